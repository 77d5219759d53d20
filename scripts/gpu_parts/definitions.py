"""The parts of a report, risky ones last: at full size for a GPU, or tiny for a trial on a CPU."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import torch.distributed as dist

from gpu_parts.part import Part
from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.run_info import read_run_info

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 9.5
"""Sum of the limits below, in minutes."""

VGG11 = "--settings baseline kfac kfac:application=weight,inverse_method=cholesky sua grouped sua_grouped"
RESNET50 = (
    "--model preact_resnet50 --period 64 --settings baseline kfac sua sua_grouped:group_size=64 "
    "--rounds 5 --refresh-rounds 2"
)
TRANSFORMER = "--model transformer --settings baseline kfac grouped sua_grouped --rounds 5 --refresh-rounds 2"
OTHER_STRUCTURES = "--settings sua activation_only eigenvalue_corrected --rounds 3 --refresh-rounds 1"
TINY_BENCH = "--model tiny --device cpu --settings sua --rounds 1 --refresh-rounds 1"
STRUCTURES = "preconditioner=baseline,kfac,grouped,sua,sua_grouped"
DENSE_KFAC = "preconditioner=kfac preconditioner.application=weight preconditioner.inverse_method=cholesky"
TINY_RUN = "model=tiny dataset=digits dataset.train_size=200 device=cpu num_threads=1"
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
        _rates(out, is_tiny),
        *_benches(out, is_tiny),
        _training(out, is_tiny),
        _bits(out, is_tiny),
        _introspection(out, is_tiny),
        *([] if is_tiny else [_compiled_bench(out)]),
        *_processes(is_tiny),
    ]


def _tests(is_tiny: bool) -> Part:
    if is_tiny:
        return Part("tests", (f"{_python()} -m pytest -m gpu --collect-only -q tests/training",), 90)
    return Part("tests", (f"CUBLAS_WORKSPACE_CONFIG=:4096:8 {_python()} -m pytest -m gpu -q",), 90, shown_lines=40)


def _rates(out: Path, is_tiny: bool) -> Part:
    """Return the rates by which the preconditioner chooses, beside those that are in force."""
    device = "cpu" if is_tiny else "cuda"
    command = f"{_python()} -m kfac_sua.bench.device_rates --device {device} --out {_quoted(out / 'device-rates.json')}"
    return Part("device-rates", (command,), 20, shown_from="measured", shown_lines=20)


def _benches(out: Path, is_tiny: bool) -> list[Part]:
    """Return the measurements of all networks, captured, and of the paper's eager too."""
    vgg11, resnet50 = (TINY_BENCH, TINY_BENCH) if is_tiny else (VGG11, RESNET50)
    return [
        _bench(out, "bench-vgg11", vgg11, 40),
        _bench(out, "bench-vgg11-eager", f"{vgg11} capture=false", 40),
        _bench(out, "bench-resnet50", resnet50, 40),
        _bench(out, "bench-resnet50-eager", f"{resnet50} capture=false", 40),
        _bench(out, "bench-transformer", TINY_BENCH if is_tiny else TRANSFORMER, 30),
        _bench(out, "bench-structures", TINY_BENCH if is_tiny else OTHER_STRUCTURES, 30),
    ]


def _compiled_bench(out: Path) -> Part:
    """Return plain SGD through torch.compile beside plain SGD: apart, as compiling may take longer than its limit."""
    return _bench(out, "bench-vgg11-compiled", "--settings baseline --compiled", 30)


def _bench(out: Path, name: str, options: str, limit_s: float) -> Part:
    command = f"{_python()} -m kfac_sua.bench {options} --json {_quoted(out / f'{name}.json')}"
    return Part(name, (" ".join(command.split()),), limit_s, shown_from="Time over", shown_lines=40)


def _training(out: Path, is_tiny: bool) -> Part:
    """Return an epoch of every structure, and of K-FAC with dense inverses."""
    runs, note = out / "runs", ""
    if is_tiny:
        commands = [_train(f"-m preconditioner=baseline,sua epochs=1 capture=auto {TINY_RUN}", runs)]
    else:
        images = "epochs=1" if _has_cifar10() else "epochs=10 dataset=digits"
        note = "" if _has_cifar10() else "On `dataset=digits`, ten epochs, as `data/cifar10.npz` is not there."
        keys = f"{images} capture=true {LEARNING_RATE}"
        commands = [_train(f"-m {STRUCTURES} {keys}", runs), _train(f"{DENSE_KFAC} {keys}", runs / "dense")]
    return Part("training", tuple(commands), 70, note=note, summary=lambda: training_table(runs))


