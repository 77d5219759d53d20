"""One run from start to end: train, evaluate, record, checkpoint; or go on where the same command stopped."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

import torch
from omegaconf import OmegaConf

from kfac_sua.build import choose_device
from kfac_sua.config import Config, ProgressStyle
from kfac_sua.data import BatchLoader
from kfac_sua.runs.directory import RunDirectory, resolved, run_directory
from kfac_sua.runs.environment import environment
from kfac_sua.runs.lock import Hold, RunBusyError, RunLostError, exclusive
from kfac_sua.runs.record import (
    ENDED,
    EpochRecord,
    RecordError,
    RunInfo,
    append_record,
    failure_reason,
    read_ended_records,
    read_records,
    read_run_info,
    records_digest,
    rewrite_records,
    write_run_info,
)
from kfac_sua.runs.tensorboard import TensorBoardLog
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, previous_path
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
    info = world.from_first(lambda: _ended(directory))
    if info is not None:
        return info
    try:
        training = world.each(lambda: Training.start(config, device, world))
    except Exception as error:  # of a run that has begun; otherwise, nothing of it is on disk
        if world.is_first:
            with contextlib.suppress(RunBusyError):
                _record_early_failure(directory, error)
        raise
    with _held_by_first(directory, world) as hold:
        info = world.from_first(lambda: _ended(directory))
        if info is not None:
            return info
        try:
            with named_losses(world.rank, world.size):
                info = _carry_out(training, directory, hold)
        except RunLostError:
            raise
        except Exception as error:
            if world.is_first:
                _record_failure(directory, error)
            raise
    if world.is_first:
        world.say(_summary(directory, info))
    return info


@contextlib.contextmanager
def _held_by_first(directory: RunDirectory, world: World) -> Iterator[Hold | None]:
    """Hold the run's directory on the first process, and none on the others, which leave if that cannot be."""
    with contextlib.ExitStack() as stack:
        holds: list[Hold] = []
        world.from_first(lambda: holds.append(stack.enter_context(exclusive(directory.path))))
        yield holds[0] if holds else None


def _ended(directory: RunDirectory) -> RunInfo | None:
    """Say so if the run has finished or diverged, and return what it left."""
    info = _read_own_info(directory)
    if info is None or info.status not in ENDED:
        return None
    print(f"already {_summary(directory, info)}", flush=True)
    return info


def _read_own_info(directory: RunDirectory) -> RunInfo | None:
    """Return what run.json says of the run, if there is one."""
    info = read_run_info(directory.info) if directory.info.exists() else None
    if info is not None and (info.fingerprint != directory.fingerprint or info.seed != directory.seed):
        raise RecordError(f"{directory.info} belongs to another run; restore it, or move {directory.path} away.")
    return info


def _carry_out(training: Training, directory: RunDirectory, hold: Hold | None) -> RunInfo:
    """Train what is left of a run, from its checkpoint if there is one."""
    world = training.world
    training.connect()
    begun, info = world.from_first(lambda: _read_own_info(directory)), _new_info(training, directory.fingerprint)
    is_resumed, records = _resume(training, directory)
    if begun is not None:
        info = _continued(begun, info, is_resumed)
    world.from_first(lambda: _prepare_directory(directory, info, records))
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


def _resume(training: Training, directory: RunDirectory) -> tuple[bool, list[EpochRecord]]:
    """Load the last checkpoint, if there is one, and return whether there was and the records up to it."""
    checkpoint, records = training.world.from_first(lambda: _read_checkpoint(training, directory))
    if checkpoint is None:
        return False, []
    try:
        training.restore(checkpoint)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise CheckpointError(
            f"{directory.checkpoint} does not fit ({failure_reason(error).removesuffix('.')}); move it away to start "
            "this run from the beginning."
        ) from error
    return True, records


def _read_checkpoint(training: Training, directory: RunDirectory) -> tuple[Checkpoint | None, list[EpochRecord]]:
    """Return the last checkpoint, if there is one, and the records up to it."""
    checkpoint = load_checkpoint(
        directory.checkpoint,
        fingerprint=directory.fingerprint,
        seed=training.config.seed,
        # What is told to other processes must not lie on this one's GPU.
        device=training.device if training.world.size == 1 else torch.device("cpu"),
        data_digest=training.data_digest,
    )
    if checkpoint is None:
        return None, []
    # A row is written before its checkpoint, so that a crash between the two leaves a row too many.
    records = [record for record in read_records(directory.metrics) if record.epoch <= checkpoint.epoch]
    is_complete = [record.epoch for record in records] == list(range(checkpoint.epoch + 1))
    if is_complete and records_digest(records) != checkpoint.records_digest:
        raise RecordError(
            f"{directory.metrics} is not as it was when {directory.checkpoint.name} was written; restore it, or move "
            "the directory away to start this run from the beginning."
        )
    if not is_complete:
        raise RecordError(
            f"{directory.metrics} lacks epochs that {directory.checkpoint.name} has completed ({checkpoint.epoch}); "
            "restore it, or move the directory away to start this run from the beginning."
        )
    return checkpoint, records


