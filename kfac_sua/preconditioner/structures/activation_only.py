"""The activation factor alone: the Fisher block with output gradients taken as white.

K = A ⊗ I, with A = Σ h hᵀ / N summed over the locations of each example. It needs no output gradients, so that its
block is the same for every loss; its preconditioned gradient ``V (A + ε I)⁻¹`` is that of gradient descent on neurons
(FOOF). Before an orthogonalising optimizer it is Newton-Muon (``examples/newton_muon.py``).

Reference: Benzing (2022), "Gradient Descent on Neurons and its Link to Approximate Second-Order Optimization",
arXiv:2201.12250, Sec. 3; before Muon: arXiv:2604.01472.
"""

from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.structures.row_structure import RowStructure, Spectrum, Tensors
from kfac_sua.preconditioner.structures.rows import LayerRows


class ActivationOnly(RowStructure):
    """``A ⊗ I``: one Cholesky factorisation per layer, and one product per step."""

    measured_shapes: ClassVar = {"factor": ("g", "d", "d")}
    kept_shapes: ClassVar = {"inverse": ("g", "d", "d")}
    forms = ("dense", "identity")
    needs_output_grads = False
    can_be_averaged = True
    can_be_captured = True

    def measure(self, rows: LayerRows) -> Tensors:
        """Return A."""
        return {"factor": rows.activation_factor()}

    def invert(self, measured: Tensors, damping: float) -> Tensors:
        """Return (A + ε I)⁻¹, by Cholesky in float64, as A has at most as high a rank as there are rows."""
        factor = measured["factor"]
        damped = factor.double() + damping * torch.eye(factor.shape[-1], dtype=torch.float64, device=factor.device)
        return {"inverse": torch.cholesky_inverse(torch.linalg.cholesky(damped)).to(factor.dtype)}

    def precondition(self, gradient: Tensor, kept: Tensors) -> Tensor:
        """Return V (A + ε I)⁻¹."""
        return torch.bmm(gradient, kept["inverse"])

    def product(self, vector: Tensor, measured: Tensors) -> Tensor:
        """Return V A."""
        return torch.bmm(vector, measured["factor"])

    def spectrum(self, measured: Tensors) -> Spectrum:
        """Return A's eigenvalues, the same for every output."""
        values, vectors = torch.linalg.eigh(measured["factor"])  # [g, d], [g, d, d]
        sizes = self.sizes_by_letter
        return Spectrum(values[:, None].expand(-1, sizes["p"], -1), lambda vector: vector @ vectors)  # [g, p, d]

    def dense(self, rows: LayerRows) -> Tensor:
        """Return I ⊗ A, as d is the last dimension of a gradient."""
        inputs = rows.inputs
        factor = torch.einsum("gnsd,gnse->gde", inputs, inputs) / rows.num_examples
        identity = torch.eye(rows.output_grads.shape[-1]).to(factor)
        return torch.stack([torch.kron(identity, one) for one in factor])  # [g, p · d, p · d]

    def inversion_flops(self) -> int:
        """Factorisation and inverse: d³ per group."""
        sizes = self.sizes_by_letter
        return sizes["g"] * sizes["d"] ** 3

    def application_flops(self) -> int:
        """One product."""
        sizes = self.sizes_by_letter
        return 2 * sizes["g"] * sizes["p"] * sizes["d"] ** 2
