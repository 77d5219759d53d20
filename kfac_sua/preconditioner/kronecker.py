"""The inverse of a layer's damped Fisher block: a Kronecker product of two sides, each in a form of its own.

It multiplies a weight gradient ``[conv_groups, P, p, t, Q, d]`` (see ``geometry``): P groups of p output channels on
the gradient side, Q blocks of d features on the activation side, t taps under the identity factor. No Kronecker product
is formed: (B ⊗ A) vec(V) = vec(A V Bᵀ) (Martens & Grosse 2015, Sec. 4.2; Laurent et al. 2018, Sec. 1).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import EigenBasis, Inverse, form_of, inverse_from_state
from kfac_sua.preconditioner.geometry import LayerGeometry


@dataclass(frozen=True)
class Sides:
    """Some of the two sides of a layer's Kronecker product.

    Args:
        activation: Whether the activation side is among them.
        gradient: Whether the gradient side is among them.
    """

    activation: bool
    gradient: bool

    def complement(self) -> "Sides":
        """Return the sides that are not among these."""
        return BOTH_SIDES.without(self)

    def common(self, other: "Sides") -> "Sides":
        """Return the sides that are among both."""
        return Sides(activation=self.activation and other.activation, gradient=self.gradient and other.gradient)

    def without(self, other: "Sides") -> "Sides":
        """Return the sides that are among these and not among the others."""
        return Sides(activation=self.activation and not other.activation, gradient=self.gradient and not other.gradient)


EIGENBASIS = "eigenbasis"
"""Name of the form of either side, in a table, under exact damping."""

BOTH_SIDES = Sides(activation=True, gradient=True)
GRADIENT_SIDE = Sides(activation=False, gradient=True)
NEITHER_SIDE = Sides(activation=False, gradient=False)


class LayerInverse(ABC):
    """Inverse of a layer's damped Fisher block."""

    @property
    @abstractmethod
    def by_sides(self) -> "KroneckerInverse | None":
        """The inverse itself, if one side can be applied without the other; ``None`` otherwise."""

    @property
    @abstractmethod
    def forms(self) -> tuple[str, str]:
        """Names of the forms of the activation and of the gradient side, for a table."""

    @property
    @abstractmethod
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the inverse."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores: nested dicts of tensors."""

    def tensors(self) -> list[Tensor]:
        """Return all tensors that an application reads: those that a checkpoint stores."""
        entries = self.to_state().values()
        return [tensor for entry in entries for tensor in (entry.values() if isinstance(entry, dict) else [entry])]

    @abstractmethod
    def apply(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> Tensor:
        """Multiply a weight gradient ``[g, P, p, t, Q, d]`` (see ``geometry``) by the inverse, or by some of its sides.

        Returns:
            The same shape.
        """

    def apply_(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> None:
        """Do what :meth:`apply` does, in place."""
        blocks.copy_(self.apply(blocks, sides))

    @abstractmethod
    def apply_to_bias(self, columns: Tensor) -> Tensor:
        """Multiply the gradient of a separate bias, ``[g · P, p, 1]``, by the inverse of its block."""


@dataclass
class KroneckerInverse(LayerInverse):
    """Inverse of a layer's damped Kronecker product under factored damping: the product of the sides' inverses.

    Reference: (B ⊗ A)⁻¹ = B⁻¹ ⊗ A⁻¹, Laurent et al. (2018), Sec. 1; Martens & Grosse (2015), Sec. 4.2 and 6.3.

    Args:
        activation: Inverse of the damped activation factor.
        gradient: Inverse of the damped gradient factor, already divided by the block's scale.
        bias_scale: 1 / (1 + activation damping), ``[conv_groups]``: the inverse of the separate bias block's scalar
            activation factor.
    """

    activation: Inverse
    gradient: Inverse
    bias_scale: Tensor

    names: ClassVar[tuple[str, ...]] = ("activation", "gradient", "bias_scale")

    @property
    def forms(self) -> tuple[str, str]:
        """Names of the forms of the two inverses."""
        return self.activation.form, self.gradient.form

    @property
    def by_sides(self) -> "KroneckerInverse":
        """The inverse itself."""
        return self

    @property
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the inverse."""
        return self.bias_scale

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        sides = {"activation": self.activation.tensors(), "gradient": self.gradient.tensors()}
        return {**sides, "bias_scale": self.bias_scale}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], geometry: LayerGeometry) -> "KroneckerInverse":
        """Undo :meth:`to_state`."""
        activation, gradient = (inverse_from_state(state[side], geometry) for side in ("activation", "gradient"))
        return cls(activation, gradient, state["bias_scale"])

    def apply(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> Tensor:
        """Multiply ``[g, P, p, t, Q, d]`` by both inverse factors (or by one), block by block."""
        g, num_p, p, t, num_q, d = blocks.shape
        if sides.gradient:
            # [g · P, p, t · Q · d] and back. The reshaped tensor has no name, so that a copy is freed at once.
            blocks = self.gradient.left(blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
        if not sides.activation:
            return blocks
        return weight_view(self.activation.right(activation_view(blocks)), blocks.shape)  # [g, P, p, t, Q, d]

    def apply_(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> None:
        """Do what :meth:`apply` does, in place; the product with the second side is written without a copy."""
        target = activation_view(blocks)  # [g · Q, P · p · t, d]
        if sides != BOTH_SIDES or target.data_ptr() != blocks.data_ptr():  # a copy, where both g and Q exceed 1
            super().apply_(blocks, sides)
            return
        self.activation.right_into(activation_view(self.apply(blocks, GRADIENT_SIDE)), target)

    def apply_to_bias(self, columns: Tensor) -> Tensor:
        """Multiply ``[g · P, p, 1]`` by the inverse gradient factor and by that of the scalar activation factor."""
        scale = self.bias_scale.repeat_interleave(len(columns) // len(self.bias_scale))  # [g · P]
        return self.gradient.left(columns) * scale[:, None, None]  # [g · P, p, 1]


@dataclass
class KroneckerEigenbasis(LayerInverse):
    """Eigenbases of a layer's factors, for exact damping: (scale · Ḡ ⊗ Ā + ε I)⁻¹ is diagonal in their product.

    Reference: the Kronecker-factored eigenbasis of George et al. (2018), with the eigenvalues of the factors.

    Args:
        activation: Eigenbasis of the activation factor.
        gradient: Eigenbasis of the gradient factor.
        scale: S under ``expand``, 1 under ``reduce``; a 0-d tensor, as a captured step reads it by its address.
        damping: ε on the block; a 0-d tensor for the same reason.
    """

    activation: EigenBasis
    gradient: EigenBasis
    scale: Tensor
    damping: Tensor

    names: ClassVar[tuple[str, ...]] = ("activation", "gradient", "scale", "damping")

    @property
    def forms(self) -> tuple[str, str]:
        """The name of eigenbases, for both sides."""
        return EIGENBASIS, EIGENBASIS

    @property
    def by_sides(self) -> None:
        """``None``: the eigenbasis of one side does not determine an inverse of that side."""
        return None

    @property
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the inverse."""
        return self.activation.values

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        sides = {"activation": self.activation.tensors(), "gradient": self.gradient.tensors()}
        return {**sides, "scale": self.scale, "damping": self.damping}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], geometry: LayerGeometry) -> "KroneckerEigenbasis":
        """Undo :meth:`to_state`."""
        activation, gradient = (EigenBasis.from_tensors(state[side], geometry) for side in ("activation", "gradient"))
        return cls(activation, gradient, state["scale"], state["damping"])

    def apply(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> Tensor:
        """Divide ``[g, P, p, t, Q, d]`` by scale · products of eigenvalues + ε, in the eigenbases."""
        assert sides == BOTH_SIDES, "the eigenbasis of one side does not determine an inverse"
        rotated = _rotate(blocks, self.gradient.vectors.mT, self.activation.vectors)
        g, num_p, p, _, num_q, d = blocks.shape
        gradient_values = self.gradient.values.view(g, num_p, p, 1, 1, 1)  # [g, P, p, 1, 1, 1] from [g · P, p]
        activation_values = self.activation.values.view(g, 1, 1, 1, num_q, d)  # [g, 1, 1, 1, Q, d] from [g · Q, d]
        rotated = rotated / (self.scale * gradient_values * activation_values + self.damping)  # [g, P, p, t, Q, d]
        return _rotate(rotated, self.gradient.vectors, self.activation.vectors.mT)

    def apply_to_bias(self, columns: Tensor) -> Tensor:
        """Divide ``[g · P, p, 1]`` by scale · eigenvalues + ε, in the gradient factor's eigenbasis."""
        rotated = torch.bmm(self.gradient.vectors.mT, columns)  # [g · P, p, 1]
        rotated = rotated / (self.scale * self.gradient.values.unsqueeze(-1) + self.damping)  # [g · P, p, 1]
        return torch.bmm(self.gradient.vectors, rotated)  # [g · P, p, 1]


def layer_inverse_from_state(
    state: Mapping[str, Any], geometry: LayerGeometry
) -> KroneckerInverse | KroneckerEigenbasis | None:
    """Undo ``to_state``, for a layer of this geometry; ``None`` where the state is empty.

    Raises:
        ValueError: If no class of inverses has such a state.
    """
    if not state:
        return None
    forms: tuple[type[KroneckerInverse] | type[KroneckerEigenbasis], ...] = (KroneckerInverse, KroneckerEigenbasis)
    return form_of(state, forms).from_state(state, geometry)


def activation_view(blocks: Tensor) -> Tensor:
    """View ``[g, P, p, t, Q, d]`` as ``[g · Q, P · p · t, d]``, without a copy unless both g and Q exceed 1."""
    g, num_p, p, t, num_q, d = blocks.shape
    if num_q == 1:
        return blocks.reshape(g, num_p * p * t, d)  # [g, P · p · t, d]
    by_block = blocks.reshape(g, num_p * p * t, num_q, d).transpose(1, 2)  # [g, Q, P · p · t, d]
    return by_block.reshape(g * num_q, num_p * p * t, d)  # [g · Q, P · p · t, d]


def weight_view(values: Tensor, shape: torch.Size) -> Tensor:
    """Undo :func:`activation_view`: view ``[g · Q, P · p · t, d]`` as ``[g, P, p, t, Q, d]``."""
    g, num_p, p, t, num_q, d = shape
    if num_q == 1:
        return values.view(shape)  # [g, P, p, t, 1, d]
    return values.view(g, num_q, num_p, p, t, d).permute(0, 2, 3, 4, 1, 5)  # [g, P, p, t, Q, d]


def _rotate(blocks: Tensor, gradient_matrix: Tensor, activation_matrix: Tensor) -> Tensor:
    """Multiply ``[g, P, p, t, Q, d]`` by ``[g · P, p, p]`` from the left and ``[g · Q, d, d]`` from the right."""
    g, num_p, p, t, num_q, d = blocks.shape
    # [g · P, p, t · Q · d] and back. The reshaped tensor has no name, so that a copy is freed at once.
    left = torch.bmm(gradient_matrix, blocks.reshape(g * num_p, p, t * num_q * d)).view(blocks.shape)
    return weight_view(torch.bmm(activation_view(left), activation_matrix), blocks.shape)  # [g, P, p, t, Q, d]
