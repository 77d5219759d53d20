"""The installed commands: ``kfac-sua-train`` is ``python -m kfac_sua.train``, and so on.

Completion in the shell goes by the name of a program, which ``python -m`` does not have. This file imports nothing
heavy, so that Ctrl-C ends a command with one line while it imports its packages.
"""

import importlib
from typing import NoReturn

from kfac_sua.startup import begin, run_command


def train() -> NoReturn:
    """Carry out ``kfac-sua-train`` and leave with its exit code."""
    _carry_out("kfac_sua.train")


def reproduce() -> NoReturn:
    """Carry out ``kfac-sua-reproduce`` and leave with its exit code."""
    _carry_out("kfac_sua.reproduce")


def evaluate() -> NoReturn:
    """Carry out ``kfac-sua-evaluate`` and leave with its exit code."""
    _carry_out("kfac_sua.evaluate")


def bench() -> NoReturn:
    """Carry out ``kfac-sua-bench`` and leave with its exit code."""
    _carry_out("kfac_sua.bench.__main__")


def introspect() -> NoReturn:
    """Carry out ``kfac-sua-introspect`` and leave with its exit code."""
    _carry_out("kfac_sua.introspect.__main__")


def _carry_out(module: str) -> NoReturn:
    begin()
    run_command(importlib.import_module(module).main)
