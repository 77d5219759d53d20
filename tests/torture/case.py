"""One case of a campaign, and what it needs to know about undisturbed runs."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kfac_sua.runs.run_info import read_run_info
from torture.command import Ended, call
from torture.outcome import Outcome, command_line, difference, directory_of, read_outcome
from torture.table import Result


@dataclass(frozen=True)
class Bench:
    """Where a case works.

    Attributes:
        root: Directory of the whole campaign, which holds the undisturbed runs.
        directory: The case's own, empty.
        rng: The case's own randomness.
    """

    root: Path
    directory: Path
    rng: random.Random

    @property
    def output_dir(self) -> Path:
        """Where the case's runs go."""
        return self.directory / "runs"

    @property
    def log_dir(self) -> Path:
        """Where what they print goes."""
        return self.directory / "log"

    def reference(self, setting: str) -> Outcome:
        """Return what an undisturbed run of a setting leaves."""
        return read_outcome(directory_of(command_line(setting, reference_dir(self.root, setting))))

    def seconds(self, setting: str) -> float:
        """Return how long an undisturbed run of a setting took."""
        return _measured(self.root, setting)["seconds"]

    def file_operations(self, setting: str) -> int:
        """Return how many files an undisturbed run of a setting wrote, renamed and removed."""
        return int(_measured(self.root, setting)["file_operations"])


@dataclass(frozen=True)
class Verdict:
    """What a case has found; see :class:`Result`."""

    tried: int = 1
    lost: tuple[int, ...] = ()
    problem: str = ""
    is_wrong: bool = False


@dataclass(frozen=True)
class Case:
    """A fault to bring about.

    Attributes:
        campaign: Its campaign.
        fault: Kind of fault.
        name: Distinguishes it within the campaign.
        settings: Undisturbed runs that it is compared with.
        carry_out: Does it.
    """

    campaign: str
    fault: str
    name: str
    settings: tuple[str, ...]
    carry_out: Callable[[Bench], Verdict]

    @property
    def full_name(self) -> str:
        """Name with which the case can be repeated."""
        return f"{self.campaign}/{self.name}"


def run_case(case: Case, root: Path, seed: int) -> Result:
    """Carry out a case; whatever it raises counts as a fault that was not survived.

    Args:
        case: The case.
        root: Directory of the whole campaign.
        seed: Of the campaign; each case draws from its own stream.
    """
    directory = root / "cases" / case.full_name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        verdict = case.carry_out(Bench(root, directory, random.Random(f"{seed}/{case.full_name}")))
    except Exception as error:
        verdict = Verdict(problem=f"{type(error).__name__}: {error}")
    if not verdict.problem:
        shutil.rmtree(directory, ignore_errors=True)  # what has gone wrong stays for inspection
    return Result(
        case.campaign,
        case.fault,
        case.full_name,
        tried=verdict.tried,
        survived=0 if verdict.problem else verdict.tried,
        wrong=int(verdict.is_wrong),
        lost=verdict.lost,
        problem=verdict.problem,
    )


def reference_dir(root: Path, setting: str) -> Path:
    """Return where the undisturbed run of a setting writes."""
    return root / "undisturbed" / setting


def make_reference(root: Path, setting: str) -> None:
    """Carry out an undisturbed run, and write down how long it takes.

    Args:
        root: Directory of the whole campaign.
        setting: One of ``SETTINGS``.

    Raises:
        RuntimeError: If it does not finish.
    """
    directory = reference_dir(root, setting)
    ended = call(command_line(setting, directory), directory / "log")
    if ended.code != 0:
        raise RuntimeError(f"The undisturbed run of {setting} failed: {ended}.")
    measured = {"seconds": ended.seconds, "file_operations": ended.counts[2]}
    (directory / "measured.json").write_text(json.dumps(measured), encoding="utf-8")


def _measured(root: Path, setting: str) -> dict[str, float]:
    return json.loads((reference_dir(root, setting) / "measured.json").read_text(encoding="utf-8"))


def finish(bench: Bench, setting: str, arguments: list[str]) -> Verdict:
    """Give the same command again, undisturbed, and compare what it leaves with what it must."""
    ended = call(arguments, bench.log_dir)
    return compare(bench, setting, arguments, ended)


def compare(bench: Bench, setting: str, arguments: list[str], ended: Ended) -> Verdict:
    """Judge a command that must have finished with the results of an undisturbed run."""
    if ended.code != 0 or ended.complaint:
        return Verdict(problem=f"the same command does not finish: {ended.complaint or ended}")
    problem = difference(read_outcome(directory_of(arguments)), bench.reference(setting))
    return Verdict(problem=problem and f"wrong result: {problem}", is_wrong=bool(problem))


def failure_problem(ended: Ended, path: Path, reason: str, *, must_be_recorded: bool = True) -> str:
    """Return what is wrong with a run that had to fail, if anything.

    Args:
        ended: How its command ended.
        path: Its run.json.
        reason: Part of the sentence that says why it failed.
        must_be_recorded: Whether run.json can and must say why, too.
    """
    if ended.complaint:
        return ended.complaint
    if not ended.is_refusal or reason not in ended.err:
        return f"expected one sentence with '{reason}', got {ended}"
    if not must_be_recorded:
        return ""
    info = read_run_info(path)
    if info.status != "failed" or reason not in (info.failure or ""):
        return f"run.json says {info.status}, {info.failure!r}, and not failed with '{reason}'"
    return ""
