"""Statistics of several processes, each with a part of the mini-batch, as those of one process with all of it.

Where a factor is kept as rows, or as patches, all processes get all of them; a dense factor is averaged, and of its
symmetric blocks about one triangle travels. Three collective calls per measurement: what there is, rows, moments.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kfac_sua.preconditioner.factors import Factor
from kfac_sua.preconditioner.grouping import BlockLayout
from kfac_sua.preconditioner.layers import LayerGeometry
from kfac_sua.preconditioner.patch_rows import PatchRows
from kfac_sua.preconditioner.pixels import output_size
from kfac_sua.preconditioner.statistics import LayerFactors
from kfac_sua.preconditioner.triangles import mirrored_, packed, triangle_numbers, unpack_

_DENSE, _ROWS, _PATCHES = range(3)

DESCRIPTION_BYTES = 12 * 8
"""Bytes of what every process says of a layer: twelve integers."""


@dataclass(frozen=True)
class Site:
    """What every process knows of a layer, whether or not the loss has reached it there.

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
class _Side:
    """One factor of one layer on all processes.

    Args:
        factor: What this process measured; ``None`` if the loss did not reach the layer here.
        weights: Share of each process in all rows.
        shapes: Shape of what each process sends, if rows or pixels are exchanged; ``None`` where moments are.
        num_blocks: Blocks of the factor.
        width: Width of a block.
        site: The layer.
    """

    factor: Factor | None
    weights: list[float]
    shapes: list[tuple[int, ...]] | None
    num_blocks: int
    width: int
    site: Site


class Processes:
    """The processes that share a mini-batch.

    Args:
        group: Their process group.

    Attributes:
        rank: Place of this process among them.
        size: How many they are.
        sent_bytes: Bytes that this process has handed to the collectives, by what they are.
        statistics_bytes: The same of the last measurement alone; ``None`` before the first.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.sent_bytes: Counter[str] = Counter()
        self.statistics_bytes: int | None = None

    def place(self, num_examples: int, device: torch.device) -> tuple[int, int]:
        """Return how many examples the processes before this one have, and how many all of them have."""
        own = torch.tensor([num_examples], device=device)
        counts = [int(count) for count in torch.cat(self.gather(own, "examples")).tolist()]
        return sum(counts[: self.rank]), sum(counts)

    def join(self, measured: Sequence[LayerFactors | None], sites: Sequence[Site]) -> list[LayerFactors | None]:
        """Return the factors of the whole mini-batch.

        Args:
            measured: What this process measured, per layer; ``None`` where the loss did not reach the layer.
            sites: The layers, in the same order.

        Returns:
            The same on every process; ``None`` where the loss reached the layer nowhere.
        """
        before = self.sent_bytes.total()
        described = self._described(measured, sites[0].like.device)
        sides = [
            side
            for layer, (factors, site) in enumerate(zip(measured, sites, strict=True))
            for side in _sides(factors, site, [process[layer] for process in described])
        ]
        joined = [*self._exchange(sides)]
        self.statistics_bytes = self.sent_bytes.total() - before
        result: list[LayerFactors | None] = []
        for layer in range(len(sites)):
            num_rows, num_examples = (sum(process[layer][i] for process in described) for i in range(2))
            pair = joined[2 * layer], joined[2 * layer + 1]
            scale = num_rows / num_examples if num_examples else 0.0
            result.append(LayerFactors(*pair, scale=scale, num_rows=num_rows) if num_rows else None)
        return result

    def _described(self, measured: Sequence[LayerFactors | None], device: torch.device) -> list[list[list[int]]]:
        """Return what every process says of every layer, ``[processes, layers, numbers]``."""
        header = torch.tensor([description(factors) for factors in measured], device=device)
        described: list[list[list[int]]] = torch.stack(self.gather(header, "header")).tolist()
        return described

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over the processes of values of one shape, the same on all of them."""
        total = values.clone()
        self.add_up_(total, "means")
        return total / self.size

    def _exchange(self, sides: Sequence[_Side]) -> Iterator[Factor]:
        rows, moments = self._exchange_rows(sides), self._exchange_moments(sides)
        for side in sides:
            yield next(moments) if side.shapes is None else next(rows)

    def _exchange_rows(self, sides: Sequence[_Side]) -> Iterator[Factor]:
        """Send all rows to all processes, scaled so that their Gram matrices add up to the average."""
        kept = [side for side in sides if side.shapes is not None]
        if not kept:
            return
        longest = max(sum(math.prod(side.shapes[rank]) for side in kept if side.shapes) for rank in range(self.size))
        own = kept[0].site.like.new_zeros(longest)
        parts = [_scaled_rows(side, self.rank).flatten() for side in kept]
        sent = torch.cat(parts)
        own[: len(sent)] = sent
        received = [list(self._split(flat, kept, rank)) for rank, flat in enumerate(self.gather(own, "rows"))]
        for index, side in enumerate(kept):
            values = torch.cat([parts[index] for parts in received], dim=-2)
            is_patches = values.dim() == 4
            yield Factor(patches=PatchRows(values, side.site.geometry)) if is_patches else Factor(rows=values)

    def _split(self, flat: Tensor, kept: Sequence[_Side], rank: int) -> Iterator[Tensor]:
        start = 0
        for side in kept:
            assert side.shapes is not None
            size = math.prod(side.shapes[rank])
            yield flat[start : start + size].view(side.shapes[rank])
            start += size

    def _exchange_moments(self, sides: Sequence[_Side]) -> Iterator[Factor]:
        """Average dense blocks, in one call over the upper triangles of all of them."""
        dense = [side for side in sides if side.shapes is None]
        if not dense:
            return
        blocks = []
        for side in dense:
            if side.factor is None:
                blocks.append(side.site.like.new_zeros(side.num_blocks, side.width, side.width))
            else:
                blocks.append(side.factor.dense() * side.weights[self.rank])
        self.add_up_(flat := packed(*blocks), "moments")
        start = 0
        for block in blocks:
            size = len(block) * triangle_numbers(block.shape[-1])
            yield Factor(blocks=mirrored_(unpack_(block, flat[start : start + size])))
            start += size

    def gather(self, values: Tensor, what: str) -> list[Tensor]:
        """Return the values of all processes, in their order; shape and dtype must be the same on all.

        Args:
            values: Of this process.
            what: What they are, for :attr:`sent_bytes`.
        """
        self.sent_bytes[what] += values.numel() * values.itemsize
        received = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(received, values.contiguous(), group=self._group)
        return received

    def add_up_(self, values: Tensor, what: str) -> None:
        """Replace a contiguous tensor by its sum over all processes."""
        self.sent_bytes[what] += values.numel() * values.itemsize
        dist.all_reduce(values, group=self._group)


