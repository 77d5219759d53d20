"""One run from start to end: train, evaluate, record, checkpoint; or go on where the same command stopped."""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import Any

from kfac_sua.config import Config
from kfac_sua.data import BatchLoader
from kfac_sua.device import choose_device, choose_precision, rates_as_configured
from kfac_sua.runs.directory import run_directory
from kfac_sua.runs.metrics import EpochRecord
from kfac_sua.runs.run_info import RunInfo
from kfac_sua.training.build import build_training
from kfac_sua.training.capturing import check_captured, phase_around
from kfac_sua.training.determinism import determinism
from kfac_sua.training.divergence import LOOK_PERIOD, Diverged, LateLook
from kfac_sua.training.evaluate import Evaluation, evaluate
from kfac_sua.training.launch import Invocation, Launch
from kfac_sua.training.precision import computing_in
from kfac_sua.training.process_group import open_process_group
from kfac_sua.training.progress import Progress
from kfac_sua.training.rendezvous import open_rendezvous
from kfac_sua.training.state import Training
from kfac_sua.training.timing import TRAINING_PHASES
from kfac_sua.training.writer import RunWriter


def run(config: Config, launch: Launch | None = None, invocation: Invocation | None = None) -> RunInfo:
    """Carry out the run that a configuration defines, or what is left of it.

    A run that has finished or diverged is not repeated: its directory says so, and so does this function.

    Args:
        config: The checked configuration.
        launch: This process among those that carry out the run together; ``None`` for a single process.
        invocation: What the command line says about the run beside its configuration; ``None`` for nothing.

    Returns:
        What run.json holds at the end.

    Raises:
        ConfigError: If there is no such device or precision, settings do not fit the network or each other, or several
            processes are not there for one run.
        DataError: If the data set cannot be had, is damaged or too small.
        CheckpointError: If the run's checkpoint is damaged or belongs to another run.
        RecordError: If the run's records are damaged.
        RunBusyError: If another process is carrying the run out.
        ConnectionLostError: If one of several processes has gone.
        OtherProcessError: If another of several processes fails; that one says why.
        Interrupted: On SIGINT and SIGTERM, after which the same command resumes.
    """
    launch, invocation = launch or Launch(), invocation or Invocation()
    with contextlib.ExitStack() as stack:
        rendezvous = stack.enter_context(open_rendezvous(launch))
        rendezvous.require_one_run(config)
        device = rendezvous.choose_device(lambda: choose_device(config.device))
        stack.enter_context(determinism(config.deterministic, device))  # before anything else uses the GPU
        process_group = stack.enter_context(open_process_group(launch, device, rendezvous.store))
        config = dataclasses.replace(config, precision=choose_precision(config.precision, device.type))
        stack.enter_context(computing_in(config.precision, device))
        stack.enter_context(rates_as_configured(config.device_rates, device))
        writer = RunWriter(run_directory(config, device.type, process_group.size), process_group, invocation)
        if ended := writer.find_ended():
            return ended

        # --- Build everything; nothing is written yet ---------------------------------------------------------------
        with writer.noting_early_failure():
            training = build_training(config, device, process_group)
        stack.callback(training.close)

        with writer.holding():
            if ended := writer.find_ended():  # meanwhile, by another process
                return ended
            writer.resume(training)
            with writer.logging():
                # --- Epoch 0 is the untrained network, so that curves against time begin at zero seconds ------------
                if not writer.records:
                    train_eval, val = _evaluate_epoch(training, writer.stop_if_asked)
                    measured = training.diagnostics.means()
                    writer.log(_record(training, train_eval, train_eval, val, measured))

                # --- Train ------------------------------------------------------------------------------------------
                while training.epoch < config.epochs:
                    train = train_epoch(training, writer.progress, writer.between)
                    is_finite = math.isfinite(train.loss)
                    train_eval, val = _evaluate_epoch(training, writer.between) if is_finite else (train, train)
                    if not (math.isfinite(train_eval.loss) and math.isfinite(val.loss)):
                        info = writer.end(status="diverged", diverged_at_epoch=training.epoch + 1)
                        break
                    measured = training.diagnostics.means()
                    training.end_epoch()
                    training.keep_if_best(val.error)
                    writer.log(_record(training, train, train_eval, val, measured))
                    writer.save()
                    writer.progress.epoch(writer.records[-1])

                # --- Test, once -------------------------------------------------------------------------------------
                else:
                    test = _evaluate(training, training.evaluation_loader(training.splits.test), writer.between)
                    info = writer.end(status="finished", test_loss=test.loss, test_error=test.error)
        writer.say_end()
        return info


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
    look = LateLook(training.sums)
    with training.watch.phase(phase_around(training)):
        training.begin_epoch()
        training.step_losses.note(training.step, begins=True)
        with contextlib.suppress(Diverged):
            for _ in range(training.batch, len(training.loader)):
                num_skipped = training.skipped_steps
                training.take_step()
                if training.skipped_steps == num_skipped:  # what a skipped mini-batch leaves in .grad is nothing's
                    training.diagnostics.after_step(training.batch)
                training.batch += 1
                training.step_losses.note(training.step)
                training.watch.switch(phase_around(training))
                progress.step()
                after_batch()
                if training.step % LOOK_PERIOD == 0:
                    check_captured(training)
                    if look.has_diverged():
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


def _record(
    training: Training, train: Evaluation, train_eval: Evaluation, val: Evaluation, measured: dict[str, float]
) -> EpochRecord:
    times = training.watch.totals()
    seconds: dict[str, Any] = {f"{phase}_s": value for phase, value in times.items()}
    diagnostics: dict[str, Any] = measured | training.diagnostics.counts()
    return EpochRecord(
        epoch=training.epoch,
        step=training.step,
        lr=training.lr(max(training.epoch - 1, 0)),
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
