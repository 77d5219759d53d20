"""Models of others with and without the preconditioner, as a table: ``python scripts/foreign_models.py``.

Every model takes ten steps of SGD without momentum on one fixed mini-batch, at each of four learning rates; the lowest
last loss is shown. Structure SUA in groups of 32, damping 0.1, a refresh every 5 mini-batches, float32.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import importlib
import logging
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kfac_sua import KroneckerPreconditioner
from kfac_sua.startup import run_command

STEPS = 10
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0)


def train(foreign: Any, lr: float, *, is_preconditioned: bool) -> tuple[list[float], KroneckerPreconditioner | None]:
    """Return the losses before and after every step, and the preconditioner."""
    torch.manual_seed(0)
    model: nn.Module = foreign.make()
    preconditioner = None
    if is_preconditioned:
        preconditioner = KroneckerPreconditioner(model, structure="sua", group_size=32, damping=0.1, inverse_period=5)
    inputs = foreign.inputs(torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = []
    for _ in range(STEPS + 1):
        optimizer.zero_grad()
        loss = foreign.loss(model(inputs))
        losses.append(loss.item())
        loss.backward()
        if preconditioner is not None:
            preconditioner.step()
        optimizer.step()
    return losses, preconditioner


def best(foreign: Any, *, is_preconditioned: bool) -> tuple[float, list[float], KroneckerPreconditioner | None]:
    """Return the learning rate with the lowest last loss, its losses, and a preconditioner that has seen the model."""
    runs = {lr: train(foreign, lr, is_preconditioned=is_preconditioned) for lr in LEARNING_RATES}
    lr = min(runs, key=lambda lr: runs[lr][0][-1] if math.isfinite(runs[lr][0][-1]) else math.inf)
    return lr, *runs[lr]


def row(name: str, foreign: Any) -> str:
    """Return one row of the table."""
    lr, losses, preconditioner = best(foreign, is_preconditioned=True)
    plain_lr, plain, _ = best(foreign, is_preconditioned=False)
    assert preconditioner is not None
    rows = preconditioner.describe().rows
    reasons = Counter(one.reason for one in rows if one.reason)
    events = Counter(key.split(":")[0].replace("_", " ") for key in preconditioner.events)
    left = [f"{count} × {reason}" for reason, count in reasons.items()]
    left += [f"reported: {count} × {kind}" for kind, count in events.items()]
    treated = sum(not one.reason for one in rows)
    return (
        f"| {name} | {treated} | {'; '.join(left) or '–'} | {losses[0]:.3g} | {losses[-1]:.2g} (lr {lr:g}) "
        f"| {plain[-1]:.2g} (lr {plain_lr:g}) |"
    )


def main() -> None:
    """Print the table."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    models = importlib.import_module("preconditioner.foreign_models").FOREIGN_MODELS
    logging.getLogger("kfac_sua").setLevel(logging.ERROR)  # the table has the layers that are left alone
    print(f"| model | layers preconditioned | left alone, and why | loss | after {STEPS} steps | plain SGD |")
    print("|---|---|---|---|---|---|")
    for name, foreign in models.items():
        print(row(name, foreign), flush=True)


if __name__ == "__main__":
    run_command(main)
