"""Kills and interruptions at random instants, each followed by the same command until the run is done."""

import os
from collections.abc import Callable
from functools import partial
from signal import SIGINT, SIGKILL, SIGTERM

from torture.case import Bench, Case, Verdict, finish
from torture.command import Ended, Running, before_file_operation, nothing, start
from torture.outcome import SETTINGS, command_line, directory_of, steps_on_disk

CAMPAIGN = "kills"
KILLS_PER_RUN = 3
# The second Ctrl-C comes after at most so long: sometimes while the checkpoint of the first one is being written.
LARGEST_PAUSE_S = 0.03


def cases(effort: float) -> list[Case]:
    """Return the cases.

    Args:
        effort: 1 for the whole campaign, of about a hundred kills at random instants and as many at file operations.
    """
    num_runs = max(1, round(3.5 * effort))
    kinds: dict[str, Callable[[Bench, str], Verdict]] = {
        "SIGKILL at a random instant": partial(_killed_repeatedly, make_start=_kill_later),
        "SIGKILL before a file operation": partial(_killed_repeatedly, make_start=_kill_at_file_operation),
        "SIGTERM": partial(_asked_to_stop, numbers=(SIGTERM,)),
        "SIGINT": partial(_asked_to_stop, numbers=(SIGINT,)),
        "SIGINT twice": partial(_asked_to_stop, numbers=(SIGINT, SIGINT)),
    }
    return [
        Case(CAMPAIGN, kind, f"{kind} {number} {setting}".replace(" ", "-"), (setting,), _bound(carry_out, setting))
        for kind, carry_out in kinds.items()
        for setting in SETTINGS
        for number in range(num_runs)
    ]


def _bound(carry_out: Callable[[Bench, str], Verdict], setting: str) -> Callable[[Bench], Verdict]:
    return lambda bench: carry_out(bench, setting)


def _wait(running: Running, bench: Bench, setting: str) -> None:
    """Wait until a random instant: one in four anywhere in the process, the others after its first file."""
    seconds = bench.seconds(setting)
    if bench.rng.random() < 0.25:
        running.sleep(bench.rng.uniform(0, seconds))
    else:
        running.wait_for_first_file()
        running.sleep(bench.rng.uniform(0, seconds / 2))


def _kill_later(bench: Bench, setting: str, arguments: list[str]) -> Ended:
    running = start(arguments, bench.log_dir, nothing)
    _wait(running, bench, setting)
    running.send(SIGKILL)
    return running.wait()


def _kill_at_file_operation(bench: Bench, setting: str, arguments: list[str]) -> Ended:
    left = bench.rng.randrange(bench.file_operations(setting))

    def count_down() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), SIGKILL)
        left -= 1

    return start(arguments, bench.log_dir, lambda: before_file_operation(count_down)).wait()


def _killed_repeatedly(bench: Bench, setting: str, *, make_start: Callable[[Bench, str, list[str]], Ended]) -> Verdict:
    """Kill a run several times, then let it finish."""
    arguments = command_line(setting, bench.output_dir)
    lost: list[int] = []
    for _ in range(KILLS_PER_RUN):
        ended = make_start(bench, setting, arguments)
        if ended.complaint or ended.code not in (0, -SIGKILL):
            return Verdict(len(lost) + 1, tuple(lost), ended.complaint or f"it left before the kill: {ended}")
        if ended.code == 0:
            break  # done before it was killed
        done, saved, _ = ended.counts
        on_disk = steps_on_disk(directory_of(arguments))
        if on_disk < saved:
            return Verdict(len(lost) + 1, tuple(lost), f"step {saved} was saved, but only {on_disk} can be read back")
        lost.append(max(0, done - on_disk))
    verdict = finish(bench, setting, arguments)
    return Verdict(len(lost), tuple(lost), verdict.problem, verdict.is_wrong)


def _asked_to_stop(bench: Bench, setting: str, *, numbers: tuple[int, ...]) -> Verdict:
    """Ask a run to stop, perhaps twice, at a random instant; then let it finish."""
    arguments = command_line(setting, bench.output_dir)
    running = start(arguments, bench.log_dir)
    _wait(running, bench, setting)
    _send(running, numbers, bench)
    ended = running.wait()
    done, _, _ = ended.counts
    lost = max(0, done - steps_on_disk(directory_of(arguments)))
    problem = _interruption_problem(ended, numbers, lost)
    if problem:
        return Verdict(lost=(lost,), problem=problem)
    verdict = finish(bench, setting, arguments)
    return Verdict(lost=(lost,), problem=verdict.problem, is_wrong=verdict.is_wrong)


def _send(running: Running, numbers: tuple[int, ...], bench: Bench) -> None:
    for index, number in enumerate(numbers):
        if index:
            running.sleep(bench.rng.uniform(0, LARGEST_PAUSE_S))
        running.send(number)


def _interruption_problem(ended: Ended, numbers: tuple[int, ...], lost: int) -> str:
    """Return what is wrong with how a run has stopped, if anything."""
    number = numbers[0]
    # Until training begins, and after its end, there is nothing to save, and SIGTERM acts as in any other program.
    conventional = {128 + number, 0} | ({-SIGTERM} if number == SIGTERM else set())
    if ended.complaint or ended.code not in conventional:
        return ended.complaint or f"expected exit code {128 + number}: {ended}"
    if len(numbers) == 1 and lost:
        return f"{lost} steps were lost, though a checkpoint was to be written: {ended}"
    return ""
