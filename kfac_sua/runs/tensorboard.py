"""TensorBoard view of a run: STEP is the epoch and wall time is training time, so both axes are honest."""

from pathlib import Path
from typing import TYPE_CHECKING

from kfac_sua.runs.event_file import EventFile
from kfac_sua.runs.record import EpochRecord

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

# Tag in TensorBoard -> column of metrics.csv.
SCALARS = {
    "train/loss": "train_loss",
    "train/error": "train_error",
    "train/lr": "lr",
    "train/eval_loss": "train_eval_loss",
    "val/loss": "val_loss",
    "val/error": "val_error",
    "time/train": "train_time_s",
    "time/forward_backward": "forward_backward_s",
    "time/statistics": "statistics_s",
    "time/inversion": "inversion_s",
    "time/application": "application_s",
    "time/optimizer": "optimizer_s",
    "time/data": "data_s",
    "time/other": "other_s",
    "time/captured": "captured_s",
    "time/evaluation": "evaluation_s",
    "time/writing": "writing_s",
}


class TensorBoardLog:
    """The epochs of one run, in an event file for every attempt at it (see ``event_file.py``).

    A file begins with all epochs that stand, so that it does not matter what is left of those before: a reader that has
    them takes these in their place, and epochs that a resume from an earlier checkpoint has dropped are gone.

    A point's wall time is the run's start plus its training seconds, so TensorBoard's RELATIVE axis leaves out
    evaluation, checkpoints and the pause before a resume; it counts from the first point, which is epoch 0, the
    untrained network at zero seconds. The hyper-parameters are written into the run's own file, which gives one row
    per run in the HPARAMS tab (``add_hparams`` would add a second, time-stamped run).

    Args:
        directory: Directory of the event file, made if missing.
        started_unix_s: Start of the run's first attempt, seconds since 1970.
        hyper_parameters: Flat values for the HPARAMS tab.
        existing: Records of the epochs that are already done.

    Raises:
        OSError: If the file cannot be written; it names the file.
    """

    def __init__(
        self,
        directory: Path,
        started_unix_s: float,
        hyper_parameters: dict[str, int | float | str | bool],
        existing: list[EpochRecord],
    ) -> None:
        # Imported here because it takes seconds, which collecting and plotting need not pay.
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import hparams

        self._started_unix_s = started_unix_s
        # The metric's value is ignored: the tab shows the last point of the scalar with this tag.
        summaries = hparams(hyper_parameters, {"val/error": 0.0})
        events = [Event(wall_time=started_unix_s, summary=summary) for summary in summaries]
        self._file = EventFile(directory, started_unix_s, 0, [*events, *map(self._event, existing)])

    def log(self, record: EpochRecord) -> None:
        """Add one epoch and write it out, so that a running TensorBoard shows it.

        Args:
            record: The epoch, not among those already logged.

        Raises:
            OSError: If the file cannot be written; it names the file.
        """
        self._file.append([self._event(record)])

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _event(self, record: EpochRecord) -> "Event":
        """Return all scalars of one epoch, as one event: it is read as a whole or, if a crash has torn it, not."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=getattr(record, column)) for tag, column in SCALARS.items()]
        walltime = self._started_unix_s + record.train_time_s
        return Event(wall_time=walltime, step=record.epoch, summary=Summary(value=values))
