"""What each of N processes sends, keeps and computes, counted from shapes without processes and data.

Network, statistics and exchange are the real ones, on PyTorch's meta device, where tensors have shapes only. An
exchange counts what it would send, and assumes that the other processes send the same.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.bench.contender import NUM_CLASSES
from kfac_sua.build import build_model
from kfac_sua.config import Config, ConfigError, KroneckerConfig
from kfac_sua.data.sizes import IMAGE_SHAPE
from kfac_sua.preconditioner import FisherType, KroneckerPreconditioner
from kfac_sua.preconditioner.distributed.assignment import Work, plan_assignment
from kfac_sua.preconditioner.distributed.averaging import description
from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.distributed.inversion import read_inverse
from kfac_sua.preconditioner.events import GradientEvent
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.forms import EigenBasis, Factor
from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.kronecker import KroneckerEigenbasis, KroneckerInverse, LayerInverse
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.precision import at_least_float32
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import DampingRule
from kfac_sua.preconditioner.structures.kronecker import KroneckerStructure

META = torch.device("meta")

CHECK_BYTES = 4 * len(GradientEvent)
"""Bytes of a layer's flags, which processes add up as float32 whenever statistics are measured."""


@dataclass(frozen=True)
class Costs:
    """Costs of one setting for each of N processes; bytes are those that one process hands to the collectives.

    Args:
        setting: Name of the setting.
        num_processes: N.
        batch_size: Examples of all processes together.
        factor_period: Mini-batches between measurements of the statistics.
        inverse_period: Mini-batches between refreshes.
        header_bytes: Per measurement: what there is.
        rows_bytes: Per measurement: rows and patches.
        moments_bytes: Per measurement: triangles of dense factors, and a flag per layer and event of its gradient.
        inverse_bytes: Per refresh.
        inverses_are_summed: Whether these travel as a sum over processes rather than a gather.
        gradient_bytes: Per mini-batch, by DistributedDataParallel: the gradients of all parameters.
        kept_bytes: Inverses and running averages kept between mini-batches.
        buffer_bytes: Of the largest exchange, what a process holds of it at once.
        num_factors: Factors of all layers.
        num_low_rank: Of these, how many are kept as rows or patches.
        num_shared: Blocks inverted by one process for all.
        num_everywhere: Blocks inverted by every process.
        inversion_flops: Per refresh, of the process with most of them.
        inversion_flops_alone: Per refresh, of a process that inverts everything.
    """

    setting: str
    num_processes: int
    batch_size: int
    factor_period: int
    inverse_period: int
    header_bytes: int
    rows_bytes: int
    moments_bytes: int
    inverse_bytes: int
    inverses_are_summed: bool
    gradient_bytes: int
    kept_bytes: int
    buffer_bytes: int
    num_factors: int
    num_low_rank: int
    num_shared: int
    num_everywhere: int
    inversion_flops: int
    inversion_flops_alone: int

    @property
    def statistics_bytes(self) -> int:
        """Bytes per measurement of the statistics."""
        return self.header_bytes + self.rows_bytes + self.moments_bytes

    @property
    def bytes_per_step(self) -> float:
        """Bytes per mini-batch, averaged over a refresh period."""
        return self.statistics_bytes / self.factor_period + self.inverse_bytes / self.inverse_period

    @property
    def received_per_step(self) -> float:
        """The same bytes as each process receives them, if collectives go around a ring."""
        gathered = self.gathered(self.header_bytes + self.rows_bytes)
        inverses = self.summed(self.inverse_bytes) if self.inverses_are_summed else self.gathered(self.inverse_bytes)
        return (gathered + self.summed(self.moments_bytes)) / self.factor_period + inverses / self.inverse_period

    @property
    def gradients_received(self) -> float:
        """Bytes that each process receives per mini-batch for the sum of all gradients, if it goes around a ring."""
        return self.summed(self.gradient_bytes)

    def gathered(self, num_bytes: int) -> float:
        """Return the bytes that a process receives in an all-gather, given the bytes of each process."""
        return float((self.num_processes - 1) * num_bytes)

    def summed(self, num_bytes: int) -> float:
        """Return the bytes that a process receives in an all-reduce: a reduce-scatter and an all-gather."""
        return 2 * (self.num_processes - 1) / self.num_processes * num_bytes


