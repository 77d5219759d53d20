"""One command per figure of the paper: ``python -m kfac_sua.reproduce fig1 --scale small --seeds 3``.

It carries out whatever is missing: the grid of every curve, the selection, the final runs over the seeds, figures and
report. Interrupted at any point, the same command goes on.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import contextlib
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from kfac_sua.campaign.conduct import CampaignError, conduct
from kfac_sua.campaign.definition import campaign_names, keep_methods, load_campaign, load_scale, scale_names
from kfac_sua.campaign.dry_run import describe
from kfac_sua.campaign.engine import RUNS_PER_GPU, Jobs, Workers, num_cores
from kfac_sua.campaign.forecast import Forecast, foretell
from kfac_sua.campaign.gpus import find_gpus
from kfac_sua.campaign.jobs import LaunchError
from kfac_sua.campaign.launcher import LAUNCHERS, SLURM, Launcher, load_launcher, require_cluster, with_device
from kfac_sua.campaign.plan import Plan
from kfac_sua.campaign.publish import publish
from kfac_sua.campaign.selection import RULE_SENTENCES, Rule, SelectionError
from kfac_sua.command_line import BAD_INPUT, FAILED, count, keep_command, say
from kfac_sua.compose import compose_config
from kfac_sua.compose.launchers import launcher_overrides
from kfac_sua.config import ConfigError
from kfac_sua.data import DataError
from kfac_sua.device import choose_device, device_type, knowing
from kfac_sua.figures.curves import FigureError
from kfac_sua.files.lock import RunBusyError, exclusive
from kfac_sua.runs.final_table import CollectError
from kfac_sua.runs.run_info import RecordError, failure_reason
from kfac_sua.startup import run_command
from kfac_sua.streams import output_is_recorded
from kfac_sua.training.signals import Interrupted

INPUT_ERRORS = (ConfigError, DataError)
RUN_ERRORS = (
    *(CampaignError, LaunchError, SelectionError, CollectError, RecordError, FigureError, RunBusyError),
    *(OSError, MemoryError),
)
LOCAL = "local"
_SMALLER = "This is the paper's size, without a GPU; --scale small (make: SCALE=small) is made for a CPU."
_INTERRUPTED = "interrupted; the same command goes on where this one stopped."


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code.

    An error that a user can cause ends with one sentence on stderr; with ``--debug``, with a traceback.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if everything is done, 1 if a run failed, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM.
    """
    keep_command("kfac_sua.reproduce", sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_intermixed_args(arguments)
    try:
        with _interrupted_by_sigterm():
            _carry_out(options, shlex.join(["python", "-m", "kfac_sua.reproduce", *(arguments or sys.argv[1:])]))
    except (*INPUT_ERRORS, *RUN_ERRORS) as error:
        if options.debug or os.environ.get("HYDRA_FULL_ERROR") == "1":
            traceback.print_exc()
        else:
            say(failure_reason(error))
        return BAD_INPUT if isinstance(error, INPUT_ERRORS) else FAILED
    except KeyboardInterrupt as interrupt:
        say(_INTERRUPTED)
        return 128 + getattr(interrupt, "signal_number", signal.SIGINT)
    return 0


def _carry_out(options: argparse.Namespace, command: str) -> None:
    campaign = keep_methods(load_campaign(options.campaign), options.only, options.extra)
    scale = load_scale(campaign, options.scale)
    device, overrides, launcher = _resources(options)
    root = options.out or Path("outputs") / f"{campaign.name}-{options.scale}-{device}"
    is_here = launcher is None or not launcher.has_machines_of_its_own
    gpus = find_gpus() if is_here and device == "cuda" else ()
    with knowing(gpus[0].device) if gpus else contextlib.nullcontext():
        plan = Plan(campaign, scale, root, options.seeds, tuple(overrides))
        plan.check()
        engine = Jobs(launcher, root) if launcher else Workers.sharing(gpus, options.jobs)
        if options.dry_run:
            forecast = foretell(plan, options.select_by, engine, with_data=False)
            print(describe(plan, options.select_by, engine, forecast))
            _say_time(forecast, options.scale, device)
            return
        if launcher is not None:
            require_cluster(launcher)
        output_is_recorded()
        with _only_one(root):
            if engine.description:
                print(engine.description, flush=True)
            forecast = foretell(plan, options.select_by, engine, with_data=True)
            _say_time(forecast, options.scale, device)
            results = conduct(plan, options.select_by, engine, forecast.first)
            paths = publish(
                plan, scale=options.scale, device=device, rule=options.select_by, results=results, command=command
            )
        print(f"Wrote {', '.join(map(str, paths))}.")


def _say_time(forecast: Forecast, scale: str, device: str) -> None:
    """Print how long the rest will take, and, for the full scale on a CPU, which scale is made for it."""
    lines = forecast.lines()
    if lines and scale == "full" and device == "cpu":
        lines.append(_SMALLER)
    for line in lines:
        print(line, flush=True)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the campaign as Ctrl-C does: its workers write their checkpoints."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del frame
        raise Interrupted(_INTERRUPTED, number)

    if threading.current_thread() is not threading.main_thread():  # which alone receives signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _resources(options: argparse.Namespace) -> tuple[str, list[str], Launcher | None]:
    """Return the device, the overrides of every run, and the launcher; None if this command launches the runs."""
    of_launcher, overrides = launcher_overrides(options.overrides)
    if options.launcher == LOCAL:
        if of_launcher:
            raise ConfigError(f"{of_launcher[0]} means nothing to --launcher local; give {' or '.join(LAUNCHERS)}.")
        return _device(overrides), overrides, None
    if options.launcher == SLURM:  # the machines of a cluster are not known here
        launcher = load_launcher(SLURM, of_launcher, options.jobs)
    else:
        default_jobs = num_cores() if _device(overrides) == "cpu" else 1
        launcher = load_launcher(options.launcher, of_launcher, options.jobs, default_jobs)
    launcher, overrides = with_device(launcher, overrides)
    return device_type(compose_config(_device_overrides(overrides)).device), overrides, launcher


def _device(overrides: Sequence[str]) -> str:
    return choose_device(compose_config(_device_overrides(overrides)).device).type


def _device_overrides(overrides: Sequence[str]) -> list[str]:
    return [override for override in overrides if override.startswith("device=")]


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Hold the campaign's directory, or raise if another process holds it."""
    try:
        with exclusive(root):
            yield
    except RunBusyError as error:
        raise RunBusyError(str(error).replace("trained", "worked on")) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kfac_sua.reproduce",
        description="Reproduce a figure of Laurent et al. (2018): tune every curve on a grid, train the best cells "
        "over several seeds, draw the figures, and report on each claim. The same command again does what is missing.",
        epilog="Selection rules: " + " ".join(f"{rule}: {text}" for rule, text in RULE_SENTENCES.items()),
    )
    parser.add_argument(
        "campaign", metavar="CAMPAIGN", help=f"{', '.join(campaign_names())}, or the YAML file of one's own"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of every run, as for kfac_sua.train: device=cpu"
    )
    parser.add_argument(
        "--scale", choices=scale_names(), default="full", help="full: the paper; small: a CPU; smoke: a test (full)"
    )
    parser.add_argument("--seeds", type=count, default=3, metavar="N", help="final runs per curve (3)")
    parser.add_argument(
        "--jobs",
        type=count,
        metavar="N",
        help=f"runs of the grid at the same time (one per core, and at most {RUNS_PER_GPU} on each GPU; slurm: "
        "array_parallelism)",
    )
    parser.add_argument(
        "--launcher",
        choices=[LOCAL, *LAUNCHERS],
        default=LOCAL,
        help="who carries out the runs: this command, or one of Hydra's launchers, set by hydra.launcher.<key>=value "
        "(%(default)s)",
    )
    parser.add_argument(
        "--select-by",
        type=Rule,
        choices=list(Rule),
        default=Rule.one_standard_error,
        help="rule of selection (%(default)s)",
    )
    parser.add_argument("--only", type=_names, default=[], metavar="METHOD,…", help="only these curves")
    parser.add_argument(
        "--with", dest="extra", type=_names, default=[], metavar="METHOD,…", help="also these optional curves"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="directory (outputs/<campaign>-<scale>-<device>)")
    parser.add_argument("--dry-run", action="store_true", help="print the runs to come, what is done, and the time")
    parser.add_argument("--debug", action="store_true", help="show where an error arises, as HYDRA_FULL_ERROR=1 does")
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


if __name__ == "__main__":
    run_command(main)
