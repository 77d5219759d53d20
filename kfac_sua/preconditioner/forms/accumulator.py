"""Adding up a moment over the calls and micro-batches of a step: as rows while these are few, then as dense blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kfac_sua.preconditioner.forms import (
    LOW_RANK_FORMS,
    DenseFactor,
    Factor,
    LowRankFactor,
    MomentFactor,
    PatchFactor,
    RowsFactor,
    moment_form,
    moments,
)
from kfac_sua.preconditioner.forms.correlations import can_correlate, is_worth_correlating, patch_moment
from kfac_sua.preconditioner.forms.patch_rows import PatchRows, can_be_patch_rows
from kfac_sua.preconditioner.forms.rates import rates_of
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry


@dataclass
class Scalings:
    """Multiplications of tensors by numbers, collected to be carried out in one call."""

    tensors: list[Tensor] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)

    def add(self, tensor: Tensor, number: float) -> None:
        """Note that a tensor is to be multiplied by a number, in place."""
        self.tensors.append(tensor)
        self.numbers.append(number)

    def carry_out(self) -> None:
        """Multiply all tensors."""
        if self.tensors:
            torch._foreach_mul_(self.tensors, self.numbers)


class MomentAccumulator:
    """Sum of the Gram matrices UᵀU of rows.

    Rows are kept as they are until there are too many (see ``cost``), and then replaced by the sum of their Gram
    matrices.

    Args:
        max_rows: Number of rows up to which rows are kept.
    """

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._parts: list[LowRankFactor] = []
        self._sum: MomentFactor | None = None

    @property
    def num_rows(self) -> int:
        """Rows kept."""
        return sum(part.num_rows for part in self._parts)

    def has_room(self, num_rows: int) -> bool:
        """Whether this many more rows may be kept."""
        return self._sum is None and self.num_rows + num_rows <= self._max_rows

    def add(self, rows: Tensor) -> None:
        """Add rows, ``[num_blocks, rows, d]``; they are kept if there is room."""
        if self.has_room(rows.shape[1]):
            self.keep(RowsFactor(rows.clone()))  # rows may be a view of a buffer that the caller uses again
        else:
            self.add_moment(moment_form(rows.shape[-1]).of_rows(rows))

    def keep(self, rows: LowRankFactor) -> None:
        """Add rows for which there is room, without a copy."""
        self._parts.append(rows)

    def add_moment(self, moment: MomentFactor) -> None:
        """Add a Gram matrix, which the accumulator may change from now on; rows that were kept are added to it."""
        parts, self._parts = self._parts, []
        for part in parts:
            self.add_moment(part.as_moment(moment_form(part.width)))
        if self._sum is None:
            self._sum = moment
        else:
            assert type(moment) is type(self._sum), "moments of two forms do not add up"
            self._sum.values.add_(moment.values)

    def absorb(self, others: "Sequence[MomentAccumulator]") -> None:
        """Add what others have accumulated, in their order; the others must not be used any more."""
        parts = [part for other in others for part in other._parts]
        if self.has_room(sum(part.num_rows for part in parts)):
            self._parts += parts
            parts = []
        rows = [part for part in parts if isinstance(part, RowsFactor)]
        if len(rows) > 1:  # one product for many calls
            parts = [RowsFactor.concatenated(rows, 1.0), *(part for part in parts if not isinstance(part, RowsFactor))]
        for part in parts:
            self.add_moment(part.as_moment(moment_form(part.width)))
        for other in others:
            if other._sum is not None:
                self.add_moment(other._sum)

    def factor(self, normaliser: float, scalings: Scalings) -> Factor:
        """Return the accumulated moment; it is multiplied by ``normaliser`` when the scalings are carried out."""
        if self._sum is not None:
            scalings.add(self._sum.values, normaliser)
            return self._sum
        by_form = (form.concatenated(self._parts, normaliser**0.5) for form in LOW_RANK_FORMS)
        return next(factor for factor in by_form if factor is not None)


class ActivationAccumulator(MomentAccumulator):
    """The moment of a layer's inputs under ``expand``, in the form that takes the least work.

    Args:
        max_rows: Number of rows up to which rows are kept.
        geometry: The layer's geometry.
        layout: Its block layout.
        max_sampled_rows: Largest number of rows measured per call; ``None`` for all.
    """

    def __init__(
        self, max_rows: int, geometry: LayerGeometry, layout: BlockLayout, max_sampled_rows: int | None
    ) -> None:
        super().__init__(max_rows)
        self._geometry = geometry
        self._layout = layout
        self._max_sampled_rows = max_sampled_rows
        self._inputs: list[Tensor] = []

    def add_inputs(self, inputs: Tensor) -> None:
        """Add the rows of one call, ``[n, h, w, conv_groups · in_channels]``."""
        geometry, layout = self._geometry, self._layout
        num_rows = moments.num_activation_rows(inputs, geometry, layout)
        if self._max_sampled_rows is not None and num_rows > self._max_sampled_rows:
            for rows in moments.sampled_activation_rows(inputs, geometry, layout, self._max_sampled_rows):
                self.add(rows)
        elif can_be_patch_rows(geometry, layout) and self.has_room(num_rows):
            self.keep(PatchFactor(PatchRows.read(inputs, geometry)))
        elif not self.has_room(num_rows) and self._gains_by_correlating(num_rows, inputs.device):
            self._correlate(inputs)
        else:
            for rows in moments.activation_rows(inputs, geometry, layout):
                self.add(rows)

    def _gains_by_correlating(self, num_rows: int, device: torch.device) -> bool:
        geometry, layout = self._geometry, self._layout
        return can_correlate(geometry, layout) and is_worth_correlating(num_rows, geometry, layout, rates_of(device))

    def fold_inputs(self) -> None:
        """Add the moments of the inputs that have waited for the end of the backward pass."""
        while self._inputs:
            self.add_moment(self._correlations(self._inputs.pop()))  # pop frees the inputs before the moment is added

    def absorb(self, others: Sequence[MomentAccumulator]) -> None:
        """Add what others have accumulated, in their order; the others must not be used any more."""
        super().absorb(others)
        for other in others:
            assert isinstance(other, ActivationAccumulator)
            for inputs in other._inputs:
                if self._may_wait(inputs):
                    self._inputs.append(inputs)
                else:
                    self.add_moment(self._correlations(inputs))

    def _correlate(self, inputs: Tensor) -> None:
        """Add the moment of patches now, or after the backward pass if a copy of the inputs takes less memory.

        During the backward pass the activations of all layers are alive, and a training step needs most memory.
        """
        if self._may_wait(inputs):
            self._inputs.append(inputs.clone())
        else:
            self.add_moment(self._correlations(inputs))

    def _may_wait(self, inputs: Tensor) -> bool:
        """Whether these inputs, together with those that wait already, are smaller than the moment."""
        num_blocks, width = self._layout.activation_blocks
        return sum(waiting.numel() for waiting in self._inputs) + inputs.numel() <= num_blocks * width**2

    def _correlations(self, inputs: Tensor) -> DenseFactor:
        return DenseFactor(patch_moment(inputs, self._geometry, self._layout))
