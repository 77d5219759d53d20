"""When a run is saved: now and then, at the end of every epoch, and when it is asked to stop."""

import signal
import time
from collections.abc import Callable, Sequence

from kfac_sua.runs.directory import RunDirectory
from kfac_sua.runs.lock import Hold
from kfac_sua.runs.record import EpochRecord, records_digest
from kfac_sua.training.checkpoint import save_checkpoint
from kfac_sua.training.signals import Interrupted, StopRequest
from kfac_sua.training.state import Training


class Saver:
    """Writes the checkpoints of one run.

    Args:
        training: The state to save.
        directory: Where to.
        stop: Whether the run has been asked to stop.
        hold: The lock of the directory.
        records: The rows written so far; whoever writes another one appends it.
        clock: Seconds of a monotonic clock.
    """

    def __init__(
        self,
        training: Training,
        directory: RunDirectory,
        stop: StopRequest,
        hold: Hold,
        records: Sequence[EpochRecord],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.training = training
        self.directory = directory
        self.records = records
        self._stop = stop
        self.hold = hold
        self._clock = clock
        self._saved_at = clock()
        self._position = _position(training)

    @property
    def is_asked_to_stop(self) -> bool:
        """Whether a signal has come."""
        return self._stop.signal_number is not None

    @property
    def signal_number(self) -> int:
        """The signal that has come, SIGINT if none has."""
        return self._stop.signal_number or signal.SIGINT

    def save(self) -> None:
        """Write a checkpoint."""
        self.hold.check()
        with self.training.watch.phase("writing"):
            checkpoint = self.training.checkpoint(self.directory.fingerprint, records_digest(self.records))
            save_checkpoint(self.directory.checkpoint, checkpoint)
        self._saved_at = self._clock()
        self._position = _position(self.training)

    def between(self) -> None:
        """Called between two mini-batches: save if it is time to, or if the run is to stop.

        Raises:
            Interrupted: If the run has been asked to stop, after it has been saved.
        """
        interval = self.training.config.checkpoint_interval_s
        if self.is_asked_to_stop:
            self.save()
            raise self.interrupted()
        is_due = interval is not None and self._clock() - self._saved_at >= interval
        if is_due or self._stop.is_to_save:
            self._stop.is_to_save = False
            self.save()

    def interrupted(self) -> Interrupted:
        """Return what to raise when the run stops here."""
        return Interrupted(f"interrupted; the same command resumes {self._position}.", self.signal_number)


def _position(training: Training) -> str:
    """Return where a run that is loaded now goes on."""
    if training.epoch == training.config.epochs:
        return "with the evaluation on the test set"
    epoch, num_batches = f"epoch {training.epoch + 1}", len(training.loader)
    if training.batch == 0:
        return f"from {epoch}"
    if training.batch == num_batches:
        return f"with the evaluation of {epoch}"
    return f"from {epoch}, mini-batch {training.batch + 1} of {num_batches}"
