"""The paper's structures: K-FAC and SUA, in channel groups or not. Kronecker products of two factors.

They keep the moments of inputs and of output gradients, each by itself, as they arrive (``factor_statistics``), and
invert the blocks of all layers in a few batched calls (``refresh``). The product is ``scale · Ḡ ⊗ Ā`` with Ḡ and Ā as
``forms.moments`` defines them.

Reference: K-FAC: Martens & Grosse (2015), for convolutions Grosse & Martens (2016); SUA: Laurent et al. (2018), Sec.
2.1; channel groups: Sec. 2.2.
"""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kfac_sua.preconditioner.apply import multiplied, quadratic_form
from kfac_sua.preconditioner.checkpoint.layer_checks import (
    Finding,
    StateHolder,
    factors_findings,
    kronecker_inverse_findings,
)
from kfac_sua.preconditioner.distributed.averaging import SharedLayer, average_factors
from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import DenseInverse, SplitInverse
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.rates import rates_of
from kfac_sua.preconditioner.forms.split import PART_BYTES
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.invert import Inverter
from kfac_sua.preconditioner.kronecker import EIGENBASIS, LayerInverse, layer_inverse_from_state
from kfac_sua.preconditioner.precision import has_fast_products
from kfac_sua.preconditioner.refresh import Refreshed, refresh_layers, small_dampings
from kfac_sua.preconditioner.settings import DampingRule, KroneckerSettings, Products, Structure, WeightSharing
from kfac_sua.preconditioner.statistics import LayerStatistics
from kfac_sua.preconditioner.structures.factor_statistics import FactorStatistics
from kfac_sua.preconditioner.structures.structure import BlockSizes, FisherStructure


