"""One run from start to end: train, evaluate, record, checkpoint; or go on where the same command stopped."""

import dataclasses
import math
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from kfac_sua.build import choose_device
from kfac_sua.config import Config
from kfac_sua.data import BatchLoader, ImageSet, epoch_generator
from kfac_sua.runs.directory import RunDirectory, resolved, run_directory
from kfac_sua.runs.lock import exclusive
from kfac_sua.runs.record import (
    EpochRecord,
    RecordError,
    RunInfo,
    append_record,
    environment,
    read_records,
    read_run_info,
    rewrite_records,
    write_run_info,
)
from kfac_sua.runs.tensorboard import TensorBoardLog
from kfac_sua.training.checkpoint import load_checkpoint, save_checkpoint
from kfac_sua.training.evaluate import ErrorCounter, Evaluation, evaluate
from kfac_sua.training.progress import Progress, print_once
from kfac_sua.training.schedule import learning_rate
from kfac_sua.training.state import Training
from kfac_sua.training.timing import TRAINING_PHASES

# Steps between looks at whether the loss is still finite: each look waits for the device.
DIVERGENCE_CHECK_PERIOD = 50


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a run; the message says where the same command goes on."""


def run(config: Config) -> RunInfo:
    """Carry out the run that a configuration defines, or what is left of it.

    A run that has finished or diverged is not repeated: its directory says so, and so does this function.

    Args:
        config: The checked configuration.

    Returns:
        What run.json holds at the end.

    Raises:
        ConfigError: If there is no such device, or the preconditioner's settings do not fit the network.
        DataError: If the data set is missing, damaged or too small.
        CheckpointError: If the run's checkpoint is damaged or belongs to another run.
        RecordError: If the run's records are damaged.
        RunBusyError: If another process is carrying the run out.
        Interrupted: On Ctrl-C, after which the same command resumes.
    """
    device = choose_device(config.device)
    directory = run_directory(config, device.type)
    info = _ended(directory)
    if info is not None:
        return info
    training = Training.start(config, device)
    with exclusive(directory.path):
        return _ended(directory) or _carry_out(training, directory)


def _ended(directory: RunDirectory) -> RunInfo | None:
    """Say so if the run has finished or diverged, and return what it left."""
    info = read_run_info(directory.info) if directory.info.exists() else None
    if info is None or info.status == "running":
        return None
    print(f"already {_summary(directory, info)}", flush=True)
    return info


def _carry_out(training: Training, directory: RunDirectory) -> RunInfo:
    """Train what is left of a run, from its checkpoint if there is one."""
    records = _resume(training, directory)
    is_begun = directory.info.exists()
    info = read_run_info(directory.info) if is_begun else _new_info(training, directory.fingerprint)
    _prepare_directory(directory, info, records)
    if training.preconditioner is not None:
        print_once(str(training.preconditioner.describe()))
    print(f"{'resumed' if records else 'started'} on {training.device.type}: {directory.path}", flush=True)
    info = _train(training, directory, info, records)
    print(_summary(directory, info), flush=True)
    return info


def train_epoch(training: Training, progress: Progress) -> Evaluation:
    """Take one step per mini-batch of one epoch.

    Args:
        training: The state, changed in place but for its count of epochs.
        progress: Told of every step.

    Returns:
        Mean loss and error over the mini-batches, each before its own step; the loss is not finite if training
        diverged, after which the epoch is cut short.
    """
    config, watch, preconditioner = training.config, training.watch, training.preconditioner
    lr = learning_rate(config.schedule, config.optimizer.lr, training.epoch, config.epochs)
    for group in training.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
    training.model.train()
    counter = ErrorCounter(training.device)
    batches = training.loader.epoch(config.seed, training.epoch)
    with watch.phase("other"):  # whatever of the epoch's wall time the phases inside leave
        for inputs, labels in watch.iterate("data", batches):
            with watch.phase("forward_backward"):
                logits = training.model(inputs)
                loss = F.cross_entropy(logits, labels)
            counter.add(logits, labels, loss)
            if _check_is_due(training) and not counter.is_finite():
                break
            with watch.phase("forward_backward"):
                training.optimizer.zero_grad(set_to_none=True)
                if preconditioner is not None:
                    preconditioner.fisher_backward(logits)
                loss.backward()
            if preconditioner is not None:
                with watch.phase("application"):
                    preconditioner.step()
            with watch.phase("optimizer"):
                training.optimizer.step()
            training.step += 1
            progress.step()
    return counter.result()


def _check_is_due(training: Training) -> bool:
    """Look at the loss now and then, and always before statistics: labels cannot be drawn from NaN."""
    preconditioner = training.preconditioner
    is_measuring = preconditioner is not None and preconditioner.statistics_due
    return is_measuring or training.step % DIVERGENCE_CHECK_PERIOD == 0


def _train(training: Training, directory: RunDirectory, info: RunInfo, records: list[EpochRecord]) -> RunInfo:
    """Train the epochs that are left, each ending with its record and a checkpoint; then evaluate on the test set."""
    epochs, splits = training.config.epochs, training.splits
    train_subset = training.evaluation_loader(_fixed_subset(training.config, splits.train))
    validation = training.evaluation_loader(splits.val)
    log = _open_tensorboard(directory, info, records)
    progress = _open_progress(training)
    resumes_from = training.epoch + 1
    try:
        if not records:  # the untrained network, so that curves against time begin at zero seconds
            train_eval = _evaluate(training, train_subset)
            _log(training, directory, log, _record(training, train_eval, train_eval, _evaluate(training, validation)))
        while training.epoch < epochs:
            train = train_epoch(training, progress)
            train_eval = _evaluate(training, train_subset)
            val = _evaluate(training, validation)
            if not all(math.isfinite(result.loss) for result in (train, train_eval, val)):
                return _end(directory, info, status="diverged", diverged_at_epoch=training.epoch + 1)
            training.epoch += 1
            record = _record(training, train, train_eval, val)
            _log(training, directory, log, record)
            with training.watch.phase("writing"):
                save_checkpoint(directory.checkpoint, training.checkpoint(directory.fingerprint))
            resumes_from = training.epoch + 1
            progress.epoch(record)
        test = _evaluate(training, training.evaluation_loader(splits.test))
        return _end(directory, info, status="finished", test_loss=test.loss, test_error=test.error)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(f"interrupted; the same command resumes from epoch {resumes_from}.") from interrupt
    finally:
        progress.close()
        log.close()


def _log(training: Training, directory: RunDirectory, log: TensorBoardLog, record: EpochRecord) -> None:
    with training.watch.phase("writing"):
        append_record(directory.metrics, record)
        log.log(record)


def _evaluate(training: Training, loader: BatchLoader) -> Evaluation:
    batches = loader.sequential(training.config.evaluation_batch_size)
    with training.watch.phase("evaluation"):
        return evaluate(training.model, batches, training.device)


def _fixed_subset(config: Config, images: ImageSet) -> ImageSet:
    """Return the training images on which train_eval_loss is measured: the same for all seeds and settings."""
    size = config.dataset.train_eval_size
    if size is None or size >= len(images):
        return images
    generator = epoch_generator(config.dataset.split_seed, 0, "train_eval")
    return images.select(torch.randperm(len(images), generator=generator)[:size].sort().values)


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


def _resume(training: Training, directory: RunDirectory) -> list[EpochRecord]:
    """Load the checkpoint, if there is one, and return the records up to it."""
    if not directory.checkpoint.exists():
        return []
    checkpoint = load_checkpoint(
        directory.checkpoint,
        fingerprint=directory.fingerprint,
        seed=training.config.seed,
        device=training.device,
    )
    training.restore(checkpoint)
    # A row is written before its checkpoint, so that a crash between the two leaves a row too many.
    records = [record for record in read_records(directory.metrics) if record.epoch <= checkpoint.epoch]
    if [record.epoch for record in records] != list(range(checkpoint.epoch + 1)):
        raise RecordError(
            f"{directory.metrics} lacks epochs that {directory.checkpoint.name} has completed ({checkpoint.epoch}); "
            "restore it, or move the directory away to start this run from the beginning."
        )
    return records


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
        num_threads=torch.get_num_threads(),
        started=_now(),
    )


def _prepare_directory(directory: RunDirectory, info: RunInfo, records: list[EpochRecord]) -> None:
    """Write what stands before the first step; nothing of a run is on disk before this."""
    directory.config.write_text(OmegaConf.to_yaml(OmegaConf.create(info.config)), encoding="utf-8")
    write_run_info(directory.info, info)
    rewrite_records(directory.metrics, records)


def _end(directory: RunDirectory, info: RunInfo, **outcome: Any) -> RunInfo:
    """Write how the run ended."""
    ended = dataclasses.replace(info, finished=_now(), **outcome)
    write_run_info(directory.info, ended)
    return ended


def _summary(directory: RunDirectory, info: RunInfo) -> str:
    """Return one line: how the run ended, its numbers, and where it lies."""
    if info.status == "diverged":
        return f"diverged in epoch {info.diverged_at_epoch} (the loss is not finite): {directory.path}"
    records = read_records(directory.metrics) if directory.metrics.exists() else []
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
        config.progress,
        f"{config.preconditioner.name} seed {config.seed}",
        total_steps=config.epochs * num_batches,
        done_steps=training.step,
        epochs=config.epochs,
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