def _new_info(training: Training, fingerprint: str) -> RunInfo:
    config, device = training.config, training.device
    surroundings = environment(device.type)
    return RunInfo(
        status="running",
        config=resolved(config, device.type),
        fingerprint=fingerprint,
        seed=config.seed,
        commit=surroundings.commit,
        versions=surroundings.versions,
        device=device.type,
        device_name=surroundings.device_name,
        machines=list(dict.fromkeys(training.world.gather(surroundings.machine))),
        num_threads=torch.get_num_threads(),
        process_counts=[training.world.size],
        started=_now(),
    )


def _continued(begun: RunInfo, now: RunInfo, is_resumed: bool) -> RunInfo:
    """Return what a run is from here on that an earlier attempt has begun, maybe on another machine."""
    device_name = begun.device_name if is_resumed else now.device_name
    machines = list(dict.fromkeys([*(begun.machines if is_resumed else []), *now.machines]))
    process_counts = list(dict.fromkeys([*(begun.process_counts if is_resumed else []), *now.process_counts]))
    return dataclasses.replace(
        begun,
        status="running",
        failure=None,
        device_name=device_name,
        machines=machines,
        process_counts=process_counts,
    )


def _prepare_directory(directory: RunDirectory, info: RunInfo, records: list[EpochRecord]) -> None:
    """Write what stands before the first step; nothing of a run is on disk before this."""
    directory.config.write_text(OmegaConf.to_yaml(OmegaConf.create(info.config)), encoding="utf-8")
    write_run_info(directory.info, info)
    rewrite_records(directory.metrics, records)


def _end(saver: Saver, info: RunInfo, **outcome: Any) -> RunInfo:
    """Write how the run ended, after which the checkpoint before the last is of no use."""
    world = saver.training.world
    world.forget_wishes()
    ended = world.from_first(lambda: _write_end(saver, info, outcome))
    wish = world.largest(saver.signal_number if saver.is_asked_to_stop else 0)
    if wish:  # the runs of a sweep that would come next must not begin
        raise Interrupted("interrupted; this run has ended.", wish)
    return ended


def _write_end(saver: Saver, info: RunInfo, outcome: dict[str, Any]) -> RunInfo:
    directory = saver.directory
    assert saver.hold is not None
    saver.hold.check()
    ended = dataclasses.replace(
        info,
        finished=_now(),
        skipped_steps=saver.training.skipped_steps,
        records_digest=records_digest(saver.records),
        **outcome,
    )
    write_run_info(directory.info, ended)
    for leftover in (previous_path(directory.checkpoint), directory.checkpoint.with_name("checkpoint.pt.tmp")):
        leftover.unlink(missing_ok=True)
    return ended


def _record_failure(directory: RunDirectory, error: Exception) -> None:
    """Write into run.json why this attempt failed, where it can be written: who started the run is told anyway."""
    with contextlib.suppress(OSError, RecordError):
        info = read_run_info(directory.info)
        if info.status not in ENDED:
            write_run_info(directory.info, dataclasses.replace(info, status="failed", failure=failure_reason(error)))


def _record_early_failure(directory: RunDirectory, error: Exception) -> None:
    """Do so for an error before the directory was locked, if the run has begun in an earlier attempt."""
    if directory.info.exists():
        with exclusive(directory.path):
            _record_failure(directory, error)


def _summary(directory: RunDirectory, info: RunInfo) -> str:
    """Return one line: how the run ended, its numbers, and where it lies."""
    if info.status == "diverged":
        return f"diverged in epoch {info.diverged_at_epoch} (the loss is not finite): {directory.path}"
    records = read_ended_records(directory.metrics, info) if directory.metrics.exists() else []
    if not records or records[-1].epoch != info.config.get("epochs") or info.test_error is None:
        raise RecordError(
            f"{directory.info} says that the run has finished, but its records are incomplete; move {directory.path} "
            "away to start it from the beginning."
        )
    last = records[-1]
    return (
        f"finished: epoch {last.epoch}, val error {last.val_error:.2%}, test error {info.test_error:.2%}, "
        f"{last.train_time_s:.1f} s of training: {directory.path}"
    )


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


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