class KroneckerStructure(FisherStructure[LayerFactors]):
    """A Kronecker product of an activation and a gradient factor.

    Attributes:
        structure: Structure of the activation factor.
    """

    structure: ClassVar[Structure]
    reads = frozenset(
        ("group_size", "damping_rule", "weight_sharing", "ema_decay", "activation_rows", "inverse_method", "products")
    )
    can_be_captured = True
    has_sides = True
    can_be_shared = True
    shares_inversion = True

    def __init__(self, geometry: LayerGeometry, settings: KroneckerSettings, device: torch.device) -> None:
        super().__init__(geometry, settings, device)
        self._layout = BlockLayout.of(geometry, self.structure, settings.group_size)
        self._costs = self._costs_on(device)

    @property
    def label(self) -> str:
        """K-FAC also for layers on which SUA is the same."""
        return "K-FAC" if self._layout.taps_in_features else "SUA"

    @property
    def layout(self) -> BlockLayout:
        """Its blocks."""
        return self._layout

    @property
    def side_costs(self) -> tuple[SideCost, SideCost]:
        """Work on the activation and on the gradient side, by the rates of the weight's device."""
        return self._costs

    def at_hand(self, like: Tensor) -> Self:
        """Return the structure with the products that it would be applied in now."""
        products = self.settings.products
        if products is Products.auto and not has_fast_products(like):
            products = Products.ieee
        current = copy.copy(self)
        activation, gradient = (replace(cost, products=products) for cost in self._costs)
        current._costs = activation, gradient
        return current

    def sizes(self) -> BlockSizes:
        """Return memory and FLOPs of dense blocks."""
        is_exact = self.settings.damping_rule is DampingRule.exact
        splits = [not is_exact and cost.dense_application().is_split for cost in self._costs]
        has_average = self.settings.ema_decay > 0
        # Bytes per number of a dense block: of its inverse, and of its running average.
        sizes = [(PART_BYTES if is_split else 4) + (4 if has_average else 0) for is_split in splits]
        forms = EIGENBASIS, EIGENBASIS
        if not is_exact:
            activation, gradient = ((SplitInverse if is_split else DenseInverse).form for is_split in splits)
            forms = activation, gradient
        costs = self._costs
        return BlockSizes(
            activation_blocks=self._layout.activation_blocks,
            gradient_blocks=self._layout.gradient_blocks,
            memory_bytes=sum(size * cost.num_blocks * cost.width**2 for size, cost in zip(sizes, costs, strict=True)),
            inverse_flops=sum(cost.eigenbasis() if is_exact else cost.dense_inverse() for cost in costs),
            apply_flops=sum(cost.eigenbasis_apply() if is_exact else cost.dense_apply() for cost in costs),
            low_rank_rows=self._max_rows,
            forms=forms,
        )

    def new_statistics(self, name: str, num_processes: int) -> LayerStatistics:
        """Return what reduces rows to moments as they arrive."""
        sampled_rows = self.settings.activation_rows
        activation, gradient = self._max_rows
        return FactorStatistics(
            name,
            self.geometry,
            self._layout,
            reduce=self.settings.weight_sharing is WeightSharing.reduce,
            max_activation_rows=activation,
            max_gradient_rows=gradient,
            sampled_rows=math.ceil(sampled_rows / num_processes) if sampled_rows else None,
        )

    def follow(self, device: torch.device, statistics: LayerStatistics) -> None:
        """Take the rates of the device, and keep as many rows as they suggest."""
        if self._costs[0].rates is not rates_of(device):
            self._costs = self._costs_on(device)
            assert isinstance(statistics, FactorStatistics)
            statistics.max_rows = self._max_rows

    @classmethod
    def average_over_processes(
        cls,
        structures: Sequence[Self],
        measured: Sequence[LayerFactors | None],
        likes: Sequence[Tensor],
        processes: Processes,
    ) -> list[LayerFactors | None]:
        """Average moments, and gather rows."""
        shared = [structure.shared(like) for structure, like in zip(structures, likes, strict=True)]
        return average_factors(measured, shared, processes)

    def shared(self, like: Tensor) -> SharedLayer:
        """Return what the other processes know of the layer too.

        Args:
            like: A tensor of the factors' dtype and device.
        """
        return SharedLayer(self._layout, self.geometry, self._max_rows, like)

    @classmethod
    def finds_non_finite(cls, settings: KroneckerSettings) -> bool:
        """Return whether an inversion tells which factors are not finite.

        A matrix that is not finite has no Cholesky factorisation. Eigendecompositions would raise instead, and a
        running average would keep the numbers.
        """
        return not settings.needs_dense_factors

    @classmethod
    def refresh(
        cls,
        structures: Sequence[Self],
        measured: Sequence[LayerFactors],
        settings: KroneckerSettings,
        inverter: Inverter,
    ) -> list[Refreshed]:
        """Invert the blocks of all layers, those of equal size in one call."""
        layouts = [structure.layout for structure in structures]
        return refresh_layers(measured, layouts, [one.side_costs for one in structures], settings, inverter)

    @classmethod
    def small_dampings(cls, measured: Sequence[LayerFactors], settings: KroneckerSettings) -> Tensor:
        """Compare the damping with the traces of the factors."""
        return small_dampings(measured, settings)

    def multiply(self, weight: Tensor, bias: Tensor | None, measured: LayerFactors) -> tuple[Tensor, Tensor | None]:
        """Multiply by ``scale · Ḡ ⊗ Ā``, without forming it."""
        return multiplied(weight, bias, self._layout, measured)

    def quadratic_form(self, weight: Tensor, bias: Tensor | None, measured: LayerFactors) -> Tensor:
        """Multiply before the gradient is put together again."""
        return quadratic_form(weight, bias, self._layout, measured)

    def measurement_from_state(self, state: Mapping[str, Any]) -> LayerFactors | None:
        """Undo ``to_state`` of the factors."""
        return LayerFactors.from_state(state, self.geometry)

    def inverse_from_state(self, state: Mapping[str, Any]) -> LayerInverse | None:
        """Undo ``to_state`` of an inverse by sides, or of eigenbases."""
        return layer_inverse_from_state(state, self.geometry)

    def measurement_findings(self, entry: str, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of both factors."""
        yield from factors_findings(entry, state, holder)

    def inverse_findings(self, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of both sides."""
        yield from kronecker_inverse_findings(state, holder)

    @property
    def _max_rows(self) -> tuple[int, int]:
        activation, gradient = (cost.max_kept_rows(self.settings) for cost in self._costs)
        return activation, gradient

    def _costs_on(self, device: torch.device) -> tuple[SideCost, SideCost]:
        rates, layout = rates_of(device), self._layout
        return (
            SideCost.of_activation(self.geometry, layout, self.settings, rates),
            SideCost.of_gradient(layout, self.settings, rates),
        )


class KFAC(KroneckerStructure):
    """K-FAC: the channels and kernel taps of the inputs together, in channel groups or not."""

    structure = Structure.kfac


class SUA(KroneckerStructure):
    """Spatially uncorrelated activations: the identity over kernel taps ⊗ a factor of the channels."""

    structure = Structure.sua
