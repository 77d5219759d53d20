"""The exact Fisher block through its rows: norms, products and the damped quadratic model, none of them forming it.

With rows G, ``[R, P]``, F = GᵀG is as wide as the layer has parameters, and the Gram matrix GGᵀ as wide as there are
rows: ‖F‖ = ‖GGᵀ‖, tr F = ‖G‖², and (F + εI)⁻¹v = (v − Gᵀ(GGᵀ + εI)⁻¹Gv)/ε, the Woodbury identity. One
eigendecomposition of the Gram matrix serves all ε.
"""

import dataclasses
import math

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Direction:
    """A direction u in the parameters, as far as the damped quadratic model sees it.

    Args:
        rows: Gu, ``[R]``.
        square: u·u.
        gradient: u·v with the gradient v.
    """

    rows: Tensor
    square: float
    gradient: float

    @classmethod
    def of(cls, direction: Tensor, rows: Tensor, gradient: Tensor) -> "Direction":
        """Return a direction's products with rows ``[R, P]`` and a gradient ``[P]``."""
        return cls(rows @ direction, float(direction @ direction), float(direction @ gradient))

    def __add__(self, other: "Direction") -> "Direction":
        """Return the direction in the parameters of both: all three products are sums over parameters."""
        return Direction(self.rows + other.rows, self.square + other.square, self.gradient + other.gradient)


