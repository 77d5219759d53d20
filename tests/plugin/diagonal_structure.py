"""A structure from outside the package, as somebody else's distribution adds it: the diagonal of the Fisher."""

from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner import LayerRows, RowStructure, Spectrum


class Diagonal(RowStructure):
    """K = diag(mean of the squares of single examples' gradients)."""

    measured_shapes: ClassVar = {"squares": ("g", "p", "d")}
    kept_shapes: ClassVar = {"inverse": ("g", "p", "d")}
    forms = ("diagonal", "diagonal")
    can_be_averaged = True
    can_be_captured = True

    def measure(self, rows: LayerRows) -> dict[str, Tensor]:
        """Return the mean squares."""
        return {"squares": sum(grads.square().sum(1) for grads in rows.example_grads()) / rows.num_examples}

    def invert(self, measured: dict[str, Tensor], damping: float) -> dict[str, Tensor]:
        """Return 1 / (squares + ε)."""
        return {"inverse": 1 / (measured["squares"] + damping)}

    def precondition(self, gradient: Tensor, kept: dict[str, Tensor]) -> Tensor:
        """Divide, entry by entry."""
        return gradient * kept["inverse"]

    def product(self, vector: Tensor, measured: dict[str, Tensor]) -> Tensor:
        """Multiply, entry by entry."""
        return vector * measured["squares"]

    def dense(self, rows: LayerRows) -> Tensor:
        """Return the diagonal matrix."""
        return torch.diag_embed(self.measure(rows)["squares"].flatten(1))  # [g, p · d, p · d]

    def spectrum(self, measured: dict[str, Tensor]) -> Spectrum:
        """Return the diagonal, in the basis at hand."""
        return Spectrum(measured["squares"], lambda vector: vector)

    def inversion_flops(self) -> int:
        """One division per weight."""
        return self.application_flops()

    def application_flops(self) -> int:
        """One product per weight."""
        g, p, d = self.sizes_by_letter.values()
        return g * p * d
