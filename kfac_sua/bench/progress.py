"""Progress of the benchmark on stderr."""

import sys


class Announcer:
    """Prints what is being measured: in a terminal one line that is overwritten, elsewhere one line per stage."""

    def __init__(self) -> None:
        self._stage = ""

    def show(self, stage: str, detail: str = "") -> None:
        """Print what comes next.

        Args:
            stage: Such as ``plain steps, round 2 of 9``.
            detail: Such as the setting; only in a terminal.
        """
        if sys.stderr.isatty():
            text = f"{stage}: {detail}" if detail else stage
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif stage != self._stage:
            print(stage, file=sys.stderr, flush=True)
        self._stage = stage

    def clear(self) -> None:
        """Leave the terminal's line empty for what is printed next."""
        if self._stage and sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
        self._stage = ""
