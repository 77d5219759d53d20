"""Fuzz everything that reads user input: ``python scripts/fuzz.py --minutes 10`` (needs the ``dev`` extras).

Prints how many inputs each reader accepted and refused, and what it found; the exit code is 1 if that is anything.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import collections
import importlib
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from kfac_sua.startup import run_command

TARGETS_DIR = Path(__file__).resolve().parents[1] / "tests" / "fuzz"
EXAMPLES_PER_ROUND = 200


def main(arguments: Sequence[str] | None = None) -> None:
    """Fuzz the readers in turns until the time is over.

    Args:
        arguments: Command line without the program's name; ``None`` takes the process's own.

    Raises:
        SystemExit: With exit code 1 if a reader crashed, hung, or accepted what it must not.
    """
    sys.path.insert(0, str(TARGETS_DIR))
    module = importlib.import_module("targets")
    parser = argparse.ArgumentParser(description="Fuzz the readers of options, data, records and checkpoints.")
    parser.add_argument("--minutes", type=float, default=10.0, metavar="N", help="how long, in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first round (%(default)s)")
    parser.add_argument("--only", choices=list(module.TARGETS), nargs="+", default=list(module.TARGETS))
    options = parser.parse_args(arguments)
    counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in options.only}
    findings: dict[str, str] = {}
    end = time.monotonic() + 60 * options.minutes
    for number in itertools.count(options.seed):
        for name in options.only:
            if time.monotonic() >= end:
                _report(counts, findings)
                sys.exit(1 if findings else 0)
            try:
                _fuzz(module, name, number, counts[name], end)
            except Exception as error:
                findings.setdefault(f"{name}: {type(error).__name__}: {error}", "\n".join(error.__notes__))


def _fuzz(module: Any, name: str, number: int, counts: collections.Counter[str], end: float) -> None:
    """Give one reader a round of inputs; raises its smallest finding."""
    target = module.TARGETS[name]

    @seed(number)
    @settings(
        max_examples=EXAMPLES_PER_ROUND,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(target.strategy)
    def examine(example: Any) -> None:
        if time.monotonic() >= end:
            return
        with module.time_limit():
            counts[target.examine(example)] += 1

    examine()


def _report(counts: dict[str, collections.Counter[str]], findings: dict[str, str]) -> None:
    print(f"{'reader':<18} {'inputs':>8} {'refused':>8} {'accepted':>8}")
    for name, count in counts.items():
        print(f"{name:<18} {count.total():>8} {count['refused']:>8} {count['accepted']:>8}")
    print(f"findings: {len(findings)}")
    for finding, example in findings.items():
        print(f"\n{finding}\n{example}")


if __name__ == "__main__":
    run_command(main)
