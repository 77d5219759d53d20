"""TensorBoard event files, which are only ever appended to, as a reader may hold them open.

The format follows from what TensorBoard's readers do (``tensorboard/backend/event_processing``,
``tensorboard/data/server``):

- They read the files of a directory in the order of their names, and most never return to an earlier file. So every
  attempt at a run writes one new file, whose name sorts after all others.
- At a restart, which is a ``SessionLog`` with status ``START``, the Python loader drops all points from its step on. It
  takes the first restart of a run for the run's beginning and drops nothing. So every file begins with two restarts;
  then a run whose older files have none needs no exception.
- At every new point the fast loader drops earlier points of the same tag at or after its step.
- A torn record ends the reading of its file, but not of the next file. So nothing is written after a torn record.
- With ``--reload_multifile`` a reader abandons a file whose latest event is a day old, but points of a resumed run may
  carry old times. So every write also adds an event with the present time.
"""

import errno
import io
import os
import re
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kfac_sua.files.atomic import named_in_errors, written_beside
from kfac_sua.files.openers import own_file

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_PREFIX = "events.out.tfevents."
_INFIX = "tfevents"  # readers take every file with this in its name for an event file


class EventFile:
    """A new event file, after all others of its directory.

    Events are written synchronously. ``SummaryWriter`` writes in a thread, which prints a traceback and dies when the
    disk is full.

    Args:
        directory: Where; made if missing.
        started_unix_s: Start of the run for readers, seconds since 1970.
        restart_step: Readers drop the points of earlier files at and after this step.
        events: Further events at the beginning, which is written atomically.

    Raises:
        OSError: If the file cannot be written (it is called ``next_events`` until its beginning is complete), or if
            something that is not a file has the name of an event file; it names the file.
    """

    def __init__(
        self, directory: Path, started_unix_s: float, restart_step: int, events: "Iterable[Event]" = ()
    ) -> None:
        # Imported here because it takes seconds, and collecting and plotting do not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _next_name(directory)
        start = Event(wall_time=time.time(), step=restart_step, session_log=SessionLog(status=SessionLog.START))
        version = Event(wall_time=started_unix_s, file_version="brain.Event:2")
        # The temporary name must not look like an event file: a reader would keep it open.
        with written_beside(directory / "next_events", _encoded([version, start, start, *events])) as temporary:
            temporary.replace(self._path)
        # Without a buffer a full disk raises at once, not at close.
        self._file = open(self._path, "ab", buffering=0, opener=own_file)  # noqa: SIM115 - until close()

    def append(self, events: "Iterable[Event]") -> None:
        """Append events and wait until they are on disk, so that a running TensorBoard shows them.

        Args:
            events: What to append.

        Raises:
            OSError: If they cannot be written; it names the file, which is closed then.
        """
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        present = Event(wall_time=time.time(), session_log=SessionLog(status=SessionLog.CHECKPOINT))
        content = memoryview(_encoded([present, *events]))
        with named_in_errors(self._path):
            try:
                while content:
                    content = content[self._file.write(content) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.close()  # readers ignore what follows a torn record
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _next_name(directory: Path) -> str:
    """Return a name that sorts after all event files, even if the clock was set back."""
    stamp = int(time.time())
    for path in directory.iterdir():
        if _INFIX in path.name and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if match := re.match(rf"{re.escape(_PREFIX)}(\d+)", path.name):
            stamp = max(stamp, int(match[1]) + 1)
    return f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def _encoded(events: "Iterable[Event]") -> bytes:
    """Return events in the format of the file: each with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()
