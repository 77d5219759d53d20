"""Faults of the machine and of the data, each followed by the same command once the fault is gone."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from kfac_sua.data import load_digits
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training import capturing
from kfac_sua.training.state import Training
from torture.case import Bench, Case, Verdict, compare, failure_problem, finish
from torture.command import after_each_step, call, start
from torture.corruption import interrupt
from torture.outcome import SETTINGS, SMALL_RUN, command_line, difference, directory_of, read_outcome

CAMPAIGN = "faults"
KIB = 1024
# Mini-batches whose images are spoilt: (epoch, mini-batch), counted from 0. A refresh and a plain step among them.
SPOILT = {(0, 2), (0, 3), (1, 0), (1, 7), (2, 4)}
# Beyond what the process has when the run starts: enough for the small cell, too little for the large one.
MORE_MEMORY_BYTES = 200 * KIB**2


def cases(effort: float) -> list[Case]:
    """Return the cases.

    Args:
        effort: 1 for the whole campaign; with less, fewer repetitions of what depends on chance.
    """
    many, few = max(1, round(10 * effort)), max(1, round(4 * effort))
    settings = list(SETTINGS) if effort >= 0.5 else ["baseline", "sua_grouped_mc_ema"]
    found = [
        Case(CAMPAIGN, "the real command", f"real-command-{s}", (s,), partial(_real_command, setting=s))
        for s in settings[:: len(settings) - 1]
    ]
    found += [_case("a file size limit", "sua", n, _file_size_limit) for n in range(few)]
    if _can_mount():
        found += [_case("a full disk", "sua", n, _full_disk) for n in range(many)]
        found += [_case("a read-only directory", "sua", 0, _read_only)]
    found += [_case("the directory removed", "sua", n, _directory_removed) for n in range(few)]
    found += [_case("two processes at once", "sua", n, _two_processes) for n in range(many)]
    found += [
        Case(CAMPAIGN, "a data file damaged", f"data-file-{name}", (), partial(_data_file, damage=damage))
        for name, damage in DATA_DAMAGES.items()
    ]
    for setting in settings:
        for value in ("nan", "inf"):
            spoil = partial(_spoilt_stop, setting=setting, value=float(value))
            found.append(Case(CAMPAIGN, "NaN and inf, stop", f"{value}-stop-{setting}", (setting,), spoil))
            spoil = partial(_spoilt_skip, setting=setting, value=float(value))
            found.append(Case(CAMPAIGN, "NaN and inf, skip", f"{value}-skip-{setting}", (setting,), spoil))
    found.append(Case(CAMPAIGN, "out of memory in a sweep", "out-of-memory", (), _out_of_memory))
    return found


def _case(fault: str, setting: str, number: int, carry_out: Callable[[Bench, str], Verdict]) -> Case:
    name = f"{fault} {number}".replace(" ", "-")
    return Case(CAMPAIGN, fault, name, (setting,), partial(carry_out, setting=setting))


def _real_command(bench: Bench, *, setting: str) -> Verdict:
    """``python -m kfac_sua.train`` gives what a forked child gives."""
    arguments = command_line(setting, bench.output_dir)
    command = [sys.executable, "-m", "kfac_sua.train", *arguments]
    done = subprocess.run(command, cwd=bench.directory, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        return Verdict(problem=f"exit code {done.returncode}: {done.stderr}")
    problem = difference(read_outcome(directory_of(arguments)), bench.reference(setting))
    return Verdict(problem=problem, is_wrong=bool(problem))


def _file_size_limit(bench: Bench, *, setting: str) -> Verdict:
    """No file can grow beyond a few KiB, as with a quota that is used up."""
    arguments = command_line(setting, bench.output_dir)
    limit = bench.rng.randrange(4, 64) * KIB
    ended = call(arguments, bench.log_dir, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    problem = failure_problem(ended, directory_of(arguments).info, "File too large")
    return Verdict(problem=problem) if problem else finish(bench, setting, arguments)


def _full_disk(bench: Bench, *, setting: str) -> Verdict:
    """A disk that runs full somewhere in the run."""
    free = bench.rng.randrange(0, 360) * KIB
    with _mounted(bench.directory / "disk") as disk:
        (disk / "ballast").write_bytes(bytes(2**20 - free))
        arguments = command_line(setting, disk / "runs")
        ended = call(arguments, bench.log_dir)
        if ended.code != 0:
            info = directory_of(arguments).info
            reason = "No space left on device"
            # On a disk without a single free page, nothing can be recorded.
            problem = failure_problem(ended, info, reason, must_be_recorded=free >= 64 * KIB and info.exists())
            if problem:
                return Verdict(problem=f"{free // KIB} KiB free: {problem}")
        (disk / "ballast").unlink()
        return finish(bench, setting, arguments)


def _read_only(bench: Bench, *, setting: str) -> Verdict:
    """A disk that has become read-only between two attempts."""
    with _mounted(bench.directory / "disk") as disk:
        bench.output_dir.symlink_to(disk)
        arguments = interrupt(bench, setting)
        _mount("-o", "remount,ro", str(disk))
        ended = call(arguments, bench.log_dir)
        problem = failure_problem(ended, directory_of(arguments).info, "Read-only file system", must_be_recorded=False)
        _mount("-o", "remount,rw", str(disk))
        return Verdict(problem=problem) if problem else finish(bench, setting, arguments)


def _directory_removed(bench: Bench, *, setting: str) -> Verdict:
    """Someone removes the directory of a run in progress."""
    arguments = command_line(setting, bench.output_dir)
    path, step = directory_of(arguments).path, bench.rng.randrange(1, 20)

    def remove(training: Training) -> None:
        if training.step == step:
            shutil.rmtree(path)

    ended = call(arguments, bench.log_dir, lambda: after_each_step(remove))
    problem = failure_problem(ended, path, "was removed or replaced", must_be_recorded=False)
    return Verdict(problem=problem) if problem else finish(bench, setting, arguments)


def _two_processes(bench: Bench, *, setting: str) -> Verdict:
    """Of two processes that start the same run, one carries it out; the other one leaves with a sentence."""
    arguments = command_line(setting, bench.output_dir)
    running = [start(arguments, bench.directory / name) for name in ("first", "second")]
    ended = [process.wait() for process in running]
    done = [one for one in ended if one.code == 0 and not one.complaint]
    others = [one for one in ended if one not in done]
    if not done or any(not one.is_refusal or "is being trained by process" not in one.err for one in others):
        return Verdict(problem=" and ".join(map(str, ended)))
    return compare(bench, setting, arguments, done[0])


def _data_file(bench: Bench, *, damage: Callable[[Path], None]) -> Verdict:
    """A damaged data file is refused before anything is written; with a whole one, the run finishes."""
    data, healthy = bench.directory / "data", bench.directory / "healthy"
    arguments = [*SMALL_RUN, "dataset=cifar10", f"dataset.data_dir={data}", "dataset.validation_size=100"]
    undisturbed = [*arguments, f"output_dir={healthy}", "preconditioner=sua"]
    arguments = [*arguments, f"output_dir={bench.output_dir}", "preconditioner=sua"]
    data.mkdir()
    _write_archive(data / "cifar10.npz")
    call(undisturbed, bench.log_dir)
    shutil.copyfile(data / "cifar10.npz", bench.directory / "copy.npz")
    damage(data / "cifar10.npz")
    ended = call(arguments, bench.log_dir)
    if not ended.is_refusal or ended.code != 2 or "cifar10.npz" not in ended.err or bench.output_dir.exists():
        return Verdict(problem=f"expected exit code 2, one sentence and no directory: {ended}")
    if (data / "cifar10.npz").is_dir():
        (data / "cifar10.npz").rmdir()
    shutil.copyfile(bench.directory / "copy.npz", data / "cifar10.npz")
    ended = call(arguments, bench.log_dir)
    if ended.code != 0 or ended.complaint:
        return Verdict(problem=f"with a whole file: {ended}")
    problem = difference(read_outcome(directory_of(arguments)), read_outcome(directory_of(undisturbed)))
    return Verdict(problem=problem, is_wrong=bool(problem))


def _write_archive(path: Path, **changes: Any) -> None:
    """Write an archive of digits."""
    train, test, classes = load_digits()
    arrays = {
        "train_images": train.images[:600].permute(0, 2, 3, 1).numpy(),
        "train_labels": train.labels[:600].numpy(),
        "test_images": test.images.permute(0, 2, 3, 1).numpy(),
        "test_labels": test.labels.numpy(),
        "classes": np.array(classes),
    }
    np.savez(path, **(arrays | {name: change(arrays[name]) for name, change in changes.items()}))


def _with_nan(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    spoilt = images.astype(np.float32)
    spoilt[0, 0, 0, 0] = np.nan
    return spoilt


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DATA_DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "removed": Path.unlink,
    "directory": _replace_by_directory,
    "nan-pixels": lambda path: _write_archive(path, train_images=_with_nan),
    "label-out-of-range": lambda path: _write_archive(path, train_labels=lambda labels: labels + 1),
    "pickled-labels": lambda path: _write_archive(path, train_labels=lambda labels: labels.astype(object)),
}


def _spoilt_stop(bench: Bench, *, setting: str, value: float) -> Verdict:
    """With ``non_finite=stop``, the first spoilt mini-batch ends the run as diverged, in its epoch."""
    arguments = command_line(setting, bench.output_dir, "non_finite=stop")
    ended = call(arguments, bench.log_dir, lambda: _spoil(value))
    if ended.code != 0 or ended.complaint:
        return Verdict(problem=ended.complaint or str(ended))
    info = read_run_info(directory_of(arguments).info)
    is_right = (info.status, info.diverged_at_epoch) == ("diverged", 1)
    return Verdict(
        problem="" if is_right else f"expected diverged in epoch 1, got {info.status}", is_wrong=not is_right
    )


def _spoilt_skip(bench: Bench, *, setting: str, value: float) -> Verdict:
    """With ``non_finite=skip``, a run is what it would be without the spoilt mini-batches, also when it is killed."""
    arguments = command_line(setting, bench.output_dir, "non_finite=skip")
    without = command_line(setting, bench.directory / "without", "non_finite=skip")
    running = start(arguments, bench.log_dir, lambda: _spoil(value))
    running.sleep(bench.rng.uniform(0, bench.seconds(setting)))
    running.send(9)
    running.wait()
    for command, prepare in ((arguments, lambda: _spoil(value)), (without, lambda: _spoil(None))):
        ended = call(command, bench.log_dir, prepare)
        if ended.code != 0 or ended.complaint:
            return Verdict(problem=ended.complaint or str(ended))
    skipped, left_out = (read_outcome(directory_of(command)) for command in (arguments, without))
    if skipped.info.skipped_steps != len(SPOILT):
        return Verdict(problem=f"skipped {skipped.info.skipped_steps} of {len(SPOILT)}", is_wrong=True)
    problem = difference(skipped, left_out)
    return Verdict(problem=problem and f"wrong result: {problem}", is_wrong=bool(problem))


def _spoil(value: float | None) -> None:
    """Put a value into a pixel of some mini-batches, or take no step on these."""
    capturing.take_step = _spoilt_step(capturing.take_step, value)
    capturing.take_step_if_finite = _spoilt_step(capturing.take_step_if_finite, value)


def _spoilt_step(take_step: Callable[[Training], None], value: float | None) -> Callable[[Training], None]:
    def take(training: Training) -> None:
        if (training.epoch, training.batch) not in SPOILT:
            take_step(training)
            return
        inputs, labels = training.loader.next_batch()
        if value is None:
            training.skipped_steps += 1
            return
        inputs[0, 0, 0, 0] = value
        training.loader.next_batch = lambda: (inputs, labels)  # type: ignore[method-assign]
        try:
            take_step(training)
        finally:
            del training.loader.next_batch

    return take


def _out_of_memory(bench: Bench) -> Verdict:
    """A cell of a sweep that needs too much memory fails with the reason recorded; the next one is carried out."""
    common = [
        *SMALL_RUN,
        "preconditioner=baseline",
        "epochs=1",
        "dataset.train_size=100",
        f"output_dir={bench.output_dir}",
    ]
    arguments = [*common, "-m", "model.width=32,1"]
    large, small = (directory_of([*common, f"model.width={width}"]).info for width in (32, 1))
    ended = call(arguments, bench.log_dir, _limit_memory)
    if ended.complaint or ended.code != 1:
        return Verdict(problem=ended.complaint or str(ended))
    failed, finished = read_run_info(large), read_run_info(small)
    if failed.status != "failed" or "emory" not in (failed.failure or "") or finished.status != "finished":
        return Verdict(problem=f"got {failed.status} ({failed.failure}) and {finished.status}")
    ended = call(arguments, bench.log_dir)
    statuses = [read_run_info(path).status for path in (large, small)]
    is_retried = ended.code == 0 and ended.out.count("already finished") == 1 and statuses == ["finished"] * 2
    return Verdict(problem="" if is_retried else f"not retried: {ended}, {statuses}")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MORE_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _can_mount() -> bool:
    """Whether this process may mount file systems; elsewhere the cases that need it are left out, with a line."""
    can = sys.platform == "linux" and os.geteuid() == 0 and shutil.which("mount") is not None
    if not can:
        print("faults: mounting needs root, so a full disk and a read-only directory are left out", file=sys.stderr)
    return can


@contextmanager
def _mounted(path: Path) -> Iterator[Path]:
    """A disk of one MiB."""
    path.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path))
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
