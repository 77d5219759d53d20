"""The inversions of a refresh, shared out among processes (see ``assignment``): each makes some and gets all.

A process sends one message per precision: counts of failed and repaired blocks, then the inverses, symmetric ones as
about one triangle. It reads its own blocks from the messages too, so that all processes have the same bits.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from kfac_sua.preconditioner import invert as alone
from kfac_sua.preconditioner.distributed.assignment import (
    NUM_COUNTS,
    Assignment,
    Work,
    machine_balance,
    plan_assignment,
)
from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.forms import BlockMessage, ComputedInverse, EigenBasis, Factor, RefreshResult
from kfac_sua.preconditioner.forms.triangles import packed, unpack_
from kfac_sua.preconditioner.invert import Outcome

P = TypeVar("P", bound=RefreshResult)


Kind = Callable[[Factor], type[P]]
"""Returns the class of what a factor becomes: an inverse, or an eigenbasis."""

Make = Callable[[Sequence[tuple[int, slice]]], Sequence[Outcome[P]]]
"""Inverts or decomposes some blocks of some factors: (index of the factor, its blocks) each."""


class SharedInversion:
    """Inverts factors that all processes have; the results have the same bits on all of them.

    Args:
        processes: The processes.
        flops_per_byte: Machine balance; ``None`` for that of the device.

    Attributes:
        plan: The assignment of the last refresh; ``None`` before the first.
    """

    def __init__(self, processes: Processes, flops_per_byte: float | None = None) -> None:
        self.processes = processes
        self.flops_per_byte = flops_per_byte
        self.plan: Assignment | None = None

    def invert_factors(self, factors: Sequence[Factor], dampings: Sequence[Tensor]) -> list[Outcome[ComputedInverse]]:
        """Invert factors as ``invert.invert_factors`` does, all processes together.

        Args:
            factors: Factors to invert, the same on all processes.
            dampings: For each, the damping of its blocks, ``[num_blocks]``, > 0.

        Returns:
            One outcome per factor, in order.
        """

        def make(parts: Sequence[tuple[int, slice]]) -> list[Outcome[ComputedInverse]]:
            return alone.invert_factors(
                [factors[i].part(blocks) for i, blocks in parts], [dampings[i][blocks] for i, blocks in parts]
            )

        return self._make_all(factors, lambda factor: factor.inverse_form, make)

    def eigendecompose_factors(self, factors: Sequence[Factor]) -> list[EigenBasis | None]:
        """Decompose factors as ``invert.eigendecompose_factors`` does, all processes together."""

        def make(parts: Sequence[tuple[int, slice]]) -> list[Outcome[EigenBasis]]:
            own = [factors[i].part(blocks) for i, blocks in parts]
            return [  # a basis that fails is sent as zeros
                Outcome(basis or EigenBasis.zeros(factor), num_failed=int(basis is None))
                for factor, basis in zip(own, alone.eigendecompose_factors(own), strict=True)
            ]

        made = self._make_all(factors, lambda factor: EigenBasis, make)
        return [None if one.num_failed else one.inverse for one in made]

    def _make_all(self, factors: Sequence[Factor], kind: Kind[P], make: Make[P]) -> list[Outcome[P]]:
        rank, device = self.processes.rank, factors[0].values.device
        works = [Work.making(kind(factor), factor) for factor in factors]
        plan = plan_assignment(works, self.processes.size, machine_balance(device, self.flops_per_byte))
        self.plan = plan
        # Not in one call with this process's share: the other blocks in a batch can change the last bits of a result.
        everywhere = [i for i, shares in enumerate(plan.shares) if shares is None]
        made = make([(i, slice(None)) for i in everywhere])
        results = dict(zip(everywhere, made, strict=True))
        for dtype in plan.dtypes:
            own = [(i, plan.blocks_of(i, rank)) for i in plan.factors_of(rank, dtype)]
            forms = [works[i].form for i, _ in own]
            made = make(own)
            nothing = torch.empty(0, dtype=dtype, device=device)
            messages = self._exchange(to_message(made, forms, nothing), plan.parts(dtype), plan.is_summed(dtype))
            results |= read_messages(messages, plan, factors, kind)
        return [results[i] for i in range(len(factors))]

    def _exchange(self, message: Tensor, lengths: Sequence[int], is_summed: bool) -> Sequence[Tensor]:
        """Return the messages of all processes, of these lengths or longer."""
        rank = self.processes.rank
        assert len(message) == lengths[rank]
        if not is_summed:
            padded = message.new_zeros(max(lengths))
            padded[: len(message)] = message
            return self.processes.all_gather(padded, "inverses")
        joined = message.new_zeros(sum(lengths))
        parts = joined.split([*lengths])
        parts[rank].copy_(message)
        self.processes.all_reduce_(joined, "inverses")
        return parts


def to_message(made: Sequence[Outcome[P]], forms: Sequence[BlockMessage], like: Tensor) -> Tensor:
    """Return the counts of failed and repaired blocks and then the inverses, ``[numbers]``.

    Args:
        made: What a process made of some blocks of one factor each.
        forms: The message of a block, for each.
        like: A tensor of the device and the precision.
    """
    counts = [[one.num_failed, one.num_raised, one.raised_by] for one in made]
    numbers = (part for one, form in zip(made, forms, strict=True) for part in _numbers(one.inverse, form))
    return torch.cat([like.new_tensor(counts).flatten(), *numbers])  # [numbers]


def read_messages(
    messages: Sequence[Tensor], plan: Assignment, factors: Sequence[Factor], kind: Kind[P]
) -> dict[int, Outcome[P]]:
    """Return what all processes have made, by the index of the factor.

    Args:
        messages: The result of :func:`to_message` on each process, perhaps padded.
        plan: The assignment.
        factors: All factors of the plan.
        kind: Returns the class of what was made of a factor.

    Returns:
        The results for the factors whose inverses have the messages' precision. Waits for the device once.
    """
    dtype = messages[0].dtype
    owned = [plan.factors_of(rank, dtype) for rank in range(plan.num_processes)]
    heads = [message[: NUM_COUNTS * len(own)] for message, own in zip(messages, owned, strict=True)]
    counts = iter(torch.cat(heads).view(-1, NUM_COUNTS).tolist())  # [factors of all processes, NUM_COUNTS]
    makers: dict[int, list[tuple[slice, _Reader]]] = defaultdict(list)
    fates: dict[int, list[Outcome[None]]] = defaultdict(list)
    for rank, (message, own) in enumerate(zip(messages, owned, strict=True)):
        reader = _Reader(message[NUM_COUNTS * len(own) :])
        for i in own:
            makers[i].append((plan.blocks_of(i, rank), reader))
            fates[i].append(Outcome(None, *map(int, next(counts))))
    results = {}
    for i in sorted(makers):  # the order in which every process wrote its message
        inverse = read_inverse(factors[i], kind(factors[i]), makers[i])
        results[i] = Outcome.combined(inverse, fates[i])
    return results


@dataclass
class _Reader:
    """Takes numbers from the front of a message."""

    numbers: Tensor

    def take(self, count: int) -> Tensor:
        taken, self.numbers = self.numbers.tensor_split([count])
        return taken


def read_inverse(factor: Factor, kind: type[P], parts: Sequence[tuple[slice, _Reader]]) -> P:
    """Assemble the inverse or the eigenbasis of a factor from the blocks that each process sent.

    Args:
        factor: The factor.
        kind: The class of what was made of it.
        parts: Blocks, and the message to read them from; all other blocks are zero.
    """
    values, form = factor.values, kind.message_of(factor)
    matrices = values.new_zeros(factor.num_blocks, form.height, form.width)  # [num_blocks, height, width]
    extra = values.new_empty(factor.num_blocks, form.num_extra)  # [num_blocks, num_extra]
    for blocks, reader in parts:
        num_blocks = blocks.stop - blocks.start
        flat = reader.take(num_blocks * form.num_matrix)
        if form.is_triangle:
            unpack_(matrices[blocks], flat)
        else:
            matrices[blocks] = flat.view(num_blocks, form.height, form.width)  # [blocks, height, width]
        flat = reader.take(num_blocks * form.num_extra)
        extra[blocks] = flat.view(num_blocks, form.num_extra)  # [blocks, num_extra]
    return kind.from_message(factor, matrices, extra)


def _numbers(inverse: RefreshResult, form: BlockMessage) -> Iterator[Tensor]:
    """Yield the numbers that are sent of an inverse."""
    matrices, extra = inverse.to_message()
    yield packed(matrices) if form.is_triangle else matrices.flatten()  # [numbers]
    yield extra.flatten()  # [numbers]
