"""What N processes send each other, keep and invert, next to what DistributedDataParallel sends.

Command line: ``python -m kfac_sua.bench.communication --out DIR [--processes 1 2 4 8] [--measure 1 2 4]``.

Any number of processes can be counted; those under ``--measure`` are started on this machine as well, and must send
what was counted.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kfac_sua.bench.communication.counted import Costs, ShapeModel, count_costs
from kfac_sua.bench.communication.measured import Measurement, measure
from kfac_sua.bench.communication.report import describe_costs, disagreements, to_frame
from kfac_sua.bench.settings import DEFAULT_SETTINGS, PERIOD_KEY, Setting, compose_settings, parse_items
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, as_number, count, say
from kfac_sua.config import ConfigError
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import cannot_use
from kfac_sua.preconditioner.distributed.assignment import FLOPS_PER_BYTE
from kfac_sua.runs.environment import environment
from kfac_sua.startup import run_command

_PROGRAM = "python -m kfac_sua.bench.communication"


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if all is well, 1 if bytes were counted and measured differently or the measurement failed, 2 for bad input,
        130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_intermixed_args(arguments)
    try:
        return _carry_out(options, shlex.join([*_PROGRAM.split(), *arguments]))
    except ConfigError as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error, options.out), BAD_INPUT)
    except (RuntimeError, MemoryError) as error:
        return say(" ".join(str(error).split()) or "MemoryError.", FAILED)
    except KeyboardInterrupt:
        return say("interrupted; nothing was written.", INTERRUPTED)


def _carry_out(options: argparse.Namespace, command: str) -> int:
    values = {"model": options.model, "model.width": options.width, "device": "cpu", PERIOD_KEY: options.period}
    settings = compose_settings(parse_items(options.settings), options.overrides, values)[1:]
    if not settings:
        raise ConfigError("--settings names plain SGD alone, which sends gradients only; name a preconditioner.")
    options.out.mkdir(parents=True, exist_ok=True)
    costs = [one for setting in settings for one in _count(setting, options)]
    measurements = [one for size in options.measure for one in _measure(settings, size, options)]
    base = settings[0].config
    model = f"{base.model.name.value}, width {base.model.width:g}"
    text = describe_costs(costs, measurements, model, command, environment("cpu"))
    name = f"communication-{base.model.name.value}-width-{base.model.width:g}"
    csv, markdown = options.out / f"{name}.csv", options.out / f"{name}.md"
    write_atomically(csv, to_frame(costs, measurements).to_csv(index=False).encode())
    write_atomically(markdown, text.encode())
    print(text)
    print(f"Wrote {csv}, {markdown}.")
    wrong = disagreements(costs, measurements)
    return say(" ".join(wrong)) if wrong else 0


def _count(setting: Setting, options: argparse.Namespace) -> list[Costs]:
    shapes = ShapeModel(setting.config)
    sizes = sorted({*options.processes, *options.measure})
    return [
        count_costs(setting.name, shapes, size, _batch_size(size, options), options.flops_per_byte) for size in sizes
    ]


def _measure(settings: Sequence[Setting], size: int, options: argparse.Namespace) -> list[Measurement]:
    say(f"measuring {size} of {', '.join(map(str, options.measure))} processes")
    return measure(settings, size, _batch_size(size, options), options.flops_per_byte, options.repeats)


def _batch_size(num_processes: int, options: argparse.Namespace) -> int:
    return options.batch_size * (1 if options.fixed else num_processes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=_PROGRAM,
        description="Count what processes that share mini-batches send each other, keep and invert, for any number of"
        " them, and measure it for a few on this machine.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--model", default="vgg11", help="(%(default)s)")
    parser.add_argument("--width", type=float, metavar="X", help="multiplies all channels")
    parser.add_argument(
        "--settings", nargs="+", default=list(DEFAULT_SETTINGS[1:]), metavar="NAME", help="as in kfac_sua.bench (all)"
    )
    parser.add_argument("--batch-size", type=count, default=100, metavar="N", help="of a process (%(default)s)")
    parser.add_argument("--fixed", action="store_true", help="--batch-size is of all processes together")
    parser.add_argument("--period", type=count, metavar="N", help="mini-batches between refreshes")
    parser.add_argument(
        "--processes", nargs="+", type=count, default=[1, 2, 4, 8, 16, 64, 256, 1024], metavar="N", help="to count for"
    )
    parser.add_argument("--measure", nargs="+", type=count, default=[], metavar="N", help="to start (none)")
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="mini-batches timed (%(default)s)")
    parser.add_argument(
        "--flops-per-byte",
        type=_balance,
        default=FLOPS_PER_BYTE["cpu"],
        metavar="X",
        help="machine balance that inverses are shared out by; inf shares none (%(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="further keys of the configuration")
    return parser


def _balance(text: str) -> float:
    balance = as_number(text)
    if not balance >= 0:
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, or inf, got '{text}'")
    return balance


if __name__ == "__main__":
    run_command(main)
