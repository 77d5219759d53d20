"""Frames as a campaign makes them, from formulas: a ridge in the grid, curves that fall, seeds that differ a little."""

from collections.abc import Sequence

import pandas as pd

SPEED = {"baseline": 1.0, "kfac": 1.9, "grouped": 1.7, "sua": 1.8, "sua_grouped": 1.6, "adamw": 1.2, "muon": 1.5}
SECONDS = {"baseline": 30.0, "kfac": 44.0, "grouped": 39.0, "sua": 33.0, "sua_grouped": 31.0, "muon": 36.0}
PAPER = ("baseline", "kfac", "grouped", "sua", "sua_grouped")
FINE_LRS = (0.56, 0.32, 0.18, 0.1, 0.056, 0.032, 0.018, 0.01, 0.0056, 0.0032, 0.0018, 0.001)


def run_rows(
    method: str,
    panel: str = "vgg11",
    seed: int = 0,
    epochs: int = 6,
    lr: float = 0.03,
    damping: float | None = 0.1,
    status: str = "finished",
    quality: float = 1.0,
    dataset: str = "cifar10",
    precision: str = "float32",
) -> pd.DataFrame:
    """Return the rows of one run; a higher quality falls faster and lower."""
    speed = SPEED.get(method, 1.4) * quality
    seconds = SECONDS.get(method, 35.0) * (1 + 0.02 * seed)
    inversion, statistics = (0.0, 0.0) if method in ("baseline", "adamw", "muon") else (0.12 * seconds, 0.05 * seconds)
    fingerprint = f"{method}-{lr:g}-{damping}"
    rows = []
    for epoch in range(epochs + 1):
        loss = 2.3 / (1 + 0.6 * speed * epoch) * (1 + 0.03 * seed * min(epoch, 1))
        row = {
            "run": f"{panel}/{fingerprint}/seed={seed}",
            "dataset": dataset,
            "model": "vgg11",
            "preconditioner": method if method in PAPER else "baseline",
            "base_lr": lr,
            "damping": damping,
            "precision": precision,
            "fingerprint": fingerprint,
            "seed": seed,
            "status": status,
            "test_error": 0.25,
            "epoch": epoch,
            "step": 450 * epoch,
            "lr": lr,
            "train_loss": loss,
            "train_error": 0.39 * loss,
            "train_eval_loss": 0.9 * loss,
            "val_loss": 1.1 * loss,
            "val_error": 0.20 + 0.30 * loss,
            "train_time_s": seconds * epoch,
            "forward_backward_s": (0.94 * seconds - inversion - 2 * statistics) * epoch,
            "statistics_s": statistics * epoch,
            "inversion_s": inversion * epoch,
            "application_s": statistics * epoch,
            "optimizer_s": 0.06 * seconds * epoch,
            "panel": panel,
            "method": method,
        }
        rows.append(row)
    return pd.DataFrame(rows).astype({"damping": float})


def finals(methods: Sequence[str] = PAPER, seeds: int = 3, panel: str = "vgg11", **values: object) -> pd.DataFrame:
    """Return the final runs of one panel."""
    parts = [
        run_rows(method, panel, seed, damping=0.1 if method in PAPER[1:] else None, **values)
        for method in methods
        for seed in range(seeds)
    ]
    return pd.concat(parts, ignore_index=True)


def grid_cells(
    method: str, lrs: Sequence[float], dampings: Sequence[float | None], panel: str = "vgg11", epochs: int = 3
) -> pd.DataFrame:
    """Return one run per cell: best where lr is 0.03 times the root of the damping over 0.1, diverged far above."""
    parts = []
    for damping in dampings:
        for lr in lrs:
            ratio = lr / (0.03 * ((damping or 0.1) / 0.1) ** 0.5)
            quality = 1 / (1 + 0.8 * abs(ratio - 1)) if ratio > 1 else ratio**0.6
            status = "diverged" if ratio > 9 else "finished"
            parts.append(run_rows(method, panel, 0, epochs, lr, damping, status, quality))
    return pd.concat(parts, ignore_index=True)
