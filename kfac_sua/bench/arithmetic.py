"""The number formats of a measurement: a precision of training, or float64, which only the benchmark has."""

import contextlib
import dataclasses
from collections.abc import Iterator

import torch

from kfac_sua.config import Config, Precision
from kfac_sua.device import rates_as_configured
from kfac_sua.preconditioner import Products
from kfac_sua.training.determinism import determinism
from kfac_sua.training.precision import computing_in

FLOAT64 = "float64"
BF16X3 = Products.bf16x3.value
"""Three products of bfloat16 parts with float32 sums. All three are counted as FLOPs."""
NAMES = (*map(str, Precision), FLOAT64)
"""The values of ``--precision``."""


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
        """The precision of convolutions and products of float32 tensors, of which ``float64`` has none."""
        return Precision.float32 if self.name == FLOAT64 else Precision(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of images, parameters, factors and inverses."""
        return torch.float64 if self.name == FLOAT64 else torch.float32

    def format_of(self, phase: str) -> str:
        """Return the number format of a phase's matrix products: a precision, ``bf16x3`` or ``float64``."""
        if self.name == FLOAT64 or phase == "forward_backward":
            return self.name
        # Autocast and TF32 are kept away from the preconditioner; large inverses are applied in bfloat16 parts.
        in_parts = self.device.type == "cuda" and self.precision is not Precision.float32
        return BF16X3 if in_parts and phase == "application" else "float32"

    @contextlib.contextmanager
    def computing(self, config: Config) -> Iterator[None]:
        """Compute inside as a training does from its start to its end.

        Args:
            config: Whether kernels are deterministic, and by which rates the preconditioner chooses.

        Raises:
            ConfigError: If either cannot be had.
        """
        with (
            determinism(config.deterministic, self.device),
            computing_in(self.precision, self.device),
            rates_as_configured(config.device_rates, self.device),
        ):
            yield
