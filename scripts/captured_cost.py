"""What captured steps cost beside eager ones on a GPU: ``python scripts/captured_cost.py --json captured.json``.

Per setting of the preconditioner: milliseconds of an eager plain step, of a replay, and of a refresh; the mean step
over a refresh period without and with captures, and the latter in units of captured SGD; the most memory reserved
without and with them. Wall time between two synchronisations, the median of three. About two minutes for VGG11 at full
width.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kfac_sua.build import build_model, build_optimizer, build_preconditioner
from kfac_sua.compose import compose_config
from kfac_sua.preconditioner import CapturedStep

SETTINGS = {
    "SGD": ["preconditioner=baseline"],
    "K-FAC": ["preconditioner=kfac"],
    "SUA": ["preconditioner=sua"],
    "grouped": ["preconditioner=grouped"],
    "SUA, grouped": ["preconditioner=sua_grouped"],
}
BATCH_SIZE = 100
REPEATS = 3


class Training:
    """One setting, on random images.

    Args:
        overrides: Of the configuration.
        is_captured: Whether plain steps are replays.
    """

    def __init__(self, overrides: list[str], *, is_captured: bool) -> None:
        config = compose_config([*overrides, "optimizer.lr=0.001", "dataset=cifar10", "device=cuda"])
        device = torch.device("cuda")
        torch.manual_seed(0)
        self.model = build_model(config, 10, device)
        self.optimizer = build_optimizer(config.optimizer, self.model)
        self.preconditioner = build_preconditioner(config.preconditioner, self.model, seed=0)
        self.period = self.preconditioner.settings.inverse_period if self.preconditioner else 50
        images = torch.randn(BATCH_SIZE, 3, 32, 32, device=device).to(memory_format=torch.channels_last)
        self.batch = images, torch.randint(0, 10, (BATCH_SIZE,), device=device)
        self.captured = CapturedStep(self.function, self.model, self.optimizer, self.preconditioner)
        self._step: Callable[..., Tensor] = self.captured if is_captured else self.function

    def function(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step."""
        self.optimizer.zero_grad()
        logits = self.model(images)
        if self.preconditioner is not None:
            self.preconditioner.fisher_backward(logits)
        loss = cross_entropy(logits, labels)
        loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        self.optimizer.step()
        return loss.detach()

    def step(self) -> None:
        """Take one step, whatever is due."""
        self._step(*self.batch)

    def plain(self) -> None:
        """Take one step that only applies the inverses."""
        if self.preconditioner is not None:
            self.preconditioner.go_to_step(1)
        self.step()

    def refresh(self) -> None:
        """Take one step that measures and refreshes."""
        if self.preconditioner is not None:
            self.preconditioner.go_to_step(0)
        self.step()


def milliseconds(step: Callable[[], None], num: int) -> float:
    """Return the milliseconds of a step, the median over some rounds of so many."""
    rounds = []
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(num):
            step()
        torch.cuda.synchronize()
        rounds.append((time.perf_counter() - started) / num * 1e3)
    return statistics.median(rounds)


def measure(overrides: list[str], *, is_captured: bool) -> dict[str, Any]:
    """Return the cost of one setting."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    training = Training(overrides, is_captured=is_captured)
    for _ in range(training.period + 5):
        training.step()
    plain = milliseconds(training.plain, 30)
    refresh = milliseconds(training.refresh, 3) if training.preconditioner else None
    mean = milliseconds(training.step, 2 * training.period)
    return {
        "plain_ms": plain,
        "refresh_ms": refresh,
        "mean_ms": mean,
        "peak_mib": (torch.cuda.max_memory_reserved() - before) / 2**20,
        "why_eager": training.captured.why_eager if is_captured else "",
        "num_captures": training.captured.num_captures,
    }


def main() -> None:
    """Measure every setting, writing what there is after each, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vgg11", help="vgg11 or preact_resnet50 (default: %(default)s)")
    parser.add_argument("--width", type=float, default=1.0, help="multiplies all channels (default: %(default)s)")
    parser.add_argument("--application", default="weight", help="weight or auto (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "Captured steps are CUDA graphs, and PyTorch finds no usable CUDA device here.\n")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "model": arguments.model,
        "width": arguments.width,
        "settings": {},
    }
    print(
        f"{results['device']}, PyTorch {results['torch']}, {arguments.model} at width {arguments.width:g}; ms per step"
    )
    titles = f"{'plain':>7} {'replay':>7} {'refresh':>8} {'eager':>7} {'captured':>9} {'/ SGD':>6} {'MiB':>12}"
    print(f"{'setting':<14} {titles}")
    for name, overrides in SETTINGS.items():
        more = [f"model={arguments.model}", f"model.width={arguments.width}"]
        if name != "SGD":
            more.append(f"preconditioner.application={arguments.application}")
        eager, captured = (measure([*overrides, *more], is_captured=is_captured) for is_captured in (False, True))
        results["settings"][name] = {"eager": eager, "captured": captured}
        unit = results["settings"]["SGD"]["captured"]["mean_ms"]
        refresh = f"{captured['refresh_ms']:.1f}" if captured["refresh_ms"] else "–"
        print(
            f"{name:<14} {eager['plain_ms']:>7.2f} {captured['plain_ms']:>7.2f} {refresh:>8} {eager['mean_ms']:>7.2f} "
            f"{captured['mean_ms']:>9.2f} {captured['mean_ms'] / unit:>6.2f} "
            f"{eager['peak_mib']:>6.0f}{captured['peak_mib']:>6.0f} {captured['why_eager']}",
            flush=True,
        )
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
