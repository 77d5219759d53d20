"""One run from start to end: train, evaluate, record, save; or resume where the same command stopped."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from kfac_sua.config import Config
from kfac_sua.data import BatchLoader
from kfac_sua.device import choose_device, choose_precision, rates_as_configured
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.metrics import EpochRecord
from kfac_sua.runs.run_info import RunInfo
from kfac_sua.training.attempt import tell_of_unscaled_groups
from kfac_sua.training.build import build_training
from kfac_sua.training.capturing import check_captured, outer_phase
from kfac_sua.training.determinism import determinism
from kfac_sua.training.divergence import CHECK_PERIOD, DelayedCheck, Diverged
from kfac_sua.training.evaluate import Evaluation, evaluate
from kfac_sua.training.launch import Invocation, Launch
from kfac_sua.training.precision import computing_in
from kfac_sua.training.process_group import ProcessGroup, open_process_group
from kfac_sua.training.progress import Progress
from kfac_sua.training.rendezvous import open_rendezvous
from kfac_sua.training.state import Training
from kfac_sua.training.timing import TRAINING_PHASES
from kfac_sua.training.writer import RunWriter


def run(config: Config, launch: Launch | None = None, invocation: Invocation | None = None) -> RunInfo:
    """Carry out the run that a configuration defines, or the rest of it.

    A run that has finished or diverged is not repeated: its run.json is returned.

    Args:
        config: The checked configuration.
        launch: This process among those that carry out the run together; ``None`` for a single process.
        invocation: What the command line says about the run beside its configuration; ``None`` for nothing.

    Returns:
        What run.json holds at the end.

    Raises:
        ConfigError: If there is no such device or precision, if settings do not fit the network or each other, or if
            several processes do not carry out the same run.
        DataError: If the data set cannot be had, is damaged or too small.
        CheckpointError: If the run's checkpoint is damaged or belongs to another run.
        RecordError: If the run's records are damaged.
        RunBusyError: If another process is carrying the run out.
        ConnectionLostError: If one of several processes has ended.
        OtherProcessError: If another of several processes fails; that one reports the reason.
        Interrupted: On SIGINT and SIGTERM, after which the same command resumes.
    """
    with _environment(config, launch or Launch()) as (config, device, process_group):
        directory = run_directory(config, device.type, process_group.size)
        if process_group.is_main_process:
            tell_of_unscaled_groups(config, directory, device.type, process_group.size)
        writer = RunWriter(directory, process_group, invocation or Invocation())
        if ended := writer.find_ended():
            return ended
        with writer.recording_early_failure():
            training = build_training(config, device, process_group)
        with contextlib.closing(training), writer.locked():
            if ended := writer.find_ended():  # another process has carried it out in the meantime
                return ended
            writer.resume(training)
            with writer.handling_signals():
                if not writer.records:  # epoch 0 is the untrained network, so that curves begin at zero seconds
                    train_eval, val = _evaluate_epoch(training, writer.stop_if_asked)
                    writer.log(_record(training, 0, train_eval, train_eval, val))
                while training.epoch < config.epochs:
                    epoch = training.epoch + 1
                    train = train_epoch(training, writer.progress, writer.after_batch)
                    is_finite = math.isfinite(train.loss)
                    train_eval, val = _evaluate_epoch(training, writer.after_batch) if is_finite else (train, train)
                    if not (math.isfinite(train_eval.loss) and math.isfinite(val.loss)):
                        info = writer.end(status="diverged", diverged_at_epoch=epoch)
                        break
                    record = _record(training, epoch, train, train_eval, val)
                    training.end_epoch()
                    training.keep_if_best(val.error)
                    writer.log(record)
                    writer.save()
                    writer.progress.epoch(record)
                else:
                    test = _evaluate(training, training.evaluation_loader(training.splits.test), writer.after_batch)
                    info = writer.end(status="finished", test_loss=test.loss, test_error=test.error)
        writer.print_summary()
        return info


@contextlib.contextmanager
def _environment(config: Config, launch: Launch) -> Iterator[tuple[Config, torch.device, ProcessGroup]]:
    """Join the other processes, choose device and precision, and set PyTorch's switches for them inside.

    Yields:
        The configuration with its ``precision`` resolved, the device, and the processes.
    """
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(open_rendezvous(launch))
        rendezvous.require_one_run(config)
        device = rendezvous.choose_device(lambda: choose_device(config.device))
        stack.enter_context(determinism(config.deterministic, device))  # before anything else uses the GPU
        process_group = stack.enter_context(open_process_group(launch, device, rendezvous.store))
        precision = choose_precision(config.precision, device.type)
        stack.enter_context(computing_in(precision, device))
        stack.enter_context(rates_as_configured(config.device_rates, device))
        yield dataclasses.replace(config, precision=precision), device, process_group


def train_epoch(training: Training, progress: Progress, after_batch: Callable[[], None] = lambda: None) -> Evaluation:
    """Take one step for each mini-batch that is left of the epoch.

    Args:
        training: The state, changed in place but for its count of epochs.
        progress: Counts the mini-batches.
        after_batch: Called after each mini-batch; it may raise.

    Returns:
        Mean loss and error over all mini-batches of the epoch, each before its own step. If training diverges, the loss
        is not finite and the epoch is cut short.
    """
    losses = DelayedCheck(training.sums)
    with training.watch.phase(outer_phase(training)):
        training.begin_epoch()
        training.step_losses.note(training.step, begins=True)
        with contextlib.suppress(Diverged):
            for _ in range(training.batch, len(training.loader)):
                num_skipped = training.skipped_steps
                training.take_step()
                if training.skipped_steps == num_skipped:  # a skipped mini-batch leaves no gradient to measure
                    training.diagnostics.after_step(training.batch)
                training.batch += 1
                training.step_losses.note(training.step)
                training.watch.switch(outer_phase(training))
                progress.step()
                after_batch()
                if training.step % CHECK_PERIOD == 0:
                    check_captured(training)
                    if losses.have_diverged():
                        break
    check_captured(training)
    return training.sums.result()


def _evaluate_epoch(training: Training, after_batch: Callable[[], None]) -> tuple[Evaluation, Evaluation]:
    """Return loss and error on the fixed training subset and on the validation set."""
    train_eval = _evaluate(training, training.train_subset, after_batch)
    return train_eval, _evaluate(training, training.validation, after_batch)


def _evaluate(training: Training, loader: BatchLoader, after_batch: Callable[[], None]) -> Evaluation:
    batches = loader.sequential(training.config.evaluation_batch_size)
    with training.watch.phase("evaluation"):
        training.process_group.broadcast_buffers(training.model)
        return evaluate(
            training.model, batches, training.device, after_batch, training.process_group, training.config.precision
        )


def _record(training: Training, epoch: int, train: Evaluation, train_eval: Evaluation, val: Evaluation) -> EpochRecord:
    """Return the row of an epoch whose mini-batches have been taken, and which has not ended."""
    times = training.watch.totals()
    seconds: dict[str, Any] = {f"{phase}_s": value for phase, value in times.items()}
    diagnostics: dict[str, Any] = training.diagnostics.means() | training.diagnostics.counts()
    return EpochRecord(
        epoch=epoch,
        step=training.step,
        lr=training.lr(max(epoch - 1, 0)),
        train_loss=train.loss,
        train_error=train.error,
        train_eval_loss=train_eval.loss,
        val_loss=val.loss,
        val_error=val.error,
        train_time_s=sum(times[phase] for phase in TRAINING_PHASES),
        **seconds,
        current_damping=training.diagnostics.damping,
        **diagnostics,
        skipped_steps=training.skipped_steps,
    )