def _bits(out: Path, is_tiny: bool) -> Part:
    """Return the same 200 steps captured and eager, and their comparison."""
    if is_tiny:
        keys = f"preconditioner=sua preconditioner.inverse_period=3 epochs=2 {TINY_RUN}"
    else:
        images = "train_size=10000 epochs=2" if _has_cifar10() else "train_size=1000 epochs=20 dataset=digits"
        keys = f"-m preconditioner=baseline,sua {LEARNING_RATE} dataset.{images}"
    captured, eager = out / "bits" / "captured", out / "bits" / "eager"
    commands = (
        _train(f"{keys} deterministic=true capture={'auto' if is_tiny else 'true'}", captured),
        _train(f"{keys} deterministic=true capture=false", eager),
        f"{_script('bits.py')} {_quoted(captured)} {_quoted(eager)}",
    )
    return Part("bits", commands, 40, shown_lines=40, shown_from=f"$ {commands[-1]}")


def _introspection(out: Path, is_tiny: bool) -> Part:
    """Return how far each structure is from the Fisher, at half the width."""
    size = f"{TINY_RUN} --steps 4 --images 20" if is_tiny else "model=vgg11 model.width=0.5 --steps 200 --images 200"
    if not (is_tiny or _has_cifar10()):
        size = f"dataset=digits {size}"
    command = f"{_python()} -m kfac_sua.introspect {size} --checkpoints end --out {_quoted(out / 'introspection')}"
    return Part("introspection", (command,), 60, shown_from="## What it says", shown_lines=30)


def _processes(is_tiny: bool) -> list[Part]:
    """Return a single process in a group of NCCL's, and two on one card, which NCCL refuses and gloo may or may not."""
    device, nccl = ("cpu", "gloo") if is_tiny else ("cuda", "nccl")
    command = f"{_script('processes.py')} --device {device}"
    alone = f"{command} --backend {nccl} --processes 1 --steps 20"
    shared = f"{command} --backend gloo --processes 2 --steps 10"
    return [
        Part("nccl", (alone,), 20, shown_lines=40, skipped=_lacks(nccl)),
        Part("gloo-shared-card", (shared,), 20, shown_lines=40, skipped=_lacks("gloo")),
    ]


def _lacks(backend: str) -> str:
    """Return why processes cannot talk by this backend; empty if they can."""
    if dist.is_available() and dist.is_backend_available(backend):
        return ""
    return f"this PyTorch is built without {backend}"


def training_table(runs: Path) -> str:
    """Return the last row of each metrics.csv below a directory, as a table in Markdown."""
    rows = [f"| run | status | epoch | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 3) + "|"]
    for path in sorted(runs.rglob("metrics.csv")):
        status = read_run_info(path.with_name("run.json")).status
        for last in read_records(path)[-1:]:  # none, of a run that ended before its first row
            values = " | ".join(f"{getattr(last, name):.4g}" for name in COLUMNS)
            rows.append(f"| {path.parents[2].relative_to(runs)} | {status} | {last.epoch} | {values} |")
    return "\n".join(rows)


def _has_cifar10() -> bool:
    return (ROOT / "data" / "cifar10.npz").exists()


def _train(keys: str, directory: Path) -> str:
    return f"{_python()} -m kfac_sua.train {keys} {_quoted(f'output_dir={_path(directory)}')}"


def _script(name: str) -> str:
    return f"{_python()} {_quoted(Path(__file__).with_name(name))}"


def _python() -> str:
    return _quoted(Path(sys.executable))


def _quoted(value: Path | str) -> str:
    return shlex.quote(_path(value) if isinstance(value, Path) else value)


def _path(path: Path) -> str:
    """Return a path as a command in the root of the checkout names it."""
    return os.path.relpath(path, ROOT) if path.is_relative_to(ROOT) else str(path)
