"""``train.log``: the messages of a run with their time, over all of its attempts."""

import logging
from datetime import UTC, datetime
from pathlib import Path

from kfac_sua.files.atomic import named_in_errors
from kfac_sua.files.openers import own_file

_PACKAGE = "kfac_sua"  # the logger of all modules


class RunLog(logging.Handler):
    """The log of a run. While it is open, warnings of the package go there as well.

    Args:
        path: The file, whose directory exists; lines are appended.

    Raises:
        OSError: If it cannot be opened or, in any method, written; it names the file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(logging.INFO)
        self._path = path
        with named_in_errors(path):
            # Without a buffer a full disk raises at once, not at close.
            self._file = open(path, "ab", buffering=0, opener=own_file)  # noqa: SIM115 - until close()
        logging.getLogger(_PACKAGE).addHandler(self)

    def add(self, text: str) -> None:
        """Append a text, with the time before its first line.

        Args:
            text: One line or more.
        """
        time = datetime.now(UTC).isoformat(timespec="seconds")
        first, *others = text.splitlines() or [""]
        lines = [f"{time}  {first}", *(f"{'':{len(time)}}  {line}".rstrip() for line in others)]
        # A path may hold bytes that are no text; they are written unchanged, as on stdout.
        content = memoryview("".join(f"{line}\n" for line in lines).encode(errors="surrogateescape"))
        with named_in_errors(self._path):
            while content:
                content = content[self._file.write(content) :]

    def emit(self, record: logging.LogRecord) -> None:
        """Append a warning of the package.

        Args:
            record: The record of ``logging``.
        """
        self.add(f"{record.levelname.lower()}: {record.getMessage()}")

    def close(self) -> None:
        """Close the file, and stop receiving warnings."""
        logging.getLogger(_PACKAGE).removeHandler(self)
        self._file.close()
        super().close()