class ShapeProcesses(Processes):
    """Stands for N processes as the first of them, and counts all that it sends.

    Args:
        described: What every process says of every layer, ``[processes, layers, numbers]``.
    """

    def __init__(self, described: list[list[list[int]]]) -> None:
        self.rank, self.size = 0, len(described)
        self.sent_bytes: Counter[str] = Counter()
        self.statistics_bytes: int | None = None
        self._all = described

    def all_gather(self, values: Tensor, what: str) -> list[Tensor]:
        """Count the bytes, and return this process's values for all processes."""
        self.sent_bytes[what] += values.numel() * values.itemsize
        return [values] * self.size

    def all_reduce_(self, values: Tensor, what: str) -> None:
        """Count the bytes."""
        self.sent_bytes[what] += values.numel() * values.itemsize

    def all_gather_integers(
        self, values: Sequence[Sequence[int]], device: torch.device, what: str
    ) -> list[list[list[int]]]:
        """Count, and return what every process says of every layer."""
        del device  # a meta tensor holds no numbers
        self.all_gather(torch.tensor(values), what)
        return self._all


@dataclass
class ShapeModel:
    """A network with its preconditioner on the meta device.

    Args:
        config: Network, preconditioner and mini-batch.

    Raises:
        ConfigError: If the configuration has no preconditioner, or statistics that depend on data.
    """

    config: Config
    _measured: dict[int, list[LayerFactors | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.config.preconditioner, KroneckerConfig):
            raise ConfigError("Plain SGD has no statistics to send; count a setting with a preconditioner.")
        settings = self.config.preconditioner.settings(self.config.model.width)
        if settings.fisher_type is not FisherType.empirical:
            raise ConfigError(f"Counting needs fisher_type=empirical, got {settings.fisher_type}; leave the key out.")
        if settings.activation_rows is not None:  # what a process samples would depend on how many they are
            raise ConfigError(f"Counting needs activation_rows=null, got {settings.activation_rows}; leave it out.")
        if not issubclass(structure_class(settings.structure), KroneckerStructure):
            raise ConfigError(f"Counting needs structure=kfac or sua, which have factors, got {settings.structure}.")
        self.model = build_model(self.config, NUM_CLASSES, META)
        self.preconditioner = KroneckerPreconditioner(self.model, settings=settings, distributed=False)

    @property
    def layers(self) -> list[PreconditionedLayer]:
        """The preconditioned layers."""
        return [*self.preconditioner._layers.values()]

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        return sum(parameter.numel() * parameter.itemsize for parameter in self.model.parameters())

    def run(self, num_examples: int) -> None:
        """Take the forward and the backward pass of a mini-batch."""
        inputs = torch.empty(num_examples, *IMAGE_SHAPE, device=META)
        F.cross_entropy(self.model(inputs), torch.empty(num_examples, dtype=torch.long, device=META)).backward()

    def refresh(self, joined: Sequence[LayerFactors | None]) -> list[Factor]:
        """Give layers inverses of the shapes that a refresh from these factors has; return what would be inverted."""
        is_exact = self.preconditioner.settings.damping_rule is DampingRule.exact
        sides = []
        for layer, factors in zip(self.layers, joined, strict=True):
            if factors is not None:
                layer.add_measurement(factors)
                corrected = layer.average.corrected()
                assert isinstance(corrected, LayerFactors)
                sides += [corrected.activation, corrected.gradient]
                layer.inverse = _inverse(corrected, layer.layout, is_exact)
                layer.finish_refresh(corrected)
        return sides

    def measured(self, num_examples: int) -> list[LayerFactors | None]:
        """Return the statistics that a process measures on its examples, per layer."""
        if num_examples not in self._measured:
            with self.preconditioner.capture():
                self.run(num_examples)
            measured = [layer.statistics.factors(grads_of_mean_loss=True) for layer in self.layers]
            self._measured[num_examples] = [one if isinstance(one, LayerFactors) else None for one in measured]
            self.preconditioner.discard()
        return self._measured[num_examples]


def part_sizes(batch_size: int, num_processes: int) -> list[int]:
    """Return how many examples each process has.

    Raises:
        ConfigError: If there are too few for all.
    """
    if batch_size < num_processes:
        raise ConfigError(f"batch_size={batch_size} leaves some of {num_processes} processes without an example.")
    rest = batch_size % num_processes
    return [batch_size // num_processes + (rank < rest) for rank in range(num_processes)]


def joined_factors(
    shapes: ShapeModel, num_processes: int, batch_size: int
) -> tuple[list[LayerFactors | None], Counter[str]]:
    """Return the factors of all processes together, and the bytes that each sends for them, by what they are."""
    sizes = part_sizes(batch_size, num_processes)
    by_size = {size: shapes.measured(size) for size in set(sizes)}
    if num_processes == 1:
        return by_size[batch_size], Counter()
    described = {size: [description(factors) for factors in measured] for size, measured in by_size.items()}
    processes = ShapeProcesses([described[size] for size in sizes])
    structures = [layer.structure for layer in shapes.layers if isinstance(layer.structure, KroneckerStructure)]
    likes = [at_least_float32(layer.weight.detach()) for layer in shapes.layers]
    averaged = KroneckerStructure.average_over_processes(structures, by_size[sizes[0]], likes, processes)
    return averaged, processes.sent_bytes


def count_costs(name: str, shapes: ShapeModel, num_processes: int, batch_size: int, flops_per_byte: float) -> Costs:
    """Count what each of N processes sends, keeps and inverts.

    Args:
        name: Name of the setting.
        shapes: The network, which has the inverses of these processes afterwards.
        num_processes: N.
        batch_size: Examples of all processes together.
        flops_per_byte: Machine balance that inverses are shared out by.

    Raises:
        ConfigError: If there are too few examples for all processes.
    """
    joined, sent = joined_factors(shapes, num_processes, batch_size)
    sides = shapes.refresh(joined)
    settings = shapes.preconditioner.settings
    is_exact = settings.damping_rule is DampingRule.exact
    plan = plan_assignment([Work.of(side, is_eigenbasis=is_exact) for side in sides], num_processes, flops_per_byte)
    summed = any(plan.is_summed(dtype) for dtype in plan.dtypes)
    inverses = plan.sent_bytes * (1 if summed else num_processes)
    return Costs(
        setting=name,
        num_processes=num_processes,
        batch_size=batch_size,
        factor_period=shapes.preconditioner.factor_period,
        inverse_period=settings.inverse_period,
        header_bytes=sent["header"],
        rows_bytes=sent["rows"],
        moments_bytes=sent["moments"] + (CHECK_BYTES * len(shapes.layers) if num_processes > 1 else 0),
        inverse_bytes=plan.sent_bytes,
        inverses_are_summed=summed,
        gradient_bytes=shapes.gradient_bytes if num_processes > 1 else 0,
        kept_bytes=kept_bytes(shapes.preconditioner),
        buffer_bytes=max(sent["header"] * num_processes, sent["rows"] * num_processes, sent["moments"], inverses),
        num_factors=len(sides),
        num_low_rank=sum(not side.is_moment for side in sides),
        num_shared=plan.num_shared,
        num_everywhere=plan.num_everywhere,
        inversion_flops=plan.most_flops,
        inversion_flops_alone=plan.flops_alone,
    )


def kept_bytes(preconditioner: KroneckerPreconditioner) -> int:
    """Return the bytes of inverses and running averages, as a checkpoint would hold them."""

    def size(state: object) -> int:
        if isinstance(state, dict):
            return sum(map(size, state.values()))
        return state.numel() * state.itemsize if isinstance(state, Tensor) else 0

    return size(preconditioner.state_dict()["layers"])


def _inverse(layer: LayerFactors, layout: BlockLayout, is_exact: bool) -> LayerInverse:
    """Return an inverse of the right shapes."""
    sides = layer.activation, layer.gradient
    if is_exact:
        activation_basis, gradient_basis = (read_inverse(side, EigenBasis, []) for side in sides)
        one = layer.gradient.values.new_ones(())
        return KroneckerEigenbasis(activation_basis, gradient_basis, scale=one, damping=one)
    activation, gradient = (read_inverse(side, side.inverse_form, []) for side in sides)
    return KroneckerInverse(activation, gradient, layer.gradient.values.new_ones(layout.conv_groups))
