"""One run from start to end: train, evaluate, record, checkpoint; or go on where the same command stopped."""

import contextlib
import math
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import torch

from kfac_sua.config import Config, ProgressStyle
from kfac_sua.data import BatchLoader
from kfac_sua.device import choose_device
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.lock import Hold, RunBusyError, RunLostError, exclusive
from kfac_sua.runs.record import EpochRecord, RunInfo, append_record
from kfac_sua.runs.tensorboard import TensorBoardLog
from kfac_sua.training.attempt import (
    continued_info,
    find_ended,
    new_info,
    prepare_directory,
    read_own_info,
    record_early_failure,
    record_failure,
    resume,
    summary_line,
    write_end,
)
from kfac_sua.training.damping import schedule_damping
from kfac_sua.training.evaluate import Evaluation, evaluate
from kfac_sua.training.launch import Launch
from kfac_sua.training.progress import Progress, print_once
from kfac_sua.training.saving import Saver
from kfac_sua.training.schedule import learning_rate
from kfac_sua.training.signals import Interrupted, StopRequest
from kfac_sua.training.state import Training
from kfac_sua.training.step import take_step
from kfac_sua.training.timing import TRAINING_PHASES
from kfac_sua.training.world import World, named_losses, open_world


def run(config: Config, launch: Launch | None = None) -> RunInfo:
    """Carry out the run that a configuration defines, or what is left of it.

    A run that has finished or diverged is not repeated: its directory says so, and so does this function.

    Args:
        config: The checked configuration.
        launch: This process's place among those that carry out the run together; ``None`` for this one alone.

    Returns:
        What run.json holds at the end.

    Raises:
        ConfigError: If there is no such device, or the preconditioner's settings do not fit the network.
        DataError: If the data set is missing, damaged or too small.
        CheckpointError: If the run's checkpoint is damaged or belongs to another run.
        RecordError: If the run's records are damaged.
        RunBusyError: If another process is carrying the run out.
        LostContactError: If one of several processes has gone.
        OtherProcessError: If another of several processes fails; that one says why.
        Interrupted: On SIGINT and SIGTERM, after which the same command resumes.
    """
    device = choose_device(config.device)
    with open_world(launch or Launch(), device) as world:
        return _run_together(config, device, world)


def _run_together(config: Config, device: torch.device, world: World) -> RunInfo:
    """Carry out a run, together with the other processes if there are any."""
    directory = run_directory(config, device.type, world.size)
    info = world.from_first(lambda: find_ended(directory))
    if info is not None:
        return info
    try:
        training = world.each(lambda: Training.start(config, device, world))
    except Exception as error:  # of a run that has begun; otherwise, nothing of it is on disk
        if world.is_first:
            with contextlib.suppress(RunBusyError):
                record_early_failure(directory, error)
        raise
    with _held_by_first(directory, world) as hold:
        info = world.from_first(lambda: find_ended(directory))
        if info is not None:
            return info
        try:
            with named_losses(world.rank, world.size):
                info = _carry_out(training, directory, hold)
        except RunLostError:
            raise
        except Exception as error:
            if world.is_first:
                record_failure(directory, error)
            raise
    if world.is_first:
        world.say(summary_line(directory, info))
    return info


@contextlib.contextmanager
def _held_by_first(directory: RunDirectory, world: World) -> Iterator[Hold | None]:
    """Hold the run's directory on the first process, and none on the others, which leave if that cannot be."""
    with contextlib.ExitStack() as stack:
        holds: list[Hold] = []
        world.from_first(lambda: holds.append(stack.enter_context(exclusive(directory.path))))
        yield holds[0] if holds else None


def _carry_out(training: Training, directory: RunDirectory, hold: Hold | None) -> RunInfo:
    """Train what is left of a run, from its checkpoint if there is one."""
    world = training.world
    training.connect()
    begun, info = world.from_first(lambda: read_own_info(directory)), new_info(training, directory.fingerprint)
    is_resumed, records = resume(training, directory)
    if begun is not None:
        info = continued_info(begun, info, is_resumed)
    world.from_first(lambda: prepare_directory(directory, info, records))
    if training.preconditioner is not None and world.is_first:
        print_once(str(training.preconditioner.describe()))
    where = f"{world.size} processes, {training.device.type}" if world.size > 1 else training.device.type
    world.say(f"{'resumed' if is_resumed else 'started'} on {where}: {directory.path}")
    return _train(training, directory, info, records, hold)


def train_epoch(training: Training, progress: Progress, after_batch: Callable[[], None] = lambda: None) -> Evaluation:
    """Take the mini-batches that are left of one epoch, one step each.

    Args:
        training: The state, changed in place but for its count of epochs.
        progress: Told of every mini-batch.
        after_batch: Called after each mini-batch; it may raise.

    Returns:
        Mean loss and error over all mini-batches of the epoch, each before its own step; the loss is not finite if
        training diverged, after which the epoch is cut short.
    """
    config, watch = training.config, training.watch
    lr = learning_rate(config.schedule, config.optimizer.lr, training.epoch, config.epochs)
    for group in training.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    schedule_damping(training)
    training.model.train()
    batches = training.loader.epoch(config.seed, training.epoch, first=training.batch)
    with watch.phase("other"):  # whatever of the epoch's wall time the phases inside leave
        for inputs, labels in watch.iterate("data", batches):
            if not take_step(training, inputs, labels):
                break
            training.batch += 1
            progress.step()
            after_batch()
    return training.sums.result()


