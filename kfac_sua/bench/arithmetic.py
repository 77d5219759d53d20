"""In what a measurement computes: a precision of training, or float64, which only the benchmark knows."""

import dataclasses
from contextlib import AbstractContextManager

import torch

from kfac_sua.config import Precision
from kfac_sua.training.precision import computing_in

FLOAT64 = "float64"
NAMES = (*map(str, Precision), FLOAT64)
"""What ``--precision`` takes."""


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The number formats of a measurement.

    Args:
        name: A :class:`~kfac_sua.config.Precision` other than ``auto``, in which training does just this; or
            ``float64``, everything in float64.
        device: Where to compute.
    """

    name: str
    device: torch.device

    @property
    def precision(self) -> Precision:
        """In what the convolutions and products of float32 tensors compute; under ``float64`` there are none."""
        return Precision.float32 if self.name == FLOAT64 else Precision(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """Of images, parameters, factors and inverses."""
        return torch.float64 if self.name == FLOAT64 else torch.float32

    def format_of(self, phase: str) -> str:
        """Return the number format of a phase's matrix products: ``float32``, ``tf32``, ``bfloat16`` or ``float64``."""
        if self.name == FLOAT64 or phase == "forward_backward":
            return self.name
        # Autocast is kept away from both; TF32 only from statistics and inverses.
        in_tf32 = self.device.type == "cuda" and self.precision is not Precision.float32
        return "tf32" if in_tf32 and phase == "application" else "float32"

    def computing(self) -> AbstractContextManager[None]:
        """Return the context of the whole measurement, which is that of a whole training."""
        return computing_in(self.precision, self.device)
