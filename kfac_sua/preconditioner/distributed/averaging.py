"""Factors of several processes, each measured on its part of a mini-batch, as those of one process on all of it.

Factors that are kept as rows, or as patches, are gathered: every process gets all rows. Dense factors are averaged; of
each symmetric block about one triangle is sent. A measurement takes three collective calls: the descriptions of all
factors, rows, moments.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import (
    NUM_DESCRIBED,
    Factor,
    LowRankFactor,
    MomentFactor,
    described_rows,
    description_of,
    moment_form,
)
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry

DESCRIPTION_NUMBERS = 2 + 2 * NUM_DESCRIBED
"""Integers in the description of a layer's factors: rows, examples, and for both sides the form and its sizes."""

DESCRIPTION_BYTES = 8 * DESCRIPTION_NUMBERS
"""Bytes of a description, which is sent as int64."""


@dataclass(frozen=True)
class SharedLayer:
    """What every process knows of a layer, even one that the loss has not reached on that process.

    Args:
        layout: Its block layout.
        geometry: Its geometry.
        max_rows: Rows of the activation and of the gradient factor up to which these are kept as rows.
        like: A tensor of the factors' dtype and device.
    """

    layout: BlockLayout
    geometry: LayerGeometry
    max_rows: tuple[int, int]
    like: Tensor


@dataclass(frozen=True)
class _SentRows:
    """The rows of one factor as they are gathered: their form, and the sizes of what each process sends."""

    form: type[LowRankFactor]
    sizes: list[tuple[int, ...]]


@dataclass(frozen=True)
class _Side:
    """One factor of one layer on all processes.

    Args:
        factor: What this process measured; ``None`` if the loss did not reach the layer here.
        weights: Share of each process in all rows.
        rows: What each process sends, if rows are gathered; ``None`` if moments are averaged.
        num_blocks: Blocks of the factor.
        width: Width of a block.
        layer: The layer.
    """

    factor: Factor | None
    weights: list[float]
    rows: _SentRows | None
    num_blocks: int
    width: int
    layer: SharedLayer


def average_factors(
    measured: Sequence[LayerFactors | None], layers: Sequence[SharedLayer], processes: Processes
) -> list[LayerFactors | None]:
    """Return the factors of the whole mini-batch.

    Args:
        measured: What this process measured, per layer; ``None`` where the loss did not reach the layer.
        layers: The layers, in the same order.
        processes: The processes that share the mini-batch.

    Returns:
        The same on every process; ``None`` for a layer that the loss reached on no process.
    """
    before = processes.sent_bytes.total()
    own = [description(factors) for factors in measured]
    # [processes, layers, DESCRIPTION_NUMBERS]
    descriptions = processes.all_gather_integers(own, layers[0].like.device, "header")
    sides = [
        side
        for index, (factors, layer) in enumerate(zip(measured, layers, strict=True))
        for side in _sides(factors, layer, [of_process[index] for of_process in descriptions])
    ]
    rows, moments = _gather_rows(sides, processes), _average_moments(sides, processes)
    averaged = [next(moments) if side.rows is None else next(rows) for side in sides]
    processes.statistics_bytes = processes.sent_bytes.total() - before
    result: list[LayerFactors | None] = []
    for index in range(len(layers)):
        num_rows, num_examples = (sum(of_process[index][i] for of_process in descriptions) for i in range(2))
        pair = averaged[2 * index], averaged[2 * index + 1]
        scale = num_rows / num_examples if num_examples else 0.0
        result.append(LayerFactors(*pair, scale=scale, num_rows=num_rows) if num_rows else None)
    return result


def description(factors: LayerFactors | None) -> list[int]:
    """Return rows, examples, and the form and sizes of both sides: what the other processes need to know."""
    if factors is None:
        return [0] * DESCRIPTION_NUMBERS
    num_examples = round(factors.num_rows / factors.scale)
    return [factors.num_rows, num_examples, *description_of(factors.activation), *description_of(factors.gradient)]