def _train(
    training: Training, directory: RunDirectory, info: RunInfo, records: list[EpochRecord], hold: Hold | None
) -> RunInfo:
    """Train what is left, stopping between two mini-batches when asked to; then evaluate on the test set."""
    log = _open_tensorboard(directory, info, records) if training.world.is_first else None
    progress = _open_progress(training)
    with StopRequest(is_speaker=training.world.is_first, is_alone=training.world.size == 1) as stop:
        saver = Saver(training, directory, stop, hold, records)
        try:
            if not records:  # the untrained network, so that curves against time begin at zero seconds
                records.append(_log_untrained(training, log, saver))
            while training.epoch < training.config.epochs:
                record = _train_epoch(training, progress, saver)
                if record is None:
                    return _end(saver, info, status="diverged", diverged_at_epoch=training.epoch + 1)
                _log(saver, log, record)
                records.append(record)
                saver.save()
                progress.epoch(record)
            test = _evaluate(training, training.evaluation_loader(training.splits.test), saver.between)
            return _end(saver, info, status="finished", test_loss=test.loss, test_error=test.error)
        except Interrupted:
            raise
        except KeyboardInterrupt as interrupt:
            raise saver.interrupted() from interrupt
        finally:
            progress.close()
            if log is not None:
                log.close()


def _log_untrained(training: Training, log: TensorBoardLog | None, saver: Saver) -> EpochRecord:
    """Write and return the row of epoch 0; a run that is stopped meanwhile has nothing to save."""
    train_eval, val = _evaluate_epoch(training, saver.stop_if_asked)
    record = _record(training, train_eval, train_eval, val)
    _log(saver, log, record)
    return record


def _train_epoch(training: Training, progress: Progress, saver: Saver) -> EpochRecord | None:
    """Train and evaluate one epoch, or what is left of it, and return its row; None if it diverged."""
    train = train_epoch(training, progress, saver.between)
    if not math.isfinite(train.loss):
        return None
    train_eval, val = _evaluate_epoch(training, saver.between)
    if not (math.isfinite(train_eval.loss) and math.isfinite(val.loss)):
        return None
    training.end_epoch()
    return _record(training, train, train_eval, val)


def _evaluate_epoch(training: Training, after_batch: Callable[[], None]) -> tuple[Evaluation, Evaluation]:
    """Return loss and error on the fixed training subset and on the validation set."""
    train_eval = _evaluate(training, training.train_subset, after_batch)
    return train_eval, _evaluate(training, training.validation, after_batch)


def _log(saver: Saver, log: TensorBoardLog | None, record: EpochRecord) -> None:
    def write() -> None:
        assert log is not None
        assert saver.hold is not None
        saver.hold.check()
        append_record(saver.directory.metrics, record)
        log.log(record)

    world = saver.training.world
    world.forget_wishes()
    with saver.training.watch.phase("writing"):
        world.from_first(write)


def _evaluate(training: Training, loader: BatchLoader, after_batch: Callable[[], None]) -> Evaluation:
    batches = loader.sequential(training.config.evaluation_batch_size)
    with training.watch.phase("evaluation"):
        training.world.share_buffers(training.model)
        return evaluate(
            training.model, batches, training.device, after_batch, training.world, training.config.precision
        )


def _record(training: Training, train: Evaluation, train_eval: Evaluation, val: Evaluation) -> EpochRecord:
    config, times = training.config, training.watch.totals()
    last_epoch = max(training.epoch - 1, 0)
    return EpochRecord(
        epoch=training.epoch,
        step=training.step,
        lr=learning_rate(config.schedule, config.optimizer.lr, last_epoch, config.epochs),
        train_loss=train.loss,
        train_error=train.error,
        train_eval_loss=train_eval.loss,
        val_loss=val.loss,
        val_error=val.error,
        train_time_s=sum(times[phase] for phase in TRAINING_PHASES),
        **{f"{phase}_s": seconds for phase, seconds in times.items()},
    )


def _end(saver: Saver, info: RunInfo, **outcome: Any) -> RunInfo:
    """Write how the run ended, after which the checkpoint before the last is of no use."""
    world = saver.training.world
    world.forget_wishes()
    ended = world.from_first(lambda: write_end(saver, info, outcome))
    wish = world.largest(saver.signal_number if saver.is_asked_to_stop else 0)
    if wish:  # the runs of a sweep that would come next must not begin
        raise Interrupted("interrupted; this run has ended.", wish)
    return ended


def _open_tensorboard(directory: RunDirectory, info: RunInfo, records: list[EpochRecord]) -> TensorBoardLog:
    started_unix_s = datetime.fromisoformat(info.started).timestamp()
    return TensorBoardLog(directory.path, started_unix_s, dict(_flat(info.config)), records)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, int | float | str | bool]]:
    """Yield dotted keys and values; TensorBoard's HPARAMS tab takes neither null nor lists."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, int | float | str) else str(value)


def _open_progress(training: Training) -> Progress:
    config, num_batches = training.config, len(training.loader)
    return Progress(
        config.progress if training.world.is_first else ProgressStyle.none,
        f"{config.preconditioner.name} seed {config.seed}",
        total_steps=config.epochs * num_batches,
        done_steps=training.epoch * num_batches + training.batch,
        epochs=config.epochs,
    )