class ExactBlock:
    """F = GᵀG and a gradient v: the damped quadratic model m(u) = −v·u + ½ uᵀ(F + εI)u.

    Args:
        gram: GGᵀ, ``[R, R]``.
        gradient_rows: Gv, ``[R]``.
        gradient_square: v·v.
    """

    def __init__(self, gram: Tensor, gradient_rows: Tensor, gradient_square: float) -> None:
        self.gram, self.gradient_rows, self.gradient_square = gram, gradient_rows, gradient_square
        values, self._vectors = torch.linalg.eigh(gram)
        self._values = values.clamp(min=0)  # of a positive semi-definite matrix: what is below zero is rounding
        self._gradient = self._vectors.mT @ gradient_rows  # [R]

    @property
    def norm(self) -> float:
        """‖F‖ in Frobenius' norm."""
        return float(self.gram.norm())

    @property
    def trace(self) -> float:
        """Tr F."""
        return float(self.gram.trace())

    def solve_rows(self, damping: float) -> Tensor:
        """Return w = (GGᵀ + εI)⁻¹Gv, ``[R]``, with which (F + εI)⁻¹v = (v − Gᵀw)/ε."""
        return self._vectors @ (self._gradient / (self._values + damping))

    def fit(self, direction: Direction, damping: float) -> "Fit":
        """Return how a direction does in the damped quadratic model."""
        weights = self._gradient / (self._values + damping)  # [R]
        cross = float(self._gradient @ weights)  # Gv·w
        product = direction.gradient - float((self._vectors.mT @ direction.rows) @ weights)
        # ‖v − Gᵀw‖² = v·v − 2 Gv·w + wᵀGGᵀw, in the Gram matrix's eigenbasis
        square = self.gradient_square - 2 * cross + float((self._values * weights.square()).sum())
        return Fit(
            gradient=direction.gradient,
            curvature=float(direction.rows @ direction.rows) + damping * direction.square,
            square=direction.square,
            attainable=(self.gradient_square - cross) / damping / 2,
            with_solution=product / damping,
            solution_square=square / damping**2,
        )

    def direction_by(self, statistics: "ExactBlock", cross: Tensor, damping: float) -> Direction:
        """Return the direction (F′ + εI)⁻¹v of another block F′ = G′ᵀG′.

        Args:
            statistics: F′, with the same gradient.
            cross: GG′ᵀ, ``[R, R′]``.
            damping: ε.
        """
        weights = statistics.solve_rows(damping)  # [R′]
        gradient = self.gradient_square - float(statistics.gradient_rows @ weights)
        square = gradient - float(statistics.gradient_rows @ weights) + float(weights @ (statistics.gram @ weights))
        return Direction((self.gradient_rows - cross @ weights) / damping, square / damping**2, gradient / damping)

    def overlap(self, statistics: "ExactBlock", cross: Tensor) -> "Overlap":
        """Return the sums from which the closeness of F and another block F′ follows, without F′'s eigenbasis."""
        is_same = statistics is self
        square = statistics.norm**2
        return Overlap(float(cross.square().sum()), square, statistics.trace, square if is_same else float("nan"))


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a direction u does in the damped quadratic model; that of a block-diagonal F is the sum of its blocks'.

    Args:
        gradient: u·v.
        curvature: uᵀ(F + εI)u.
        square: u·u.
        attainable: The largest decrease of the model, ½ vᵀ(F + εI)⁻¹v.
        with_solution: u·(F + εI)⁻¹v.
        solution_square: ‖(F + εI)⁻¹v‖².
    """

    gradient: float
    curvature: float
    square: float
    attainable: float
    with_solution: float
    solution_square: float

    def __add__(self, other: "Fit") -> "Fit":
        """Return the fit of both blocks together."""
        return Fit(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    @property
    def share(self) -> float:
        """Share of the attainable decrease that the best step along u reaches: ½ (u·v)²/(uᵀ(F + εI)u) of it.

        NaN if v is zero, so that nothing can be attained, or u is.
        """
        if not (self.curvature > 0 and self.attainable > 0):  # nor where rounding has left less than zero
            return math.nan
        return self.gradient**2 / self.curvature / 2 / self.attainable

    @property
    def cosine(self) -> float:
        """Cosine between u and (F + εI)⁻¹v; NaN if one of them is zero."""
        if not (self.square > 0 and self.solution_square > 0):  # nor where rounding has left less than zero
            return math.nan
        return self.with_solution / (self.square**0.5 * self.solution_square**0.5)


@dataclasses.dataclass(frozen=True)
class Closeness:
    """How near a symmetric K is to F, in Frobenius' norm.

    Attributes:
        relative_error: ‖F − K‖/‖F‖.
        cosine: ⟨F, K⟩/(‖F‖‖K‖).
        trace_ratio: tr K/tr F.
        basis_error: ‖F − F̃‖/‖F‖ with F̃ = Q diag(QᵀFQ) Qᵀ in K's eigenbasis Q, the nearest to F that this basis has.
        eigenvalue_error: ‖F̃ − K‖/‖F‖; its square and that of ``basis_error`` add up to that of ``relative_error``.
    """

    relative_error: float
    cosine: float
    trace_ratio: float
    basis_error: float
    eigenvalue_error: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """Sums from which the closeness of F and K follows; those of a block-diagonal K are sums over its blocks.

    Args:
        product: ⟨F, K⟩ = Σ_i c_i λ_i, with c = diag(QᵀFQ) and K's eigenvalues λ.
        square: ‖K‖² = Σ λ_i².
        trace: tr K.
        diagonal_square: ‖F̃‖² = Σ c_i²; NaN where K's eigenbasis is not at hand.
    """

    product: float
    square: float
    trace: float
    diagonal_square: float

    @classmethod
    def of(cls, diagonal: Tensor, eigenvalues: Tensor) -> "Overlap":
        """Return the sums for c = diag(QᵀFQ) and K's eigenvalues, both ``[coordinates]``."""
        return cls(
            product=float(diagonal @ eigenvalues),
            square=float(eigenvalues @ eigenvalues),
            trace=float(eigenvalues.sum()),
            diagonal_square=float(diagonal @ diagonal),
        )

    def __add__(self, other: "Overlap") -> "Overlap":
        """Return the sums of a K with the blocks of both."""
        return Overlap(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def closeness(self, norm: float, trace: float) -> Closeness:
        """Return how near K is to F.

        Args:
            norm: ‖F‖.
            trace: tr F.

        Returns:
            How near it is; NaN if F is zero, and a NaN for the cosine if K is.

        Reference: the split into eigenbasis and eigenvalues: "Better Hessians Matter" (arXiv 2509.23437).
        """
        if not (norm > 0 and trace > 0):
            return Closeness(*[math.nan] * 5)
        # Differences of squares, which rounding may make negative; a NaN stays one, as max() keeps its first argument.
        basis = max(norm**2 - self.diagonal_square, 0.0)
        eigenvalues = max(self.diagonal_square - 2 * self.product + self.square, 0.0)
        return Closeness(
            relative_error=max(norm**2 - 2 * self.product + self.square, 0.0) ** 0.5 / norm,
            cosine=self.product / (norm * self.square**0.5) if self.square != 0 else math.nan,
            trace_ratio=self.trace / trace,
            basis_error=basis**0.5 / norm,
            eigenvalue_error=eigenvalues**0.5 / norm,
        )
