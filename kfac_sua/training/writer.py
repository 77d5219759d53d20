"""What a run leaves: its lock, run.json, metrics.csv, TensorBoard events, checkpoints, its log, and what it says.

Where several processes carry out a run, all of them make the same calls, and the first one reads and writes. No other
part of the loop knows which one that is.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from kfac_sua.config import ProgressStyle
from kfac_sua.runs.directory import RunDirectory
from kfac_sua.runs.hyper_parameters import hyper_parameters
from kfac_sua.runs.lock import Hold, RunBusyError, RunLostError, exclusive
from kfac_sua.runs.log import RunLog
from kfac_sua.runs.metrics import EpochRecord, append_record, records_digest
from kfac_sua.runs.run_info import RunInfo, failure_reason
from kfac_sua.runs.tensorboard import StepLog, TensorBoardLog
from kfac_sua.training.attempt import (
    continued_info,
    find_ended,
    new_info,
    prepare_directory,
    read_checkpoint,
    read_own_info,
    record_early_failure,
    record_failure,
    restore,
    summary_line,
    with_seconds_of,
    write_end,
    write_weights,
)
from kfac_sua.training.checkpoint import Checkpoint, save_checkpoint
from kfac_sua.training.connection import connection_errors
from kfac_sua.training.launch import Invocation
from kfac_sua.training.process_group import ProcessGroup
from kfac_sua.training.progress import Progress, epoch_line, print_once
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
        clock: Seconds of a monotonic clock.
        invocation: What the command line says about the run beside its configuration.

    Attributes:
        info: What run.json says; ``None`` until :meth:`resume`.
        records: The rows of metrics.csv.
    """

    info: RunInfo | None = None
    training: Training
    progress: Progress
    _stop: StopRequest
    _held: contextlib.ExitStack
    _hold: Hold | None = None
    _said: RunLog | None = None
    _log: TensorBoardLog | None = None
    _step_log: StepLog | None = None

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
        self._clock = clock
        self._invocation = invocation

    # --- begin ------------------------------------------------------------------------------------------------------

    def find_ended(self) -> RunInfo | None:
        """Say so if the run has finished or diverged, and return what it left."""
        return self._process_group.broadcast(lambda: find_ended(self.directory, self._invocation.label))

    @contextlib.contextmanager
    def noting_early_failure(self) -> Iterator[None]:
        """Note in run.json why an attempt fails inside, before the directory is locked; nothing if it has none yet."""
        try:
            with connection_errors(self._process_group.rank, self._process_group.size):
                yield
        except Exception as error:
            if self._process_group.is_main_process:
                with contextlib.suppress(RunBusyError):
                    record_early_failure(self.directory, error)
            raise

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Hold the run's directory inside, and note in run.json why an attempt fails.

        Raises:
            RunBusyError: If another process holds it.
            ConnectionLostError: If one of several processes has gone.
        """
        with contextlib.ExitStack() as stack:
            self._process_group.broadcast(lambda: self._enter(stack))
            try:
                with connection_errors(self._process_group.rank, self._process_group.size):
                    yield
            except RunLostError:  # what lies there now is another's
                raise
            except Exception as error:
                if self._process_group.is_main_process:
                    record_failure(self.directory, error)
                    with contextlib.suppress(OSError):  # who started the run is told anyway
                        self._note(f"failed: {failure_reason(error)}")
                raise

    def _enter(self, stack: contextlib.ExitStack) -> None:
        self._hold = stack.enter_context(exclusive(self.directory.path))
        self._held = stack

    def resume(self, training: Training) -> None:
        """Go on from the run's checkpoint if there is one, and write what stands before the next step.

        Args:
            training: The state before the first step, changed in place.

        Raises:
            CheckpointError: If the checkpoint is damaged or belongs to another run.
            RecordError: If the run's records are damaged.
        """
        process_group, directory, self.training = self._process_group, self.directory, training
        process_group.broadcast(self._open_log)
        begun, info = (
            process_group.broadcast(lambda: read_own_info(directory)),
            new_info(training, directory, self._invocation),
        )
        checkpoint, self.records = process_group.broadcast(lambda: read_checkpoint(training, directory))
        source = process_group.broadcast(lambda: read_source(training)) if checkpoint is None else None
        if source is not None:
            checkpoint, self.records, info = source.checkpoint, source.records, with_seconds_of(source.info, info)
        if checkpoint is not None:
            restore(training, checkpoint, directory)
        self.info = info if begun is None else continued_info(begun, info, is_resumed=checkpoint is not None)
        where = (
            f"{process_group.size} processes, {training.device.type}"
            if process_group.size > 1
            else training.device.type
        )
        begins = f"{'resumed' if checkpoint is not None and source is None else 'started'} on {where}"
        begins += f" from epoch {training.epoch} of {training.config.start_from}" if source is not None else ""
        opening = opening_line(training.config, self._invocation.auto_keys)
        self._note(f"{begins}, {info.machines[0]}, commit {info.commit}: {info.command or 'not by a command'}")
        self._note(opening)
        process_group.broadcast(self._prepare)
        process_group.print_on_main(f"{self._invocation.label}{begins}: {directory.path}")
        process_group.print_on_main(opening)

    def _open_log(self) -> None:
        self._said = self._held.enter_context(contextlib.closing(RunLog(self.directory.log)))

    def _note(self, text: str) -> None:
        """Append to the run's log, by the process that has it."""
        if self._said is not None:
            self._said.add(text)

    def _prepare(self) -> None:
        assert self.info is not None
        prepare_directory(self.directory, self.info, self.records)
        if self.training.preconditioner is not None:
            table = self.training.preconditioner.describe()
            self._note(str(table))
            is_verbose = self.training.config.verbose
            print_once(str(table) if is_verbose else f"{table.summary()} (verbose=true shows each layer)")

    # --- while it trains --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def logging(self) -> Iterator[None]:
        """Answer signals, and keep TensorBoard's log and the progress bar open inside.

        Raises:
            Interrupted: On SIGINT and SIGTERM, after which the same command resumes.
        """
        process_group = self._process_group
        if process_group.is_main_process:
            self._open_tensorboard()
        self.progress = self._open_progress()
        self._saved_at, self._position = self._clock(), self._next_position()
        with StopRequest(
            is_main_process=process_group.is_main_process, is_single_process=process_group.size == 1
        ) as self._stop:
            try:
                yield
            except Interrupted:
                raise
            except KeyboardInterrupt as interrupt:
                raise self._interrupted(self._signal_number) from interrupt
            finally:
                self.progress.close()
                for log in (self._log, self._step_log):
                    if log is not None:
                        log.close()

    def log(self, record: EpochRecord) -> None:
        """Write a row."""
        self._process_group.discard_delayed()
        with self.training.watch.phase("writing"):
            self._process_group.broadcast(lambda: self._append(record))
        self.records.append(record)

    def save(self) -> None:
        """Write a checkpoint."""
        self._process_group.discard_delayed()
        with self.training.watch.phase("writing"):
            self._log_step_losses()  # before: a run that goes on from there does not take these steps again
            checkpoint = self.training.checkpoint(self.directory.fingerprint, records_digest(self.records))
            self._process_group.broadcast(lambda: self._write(checkpoint))
        self._saved_at, self._position = self._clock(), self._next_position()
        self._stop.is_to_save = False

    def between(self) -> None:
        """Called between two mini-batches: save if it is time to, or if the run is to stop.

        Raises:
            Interrupted: If the run has been asked to stop, after it has been saved.
        """
        request = self._process_group.delayed_all_reduce_max(self._request())
        if request:
            self.save()
        if request > _SAVE:
            raise self._interrupted(request - _SAVE)

    def stop_if_asked(self) -> None:
        """Called where there is nothing to save yet.

        Raises:
            Interrupted: If the run has been asked to stop.
        """
        request = self._process_group.delayed_all_reduce_max(self._request())
        if request > _SAVE:
            raise self._interrupted(request - _SAVE)

    def end(self, **outcome: Any) -> RunInfo:
        """Write how the run ended, after which the checkpoint before the last is of no use.

        Raises:
            Interrupted: If the run has been asked to stop: the runs of a sweep that would come next must not begin.
        """
        self._process_group.discard_delayed()
        self._log_step_losses()
        self.info = self._process_group.broadcast(lambda: self._write_end(outcome))
        request = self._process_group.all_reduce_max(self._signal_number if self._stop.signal_number is not None else 0)
        if request:
            raise Interrupted("interrupted; this run has ended.", request)
        return self.info

    def say_end(self) -> None:
        """Say how the run ended."""
        assert self.info is not None
        if self._process_group.is_main_process:
            print(summary_line(self.directory, self.info), flush=True)

    # --- inside -----------------------------------------------------------------------------------------------------

    @property
    def _signal_number(self) -> int:
        """The signal that has come, SIGINT if none has."""
        return self._stop.signal_number or signal.SIGINT

    def _request(self) -> int:
        """Return 0 to go on, ``_SAVE`` to save, and more to stop as well, by the signal that the excess numbers."""
        interval = self.training.config.checkpoint_interval_s
        if self._stop.signal_number is not None:
            return _SAVE + self._stop.signal_number
        is_due = interval is not None and self._clock() - self._saved_at >= interval
        return _SAVE if self._stop.is_to_save or (is_due and self._process_group.is_main_process) else 0

    def _interrupted(self, signal_number: int) -> Interrupted:
        """Return what to raise when the run stops here, by a signal that another process may have got."""
        self._process_group.discard_delayed()
        message = f"interrupted; the same command resumes {self._position}."
        self._note(message)
        return Interrupted(message, signal_number)

    def _next_position(self) -> str:
        """Return where a run that is loaded now goes on."""
        training = self.training
        if training.epoch == training.config.epochs:
            return "with the evaluation on the test set"
        epoch, num_batches = f"epoch {training.epoch + 1}", len(training.loader)
        if training.batch == 0:
            return f"from {epoch}"
        if training.batch == num_batches:
            return f"with the evaluation of {epoch}"
        return f"from {epoch}, mini-batch {training.batch + 1} of {num_batches}"

    def _append(self, record: EpochRecord) -> None:
        assert self._hold is not None
        assert self._log is not None
        self._hold.check()
        append_record(self.directory.metrics, record)
        self._note(epoch_line(record, self.training.config.epochs))
        self._log.log(record)

    def _log_step_losses(self) -> None:
        """Write what is known of single steps."""
        if losses := self.training.step_losses.fetch():
            seconds = self._training_seconds()
            self._process_group.broadcast(lambda: self._append_losses(losses, seconds))

    def _append_losses(self, losses: list[tuple[int, float]], seconds: float) -> None:
        assert self._hold is not None
        assert self._step_log is not None
        self._hold.check()
        self._step_log.log(losses, self.training.step, seconds)

    def _training_seconds(self) -> float:
        times = self.training.watch.totals()
        return sum(times[phase] for phase in TRAINING_PHASES)

    def _write(self, checkpoint: Checkpoint) -> None:
        assert self._hold is not None
        self._hold.check()
        save_checkpoint(self.directory.checkpoint, checkpoint)

    def _write_end(self, outcome: dict[str, Any]) -> RunInfo:
        assert self._hold is not None
        assert self.info is not None
        self._hold.check()
        write_weights(self.directory, self.training, self.records, is_finished=outcome["status"] == "finished")
        ended = write_end(self.directory, self.info, self.records, self.training.skipped_steps, outcome)
        self._note(summary_line(self.directory, ended))
        return ended

    def _open_tensorboard(self) -> None:
        assert self.info is not None
        started_unix_s, path = datetime.fromisoformat(self.info.started).timestamp(), self.directory.path
        self._log = TensorBoardLog(path, started_unix_s, hyper_parameters(self.info.config), self.records)
        if self.training.config.log_interval is not None:
            self._step_log = StepLog(path, started_unix_s, self.training.step, self._training_seconds())

    def _open_progress(self) -> Progress:
        training, config = self.training, self.training.config
        num_batches = len(training.loader)
        return Progress(
            config.progress if self._process_group.is_main_process else ProgressStyle.none,
            f"{config.preconditioner.name} seed {config.seed}",
            total_steps=config.epochs * num_batches,
            done_steps=training.epoch * num_batches + training.batch,
            epochs=config.epochs,
        )