def default_processes() -> Processes | None:
    """Return the processes of the default group, or ``None`` if there is no group of more than one."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    assert dist.group.WORLD is not None
    return Processes(dist.group.WORLD)


def description(factors: LayerFactors | None) -> list[int]:
    """Return rows, examples, and of both sides form and shape: what the other processes need to know."""
    if factors is None:
        return [0] * 12
    num_examples = round(factors.num_rows / factors.scale)
    return [factors.num_rows, num_examples, *_form(factors.activation), *_form(factors.gradient)]


def _form(factor: Factor) -> list[int]:
    """Return the form, and the four sizes that the shape of its rows or pixels can have."""
    if factor.blocks is not None:
        return [_DENSE, 0, 0, 0, 0]
    shape = list(factor.values.shape)
    return [_PATCHES if factor.patches is not None else _ROWS, *shape, *[0] * (4 - len(shape))]


def _sides(factors: LayerFactors | None, site: Site, described: list[list[int]]) -> Iterator[_Side]:
    """Yield the activation and the gradient side of a layer, from what all processes say of it."""
    total = sum(process[0] for process in described)
    weights = [process[0] / total if total else 0.0 for process in described]
    own = (None, None) if factors is None else (factors.activation, factors.gradient)
    blocks = (site.layout.activation_blocks, site.layout.gradient_blocks)
    for index, (factor, (num_blocks, width)) in enumerate(zip(own, blocks, strict=True)):
        forms = [process[2 + 5 * index : 7 + 5 * index] for process in described]
        present = [form for form, process in zip(forms, described, strict=True) if process[0]]
        shapes = _shapes(forms, present, site, index)
        yield _Side(factor, weights, shapes, num_blocks, width, site)


def _shapes(forms: list[list[int]], present: list[list[int]], site: Site, index: int) -> list[tuple[int, ...]] | None:
    """Return the shape of every process's rows or pixels, if all have such, alike, and not too many in all."""
    if not present or any(form[0] == _DENSE or form[0] != present[0][0] for form in present):
        return None
    is_patches = present[0][0] == _PATCHES
    dims = 4 if is_patches else 3
    rest = {(*form[1 : dims - 1], form[dims]) for form in present}  # all sizes but the examples or rows
    num_rows = sum(_num_rows(form, site) for form in present)
    if len(rest) > 1 or num_rows > site.max_rows[index]:
        return None
    template = present[0][1 : dims + 1]
    return [tuple(form[1 : dims + 1]) if form in present else (*template[:-2], 0, template[-1]) for form in forms]


def _num_rows(form: list[int], site: Site) -> int:
    if form[0] == _ROWS:
        return form[2]
    height, width, num_examples, _ = form[1:5]
    return math.prod(output_size(site.geometry, height, width)) * num_examples


def _scaled_rows(side: _Side, rank: int) -> Tensor:
    if side.factor is None:
        return side.site.like.new_empty(0)
    return side.factor.values * side.weights[rank] ** 0.5
