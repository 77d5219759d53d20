"""Cost and effect of KL clip and adaptive damping: ``python scripts/safety.py runs``, ``cost``, ``table``, ``trace``.

VGG11 at a quarter of its width with SUA on 10,000 images of CIFAR-10 (``make data``), 3 epochs: at the learning rate
and damping of ``experiment=first_light_sua``, and at ones that are far too large or too small, each without and with
them. ``runs`` takes about 20 minutes on an idle core and goes on where it was stopped, ``cost`` about 3; ``table``
prints what they left below ``outputs/runs/safety`` as Markdown. ``trace`` trains once more, for a minute, and prints
how far steps are clipped and where the damping goes.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from kfac_sua.compose import compose_config
from kfac_sua.config import Config, KroneckerConfig
from kfac_sua.files.atomic import write_atomically
from kfac_sua.runs.directory import RunDirectory, run_directory
from kfac_sua.runs.metrics import EpochRecord, read_ended_records
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.startup import run_command
from kfac_sua.training.build import build_training
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run

OUT = Path("outputs/runs/safety")
FIXED = (
    "experiment=first_light_sua",
    "epochs=3",
    "dataset.train_size=10000",
    "device=cpu",
    "num_threads=1",
    "progress=none",
    f"output_dir={OUT}",
)
WEIGHT = "preconditioner.application=weight"  # which kl_clip needs
KL_CLIP, ADAPTIVE = "preconditioner.kl_clip=0.001", "preconditioner.adaptive_damping=5"
CONDITIONS = {
    "tuned (lr 0.01, damping 0.1)": (),
    "lr × 10": ("optimizer.lr=0.1",),
    "lr × 100": ("optimizer.lr=1",),
    "damping / 100": ("preconditioner.damping=0.001",),
    "damping × 100": ("preconditioner.damping=10",),
    "lr 1, damping 10, no momentum": ("optimizer.lr=1", "preconditioner.damping=10", "optimizer.momentum=0"),
}
SAFETIES = {
    "neither": (WEIGHT,),
    "KL clip 0.001": (WEIGHT, KL_CLIP),
    "adaptive damping, T = 5": (WEIGHT, ADAPTIVE),
}
COSTS = {
    "neither, application=auto": (),
    "neither, application=weight": (WEIGHT,),
    "KL clip (application=weight)": (WEIGHT, KL_CLIP),
    "adaptive damping, T = 5, application=auto": (ADAPTIVE,),
    "adaptive damping, T = 50, application=auto": ("preconditioner.adaptive_damping=50",),
    "both (application=weight)": (WEIGHT, KL_CLIP, ADAPTIVE),
}
SEEDS = (0, 1)
CPU = torch.device("cpu")
PERIOD, ROUNDS = 50, 5


def main(arguments: Sequence[str] | None = None) -> None:
    """Carry out one part.

    Args:
        arguments: Command line without the program's name; ``None`` takes the process's own.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("part", choices=("runs", "cost", "table", "trace"))
    parts = {"runs": carry_out, "cost": measure_cost, "table": print_tables, "trace": print_traces}
    parts[parser.parse_args(arguments).part]()


def configs() -> Iterator[tuple[str, str, Config]]:
    """Yield condition, safety and configuration of every run, the first seed of all of them first."""
    for seed in SEEDS:
        for condition, first in CONDITIONS.items():
            for safety, second in SAFETIES.items():
                yield condition, safety, compose_config([*FIXED, *first, *second, f"seed={seed}"])


def carry_out() -> None:
    """Train what has not been trained yet."""
    for _, _, config in configs():
        run(config)


def measure_cost() -> None:
    """Measure CPU seconds per step, interleaved: in turns, every setting takes one refresh period of steps."""
    trainings = {name: build_training(compose_config([*FIXED, *more]), CPU) for name, more in COSTS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for round_number in range(ROUNDS + 1):  # the first is for warming up
        for name, training in trainings.items():
            training.model.train()
            training.loader.begin_epoch(0, round_number)
            started = time.process_time()
            for _ in range(PERIOD):
                training.take_step()
            if round_number:
                seconds[name].append((time.process_time() - started) / PERIOD)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT / "cost.json", json.dumps(seconds, indent=1).encode())


