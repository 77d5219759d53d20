"""What a run says, with the time of every line: ``train.log`` in its directory, over all of its attempts."""

import logging
from datetime import UTC, datetime
from pathlib import Path

from kfac_sua.runs.atomic import named_in_errors
from kfac_sua.runs.openers import own_file

_PACKAGE = "kfac_sua"  # the logger of all modules


class RunLog(logging.Handler):
    """The log of a run, to which warnings of the package go as well while it is open.

    Args:
        path: The file, whose directory exists; lines are appended.

    Raises:
        OSError: If it cannot be opened or, by any method, not written; it names the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path
        with named_in_errors(path):
            # Without a buffer, what a full disk refuses is refused at once, not at close.
            self._file = open(path, "ab", buffering=0, opener=own_file)  # noqa: SIM115 - until close()
        logging.getLogger(_PACKAGE).addHandler(self)

    def add(self, text: str) -> None:
        """Append a text, the time before its first line.

        Args:
            text: One line or more.
        """
        time = datetime.now(UTC).isoformat(timespec="seconds")
        first, *others = text.splitlines() or [""]
        lines = [f"{time}  {first}", *(f"{'':{len(time)}}  {line}".rstrip() for line in others)]
        # A path may hold bytes that are no text: they are written as they are, as the streams do.
        content = memoryview("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
        with named_in_errors(self._path):
            while content:
                content = content[self._file.write(content) :]

    def emit(self, record: logging.LogRecord) -> None:
        """Append what the package logs.

        Args:
            record: A record of Python's logging.
        """
        self.add(f"{record.levelname.lower()}: {record.getMessage()}")

    def close(self) -> None:
        """Close the file, and take no more warnings."""
        logging.getLogger(_PACKAGE).removeHandler(self)
        self._file.close()
        super().close()
