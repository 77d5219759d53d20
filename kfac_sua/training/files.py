"""The files that the main process writes into a run's directory while the run is locked."""

import contextlib
import dataclasses
import io
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.lock import Hold, exclusive
from kfac_sua.runs.directory import RunDirectory, with_channels_per_group
from kfac_sua.runs.hyper_parameters import hyper_parameters
from kfac_sua.runs.log import RunLog
from kfac_sua.runs.metrics import EpochRecord, append_record, best_epoch, records_digest, rewrite_records
from kfac_sua.runs.run_info import ENDED, RecordError, RunInfo, failure_reason, read_run_info, write_run_info
from kfac_sua.runs.tensorboard import StepLog, TensorBoardLog
from kfac_sua.training.attempt import now, summary_line
from kfac_sua.training.checkpoint import Checkpoint, previous_path, save_checkpoint
from kfac_sua.training.progress import epoch_line
from kfac_sua.training.state import Training, weights


class RunFiles:
    """The files of one run. Every write first checks that the directory is still the one that was locked.

    Args:
        directory: The run's directory.
    """

    _lock: Hold | None = None
    _log: RunLog | None = None
    _tensorboard: TensorBoardLog | None = None
    _step_log: StepLog | None = None

    def __init__(self, directory: RunDirectory) -> None:
        self._directory = directory
        self._open = contextlib.ExitStack()

    def lock(self) -> None:
        """Lock the directory until :meth:`close`.

        Raises:
            RunBusyError: If another process holds it.
        """
        self._lock = self._open.enter_context(exclusive(self._directory.path))

    def open_log(self) -> None:
        """Open train.log."""
        self._log = self._open.enter_context(contextlib.closing(RunLog(self._directory.log)))

    def note(self, text: str) -> None:
        """Append to train.log if it is open: it is not on the other processes."""
        if self._log is not None:
            self._log.add(text)

    def begin(self, info: RunInfo, records: list[EpochRecord]) -> None:
        """Write what stands before the first step; before this, nothing of the run but its log is on disk."""
        write_config(self._directory.config, info.config)
        write_run_info(self._directory.info, info)
        rewrite_records(self._directory.metrics, records)

    def open_tensorboard(
        self, info: RunInfo, records: list[EpochRecord], *, logs_steps: bool, step: int, train_time_s: float
    ) -> None:
        """Open the event files.

        Args:
            info: Start and configuration of the run.
            records: The epochs that are complete.
            logs_steps: Whether losses of single steps will come.
            step: Completed optimisation steps.
            train_time_s: Seconds of training so far.
        """
        started_unix_s, path = datetime.fromisoformat(info.started).timestamp(), self._directory.path
        log = TensorBoardLog(path, started_unix_s, hyper_parameters(with_channels_per_group(info.config)), records)
        self._tensorboard = self._open.enter_context(contextlib.closing(log))
        if logs_steps:
            step_log = StepLog(path, started_unix_s, step, train_time_s)
            self._step_log = self._open.enter_context(contextlib.closing(step_log))

    def append(self, record: EpochRecord, epochs: int) -> None:
        """Append an epoch to metrics.csv, train.log and TensorBoard."""
        assert self._tensorboard is not None
        self._check_lock()
        append_record(self._directory.metrics, record)
        self.note(epoch_line(record, epochs))
        self._tensorboard.log(record)

    def append_step_losses(self, losses: list[tuple[int, float]], step: int, train_time_s: float) -> None:
        """Append losses of single steps to TensorBoard."""
        assert self._step_log is not None
        self._check_lock()
        self._step_log.log(losses, step, train_time_s)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint."""
        self._check_lock()
        save_checkpoint(self._directory.checkpoint, checkpoint)

    def end(self, info: RunInfo, records: list[EpochRecord], training: Training, outcome: dict[str, Any]) -> RunInfo:
        """Write the weights and how the run ended, remove the previous checkpoint, and return the new run.json."""
        self._check_lock()
        directory = self._directory
        self._write_weights(training, records, is_finished=outcome["status"] == "finished")
        digest = records_digest(records)
        ended = dataclasses.replace(
            info, ended=now(), skipped_steps=training.skipped_steps, records_digest=digest, **outcome
        )
        write_run_info(directory.info, ended)
        for leftover in (previous_path(directory.checkpoint), directory.checkpoint.with_name("checkpoint.state.tmp")):
            leftover.unlink(missing_ok=True)
        self.note(summary_line(directory, ended))
        return ended

    def close(self) -> None:
        """Close all files and release the lock."""
        self._open.close()

    def _check_lock(self) -> None:
        assert self._lock is not None
        self._lock.check()

    def _write_weights(self, training: Training, records: list[EpochRecord], *, is_finished: bool) -> None:
        """Write the best weights and, unless the run has diverged, the last ones, as ``torch.load`` reads them.

        A run that began with an older version may not have kept its best weights: then they are not written.
        """
        best = training.best
        states = {"best": best["model"] if best is not None and best["epoch"] == best_epoch(records) else None}
        states["last"] = weights(training.model) if is_finished else None
        for name, state in states.items():
            if state is not None:
                buffer = io.BytesIO()
                torch.save(state, buffer)
                write_atomically(self._directory.weights[name], buffer.getvalue())


def write_config(path: Path, values: dict[str, Any]) -> None:
    """Write a run's configuration in the form that ``--rerun`` reads.

    Args:
        path: The config.yaml file, whose directory exists.
        values: The configuration as plain values.
    """
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(values)).encode())


def record_failure(directory: RunDirectory, error: Exception) -> None:
    """Write into run.json why an attempt failed. If that fails too, the user still sees the first error.

    Args:
        directory: The run's directory, which this process has locked.
        error: Why the attempt failed.
    """
    with contextlib.suppress(OSError, RecordError):
        info = read_run_info(directory.info)
        if info.status not in ENDED:
            write_run_info(directory.info, dataclasses.replace(info, status="failed", failure=failure_reason(error)))
