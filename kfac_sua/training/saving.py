"""When a run is saved: now and then, at the end of every epoch, and when it is asked to stop."""

import signal
import time
from collections.abc import Callable, Sequence

from kfac_sua.runs.directory import RunDirectory
from kfac_sua.runs.lock import Hold
from kfac_sua.runs.record import EpochRecord, records_digest
from kfac_sua.training.checkpoint import Checkpoint, save_checkpoint
from kfac_sua.training.signals import Interrupted, StopRequest
from kfac_sua.training.state import Training

_SAVE = 1


class Saver:
    """Writes the checkpoints of one run.

    Args:
        training: The state to save.
        directory: Where to.
        stop: Whether the run has been asked to stop.
        hold: The lock of the directory; ``None`` on a process that writes nothing.
        records: The rows written so far; whoever writes another one appends it.
        clock: Seconds of a monotonic clock.

    Where several processes carry out a run, all of them make the same calls; the first one writes.
    """

    def __init__(
        self,
        training: Training,
        directory: RunDirectory,
        stop: StopRequest,
        hold: Hold | None,
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
        training = self.training
        training.world.forget_wishes()
        with training.watch.phase("writing"):
            checkpoint = training.checkpoint(self.directory.fingerprint, records_digest(self.records))
            training.world.from_first(lambda: self._write(checkpoint))
        self._saved_at = self._clock()
        self._stop.is_to_save = False
        self._position = _position(training)

    def between(self) -> None:
        """Called between two mini-batches: save if it is time to, or if the run is to stop.

        Raises:
            Interrupted: If the run has been asked to stop, after it has been saved.
        """
        wish = self.training.world.agree(self._wish())
        if wish:
            self.save()
        if wish > _SAVE:
            raise self.interrupted(wish - _SAVE)

    def stop_if_asked(self) -> None:
        """Called where there is nothing to save yet.

        Raises:
            Interrupted: If the run has been asked to stop.
        """
        wish = self.training.world.agree(self._wish())
        if wish > _SAVE:
            raise self.interrupted(wish - _SAVE)

    def interrupted(self, signal_number: int | None = None) -> Interrupted:
        """Return what to raise when the run stops here, by a signal that another process may have got."""
        self.training.world.forget_wishes()
        number = signal_number or self.signal_number
        return Interrupted(f"interrupted; the same command resumes {self._position}.", number)

    def _wish(self) -> int:
        """Return 0 to go on, ``_SAVE`` to save, and more to stop as well, by the signal that the excess numbers."""
        interval = self.training.config.checkpoint_interval_s
        if self._stop.signal_number is not None:
            return _SAVE + self._stop.signal_number
        is_due = interval is not None and self._clock() - self._saved_at >= interval
        return _SAVE if self._stop.is_to_save or (is_due and self.training.world.is_first) else 0

    def _write(self, checkpoint: Checkpoint) -> None:
        assert self.hold is not None
        self.hold.check()
        save_checkpoint(self.directory.checkpoint, checkpoint)


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
