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

from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import (
    NUM_DESCRIBED,
    Factor,
    RowFactor,
    SumFactor,
    described_rows,
    description_of,
    sum_form,
)
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry

DESCRIPTION_NUMBERS = 2 + 2 * NUM_DESCRIBED
"""Integers that every process says of a layer: rows, examples, and of both sides the form and its sizes."""

DESCRIPTION_BYTES = 8 * DESCRIPTION_NUMBERS
"""Bytes of these: they travel as int64."""


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
class _Rows:
    """Rows of one factor as they are exchanged: the form, and the sizes of what each process sends."""

    form: type[RowFactor]
    sizes: list[tuple[int, ...]]


@dataclass(frozen=True)
class _Side:
    """One factor of one layer on all processes.

    Args:
        factor: What this process measured; ``None`` if the loss did not reach the layer here.
        weights: Share of each process in all rows.
        rows: What each process sends, if rows are exchanged; ``None`` where moments are.
        num_blocks: Blocks of the factor.
        width: Width of a block.
        site: The layer.
    """

    factor: Factor | None
    weights: list[float]
    rows: _Rows | None
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
            yield next(moments) if side.rows is None else next(rows)

    def _exchange_rows(self, sides: Sequence[_Side]) -> Iterator[Factor]:
        """Send all rows to all processes, scaled so that their Gram matrices add up to the average."""
        kept = [(side, side.rows) for side in sides if side.rows is not None]
        if not kept:
            return
        longest = max(sum(math.prod(rows.sizes[rank]) for _, rows in kept) for rank in range(self.size))
        own = kept[0][0].site.like.new_zeros(longest)
        sent = torch.cat([_scaled_rows(side, self.rank).flatten() for side, _ in kept])  # [numbers]
        own[: len(sent)] = sent
        gathered = self.gather(own, "rows")
        received = [[*_split(flat, [rows.sizes[rank] for _, rows in kept])] for rank, flat in enumerate(gathered)]
        for index, (side, rows) in enumerate(kept):
            values = torch.cat([parts[index] for parts in received], dim=-2)  # rows, or examples, of all processes
            yield rows.form.of(values, side.site.geometry)

    def _exchange_moments(self, sides: Sequence[_Side]) -> Iterator[Factor]:
        """Average moments, in one call over all of them, of symmetric blocks over their upper triangles."""
        moments = [_scaled_moment(side, self.rank) for side in sides if side.rows is None]
        if not moments:
            return
        flat = torch.cat([piece.flatten() for moment in moments for piece in moment.pieces()])  # [numbers]
        self.add_up_(flat, "moments")
        sizes = [moment.num_blocks * moment.count_numbers(moment.width) for moment in moments]
        for moment, numbers in zip(moments, flat.split(sizes), strict=True):
            yield moment.from_numbers_(numbers)

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
    """Return rows, examples, and of both sides form and sizes: what the other processes need to know."""
    if factors is None:
        return [0] * DESCRIPTION_NUMBERS
    num_examples = round(factors.num_rows / factors.scale)
    return [factors.num_rows, num_examples, *description_of(factors.activation), *description_of(factors.gradient)]


def _sides(factors: LayerFactors | None, site: Site, described: list[list[int]]) -> Iterator[_Side]:
    """Yield the activation and the gradient side of a layer, from what all processes say of it."""
    total = sum(process[0] for process in described)
    weights = [process[0] / total if total else 0.0 for process in described]
    own = (None, None) if factors is None else (factors.activation, factors.gradient)
    blocks = (site.layout.activation_blocks, site.layout.gradient_blocks)
    for index, (factor, (num_blocks, width)) in enumerate(zip(own, blocks, strict=True)):
        start = 2 + index * NUM_DESCRIBED
        said = [process[start : start + NUM_DESCRIBED] if process[0] else None for process in described]
        rows = _rows(said, site, site.max_rows[index])
        yield _Side(factor, weights, rows, num_blocks, width, site)


def _rows(sides: Sequence[Sequence[int] | None], site: Site, max_rows: int) -> _Rows | None:
    """Return what every process sends of its rows; ``None`` if moments must be sent.

    Rows are sent if all processes that the loss reached have them, in one form and of one width, and not too many in
    all.

    Args:
        sides: What each process says of the side; ``None`` where the loss did not reach the layer.
        site: The layer.
        max_rows: Rows up to which the factor is kept as rows.
    """
    described = [None if side is None else described_rows(side) for side in sides]
    present = [rows for rows, side in zip(described, sides, strict=True) if side is not None]
    kept = [rows for rows in present if rows is not None]
    if len(kept) < len(present) or len({form for form, _ in kept}) != 1:
        return None
    form, some = kept[0]
    like = {(*sizes[:-2], sizes[-1]) for _, sizes in kept}  # all but the rows, or the examples
    num_rows = sum(form.num_rows_of(sizes, site.geometry) for _, sizes in kept)
    if len(like) > 1 or num_rows > max_rows:
        return None
    nothing = (*some[:-2], 0, some[-1])
    return _Rows(form, [nothing if rows is None else rows[1] for rows in described])


def _split(flat: Tensor, sizes: Sequence[tuple[int, ...]]) -> Iterator[Tensor]:
    """Yield tensors of these sizes from the front of ``[numbers]``."""
    start = 0
    for one in sizes:
        yield flat[start : start + math.prod(one)].view(one)  # [blocks, rows, d] or [h, w, n, channels]
        start += math.prod(one)


def _scaled_moment(side: _Side, rank: int) -> SumFactor:
    form = sum_form(side.width)
    if side.factor is None:
        return form.zeros(side.num_blocks, side.width, side.site.like)
    moment = side.factor.summed(form)
    return moment.with_values(moment.values * side.weights[rank])


def _scaled_rows(side: _Side, rank: int) -> Tensor:
    if side.factor is None:
        return side.site.like.new_empty(0)
    return side.factor.values * side.weights[rank] ** 0.5
