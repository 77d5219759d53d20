"""The command: ``python scripts/torture.py --minutes 15``; see the README."""

import argparse
import itertools
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from torture import corruption, faults, kills, soak
from torture.case import Case, make_reference, run_case
from torture.table import Result, as_csv, as_markdown

CAMPAIGNS: dict[str, Callable[[float], list[Case]]] = {
    "kills": kills.cases,
    "corruption": corruption.cases,
    "faults": faults.cases,
    "soak": soak.cases,
}
# Minutes that the whole takes on two cores of about 3 GHz; other durations scale the number of cases.
FULL_MINUTES = 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the campaigns and print the table.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0 if all faults were survived and no result was wrong, 1 otherwise, 2 for bad input.
    """
    options = _parser().parse_args(arguments)
    torch.set_num_threads(1)  # a child forked from a process with several would wait for those forever
    # Files of resumed runs repeat steps on purpose, of which its reader warns; `difference` compares what it returns.
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    effort = options.minutes / FULL_MINUTES
    all_cases = [case for name in options.campaign for case in CAMPAIGNS[name](effort)]
    unknown = set(options.only) - {case.full_name for case in all_cases}
    if unknown:
        print(f"--only: there is no case {unknown.pop()!r} at --minutes {options.minutes:g}.", file=sys.stderr)
        return 2
    is_chosen = [case.full_name in options.only for case in all_cases]
    cases = list(itertools.compress(all_cases, is_chosen)) if options.only else _thinned(all_cases, effort)
    started_at = time.monotonic()
    root = options.out.absolute() / "work"
    shutil.rmtree(root, ignore_errors=True)
    results = _carry_out(cases, root, options.seed, options.jobs)
    if all(result.is_good for result in results):
        shutil.rmtree(root, ignore_errors=True)
    minutes = (time.monotonic() - started_at) / 60
    return _report(results, options, f"{minutes:.1f} minutes, {options.jobs} at a time")


def _thinned(cases: Sequence[Case], effort: float) -> list[Case]:
    """Return cases of every kind of fault, fewer of each in a short campaign; long runs are shorter by themselves."""
    kinds: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        kinds.setdefault((case.campaign, case.fault), []).append(case)
    kept = []
    for (campaign, _), of_kind in kinds.items():
        share = 1.0 if campaign == soak.CAMPAIGN else min(1.0, 2 * effort)
        number = max(1, round(share * len(of_kind)))
        kept += [of_kind[index * len(of_kind) // number] for index in range(number)]
    return kept


def _carry_out(cases: Sequence[Case], root: Path, seed: int, jobs: int) -> list[Result]:
    """Carry out the undisturbed runs that the cases are compared with, then the cases, several at a time."""
    settings = sorted({setting for case in cases for setting in case.settings})
    global _TASKS  # what forked workers find in their copy of memory, since functions do not travel through pipes
    references = [_reference_task(root, setting) for setting in settings]
    _TASKS = [*references, *(_case_task(case, root, seed) for case in cases)]
    # The longest cases come first, so that no core idles at the end.
    order = sorted(range(len(cases)), key=lambda index: cases[index].campaign != soak.CAMPAIGN)
    results: dict[int, Result] = {}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        pool.map(_do, range(len(references)), chunksize=1)
        numbers = [len(references) + index for index in order]
        for index, result in zip(
            order, tqdm(pool.imap(_do, numbers), "torture", len(cases), unit="case", disable=None), strict=True
        ):
            results[index] = result
            if not result.is_good:
                tqdm.write(f"{result.case}: {result.problem}", file=sys.stderr)
    return [results[index] for index in range(len(cases))]


_TASKS: list[Callable[[], Result | None]] = []


def _do(number: int) -> Result | None:
    return _TASKS[number]()


def _reference_task(root: Path, setting: str) -> Callable[[], None]:
    return lambda: make_reference(root, setting)


def _case_task(case: Case, root: Path, seed: int) -> Callable[[], Result]:
    return lambda: run_case(case, root, seed)


def _report(results: Sequence[Result], options: argparse.Namespace, circumstances: str) -> int:
    text = as_markdown(results)
    failures = [result for result in results if not result.is_good]
    for failure in failures:
        command = (
            f"python scripts/torture.py --minutes {options.minutes:g} --seed {options.seed} --only '{failure.case}'"
        )
        text += f"\n- `{failure.case}`: {failure.problem}\n  Repeat: `{command}`\n"
    options.out.mkdir(parents=True, exist_ok=True)
    header = f"Faults against the training command, {circumstances}, seed {options.seed}.\n\n"
    (options.out / "torture.md").write_text(header + text, encoding="utf-8")
    (options.out / "torture.csv").write_text(as_csv(results), encoding="utf-8")
    print(header + text, end="")
    return 1 if failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python scripts/torture.py",
        description="Kill, corrupt, starve and exhaust small training runs, give the same command again each time, "
        "and compare what they leave, bit for bit, with undisturbed runs. Prints one table.",
        epilog="Exit code: 0 if every fault was survived, 1 otherwise, 2 for bad input.",
    )
    parser.add_argument(
        "--minutes", type=_positive, default=FULL_MINUTES, metavar="M", help="about so long, on 2 cores (%(default)g)"
    )
    parser.add_argument(
        "--campaign", nargs="+", choices=list(CAMPAIGNS), default=list(CAMPAIGNS), help="which ones (all)"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="CASE", help="these cases alone, as the list of failures calls them"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/torture"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults (%(default)s)")
    parser.add_argument("--jobs", type=int, default=_num_cores(), metavar="N", help="at a time (one per core)")
    return parser


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < 10_000:
        raise argparse.ArgumentTypeError(f"must be a number of minutes > 0, got '{text}'")
    return value
