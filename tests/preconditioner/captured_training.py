"""A small training that is carried out eagerly, or with captured steps: on an emulated graph, or on a CUDA device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from graph_emulator import EmulatedGraph
from torch import Tensor, nn

from kfac_sua.preconditioner import CapturedStep, KroneckerPreconditioner
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.layer import PreconditionedLayer

PERIOD = 20
BATCH_SIZE = 4
LR = 0.03


def make_net() -> nn.Sequential:
    """Return a net with every kind of layer of the paper's.

    Its second convolution has so few locations that inverses may be applied to both sides in the backward pass.
    """
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(4)),
        *(nn.Conv2d(6, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20), nn.ReLU(inplace=True), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(20, 10)),
    )


def rebind(taken: Sequence[tuple[PreconditionedLayer, LayerInverse]]) -> None:
    """Take the tensors of new inverses, wherever they lie; stands in for ``take_inverses``."""
    for layer, inverse in taken:
        layer.inverse = inverse


def with_dropout() -> nn.Sequential:
    """Return the net with dropout before its classifier."""
    net = make_net()
    net.insert(len(net) - 1, nn.Dropout(0.3))
    return net


def batches(num: int, start: int = 0, size: int = BATCH_SIZE) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield random images and labels; those of a number are always the same."""
    for index in range(start, start + num):
        generator = torch.Generator().manual_seed(index)
        yield torch.randn(size, 3, 8, 8, generator=generator), torch.randint(0, 10, (size,), generator=generator)


def sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(net.parameters(), **{"lr": LR, "momentum": 0.9} | options)


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    """Return a fused AdamW with a learning rate in float32, which is what a captured step reads from the device."""
    return torch.optim.AdamW(net.parameters(), lr=torch.tensor(LR / 10), fused=True)


def muon(net: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the classifier's weight and SGD for the rest."""
    matrices = [parameter for parameter in net.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in net.parameters() if parameter.dim() != 2]
    return [torch.optim.Muon(matrices, lr=LR / 10), torch.optim.SGD(others, lr=LR, momentum=0.9)]


@dataclass
class Case:
    """A training.

    Args:
        settings: Of the preconditioner; ``None`` for plain SGD.
        make: Makes the net.
        optimizer: Makes the optimizer, or several.
        autocast: Whether the forward pass is in bfloat16.
        after_backward: Called with the net in the function, before the optimizer's step.
        lr: Learning rate that ``kl_clip`` is told.
    """

    settings: dict[str, Any] | None = field(default_factory=dict)
    make: Callable[[], nn.Module] = make_net
    optimizer: Callable[[nn.Module], Any] = sgd
    autocast: bool = False
    after_backward: Callable[[nn.Module], Any] = lambda net: None


class Training:
    """A training in progress.

    Args:
        case: What to train.
        is_captured: Whether plain steps are replays.
        device: Where; on the CPU graphs are emulated.
    """

    def __init__(self, case: Case, *, is_captured: bool, device: str = "cpu") -> None:
        self.case = case
        self.device = device
        self.net = case.make().to(device)
        optimizer = case.optimizer(self.net)
        self.optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
        self.preconditioner = None
        if case.settings is not None:
            settings = {"inverse_period": PERIOD, "damping": 0.1} | case.settings
            self.preconditioner = KroneckerPreconditioner(self.net, **settings)
        self.total = torch.zeros((), device=device)
        self.graph = EmulatedGraph() if device == "cpu" else None
        self.captured = CapturedStep(self.function, self.net, self.optimizers, self.preconditioner, graph=self.graph)
        self._step = self.captured if is_captured else self.function

    def function(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take one step."""
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with torch.autocast(self.device, dtype=torch.bfloat16) if self.case.autocast else nullcontext():
            logits = self.net(images)
            if self.preconditioner is not None:
                self.preconditioner.fisher_backward(logits)
            loss = nn.functional.cross_entropy(logits, labels)
        loss.backward()
        if self.preconditioner is not None:
            self.preconditioner.step(lr=self.optimizers[0].param_groups[0]["lr"])
        self.case.after_backward(self.net)
        for optimizer in self.optimizers:
            optimizer.step()
        self.total += loss.detach()
        return loss.detach()

    def take(self, num: int, start: int = 0, size: int = BATCH_SIZE) -> list[float]:
        """Take so many steps, and return their losses."""
        return [float(loss) for loss in self.losses(num, start, size)]

    def losses(self, num: int, start: int = 0, size: int = BATCH_SIZE) -> Iterator[Tensor]:
        """Take so many steps, yielding the loss of each as soon as it was taken, without waiting for it."""
        like = next(self.net.parameters())
        for images, labels in batches(num, start, size):
            yield self._step(images.to(like, non_blocking=True), labels.to(self.device, non_blocking=True))

    def state(self) -> dict[str, Any]:
        """Return everything that training changes."""
        values: dict[str, Any] = {"total": self.total, **self.net.state_dict()}
        for name, parameter in self.net.named_parameters():
            values[f"grad of {name}"] = parameter.grad
        for number, optimizer in enumerate(self.optimizers):
            for index, state in optimizer.state_dict()["state"].items():
                values |= {f"optimizer {number} {index} {key}": value for key, value in state.items()}
        if self.preconditioner is not None:
            values |= {"preconditioner": self.preconditioner.state_dict(), "kl_scale": self.preconditioner.kl_scale}
        return values


def num_plain(case: Case, num: int) -> int:
    """Return how many of the first steps only apply inverses."""
    settings = case.settings
    if settings is None:
        return num
    period = settings.get("factor_period") or settings.get("inverse_period", PERIOD)
    return num - -(-num // period)
