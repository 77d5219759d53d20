"""EKFAC: K-FAC's eigenbasis with the exact second moments of the gradient along each of its directions.

K = (U_G ⊗ U_A) diag(s) (U_G ⊗ U_A)ᵀ, with U_A and U_G the eigenvectors of K-FAC's factors and
s = Σ_n (U_Gᵀ g_n U_A)² / N the second moments of the single examples' gradients g_n in that basis, entry by entry: the
best approximation in the Frobenius norm that has this basis. The moments take a second pass over the rows, once the
basis is known.

Reference: George, Laurent, Bouthillier, Ballas & Vincent (2018), "Fast Approximate Natural Gradient Descent in a
Kronecker-factored Eigenbasis", arXiv:1806.03884, Sec. 3.
"""

from typing import ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms.eigen import EigenBasis, decomposed
from kfac_sua.preconditioner.structures.row_structure import RowStructure, Spectrum, Tensors
from kfac_sua.preconditioner.structures.rows import LayerRows

_BASIS = {"activation_basis": ("g", "d", "d"), "gradient_basis": ("g", "p", "p")}


class EigenvalueCorrected(RowStructure):
    """``diag(s)`` in the eigenbasis of K-FAC's factors."""

    measured_shapes: ClassVar = {**_BASIS, "moments": ("g", "p", "d")}
    kept_shapes: ClassVar = {**_BASIS, "inverse": ("g", "p", "d")}
    forms = ("eigenbasis", "eigenbasis")
    can_be_captured = True

    def measure(self, rows: LayerRows) -> Tensors:
        """Return the basis, and the moments along it; NaN where a factor has no eigendecomposition."""
        activation, gradient = (_eigenvectors(one) for one in (rows.activation_factor(), rows.gradient_factor()))
        moments = torch.zeros(gradient.shape[:-1] + activation.shape[-1:]).to(activation)  # [g, p, d]
        for grads in rows.example_grads(gradient, activation):  # [g, rows, p, d]
            moments += grads.square().sum(1)
        return {
            "activation_basis": activation,
            "gradient_basis": gradient,
            "moments": moments / rows.num_examples,
        }

    def invert(self, measured: Tensors, damping: float) -> Tensors:
        """Return the basis with 1 / (s + ε)."""
        return {
            "activation_basis": measured["activation_basis"],
            "gradient_basis": measured["gradient_basis"],
            "inverse": 1 / (measured["moments"] + damping),
        }

    def precondition(self, gradient: Tensor, kept: Tensors) -> Tensor:
        """Divide by s + ε in the basis."""
        return _scaled(gradient, kept, kept["inverse"])

    def product(self, vector: Tensor, measured: Tensors) -> Tensor:
        """Multiply by s in the basis."""
        return _scaled(vector, measured, measured["moments"])

    def spectrum(self, measured: Tensors) -> Spectrum:
        """Return s and the basis."""
        activation, gradient = measured["activation_basis"], measured["gradient_basis"]
        return Spectrum(measured["moments"], lambda vector: gradient.mT @ vector @ activation)

    def dense(self, rows: LayerRows) -> Tensor:
        """Return the diagonal of QᵀFQ in K-FAC's basis Q, with F the exact block."""
        blocks = []
        grads = torch.einsum("gcnsp,gnsd->gcnpd", rows.output_grads, rows.inputs).flatten(3).flatten(1, 2)
        for activation, gradient, own in zip(rows.activation_factor(), rows.gradient_factor(), grads, strict=True):
            basis = torch.kron(torch.linalg.eigh(gradient)[1], torch.linalg.eigh(activation)[1])  # [p · d, p · d]
            fisher = own.mT @ own / rows.num_examples  # [p · d, p · d]
            blocks.append(basis @ torch.diag((basis.mT @ fisher @ basis).diagonal()) @ basis.mT)
        return torch.stack(blocks)  # [g, p · d, p · d]

    def inversion_flops(self) -> int:
        """Both eigendecompositions."""
        g, p, d = self.sizes_by_letter.values()
        return g * (EigenBasis.decomposition_flops(p) + EigenBasis.decomposition_flops(d))

    def application_flops(self) -> int:
        """Into the basis and back."""
        g, p, d = self.sizes_by_letter.values()
        return g * (EigenBasis.application_flops(p, d) + EigenBasis.application_flops(d, p))


def _eigenvectors(factor: Tensor) -> Tensor:
    """Return the eigenvectors of ``[g, d, d]`` in columns; NaN if there is no decomposition."""
    found = decomposed(factor)
    return torch.full_like(factor, float("nan")) if found is None else found[1]


def _scaled(vector: Tensor, basis: Tensors, values: Tensor) -> Tensor:
    """Multiply ``[g, p, d]`` by values in a basis."""
    activation, gradient = basis["activation_basis"], basis["gradient_basis"]
    rotated = torch.bmm(torch.bmm(gradient.mT, vector), activation) * values  # [g, p, d]
    return torch.bmm(torch.bmm(gradient, rotated), activation.mT)  # [g, p, d]