def _sides(factors: LayerFactors | None, layer: SharedLayer, descriptions: list[list[int]]) -> Iterator[_Side]:
    """Yield the activation and the gradient side of a layer, from its descriptions by all processes."""
    total = sum(one[0] for one in descriptions)
    weights = [one[0] / total if total else 0.0 for one in descriptions]
    own = (None, None) if factors is None else (factors.activation, factors.gradient)
    blocks = (layer.layout.activation_blocks, layer.layout.gradient_blocks)
    for index, (factor, (num_blocks, width)) in enumerate(zip(own, blocks, strict=True)):
        start = 2 + index * NUM_DESCRIBED
        of_side = [one[start : start + NUM_DESCRIBED] if one[0] else None for one in descriptions]
        rows = _sent_rows(of_side, layer, layer.max_rows[index])
        yield _Side(factor, weights, rows, num_blocks, width, layer)


def _sent_rows(descriptions: Sequence[Sequence[int] | None], layer: SharedLayer, max_rows: int) -> _SentRows | None:
    """Return which rows every process sends; ``None`` if moments must be sent.

    Rows are sent if all processes that the loss reached have them, in one form and of one width, and not too many in
    all.

    Args:
        descriptions: That of the side by each process; ``None`` where the loss did not reach the layer.
        layer: The layer.
        max_rows: Rows up to which the factor is kept as rows.
    """
    described = [None if one is None else described_rows(one) for one in descriptions]
    present = [rows for rows, one in zip(described, descriptions, strict=True) if one is not None]
    kept = [rows for rows in present if rows is not None]
    if len(kept) < len(present) or len({form for form, _ in kept}) != 1:
        return None
    form, some = kept[0]
    without_rows = {(*sizes[:-2], sizes[-1]) for _, sizes in kept}  # the last dimension but one counts rows or examples
    num_rows = sum(form.num_rows_of(sizes, layer.geometry) for _, sizes in kept)
    if len(without_rows) > 1 or num_rows > max_rows:
        return None
    nothing = (*some[:-2], 0, some[-1])
    return _SentRows(form, [nothing if rows is None else rows[1] for rows in described])


def _gather_rows(sides: Sequence[_Side], processes: Processes) -> Iterator[Factor]:
    """Gather all rows on all processes, scaled so that their Gram matrices add up to the average."""
    kept = [(side, side.rows) for side in sides if side.rows is not None]
    if not kept:
        return
    longest = max(sum(math.prod(rows.sizes[rank]) for _, rows in kept) for rank in range(processes.size))
    padded = kept[0][0].layer.like.new_zeros(longest)  # all_gather needs one length
    own = torch.cat([_scaled_rows(side, processes.rank).flatten() for side, _ in kept])  # [numbers]
    padded[: len(own)] = own
    gathered = processes.all_gather(padded, "rows")
    received = [[*_split(flat, [rows.sizes[rank] for _, rows in kept])] for rank, flat in enumerate(gathered)]
    for index, (side, rows) in enumerate(kept):
        values = torch.cat([parts[index] for parts in received], dim=-2)  # [..., rows or examples of all processes, d]
        yield rows.form.of(values, side.layer.geometry)


def _average_moments(sides: Sequence[_Side], processes: Processes) -> Iterator[Factor]:
    """Average all moments in one call, those of symmetric blocks over their upper triangles."""
    moments = [_scaled_moment(side, processes.rank) for side in sides if side.rows is None]
    if not moments:
        return
    flat = torch.cat([piece.flatten() for moment in moments for piece in moment.pieces()])  # [numbers]
    processes.all_reduce_(flat, "moments")
    sizes = [moment.num_blocks * moment.count_numbers(moment.width) for moment in moments]
    for moment, numbers in zip(moments, flat.split(sizes), strict=True):
        yield moment.from_numbers_(numbers)


def _split(flat: Tensor, sizes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yield tensors of these sizes from the front of ``[numbers]``."""
    start = 0
    for one in sizes:
        yield flat[start : start + math.prod(one)].view(one)  # [blocks, rows, d] or [h, w, n, channels]
        start += math.prod(one)


def _scaled_moment(side: _Side, rank: int) -> MomentFactor:
    """Return this process's part of the average of a factor: zeros where it measured nothing."""
    form = moment_form(side.width)
    if side.factor is None:
        return form.zeros(side.num_blocks, side.width, side.layer.like)
    moment = side.factor.as_moment(form)
    return moment.with_values(moment.values * side.weights[rank])


def _scaled_rows(side: _Side, rank: int) -> Tensor:
    """Return the rows that this process sends of a factor: none where it measured nothing."""
    if side.factor is None:
        return side.layer.like.new_empty(0)
    return side.factor.values * side.weights[rank] ** 0.5
