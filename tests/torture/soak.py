"""Long runs: memory, file descriptors and threads stay flat, and seconds go on through a change of the clock."""

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from kfac_sua import train
from kfac_sua.training.state import Training
from torture.case import Bench, Case, Verdict, compare
from torture.command import after_each_step, call
from torture.outcome import SMALL_RUN, command_line

CAMPAIGN = "soak"
NUM_STEPS = 10_000
STEPS_PER_EPOCH = 80
STEPS_BETWEEN_SAMPLES = 20
NUM_RUNS = 200
LARGEST_GROWTH = 0.02
CLOCK_JUMPS_S = (-86_400.0, -0.5, 86_400.0)

_LONG_RUN = (
    *("model=tiny", "dataset=digits", "dataset.train_size=800", "dataset.train_eval_size=100", "batch_size=10"),
    *("device=cpu", "num_threads=1", "progress=none", "checkpoint_interval_s=1"),
)


def cases(effort: float) -> list[Case]:
    """Return the cases.

    Args:
        effort: 1 for the whole campaign; with less, shorter runs.
    """
    num_epochs = max(5, round(NUM_STEPS * min(effort, 1.0) / STEPS_PER_EPOCH))
    num_runs = max(8, round(NUM_RUNS * min(effort, 1.0)))
    steps, runs = f"{num_epochs * STEPS_PER_EPOCH} steps: memory", f"{num_runs} runs in a process: descriptors, threads"
    return [
        *(
            Case(CAMPAIGN, steps, f"memory-{name}", (), partial(_train_long, name=name, num_epochs=num_epochs))
            for name in ("baseline", "kfac", "sua_grouped")
        ),
        Case(CAMPAIGN, runs, "descriptors", (), partial(_train_often, num_runs=num_runs)),
        *(
            Case(CAMPAIGN, "the clock jumps", f"clock-{jump:g}", ("sua",), partial(_jump, jump_s=jump))
            for jump in CLOCK_JUMPS_S
        ),
    ]


def _train_long(bench: Bench, *, name: str, num_epochs: int) -> Verdict:
    """The resident memory of the last fifth of a run is that of the second fifth."""
    samples = bench.directory / "bytes"
    arguments = [*_LONG_RUN, f"preconditioner={name}", f"epochs={num_epochs}", f"output_dir={bench.output_dir}"]
    if name != "baseline":
        arguments.append("preconditioner.inverse_period=10")

    def sample(training: Training) -> None:
        if training.step % STEPS_BETWEEN_SAMPLES == 0:
            _append(samples, resident_bytes())

    ended = call(arguments, bench.log_dir, lambda: after_each_step(sample))
    if ended.code != 0 or ended.complaint:
        return Verdict(problem=ended.complaint or str(ended))
    growth = relative_growth([float(line) for line in samples.read_text().split()])
    is_flat = growth <= LARGEST_GROWTH
    return Verdict(problem="" if is_flat else f"resident memory grew by {growth:.1%}")


def relative_growth(values: list[float]) -> float:
    """Return by how much the median of the last fifth exceeds that of the second fifth; the first is warm-up."""
    fifth = len(values) // 5
    before, after = median(values[fifth : 2 * fifth]), median(values[-fifth:])
    return after / before - 1


def _train_often(bench: Bench, *, num_runs: int) -> Verdict:
    """After every run of a sweep, a process has as many descriptors and threads as after the second."""
    samples = bench.directory / "counts"
    arguments = [*SMALL_RUN, "-m", "preconditioner=sua", f"seed=range({num_runs})", "epochs=1", "batch_size=200"]
    ended = call([*arguments, f"output_dir={bench.output_dir}"], bench.log_dir, lambda: _after_each_run(samples))
    if ended.code != 0 or ended.complaint:
        return Verdict(problem=ended.complaint or str(ended))
    counts = samples.read_text().split()
    if len(counts) != num_runs:
        return Verdict(problem=f"{len(counts)} of {num_runs} runs were carried out")
    has_grown = counts[-1] != counts[1]
    return Verdict(problem=f"descriptors/threads grew from {counts[1]} to {counts[-1]}" if has_grown else "")


def _after_each_run(samples: Path) -> None:
    original: Callable[..., object] = train.run

    def run(*arguments: object) -> object:
        info = original(*arguments)
        descriptors, threads = len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir()))
        _append(samples, f"{descriptors}/{threads}")
        return info

    train.run = run


def _jump(bench: Bench, *, jump_s: float) -> Verdict:
    """A wall clock that is set anew in the middle changes no number, and no second runs backwards or is invented."""
    arguments = command_line("sua", bench.output_dir)

    def set_clock_in_epoch_two() -> None:
        true_time = time.time

        def jump(training: Training) -> None:
            if training.step == 12:
                time.time = lambda: true_time() + jump_s

        after_each_step(jump)

    ended = call(arguments, bench.log_dir, set_clock_in_epoch_two)
    return compare(bench, "sua", arguments, ended)


def resident_bytes() -> int:
    """Return the resident memory of this process, as Linux counts it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _append(path: Path, value: object) -> None:
    with path.open("a", encoding="ascii") as file:
        file.write(f"{value}\n")
