"""The inverses of a refresh, each process making its share of them (see ``sharing``) and getting all others'.

One message per precision: what became of the blocks, and then their inverses, symmetric ones as about one triangle. A
process takes its own blocks out of the messages too, so that all processes have the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kfac_sua.preconditioner import inverse as alone
from kfac_sua.preconditioner.factors import Factor
from kfac_sua.preconditioner.inverse import (
    DenseInverse,
    EigenBasis,
    Inverse,
    InverseResult,
    LowRankInverse,
    PatchInverse,
)
from kfac_sua.preconditioner.processes import Processes
from kfac_sua.preconditioner.sharing import NUM_COUNTS, InverseForm, SharingPlan, Work, machine_balance, plan_sharing
from kfac_sua.preconditioner.triangles import mirrored_, packed, unpack_


@dataclass
class Made:
    """The inverse or the eigenbasis of some blocks of a factor, and what became of them, as in ``InverseResult``."""

    inverse: Inverse | EigenBasis
    num_failed: int = 0
    num_raised: int = 0
    raised_by: int = 1


_Make = Callable[[list[Factor], list[Tensor]], list[Made]]


class SharedInversion:
    """Inverts factors that all processes have; the results are alike on all of them, to the bit.

    Args:
        processes: The processes.
        flops_per_byte: Machine balance; ``None`` for that of the device.

    Attributes:
        plan: Who inverted what at the last refresh; ``None`` before the first.
    """

    def __init__(self, processes: Processes, flops_per_byte: float | None = None) -> None:
        self.processes = processes
        self.flops_per_byte = flops_per_byte
        self.plan: SharingPlan | None = None

    def invert_factors(self, factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[InverseResult]:
        """Do what ``inverse.invert_factors`` does, all processes together.

        Args:
            factors: Factors to invert, the same on all processes.
            dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

        Returns:
            One result per factor, in order.
        """
        results = []
        for made in self._make_all(factors, dampings, _invert, is_eigenbasis=False):
            assert not isinstance(made.inverse, EigenBasis)
            results.append(InverseResult(made.inverse, made.num_failed, made.num_raised, made.raised_by))
        return results

    def eigendecompose_factors(self, factors: Sequence[Factor]) -> list[EigenBasis | None]:
        """Do what ``inverse.eigendecompose_factors`` does, all processes together."""
        undamped = [factor.values.new_zeros(factor.num_blocks) for factor in factors]
        results: list[EigenBasis | None] = []
        for made in self._make_all(factors, undamped, _decompose, is_eigenbasis=True):
            assert isinstance(made.inverse, EigenBasis)
            results.append(None if made.num_failed else made.inverse)
        return results

    def _make_all(
        self, factors: Sequence[Factor], dampings: Sequence[Tensor], make: _Make, *, is_eigenbasis: bool
    ) -> list[Made]:
        rank, device = self.processes.rank, factors[0].values.device
        works = [Work.of(factor, is_eigenbasis=is_eigenbasis) for factor in factors]
        plan = plan_sharing(works, self.processes.size, machine_balance(device, self.flops_per_byte))
        self.plan = plan
        # Not in one call with this process's share: what else is in a batch can change the last bits of a result.
        everywhere = [i for i, shares in enumerate(plan.shares) if shares is None]
        made = make([factors[i] for i in everywhere], [dampings[i] for i in everywhere])
        results = dict(zip(everywhere, made, strict=True))
        for dtype in plan.dtypes:
            own = [(i, plan.blocks_of(i, rank)) for i in plan.factors_of(rank, dtype)]
            made = make([factors[i].part(blocks) for i, blocks in own], [dampings[i][blocks] for i, blocks in own])
            nothing = torch.empty(0, dtype=dtype, device=device)
            messages = self._exchange(to_message(made, nothing), plan.parts(dtype), plan.is_summed(dtype))
            results |= read_messages(messages, plan, factors)
        return [results[i] for i in range(len(factors))]

    def _exchange(self, message: Tensor, lengths: Sequence[int], is_summed: bool) -> Sequence[Tensor]:
        """Return the messages of all processes, of these lengths or longer."""
        rank = self.processes.rank
        assert len(message) == lengths[rank]
        if not is_summed:
            padded = message.new_zeros(max(lengths))
            padded[: len(message)] = message
            return self.processes.gather(padded, "inverses")
        joined = message.new_zeros(sum(lengths))
        parts = joined.split([*lengths])
        parts[rank].copy_(message)
        self.processes.add_up_(joined, "inverses")
        return parts


def to_message(made: Sequence[Made], like: Tensor) -> Tensor:
    """Return what became of the blocks and then their inverses, ``[numbers]``."""
    counts = [[one.num_failed, one.num_raised, one.raised_by] for one in made]
    return torch.cat([like.new_tensor(counts).flatten(), *(part for one in made for part in _numbers(one.inverse))])


def read_messages(messages: Sequence[Tensor], plan: SharingPlan, factors: Sequence[Factor]) -> dict[int, Made]:
    """Return what all processes have made, by factor.

    Args:
        messages: What :func:`to_message` gave on each process, perhaps with more behind it.
        plan: Who made what.
        factors: All factors of the plan.

    Returns:
        The factors whose inverses have the messages' precision. Waits for the device once.
    """
    dtype = messages[0].dtype
    owned = [plan.factors_of(rank, dtype) for rank in range(plan.num_processes)]
    heads = [message[: NUM_COUNTS * len(own)] for message, own in zip(messages, owned, strict=True)]
    counts = iter(torch.cat(heads).view(-1, NUM_COUNTS).tolist())
    makers: dict[int, list[tuple[slice, _Reader]]] = defaultdict(list)
    fates: dict[int, list[list[float]]] = defaultdict(list)
    for rank, (message, own) in enumerate(zip(messages, owned, strict=True)):
        reader = _Reader(message[NUM_COUNTS * len(own) :])
        for i in own:
            makers[i].append((plan.blocks_of(i, rank), reader))
            fates[i].append(next(counts))
    results = {}
    for i in sorted(makers):  # the order in which each process wrote them
        failed, raised, raised_by = zip(*fates[i], strict=True)
        inverse = read_inverse(factors[i], plan.works[i].form, makers[i])
        results[i] = Made(inverse, int(sum(failed)), int(sum(raised)), int(max(raised_by)))
    return results


@dataclass
class _Reader:
    """Takes numbers from the front of a message."""

    numbers: Tensor

    def take(self, count: int) -> Tensor:
        taken, self.numbers = self.numbers.tensor_split([count])
        return taken


def read_inverse(factor: Factor, form: InverseForm, parts: Sequence[tuple[slice, _Reader]]) -> Inverse | EigenBasis:
    """Put the inverse of a factor together from the blocks that each process sent."""
    values = factor.values
    matrix = values.new_zeros(factor.num_blocks, form.height, form.width)
    extra = values.new_empty(factor.num_blocks, form.num_extra)
    for blocks, reader in parts:
        num_blocks = blocks.stop - blocks.start
        flat = reader.take(num_blocks * form.num_matrix)
        if form.is_triangle:
            unpack_(matrix[blocks], flat)
        else:
            matrix[blocks] = flat.view(num_blocks, form.height, form.width)
        extra[blocks] = reader.take(num_blocks * form.num_extra).view(num_blocks, -1)
    if form.is_eigenbasis:
        return EigenBasis(matrix, extra)
    if factor.blocks is not None:
        return DenseInverse(mirrored_(matrix))
    if factor.patches is not None:
        return PatchInverse(factor.patches, matrix.mT, extra[:, :, None])
    return LowRankInverse(matrix, extra[:, :, None])


def _numbers(inverse: Inverse | EigenBasis) -> Iterator[Tensor]:
    """Yield what an inverse is sent as; of a triangle, its upper mirror image."""
    if isinstance(inverse, DenseInverse):
        yield packed(inverse.blocks)
    elif isinstance(inverse, LowRankInverse):
        yield from (inverse.root.flatten(), inverse.scale.flatten())
    elif isinstance(inverse, PatchInverse):
        yield from (packed(inverse.triangle.mT), inverse.scale.flatten())
    else:
        yield from (inverse.vectors.flatten(), inverse.values.flatten())


def _invert(factors: list[Factor], dampings: list[Tensor]) -> list[Made]:
    results = alone.invert_factors(factors, dampings) if factors else []
    return [Made(one.inverse, one.num_failed, one.num_raised, one.raised_by) for one in results]


def _decompose(factors: list[Factor], undamped: list[Tensor]) -> list[Made]:
    """Decompose factors; where that fails, zeros stand in for the eigenbasis."""
    made = []
    for factor, basis, zeros in zip(factors, alone.eigendecompose_factors(factors), undamped, strict=True):
        nothing = zeros[:, None].expand(-1, factor.width)
        made.append(Made(basis or EigenBasis(torch.diag_embed(nothing), nothing), num_failed=int(basis is None)))
    return made
