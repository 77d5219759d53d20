"""What the project does on this GPU, within minutes: ``python scripts/gpu_report.py --out outputs/gpu-report``.

Tests, the cost of a step, an epoch of every structure, captured steps compared with eager ones bit by bit, how near
structures are to the Fisher, and processes that share a card. Each part has processes and a time limit of its own;
after each the report is rewritten, so that what is done is never lost. At the end all of it but checkpoints is in
gpu-report.tar.gz, under 16 MiB.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from gpu_parts.archive import LIMIT, NAME, REPORT, write_archive
from gpu_parts.definitions import MINUTES, ROOT, define_parts
from gpu_parts.part import RUNNING, Outcome, Part, carry_out, heeding_signals
from gpu_parts.report import TITLE, Machine, Report

from kfac_sua.startup import run_command

BAD_INPUT = 2
EXIT_CODES = (
    "Exit code: 0 if every part is ok or skipped for a reason, 1 if not, 2 for bad input or no GPU, 130 after Ctrl-C."
)


def main() -> int:
    """Carry out the command line and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXIT_CODES
    )
    default = ROOT / "outputs" / "gpu-report"
    parser.add_argument("--out", type=Path, default=default, help="where; an earlier report there is replaced")
    parser.add_argument("--tiny", action="store_true", help="a trial on a CPU, of every part at a tiny size")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together (default: %(default)g)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these parts")
    options = parser.parse_args()
    out = options.out.resolve()
    parts = define_parts(out, is_tiny=options.tiny)
    names = [part.name for part in parts]
    if unknown := [name for name in options.only or () if name not in names]:
        return _refuse(f"There is no part {unknown[0]!r}; there are {', '.join(names)}.")
    if not options.minutes > 0:
        return _refuse(f"--minutes must be > 0, got {options.minutes:g}.")
    if not options.tiny and not torch.cuda.is_available():
        return _refuse("PyTorch finds no usable CUDA device here; --tiny tries all parts on the CPU.")
    if not _is_replaceable(out):
        return _refuse(f"{out} is not empty and holds no earlier report; give --out a directory of its own.")
    shutil.rmtree(out, ignore_errors=True)
    parts = [part for part in parts if not options.only or part.name in options.only]
    return conduct(parts, out, Machine.of("cpu" if options.tiny else "cuda"), options.minutes)


def conduct(parts: Sequence[Part], out: Path, machine: Machine, minutes: float, limit: int = LIMIT) -> int:
    """Carry out parts one after the other, with a report and an archive of what there is, whatever happens.

    A part may use what those before it have left of their time, up to twice its own limit.

    Args:
        parts: The parts.
        out: Directory of all that they leave; made if missing.
        machine: Head of the report.
        minutes: For all parts of a whole report.
        limit: Bytes that the archive must stay under.

    Returns:
        The exit code.
    """
    out.mkdir(parents=True, exist_ok=True)
    report = Report(out, machine, parts, [])
    limits = [part.limit_s * minutes / MINUTES for part in parts]
    deadline = time.monotonic() + sum(limits)
    with heeding_signals() as interruption:
        for i, part in enumerate(parts):
            print(f"{part.name} …", flush=True)
            report.outcomes.append(Outcome(RUNNING, 0.0))
            report.write()
            left = deadline - time.monotonic() - sum(limits[i + 1 :])
            outcome = carry_out(part, out / f"{part.name}.log", min(2 * limits[i], left), ROOT, interruption)
            print(f"{part.name}: {outcome.text}, {outcome.seconds:.1f} s", flush=True)
            report.outcomes[i] = outcome
            report.write()
            if interruption.number:
                break
        _finish(report, limit)
    if interruption.number:
        return 128 + interruption.number
    return int(not all(outcome.is_good for outcome in report.outcomes))


def _finish(report: Report, limit: int) -> None:
    """Write the report a last time, and the archive."""

    def describe(left_out: list[str]) -> None:
        report.left_out = tuple(left_out)
        report.write()

    write_archive(report.out, describe, limit)
    print(f"report: {report.out / REPORT}\narchive: {report.out / NAME}", flush=True)


def _is_replaceable(out: Path) -> bool:
    """Whether there is nothing but perhaps an earlier report of this script's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return True
    report = out / REPORT
    return report.is_file() and report.read_text(errors="replace").startswith(TITLE)


def _refuse(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    run_command(main)
