"""``report.md``: what it ran on, how each part ended, and the lines of its output that matter."""

from __future__ import annotations

import datetime
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu_parts.archive import LIMIT, NAME, REPORT
from gpu_parts.part import OK, Outcome, Part
from kfac_sua.files.atomic import write_atomically
from kfac_sua.runs.environment import environment

TITLE = "# GPU report"
NOT_STARTED = "not started"
MAX_SHOWN_LINES = 150
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass(frozen=True)
class Machine:
    """What the parts run on, as the head of the report names it."""

    lines: tuple[str, ...]

    @classmethod
    def of(cls, device: str) -> Machine:
        """Describe this machine and its ``cpu`` or ``cuda`` device."""
        found = environment(device)
        on_gpu = device == "cuda"
        return cls(
            (
                f"device: {found.device_name}",
                f"driver: {_driver() if on_gpu else 'none'}, CUDA: {torch.version.cuda or 'none'}",
                f"PyTorch: {found.versions['torch']}, Python: {found.versions['python']}",
                f"commit: {found.commit or 'unknown (not a git checkout)'}",
                f"date: {datetime.datetime.now().astimezone().isoformat(timespec='seconds')}",
            )
        )


@dataclass
class Report:
    """The report on some parts, of which the first have ended.

    Args:
        out: Directory of the report and the logs.
        machine: What they run on.
        parts: All parts, in order.
        outcomes: Of the parts that have ended.
        left_out: What is missing in the archive because of its limit.
    """

    out: Path
    machine: Machine
    parts: Sequence[Part]
    outcomes: list[Outcome]
    left_out: Sequence[str] = ()

    def write(self) -> None:
        """Write what is known by now."""
        write_atomically(self.out / REPORT, self._text().encode())

    def _text(self) -> str:
        blocks = [TITLE, "\n".join(f"- {line}" for line in self.machine.lines), self._table()]
        if self.left_out:
            names = ", ".join(f"`{name}`" for name in self.left_out)
            blocks.append(f"Left out of {NAME}, which stays under {LIMIT / 2**20:g} MiB: {names}.")
        blocks += [self._section(part, outcome) for part, outcome in zip(self.parts, self.outcomes, strict=False)]
        return "\n\n".join(blocks) + "\n"

    def _table(self) -> str:
        rows = ["| part | command | seconds | outcome |", "|---|---|---|---|"]
        for i, part in enumerate(self.parts):
            commands = "<br>".join(f"`{command}`" for command in part.commands).replace("|", "\\|")
            outcome = self.outcomes[i] if i < len(self.outcomes) else Outcome(NOT_STARTED, 0.0)
            seconds = f"{outcome.seconds:.1f}" if outcome.seconds else "–"
            rows.append(f"| {part.name} | {commands} | {seconds} | {outcome.text} |")
        return "\n".join(rows)

    def _section(self, part: Part, outcome: Outcome) -> str:
        blocks = [f"## {part.name}: {outcome.text}"]
        if part.note:
            blocks.append(part.note)
        if part.summary is not None and not part.skipped:
            blocks.append(_summary(part))
        log = self.out / f"{part.name}.log"
        if log.exists() and not part.skipped:
            blocks.append(f"````\n{excerpt(log.read_text(errors='replace'), part, outcome)}\n````")
        return "\n\n".join(blocks)


def excerpt(text: str, part: Part, outcome: Outcome) -> str:
    """Return the lines of a part's log that its report shows, without colours and overwritten progress."""
    lines = [_COLOUR.sub("", line.rstrip("\r").rpartition("\r")[2]).rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    starts = [i for i, line in enumerate(lines) if line.startswith(part.shown_from)]
    shown = lines[starts[-1] :] if part.shown_from and starts and outcome.text == OK else lines[-part.shown_lines :]
    return "\n".join(shown[-MAX_SHOWN_LINES:]).replace("````", "'''' ")


def _summary(part: Part) -> str:
    assert part.summary is not None
    try:
        return part.summary()
    except Exception as error:  # what a part left may be torn in any way, and must not cost the report of the others
        return f"No table: {type(error).__name__}: {error}"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi does not say)"
