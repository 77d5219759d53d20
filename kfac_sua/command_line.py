"""What the commands share: their exit codes, and how they say what is wrong."""

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Sequence

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

_COMMAND = "KFAC_SUA_COMMAND"  # variable of the environment
_PASSWORD = re.compile(r"(://[^/\s:@]*:)[^/\s]*(@)")  # of scheme://user:password@host, to the last @ before the path


def say(sentence: object, code: int = FAILED) -> int:
    """Print a sentence to stderr and return the exit code that goes with it.

    Args:
        sentence: What happened.
        code: The exit code.
    """
    print(sentence, file=sys.stderr, flush=True)
    return code


def keep_command(module: str, arguments: Sequence[str]) -> None:
    """Keep a command line in the environment, from which the records of its runs take it in any process.

    A password in an address, such as that of a sweeper's data base, is kept as ``***``, since others read the records.

    Args:
        module: What was started, by ``python -m``.
        arguments: What follows it.
    """
    shown = [_PASSWORD.sub(r"\1***\2", argument) for argument in arguments]
    os.environ[_COMMAND] = shlex.join(["python", "-m", module, *shown])


def kept_command() -> str | None:
    """Return the command line that this process belongs to, if there is one."""
    return os.environ.get(_COMMAND)


def as_number(text: str) -> float:
    """Return the number that a text stands for; NaN if it stands for none.

    Args:
        text: As it stands on the command line.
    """
    try:
        return float(text)
    except ValueError:
        return math.nan


def count(text: str) -> int:
    """Return the value of an option that counts something.

    Args:
        text: As it stands on the command line.

    Raises:
        argparse.ArgumentTypeError: If it is not a whole number of at least 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got '{text}'")
    return int(text)
