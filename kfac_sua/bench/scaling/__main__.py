"""Cost of a refresh and of a step against width, kernel size, group size and mini-batch, for one convolution.

Command line: ``python -m kfac_sua.bench.scaling --out DIR [--sweep width kernel group batch] [--quick]``.

Every structure is measured with dense inverses, which is what the paper counts, and with ``inverse_method=auto``. Times
are process CPU seconds on a CPU and device seconds on a GPU. The same command again measures only what is missing; an
interruption costs at most the layer in progress.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from kfac_sua.bench.scaling.cases import SWEEPS, Case, Sweep
from kfac_sua.bench.scaling.exponents import exponent_table
from kfac_sua.bench.scaling.measure import Measurement
from kfac_sua.bench.scaling.record import Machine, ScalingError, from_frame, read_table, to_frame, write_table
from kfac_sua.bench.scaling.report import describe_study
from kfac_sua.bench.scaling.study import StudySettings, measure_missing
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, as_number, count, say
from kfac_sua.config import ConfigError, Device
from kfac_sua.device import choose_device
from kfac_sua.figures.scaling import draw_scaling
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.lock import RunBusyError, exclusive
from kfac_sua.files.openers import cannot_use
from kfac_sua.runs.environment import environment
from kfac_sua.runs.run_info import failure_reason
from kfac_sua.startup import run_command

# Largest sizes with --quick.
_QUICK = {"width": 128, "kernel": 3, "group": 32, "batch": 100}


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if everything is done, 1 if it cannot be, 2 for bad input, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    try:
        _carry_out(options)
    except (ConfigError, ScalingError) as error:
        return say(error, BAD_INPUT)
    except RunBusyError as error:
        return say(str(error).replace("trained", "measured"), FAILED)
    except (RuntimeError, MemoryError) as error:  # on a CPU, PyTorch's allocator raises a plain RuntimeError
        return say(f"{failure_reason(error)} (Lower --memory-limit-gib or --largest-width?)", FAILED)
    except OSError as error:
        return say(cannot_use(error, options.out), BAD_INPUT)
    except KeyboardInterrupt:
        return say("interrupted; the same command goes on where this one stopped.", INTERRUPTED)
    return 0


def _carry_out(options: argparse.Namespace) -> None:
    device = choose_device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(options.threads)
    found = environment(device.type)
    versions = {name: found.versions[name] or "unknown" for name in ("torch", "kfac_sua")}
    machine = Machine(device.type, found.device_name, torch.get_num_threads(), **versions)
    commit = found.commit or ""
    with exclusive(options.out):
        path = options.out / "scaling.csv"
        known = from_frame(read_table(path), path, machine) if path.exists() else {}
        _tell_of_other_commits(known, commit, path)
        measurements = measure_missing(
            _cases(options),
            known,
            StudySettings(device, 1 if options.quick else options.repeats, options.memory_limit_gib, commit),
            keep=lambda measured: write_table(path, to_frame(measured, machine)),
            tell=lambda line: print(line, file=sys.stderr, flush=True),
        )
        _publish(measurements, machine, options.out)


def _cases(options: argparse.Namespace) -> list[Case]:
    chosen = (_limited(sweep, options) for sweep in SWEEPS if sweep.name in options.sweep)
    return list(dict.fromkeys(case for sweep in chosen for case in sweep.cases()))


def _limited(sweep: Sweep, options: argparse.Namespace) -> Sweep:
    if sweep.name == "width":
        sweep = sweep.up_to(options.largest_width)
    return sweep.up_to(_QUICK[sweep.name]) if options.quick else sweep


def _tell_of_other_commits(known: Mapping[Case, Measurement], commit: str, path: Path) -> None:
    others = sorted({result.commit for result in known.values() if not result.note} - {commit})
    if others:
        print(
            f"{path} keeps seconds measured at commit {', '.join(others)}; remove it to measure all anew.",
            file=sys.stderr,
        )


def _publish(measurements: Mapping[Case, Measurement], machine: Machine, out_dir: Path) -> None:
    """Write figure, exponents and report of everything measured, and print the report."""
    if all(measurement.note for measurement in measurements.values()):
        raise ScalingError("No case fits into --memory-limit-gib; raise it or lower --largest-width.")
    frame = to_frame(measurements, machine)
    exponents = exponent_table(frame)
    paths = draw_scaling(frame, out_dir)  # its CSV is scaling.csv itself
    write_atomically(out_dir / "scaling-exponents.csv", exponents.to_csv(index=False).encode())
    text = describe_study(frame, exponents)
    write_atomically(out_dir / "scaling.md", text.encode())
    print(text)
    written = [*paths, out_dir / "scaling-exponents.csv", out_dir / "scaling.md"]
    print(f"Wrote {', '.join(map(str, written))}.")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kfac_sua.bench.scaling",
        description="Measure how statistics, inversion and application of one convolution grow with its size, under"
        " every structure, and fit exponents next to the paper's. The same command again does what is missing.",
    )
    names = [sweep.name for sweep in SWEEPS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory of the files")
    parser.add_argument("--device", type=Device, choices=list(Device), default=Device.auto, help="(%(default)s)")
    parser.add_argument("--sweep", nargs="+", choices=names, default=names, help="what to vary (all)")
    parser.add_argument(
        "--largest-width", type=_width, default=1024, metavar="C", help="channels of the widest layer (%(default)s)"
    )
    parser.add_argument("--repeats", type=count, default=3, metavar="N", help="fewest turns per case (%(default)s)")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="on a CPU (%(default)s)")
    parser.add_argument(
        "--memory-limit-gib", type=_gib, default=6.0, metavar="GIB", help="leave out cases beyond it (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes only, few turns: under a minute")
    return parser


def _width(text: str) -> int:
    widths = next(sweep.values for sweep in SWEEPS if sweep.name == "width")
    if not text.isdecimal() or not widths[0] <= int(text) <= widths[-1]:
        raise argparse.ArgumentTypeError(f"must be a number of channels from {widths[0]} to {widths[-1]}, got '{text}'")
    return int(text)


def _gib(text: str) -> float:
    limit = as_number(text)
    if not limit > 0:
        raise argparse.ArgumentTypeError(f"must be a number of GiB above 0, got '{text}'")
    return limit


if __name__ == "__main__":
    run_command(main)
