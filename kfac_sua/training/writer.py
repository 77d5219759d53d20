"""Records a run, resumes it, and stops it when it is asked to.

All processes of a run make the same calls; the main process reads and writes the files (``files.py``) and prints.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from kfac_sua.config import ProgressStyle
from kfac_sua.files.lock import RunBusyError, RunLostError, exclusive
from kfac_sua.runs.directory import RunDirectory
from kfac_sua.runs.metrics import EpochRecord, records_digest
from kfac_sua.runs.run_info import RunInfo, failure_reason
from kfac_sua.training.attempt import (
    continued_info,
    find_ended,
    new_info,
    read_checkpoint,
    read_own_info,
    restore,
    summary_line,
    with_machines_of,
)
from kfac_sua.training.connection import connection_errors
from kfac_sua.training.files import RunFiles, record_failure
from kfac_sua.training.launch import Invocation
from kfac_sua.training.process_group import ProcessGroup
from kfac_sua.training.progress import Progress, print_once
from kfac_sua.training.signals import Interrupted, StopRequest
from kfac_sua.training.start_from import read_source
from kfac_sua.training.state import Training
from kfac_sua.training.timing import TRAINING_PHASES
from kfac_sua.tuned import opening_line

_SAVE = 1


class RunWriter:
    """Writes one run into its directory.

    Args:
        directory: The run's directory.
        process_group: The processes that carry it out.
        invocation: What the command line says about the run beside its configuration.
        clock: Seconds of a monotonic clock.

    Attributes:
        records: The rows of metrics.csv.
        progress: The progress bar or lines; there from :meth:`resume` on.
    """

    training: Training
    progress: Progress
    _info: RunInfo
    _stop: StopRequest

    def __init__(
        self,
        directory: RunDirectory,
        process_group: ProcessGroup,
        invocation: Invocation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.directory = directory
        self.records: list[EpochRecord] = []
        self._process_group = process_group
        self._invocation = invocation
        self._clock = clock
        self._files = RunFiles(directory)

    # --- before the first step --------------------------------------------------------------------------------------

    def find_ended(self) -> RunInfo | None:
        """Return run.json if the run has finished or diverged, and print how."""
        return self._process_group.broadcast(lambda: find_ended(self.directory, self._invocation.label))

    @contextlib.contextmanager
    def recording_early_failure(self) -> Iterator[None]:
        """Record a failure inside, before the directory is locked, if an earlier attempt has left a run.json."""
        try:
            with connection_errors(self._process_group.rank, self._process_group.size):
                yield
        except Exception as error:
            if self._process_group.is_main_process and self.directory.info.exists():
                with contextlib.suppress(RunBusyError), exclusive(self.directory.path):
                    record_failure(self.directory, error)
            raise

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run's directory inside, and record why an attempt fails.

        Raises:
            RunBusyError: If another process holds it.
            ConnectionLostError: If one of several processes has ended.
        """
        with contextlib.closing(self._files):
            self._process_group.broadcast(self._files.lock)
            try:
                with connection_errors(self._process_group.rank, self._process_group.size):
                    yield
            except RunLostError:  # the directory now belongs to another process
                raise
            except Exception as error:
                if self._process_group.is_main_process:
                    record_failure(self.directory, error)
                    with contextlib.suppress(OSError):  # the user still sees the first error
                        self._files.note(f"failed: {failure_reason(error)}")
                raise

    def resume(self, training: Training) -> None:
        """Go on from the run's checkpoint if there is one, and write what stands before the next step.

        Args:
            training: The state before the first step, changed in place.

        Raises:
            CheckpointError: If the checkpoint is damaged or belongs to another run.
            RecordError: If the run's records are damaged.
        """
        group, directory, self.training = self._process_group, self.directory, training
        group.broadcast(self._files.open_log)
        begun, info = group.broadcast(lambda: read_own_info(directory)), new_info(training, directory, self._invocation)
        checkpoint, self.records = group.broadcast(lambda: read_checkpoint(training, directory))
        source = group.broadcast(lambda: read_source(training)) if checkpoint is None else None
        if source is not None:
            checkpoint, self.records, info = source.checkpoint, source.records, with_machines_of(source.info, info)
        if checkpoint is not None:
            restore(training, checkpoint, directory)
        self._info = info if begun is None else continued_info(begun, info, is_resumed=checkpoint is not None)

        where = f"{group.size} processes, {training.device.type}" if group.size > 1 else training.device.type
        begins = f"{'resumed' if checkpoint is not None and source is None else 'started'} on {where}"
        begins += f" from epoch {training.epoch} of {training.config.start_from}" if source is not None else ""
        opening = opening_line(training.config, self._invocation.auto_keys)
        self._files.note(f"{begins}, {info.machines[0]}, commit {info.commit}: {info.command or 'not by a command'}")
        self._files.note(opening)
        group.broadcast(self._begin)
        group.print_on_main(f"{self._invocation.label}{begins}: {directory.path}")
        group.print_on_main(opening)

    def _begin(self) -> None:
        """Write the files of the run's beginning, and show which layers are preconditioned."""
        self._files.begin(self._info, self.records)
        if self.training.preconditioner is not None:
            table = self.training.preconditioner.describe()
            self._files.note(str(table))
            is_verbose = self.training.config.verbose
            print_once(str(table) if is_verbose else f"{table.summary()} (verbose=true shows each layer)")

    # --- while it trains --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def handling_signals(self) -> Iterator[None]:
        """Show progress inside, and turn SIGINT and SIGTERM into requests that :meth:`after_batch` fulfils.

        Raises:
            Interrupted: On a second SIGINT, at once.
        """
        group = self._process_group
        if group.is_main_process:
            self._files.open_tensorboard(
                self._info,
                self.records,
                logs_steps=self.training.config.log_interval is not None,
                step=self.training.step,
                train_time_s=self._train_time_s(),
            )
        self.progress = self._new_progress()
        self._saved_at, self._position = self._clock(), self._next_position()
        with StopRequest(is_main_process=group.is_main_process, is_single_process=group.size == 1) as self._stop:
            try:
                yield
            except Interrupted:
                raise
            except KeyboardInterrupt as interrupt:
                raise self._interrupted(self._stop.signal_number or signal.SIGINT) from interrupt
            finally:
                self.progress.close()

    def log(self, record: EpochRecord) -> None:
        """Write a row."""
        self._process_group.discard_delayed()
        with self.training.watch.phase("writing"):
            self._process_group.broadcast(lambda: self._files.append(record, self.training.config.epochs))
        self.records.append(record)

    def save(self) -> None:
        """Write a checkpoint."""
        self._process_group.discard_delayed()
        with self.training.watch.phase("writing"):
            self._log_step_losses()  # before the checkpoint: a run that resumes from it does not repeat these steps
            checkpoint = self.training.checkpoint(self.directory.fingerprint, records_digest(self.records))
            self._process_group.broadcast(lambda: self._files.save(checkpoint))
        self._saved_at, self._position = self._clock(), self._next_position()
        self._stop.is_to_save = False

    def after_batch(self) -> None:
        """Save if a checkpoint is due, and stop if the run was asked to; called after every mini-batch.

        Raises:
            Interrupted: If the run was asked to stop, after a checkpoint.
        """
        request = self._process_group.delayed_all_reduce_max(self._request())
        if request:
            self.save()
        if request > _SAVE:
            raise self._interrupted(request - _SAVE)

    def stop_if_asked(self) -> None:
        """Stop if the run was asked to, without a checkpoint: called where there is nothing to save yet.

        Raises:
            Interrupted: If the run was asked to stop.
        """
        request = self._process_group.delayed_all_reduce_max(self._request())
        if request > _SAVE:
            raise self._interrupted(request - _SAVE)

    def end(self, **outcome: Any) -> RunInfo:
        """Write how the run ended, and return run.json.

        Args:
            outcome: The fields of ``RunInfo`` that the end decides.

        Raises:
            Interrupted: If the run was asked to stop: a sweep must not go on to its next run.
        """
        self._process_group.discard_delayed()
        self._log_step_losses()
        self._info = self._process_group.broadcast(
            lambda: self._files.end(self._info, self.records, self.training, outcome)
        )
        signal_number = self._process_group.all_reduce_max(self._stop.signal_number or 0)
        if signal_number:
            raise Interrupted("interrupted; this run has ended.", signal_number)
        return self._info

    def print_summary(self) -> None:
        """Print how the run ended."""
        if self._process_group.is_main_process:
            print(summary_line(self.directory, self._info), flush=True)

    # --- private ----------------------------------------------------------------------------------------------------

    def _request(self) -> int:
        """Return 0 to go on, ``_SAVE`` to save, or ``_SAVE`` plus the number of a signal to save and stop."""
        interval = self.training.config.checkpoint_interval_s
        if self._stop.signal_number is not None:
            return _SAVE + self._stop.signal_number
        is_due = interval is not None and self._clock() - self._saved_at >= interval
        return _SAVE if self._stop.is_to_save or (is_due and self._process_group.is_main_process) else 0

    def _interrupted(self, signal_number: int) -> Interrupted:
        """Return the exception that stops the run here; the signal may have come to another process."""
        self._process_group.discard_delayed()
        message = f"interrupted; the same command resumes {self._position}."
        self._files.note(message)
        return Interrupted(message, signal_number)

    def _next_position(self) -> str:
        """Return where a run that is resumed from the present state goes on."""
        training = self.training
        if training.epoch == training.config.epochs:
            return "with the evaluation on the test set"
        epoch, num_batches = f"epoch {training.epoch + 1}", len(training.loader)
        if training.batch == 0:
            return f"from {epoch}"
        if training.batch == num_batches:
            return f"with the evaluation of {epoch}"
        return f"from {epoch}, mini-batch {training.batch + 1} of {num_batches}"

    def _log_step_losses(self) -> None:
        """Write the losses of single steps since the last time."""
        if losses := self.training.step_losses.fetch():
            step, train_time_s = self.training.step, self._train_time_s()
            self._process_group.broadcast(lambda: self._files.append_step_losses(losses, step, train_time_s))

    def _train_time_s(self) -> float:
        times = self.training.watch.totals()
        return sum(times[phase] for phase in TRAINING_PHASES)

    def _new_progress(self) -> Progress:
        training, config = self.training, self.training.config
        num_batches = len(training.loader)
        return Progress(
            config.progress if self._process_group.is_main_process else ProgressStyle.none,
            f"{config.preconditioner.name} seed {config.seed}",
            total_steps=config.epochs * num_batches,
            done_steps=training.epoch * num_batches + training.batch,
            epochs=config.epochs,
        )
