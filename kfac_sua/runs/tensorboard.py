"""TensorBoard view of a run: STEP is the epoch and wall time is training time, so both axes are honest."""

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_sua.runs.atomic import named_in_errors, write_atomically
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

# Makes names differ where one process opens the same log twice within a second.
_number = itertools.count()


class TensorBoardLog:
    """Event file of one run, rewritten from its records whenever it is opened.

    A point's wall time is the run's start plus its training seconds, so TensorBoard's RELATIVE axis leaves out
    evaluation, checkpoints and the pause before a resume; it counts from the first point, which is epoch 0, the
    untrained network at zero seconds. The hyper-parameters are written into the run's own file, which gives one row
    per run in the HPARAMS tab (``add_hparams`` would add a second, time-stamped run).

    Events are written here and now: ``SummaryWriter`` leaves that to a thread, which prints a traceback and dies when
    the disk is full.

    Args:
        directory: Directory of the event file, made if missing; older event files in it are removed, as
            TensorBoard merges all files of a directory and would show a resumed epoch twice.
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

        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._path = directory / name
        self._started_unix_s = started_unix_s
        events = [Event(wall_time=started_unix_s, file_version="brain.Event:2")]
        # The metric's value is ignored: the tab shows the last point of the scalar with this tag.
        for summary in hparams(hyper_parameters, {"val/error": 0.0}):
            events.append(Event(wall_time=started_unix_s, summary=summary))
        for record in existing:
            events += self._events(record)
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(self._path, _encoded(events))
        for stale in directory.glob("events.out.tfevents.*"):
            if stale != self._path:
                stale.unlink()
        self._file = self._path.open("ab", buffering=0)  # what a full disk refuses is refused at once, not at close

    def log(self, record: EpochRecord) -> None:
        """Add one epoch and write it out, so that a running TensorBoard shows it.

        Args:
            record: The epoch, not among those already logged.

        Raises:
            OSError: If the file cannot be written; it names the file.
        """
        content = memoryview(_encoded(self._events(record)))
        with named_in_errors(self._path):
            while content:
                content = content[self._file.write(content) :]

    def close(self) -> None:
        """Close the event file."""
        self._file.close()

    def _events(self, record: EpochRecord) -> "list[Event]":
        """Return all scalars of one epoch."""
        from tensorboard.compat.proto.event_pb2 import Event
        from torch.utils.tensorboard.summary import scalar

        walltime = self._started_unix_s + record.train_time_s
        values = {tag: getattr(record, column) for tag, column in SCALARS.items()}
        return [
            Event(wall_time=walltime, step=record.epoch, summary=scalar(tag, value)) for tag, value in values.items()
        ]


def _encoded(events: "Iterable[Event]") -> bytes:
    """Return events as they stand in a file, each with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()