def print_tables() -> None:
    """Print both tables."""
    print("| condition | safety | train loss, epoch 3 | in evaluation mode | validation error | last damping |")
    print("|---|---|---|---|---|---|")
    ends: dict[tuple[str, str], list[End]] = {}
    for condition, safety, config in configs():
        ends.setdefault((condition, safety), []).append(read_end(config))
    for (condition, safety), of_seeds in ends.items():
        cells = [_cell([getattr(end, name) for end in of_seeds], form) for name, form in END_FORMS.items()]
        print(f"| {condition} | {safety} | {' | '.join(cells)} |")
    seconds = json.loads((OUT / "cost.json").read_text())
    base = next(iter(seconds.values()))
    print("\n| setting | CPU ms per step | ratio (least to largest of the rounds) |\n|---|---|---|")
    for name, values in seconds.items():
        ratios = [value / other for value, other in zip(values, base, strict=True)]
        print(
            f"| {name} | {1000 * statistics.median(values):.1f} | {statistics.median(ratios):.3f} "
            f"({min(ratios):.3f} to {max(ratios):.3f}) |"
        )


def print_traces() -> None:
    """Print, per refresh period of the tuned condition, what the clip and what the reduction ratio do."""
    clipped = build_training(compose_config([*FIXED, WEIGHT, KL_CLIP]), CPU)
    adapted = build_training(compose_config([*FIXED, WEIGHT, ADAPTIVE]), CPU)
    clip, adaptive = clipped.preconditioner, adapted.adaptive_damping
    assert clip is not None
    assert adaptive is not None
    assert adapted.preconditioner is not None
    print("| steps | clipped | median scale | median ρ | damping after them |\n|---|---|---|---|---|")
    for period in range(3 * 2):
        scales, ratios = [], []
        for training in (clipped, adapted):
            training.model.train()
            training.loader.begin_epoch(0, period // 2, first=period % 2 * PERIOD)
            for _ in range(PERIOD):
                training.take_step()
                training.batch += 1
                if training is clipped:
                    assert clip.kl_scale is not None
                    scales.append(float(clip.kl_scale))
                elif training.step % 5 == 1 and adaptive.reduction_ratio is not None:
                    ratios.append(adaptive.reduction_ratio)
        share = sum(scale < 1 for scale in scales) / PERIOD
        print(
            f"| {PERIOD * period} to {PERIOD * (period + 1)} | {share:.0%} | {statistics.median(scales):.2f} | "
            f"{statistics.median(ratios):.2f} | {adapted.preconditioner.damping:.2g} |"
        )


@dataclasses.dataclass(frozen=True)
class End:
    """How one run ended; ``None`` throughout if it diverged."""

    train_loss: float | None = None
    train_eval_loss: float | None = None
    val_error: float | None = None
    damping: float | None = None


END_FORMS = {"train_loss": ".3f", "train_eval_loss": ".3f", "val_error": ".1%", "damping": ".3g"}


def read_end(config: Config) -> End:
    """Return how a run ended.

    Raises:
        SystemExit: If it has not been carried out.
    """
    directory = run_directory(config, "cpu")
    if not directory.info.exists():
        raise SystemExit(f"{directory.path} is missing; carry out `python scripts/safety.py runs` first.")
    info = read_run_info(directory.info)
    if info.status == "diverged":
        return End()
    last: EpochRecord = read_ended_records(directory.metrics, info)[-1]
    return End(last.train_loss, last.train_eval_loss, last.val_error, _last_damping(directory, config))


def _last_damping(directory: RunDirectory, config: Config) -> float:
    checkpoint = load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=CPU)
    assert isinstance(config.preconditioner, KroneckerConfig)
    assert checkpoint is not None
    assert checkpoint.preconditioner is not None
    return float(checkpoint.preconditioner["damping"])


def _cell(values: Sequence[float | None], form: str) -> str:
    return ", ".join("diverged" if value is None else format(value, form) for value in values)


if __name__ == "__main__":
    run_command(main)
