"""Damaged files: every file of a run's directory, damaged in every way, before the same command goes on."""

import hashlib
import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from signal import SIGKILL

import torch

from kfac_sua.training.checkpoint import MAGIC
from torture.case import Bench, Case, Verdict, compare, reference_dir
from torture.command import Ended, after_each_save, call
from torture.outcome import command_line, directory_of

CAMPAIGN = "corruption"
SETTING = "sua_grouped_mc_ema"
# Killed after this step's checkpoint: the third mini-batch of the second epoch, of 8 each.
INTERRUPTED_AT = 11
FILES = (
    "checkpoint.state",
    "checkpoint.previous.state",
    "metrics.csv",
    "run.json",
    "config.yaml",
    "events.out",
    ".lock",
)
# A finished run has nothing to go on with; the command only reads what it says about itself.
FILES_OF_A_FINISHED_RUN = ("checkpoint.state", "metrics.csv", "run.json", "config.yaml", ".lock")

Damage = Callable[[Path, Bench], None]


def cases(effort: float) -> list[Case]:
    """Return the cases.

    Args:
        effort: 1 for the whole campaign; with less, fewer random lengths and bits.
    """
    found = []
    for name, damage in DAMAGES.items():
        is_random = name in ("truncated", "a bit flipped", "random bytes")
        for number in range(max(1, round(3 * effort)) if is_random else 1):
            for file in FILES:
                found.append(_case(name, file, number, partial(_damage_interrupted, file=file, damage=damage)))
            for file in FILES_OF_A_FINISHED_RUN:
                label = f"finished {file}"
                found.append(_case(name, label, number, partial(_damage_finished, file=file, damage=damage)))
    found += [
        _case(name, "both checkpoints", 0, partial(_damage_both_checkpoints, damage=damage))
        for name, damage in DAMAGES.items()
    ]
    return found


def _case(damage: str, file: str, number: int, carry_out: Callable[[Bench], Verdict]) -> Case:
    name = f"{damage} {file} {number}".replace(" ", "-")
    return Case(CAMPAIGN, f"file {damage}", name, (SETTING,), carry_out)


def interrupt(bench: Bench, setting: str = SETTING, *more: str) -> list[str]:
    """Start a run, kill it in its second epoch, and return the command that goes on.

    Args:
        bench: Where.
        setting: One of ``SETTINGS``.
        more: Further overrides.

    Raises:
        RuntimeError: If it was not killed.
    """

    def kill(step: int) -> None:
        if step >= INTERRUPTED_AT:
            os.kill(os.getpid(), SIGKILL)

    # As often as possible, so that there is a checkpoint before the last.
    arguments = command_line(setting, bench.output_dir, "checkpoint_interval_s=1e-6", *more)
    ended = call(arguments, bench.log_dir, lambda: after_each_save(kill))
    if ended.code != -SIGKILL:
        raise RuntimeError(f"the run was not interrupted: {ended}")
    return command_line(setting, bench.output_dir, *more)


def _damage_interrupted(bench: Bench, *, file: str, damage: Damage) -> Verdict:
    arguments = interrupt(bench)
    damage(_find(directory_of(arguments).path, file), bench)
    return _go_on(bench, arguments)


def _damage_both_checkpoints(bench: Bench, *, damage: Damage) -> Verdict:
    arguments = interrupt(bench)
    for file in ("checkpoint.state", "checkpoint.previous.state"):
        damage(directory_of(arguments).path / file, bench)
    return _go_on(bench, arguments)


def _damage_finished(bench: Bench, *, file: str, damage: Damage) -> Verdict:
    """Damage a finished run: it is refused, or its records are what they were."""
    arguments = command_line(SETTING, bench.output_dir)
    undisturbed = directory_of(command_line(SETTING, reference_dir(bench.root, SETTING))).path
    shutil.copytree(undisturbed, directory_of(arguments).path)
    damage(_find(directory_of(arguments).path, file), bench)
    ended = call(arguments, bench.log_dir)
    if file == "checkpoint.state" and ended.out.startswith("already finished"):  # which is not read any more
        _restore(directory_of(arguments).path / file, undisturbed / file)
    return _judge(bench, arguments, ended)


def _restore(path: Path, original: Path) -> None:
    if path.is_dir():
        path.rmdir()
    shutil.copyfile(original, path)


def _go_on(bench: Bench, arguments: list[str]) -> Verdict:
    """Give the same command again: it refuses, or leaves what an undisturbed run leaves."""
    return _judge(bench, arguments, call(arguments, bench.log_dir))


def _judge(bench: Bench, arguments: list[str], ended: Ended) -> Verdict:
    if (payload := _payload_path(bench)).exists():
        return Verdict(problem=f"the payload was executed: {payload}", is_wrong=True)
    if ended.is_refusal:
        return Verdict()
    return compare(bench, SETTING, arguments, ended)


def _find(directory: Path, file: str) -> Path:
    """Return a file of a run; the name of the event file ends in what cannot be foreseen."""
    return next(directory.glob(f"{file}*tfevents*")) if file == "events.out" else directory / file


def _truncate(path: Path, bench: Bench) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: bench.rng.randrange(max(1, len(content)))])


def _flip_a_bit(path: Path, bench: Bench) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[bench.rng.randrange(len(content))] ^= 1 << bench.rng.randrange(8)
    path.write_bytes(content)


def _empty(path: Path, bench: Bench) -> None:
    del bench
    path.write_bytes(b"")


def _randomise(path: Path, bench: Bench) -> None:
    path.write_bytes(bench.rng.randbytes(max(1, path.stat().st_size)))


def _remove(path: Path, bench: Bench) -> None:
    del bench
    path.unlink()


def _make_directory(path: Path, bench: Bench) -> None:
    del bench
    path.unlink()
    path.mkdir()


def _take_from_another_seed(path: Path, bench: Bench) -> None:
    """Replace a file by that of a run that differs in the seed alone."""
    donor_bench = Bench(bench.root, bench.directory / "donor", random.Random(0))
    donor = directory_of(interrupt(donor_bench, SETTING, "seed=1")).path
    file = "events.out" if path.name.startswith("events.out") else path.name
    shutil.copyfile(_find(donor, file), path)


def _plant_pickle(path: Path, bench: Bench) -> None:
    """Write a pickle that makes a file when it is loaded."""
    path.write_bytes(pickle.dumps(_Payload(_payload_path(bench))))


def _plant_saved_payload(path: Path, bench: Bench) -> None:
    """Write what ``torch.save`` makes of such an object, with the right head and digest of a checkpoint."""
    buffer = io.BytesIO()
    torch.save({"format_version": 2, "model": _Payload(_payload_path(bench))}, buffer)
    path.write_bytes(MAGIC + hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())


class _Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch '{self._path}'",)


def _payload_path(bench: Bench) -> Path:
    return bench.directory / "executed"


DAMAGES: dict[str, Damage] = {
    "truncated": _truncate,
    "a bit flipped": _flip_a_bit,
    "random bytes": _randomise,
    "emptied": _empty,
    "removed": _remove,
    "a directory instead": _make_directory,
    "of another run": _take_from_another_seed,
    "a hostile pickle": _plant_pickle,
    "a hostile torch.save": _plant_saved_payload,
}
