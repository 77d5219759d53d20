"""Plain SGD through ``torch.compile``: what PyTorch has to offer without a preconditioner."""

import dataclasses
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.config import Config
from kfac_sua.training.precision import compute_logits

COMPILED = "compiled"
"""Name of its row."""

WARM_UP_STEPS = 5
"""The first compiles, forward and backward; ``reduce-overhead`` records graphs in the two after it."""


class CompiledContender(Contender):
    """A setting whose network is compiled: on CUDA with ``mode="reduce-overhead"``, which makes graphs of its own.

    Args:
        config: That of plain SGD.
        arithmetic: The number formats of training.
        batch: The mini-batch.
    """

    def __init__(self, config: Config, arithmetic: Arithmetic, batch: Batch) -> None:
        super().__init__(dataclasses.replace(config, capture=False), arithmetic, batch)
        self._has_graphs = self._device.type == "cuda"
        mode = "reduce-overhead" if self._has_graphs else None
        self._compiled = cast(nn.Module, torch.compile(self.model, mode=mode))

    @property
    def why_eager(self) -> str:
        """Why no step is captured as a whole."""
        return "torch.compile makes graphs of its own"

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the logits, ``[batch, classes]``, and the loss."""
        if self._has_graphs:
            self._optimizer.zero_grad(set_to_none=True)  # the last gradients lie where the coming graphs write
            torch.compiler.cudagraph_mark_step_begin()
        logits = compute_logits(self._compiled, self._inputs, self._precision)
        return logits, F.cross_entropy(logits, self._labels)

    def warm_up(self) -> None:
        """Compile, and take steps until graphs are recorded."""
        for _ in range(WARM_UP_STEPS):
            self.timed_step()

    def try_warm_up(self) -> str:
        """Warm up, and return in a clause why that cannot be; empty if it can."""
        try:
            self.warm_up()
        except Exception as error:  # whatever compilers, and what looks for them, raise
            # What follows an empty line is advice for those who debug PyTorch.
            return " ".join(str(error).split("\n\n")[0].split()).rstrip(".") or type(error).__name__
        return ""
