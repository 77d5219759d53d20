"""Event files of TensorBoard, which a reader may hold open: each is written once, from front to back, and stays.

What readers do, of which all here follows (``tensorboard/backend/event_processing``, ``tensorboard/data/server``):

- They go through the files of a directory in the order of their names, and most never return to one they have left. So
  every attempt at a run writes a file of its own, whose name comes after all others, and nothing else.
- The loader in Python drops, of all tags, the points at or after the step of a restart, which is a ``SessionLog`` of
  status ``START``; the first one that it sees in a run it takes for the run's beginning and drops nothing. So there are
  two, and files of before, which have none, need no exception.
- The fast loader drops, of a tag, the points at or after the step of every new point of that tag.
- A record that is torn ends the reading of its file, not that of the next one. So nothing follows it in the same file.
- With ``--reload_multifile`` a file whose latest event is a day old is not looked at again, and points of a resumed run
  may carry old times. So every write also notes the present.
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

from kfac_sua.runs.atomic import named_in_errors, written_beside
from kfac_sua.runs.openers import own_file

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event

_PREFIX = "events.out.tfevents."
_INFIX = "tfevents"  # what readers know an event file by


class EventFile:
    """A new event file, after all others of its directory.

    Events are written here and now: ``SummaryWriter`` leaves that to a thread, which prints a traceback and dies when
    the disk is full.

    Args:
        directory: Where; made if missing.
        started_unix_s: What readers take for the start of the run, seconds since 1970.
        restart_step: The first step that this file tells of: what other files say of it and later ones is void.
        events: What else it begins with; the whole beginning is there at once or, if that fails, no file is.

    Raises:
        OSError: If the file cannot be written, which is called ``next_events`` until it is whole, or something that is
            no file has the name of an event file; it names the file.
    """

    def __init__(
        self, directory: Path, started_unix_s: float, restart_step: int, events: "Iterable[Event]" = ()
    ) -> None:
        # Imported here because it takes seconds, which collecting and plotting need not pay.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / _next_name(directory)
        start = Event(wall_time=time.time(), step=restart_step, session_log=SessionLog(status=SessionLog.START))
        version = Event(wall_time=started_unix_s, file_version="brain.Event:2")
        # A reader must not find it under another name of an event file, which it would hold on to.
        with written_beside(directory / "next_events", _encoded([version, start, start, *events])) as temporary:
            temporary.replace(self._path)
        # Without a buffer, what a full disk refuses is refused at once, not at close.
        self._file = open(self._path, "ab", buffering=0, opener=own_file)  # noqa: SIM115 - until close()

    def append(self, events: "Iterable[Event]") -> None:
        """Add events and wait until they are on disk, so that a running TensorBoard shows them.

        Args:
            events: What to add.

        Raises:
            OSError: If they cannot be written; it names the file, which takes no more then.
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
                self._file.close()  # what followed a torn record could not be read
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _next_name(directory: Path) -> str:
    """Return a name after those of all event files, whatever the clock says."""
    stamp = int(time.time())
    for path in directory.iterdir():
        if _INFIX in path.name and not path.is_file():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if match := re.match(rf"{re.escape(_PREFIX)}(\d+)", path.name):
            stamp = max(stamp, int(match[1]) + 1)
    return f"{_PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def _encoded(events: "Iterable[Event]") -> bytes:
    """Return events as they stand in a file, each with its length and checksums."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()
