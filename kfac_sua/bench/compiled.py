"""Plain SGD through ``torch.compile``, the fastest that PyTorch offers without a preconditioner."""

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
"""The first step compiles forward and backward pass; with ``reduce-overhead`` the next two record graphs."""


class CompiledContender(Contender):
    """A setting with a compiled network; on CUDA with ``mode="reduce-overhead"``, which makes its own graphs.

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
        """Warm up, and return a clause on why that fails; empty if it does not."""
        try:
            self.warm_up()
        except Exception as error:  # compilers, and the code that looks for them, raise any type
            # The text after an empty line is advice on how to debug PyTorch.
            return " ".join(str(error).split("\n\n")[0].split()).rstrip(".") or type(error).__name__
        return ""
