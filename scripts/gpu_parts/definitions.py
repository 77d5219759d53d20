"""The parts of a report, risky ones last: at full size for a GPU, or tiny for a trial on a CPU."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch.distributed as dist

from gpu_parts.part import Part
from kfac_sua.runs.record import read_records, read_run_info

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
"""What the limits below add up to."""

RESNET50 = (
    "--model preact_resnet50 --period 64 --settings baseline kfac sua sua_grouped:group_size=64 "
    "--rounds 5 --refresh-rounds 2"
)
TINY_BENCH = "--model tiny --device cpu --settings sua --rounds 1 --refresh-rounds 1"
STRUCTURES = "preconditioner=baseline,kfac,grouped,sua,sua_grouped"
DENSE_KFAC = "preconditioner=kfac preconditioner.application=weight preconditioner.inverse_method=cholesky"
TINY_RUN = "model=tiny dataset=digits dataset.train_size=200 device=cpu num_threads=1 preconditioner.inverse_period=3"
# At a width of 1 the default 0.03 is past the edge for K-FAC and SUA; at 0.01 all five structures learn.
LEARNING_RATE = "optimizer.lr=0.01"
COLUMNS = ("train_time_s", "captured_s", "statistics_s", "inversion_s", "train_loss", "val_error")


def define_parts(out: Path, *, is_tiny: bool) -> list[Part]:
    """Return all parts.

    Args:
        out: Where they write.
        is_tiny: Whether for a trial on a CPU.
    """
    return [
        _tests(is_tiny),
        *_benches(out, is_tiny),
        _training(out, is_tiny),
        _bits(out, is_tiny),
        *_processes(is_tiny),
    ]


def _tests(is_tiny: bool) -> Part:
    if is_tiny:
        return Part("tests", (f"{_python()} -m pytest -m gpu --collect-only -q tests/training",), 120)
    return Part("tests", (f"CUBLAS_WORKSPACE_CONFIG=:4096:8 {_python()} -m pytest -m gpu -q",), 120, shown_lines=40)


def _benches(out: Path, is_tiny: bool) -> list[Part]:
    """Return the measurements of both networks: captured and compiled, and eager."""
    sizes = {"bench-vgg11": ("", 45), "bench-resnet50": (RESNET50, 50)}
    parts = []
    for network, (options, limit_s) in sizes.items():
        for name, more, keys in ((network, "--compiled", ""), (f"{network}-eager", "", "capture=false")):
            words = TINY_BENCH if is_tiny else f"{options} {more}"
            command = f"{_python()} -m kfac_sua.bench {words} --json {_quoted(out / f'{name}.json')} {keys}"
            parts.append(Part(name, (_spaced(command),), limit_s, shown_from="Time over", shown_lines=40))
    return parts


def _training(out: Path, is_tiny: bool) -> Part:
    """Return an epoch of every structure, and of K-FAC with dense inverses."""
    runs = out / "runs"
    settings = ("preconditioner=baseline", "preconditioner=sua") if is_tiny else (f"-m {STRUCTURES}", DENSE_KFAC)
    commands = tuple(
        _train(f"{setting} {'capture=auto' if is_tiny else 'capture=true'} {_size(setting, is_tiny)}", directory)
        for setting, directory in zip(settings, (runs, runs / "dense"), strict=True)
    )
    note = "" if is_tiny or _has_cifar10() else "On `dataset=digits`, ten epochs, as `data/cifar10.npz` is not there."
    return Part("training", commands, 85, note=note, summary=lambda: training_table(runs))


def _size(setting: str, is_tiny: bool) -> str:
    if is_tiny:
        return "epochs=1 " + _tiny_run(setting)
    return f"{LEARNING_RATE} epochs=1" if _has_cifar10() else f"{LEARNING_RATE} epochs=10 dataset=digits"


def _tiny_run(setting: str) -> str:
    """Return the keys of a tiny run; plain SGD has no refresh."""
    return TINY_RUN if "baseline" not in setting else TINY_RUN.rpartition(" ")[0]


def _bits(out: Path, is_tiny: bool) -> Part:
    """Return the same 200 steps captured and eager, and their comparison."""
    if is_tiny:
        keys = f"preconditioner=sua epochs=2 {_tiny_run('sua')}"
    else:
        images = "train_size=10000 epochs=2" if _has_cifar10() else "train_size=1000 epochs=20 dataset=digits"
        keys = f"-m preconditioner=baseline,sua {LEARNING_RATE} dataset.{images}"
    captured, eager = out / "bits" / "captured", out / "bits" / "eager"
    commands = (
        _train(f"{keys} deterministic=true capture={'auto' if is_tiny else 'true'}", captured),
        _train(f"{keys} deterministic=true capture=false", eager),
        f"{_script('bits.py')} {_quoted(captured)} {_quoted(eager)}",
    )
    return Part("bits", commands, 45, shown_lines=40, shown_from=f"$ {commands[-1]}")


def _processes(is_tiny: bool) -> list[Part]:
    """Return a single process in a group of NCCL's, and two on one card, which NCCL refuses and gloo may or may not."""
    device, nccl = ("cpu", "gloo") if is_tiny else ("cuda", "nccl")
    has_nccl, has_gloo = (
        dist.is_available() and dist.is_nccl_available(),
        dist.is_available() and dist.is_gloo_available(),
    )
    why_not = "this PyTorch is built without {}"
    script = _script("processes.py")
    return [
        Part(
            "nccl",
            (f"{script} --backend {nccl} --processes 1 --device {device} --steps 20",),
            20,
            skipped="" if is_tiny or has_nccl else why_not.format("NCCL"),
        ),
        Part(
            "gloo-shared-card",
            (f"{script} --backend gloo --processes 2 --device {device} --steps 10",),
            25,
            shown_lines=40,
            skipped="" if has_gloo else why_not.format("gloo"),
        ),
    ]


def training_table(runs: Path) -> str:
    """Return the last row of each metrics.csv below a directory, as a table in Markdown."""
    rows = [f"| run | status | epoch | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for path in sorted(runs.rglob("metrics.csv")):
        last = read_records(path)[-1]
        status = read_run_info(path.with_name("run.json")).status
        values = " | ".join(f"{getattr(last, name):.4g}" for name in COLUMNS)
        rows.append(f"| {path.parents[2].relative_to(runs)} | {status} | {last.epoch} | {values} |")
    return "\n".join(rows)


def _has_cifar10() -> bool:
    return (ROOT / "data" / "cifar10.npz").exists()


def _train(keys: str, directory: Path) -> str:
    return f"{_python()} -m kfac_sua.train {keys} {_quoted(f'output_dir={_path(directory)}')}"


def _script(name: str) -> str:
    return f"{_python()} {_path(Path(__file__).with_name(name))}"


def _python() -> str:
    return _quoted(Path(sys.executable))


def _quoted(value: Path | str) -> str:
    return shlex.quote(_path(value) if isinstance(value, Path) else value)


def _path(path: Path) -> str:
    """Return a path as a command in the root of the checkout names it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)


def _spaced(command: str) -> str:
    return " ".join(command.split())
