"""A paper study: preconditioners on up to 1,024 GPUs.

Command line: ``python -m kfac_sua.bench.communication.scaling_out --out DIR [--network-bandwidth 50e9]``.

FLOPs and bytes are counted from the code that runs; rates and bandwidths are arguments. Nothing is measured.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import dataclasses
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kfac_sua.bench.communication.cluster import Cluster
from kfac_sua.bench.communication.study import MOST_OVERHEAD, study_frame
from kfac_sua.bench.communication.study_report import describe_study
from kfac_sua.command_line import BAD_INPUT, FAILED, as_number, count, say
from kfac_sua.config import ConfigError
from kfac_sua.figures.scaling_out import draw_scaling_out
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import cannot_use
from kfac_sua.startup import run_command

_PROGRAM = "python -m kfac_sua.bench.communication.scaling_out"
_MODELS = ("vgg11", "preact_resnet50")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if all is well, 1 if the files cannot be written, 2 for bad input.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    cluster = Cluster(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Cluster)})
    try:
        frame = study_frame(options.model, options.processes, options.batch_size, options.global_batch_size, cluster)
        paths = draw_scaling_out(frame, options.out, MOST_OVERHEAD)
        text = describe_study(frame, cluster, shlex.join([*_PROGRAM.split(), *arguments]))
        markdown = options.out / "study.md"
        write_atomically(markdown, text.encode())
    except ConfigError as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error, options.out), FAILED)
    print(text)
    print(f"Wrote {', '.join(map(str, [*paths, markdown]))}.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Compute on paper what preconditioners add to SGD on many GPUs; nothing is measured.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--model", nargs="+", choices=_MODELS, default=list(_MODELS), help="(all)")
    sizes = [2**power for power in range(11)]
    parser.add_argument("--processes", nargs="+", type=count, default=sizes, metavar="N", help="GPUs (1 to 1,024)")
    parser.add_argument("--batch-size", type=count, default=100, metavar="N", help="per GPU, weak (%(default)s)")
    parser.add_argument("--global-batch-size", type=count, default=8192, metavar="N", help="strong (%(default)s)")
    for field in dataclasses.fields(Cluster):
        option = f"--{field.name.replace('_', '-')}"
        kind = count if field.type is int else _rate
        parser.add_argument(option, type=kind, default=field.default, metavar="X", help="(%(default)g)")
    return parser


def _rate(text: str) -> float:
    value = as_number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got '{text}'")
    return value


if __name__ == "__main__":
    run_command(main)
