"""What a structure is: one way to approximate a layer's Fisher block, to keep it, and to invert it.

A preconditioner makes one object of a structure's class per layer. Most structures are written more easily as a
:class:`~kfac_sua.preconditioner.structures.row_structure.RowStructure`, which receives all rows of a mini-batch at
once; this protocol is for those that reduce rows as they arrive or invert many layers together, as the Kronecker
structures do.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor

from kfac_sua.preconditioner.checkpoint.layer_checks import Finding, StateHolder
from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.factors import LayerMeasurement
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.invert import Inverter
from kfac_sua.preconditioner.kronecker import LayerInverse
from kfac_sua.preconditioner.refresh import Refreshed
from kfac_sua.preconditioner.settings import KroneckerSettings
from kfac_sua.preconditioner.statistics import LayerStatistics

M = TypeVar("M", bound=LayerMeasurement)


@dataclass(frozen=True)
class BlockSizes:
    """What a structure's block of one layer takes, for the table of layers.

    Args:
        activation_blocks: Number and width of the blocks on the activation side; zeros if there is no such side.
        gradient_blocks: The same for the gradient side.
        memory_bytes: What is kept from refresh to refresh, in float32, if dense.
        inverse_flops: FLOPs of a refresh's inversions, if dense.
        apply_flops: FLOPs of one application, if dense.
        low_rank_rows: Rows up to which both sides are inverted by the Woodbury identity; 0 for never.
        forms: Names of the forms in which the inverse is applied before the first refresh, by side.
    """

    activation_blocks: tuple[int, int]
    gradient_blocks: tuple[int, int]
    memory_bytes: int
    inverse_flops: int
    apply_flops: int
    low_rank_rows: tuple[int, int] = (0, 0)
    forms: tuple[str, str] = ("", "")


class FisherStructure(ABC, Generic[M]):
    """The block of one layer, as a structure approximates it.

    Args:
        geometry: The layer's geometry.
        settings: Settings of the preconditioner.
        device: The device of its weight.

    Attributes:
        reads: Names of the settings that the structure reads beside those that every preconditioner has; a setting
            that it does not read must keep its default.
        can_be_captured: Whether steps that apply it can be captured: its application neither waits for the device nor
            depends on numbers there.
        needs_output_grads: Whether the block depends on output gradients, and so on the kind of Fisher.
        has_sides: Whether it is a product of two sides, each of which may be applied inside the backward pass.
        can_be_shared: Whether several processes may share a mini-batch (:meth:`average_over_processes`).
        shares_inversion: Whether :meth:`refresh` lets the inverter share its matrices out among them.
    """

    reads: ClassVar[frozenset[str]] = frozenset()
    can_be_captured: ClassVar[bool] = False
    needs_output_grads: ClassVar[bool] = True
    has_sides: ClassVar[bool] = False
    can_be_shared: ClassVar[bool] = False
    shares_inversion: ClassVar[bool] = False

    def __init__(self, geometry: LayerGeometry, settings: KroneckerSettings, device: torch.device) -> None:
        self.geometry = geometry
        self.settings = settings
        del device  # of those whose costs depend on it

    # --- what it is called, and what it takes -----------------------------------------------------------------------

    @property
    @abstractmethod
    def label(self) -> str:
        """Its name in the table of layers."""

    @property
    @abstractmethod
    def layout(self) -> BlockLayout:
        """How the layer's weight gradient is viewed when it is multiplied."""

    @abstractmethod
    def sizes(self) -> BlockSizes:
        """Return memory and FLOPs."""

    @property
    def side_costs(self) -> tuple[SideCost, SideCost] | None:
        """Work on the activation and on the gradient side, if it is a Kronecker product; ``None`` otherwise."""
        return None

    def at_hand(self, like: Tensor) -> Self:
        """Return the structure under the precision switches that the caller has set now.

        Args:
            like: A tensor of the device and the dtype of what is kept.
        """
        del like
        return self

    # --- a mini-batch -----------------------------------------------------------------------------------------------

    @abstractmethod
    def new_statistics(self, name: str, num_processes: int) -> LayerStatistics:
        """Return what receives the layer's inputs and output gradients, and returns a measurement of them.

        Args:
            name: The layer's name.
            num_processes: Processes that share a mini-batch.
        """

    def follow(self, device: torch.device, statistics: LayerStatistics) -> None:
        """Follow the layer's weight to another device, or other rates of its device.

        Args:
            device: The device of the weight now.
            statistics: What :meth:`new_statistics` returned.
        """
        del device, statistics

    @classmethod
    @abstractmethod
    def average_over_processes(
        cls, structures: Sequence[Self], measured: Sequence[M | None], likes: Sequence[Tensor], processes: Processes
    ) -> list[M | None]:
        """Return the measurements of the whole mini-batch, the same on every process.

        Args:
            structures: The layers' structures.
            measured: What this process measured of each; ``None`` where the loss did not reach the layer.
            likes: A tensor of the device and the dtype of each layer's measurement.
            processes: The processes that share the mini-batch.
        """

    # --- a refresh --------------------------------------------------------------------------------------------------

    @classmethod
    def finds_non_finite(cls, settings: KroneckerSettings) -> bool:
        """Return whether :meth:`refresh` reports measurements that are not finite as failed, at no cost."""
        del settings
        return False

    @classmethod
    @abstractmethod
    def refresh(
        cls, structures: Sequence[Self], measured: Sequence[M], settings: KroneckerSettings, inverter: Inverter
    ) -> list[Refreshed]:
        """Invert the damped blocks of many layers.

        Args:
            structures: The layers' structures (:meth:`at_hand`).
            measured: Their measurements, without damping.
            settings: Those of the refresh, with its damping.
            inverter: Inverts matrices, alone or together with other processes.

        Returns:
            One outcome per layer, in order.
        """

    @classmethod
    def small_dampings(cls, measured: Sequence[M], settings: KroneckerSettings) -> Tensor:
        """Return of each layer whether its damping is too small for the precision, ``[layers]``; by default never."""
        del settings
        like = measured[0].reference_tensor
        return torch.zeros(len(measured), dtype=torch.bool, device=like.device)

    # --- its block as a matrix --------------------------------------------------------------------------------------

    @abstractmethod
    def multiply(self, weight: Tensor, bias: Tensor | None, measured: M) -> tuple[Tensor, Tensor | None]:
        """Multiply a vector of the layer's parameters by the block, without damping.

        Args:
            weight: Entries for the weight, ``[out, in, kh, kw]`` or ``[out, in]``.
            bias: Entries for the bias, ``[out]``; ``None`` where the layer has no trainable bias.
            measured: What defines the block.

        Returns:
            The same shapes.
        """

    def quadratic_form(self, weight: Tensor, bias: Tensor | None, measured: M) -> Tensor:
        """Return vᵀ K v for a vector v of the layer's parameters, a 0-d tensor; see :meth:`multiply`."""
        product, bias_product = self.multiply(weight, bias, measured)
        total = (weight * product).sum()
        return total if bias is None or bias_product is None else total + (bias * bias_product).sum()

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @abstractmethod
    def measurement_from_state(self, state: Mapping[str, Any]) -> M | None:
        """Undo ``to_state`` of a measurement; ``None`` where the state is empty."""

    @abstractmethod
    def inverse_from_state(self, state: Mapping[str, Any]) -> LayerInverse | None:
        """Undo ``to_state`` of an inverse; ``None`` where the state is empty."""

    @abstractmethod
    def measurement_findings(self, entry: str, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of a measurement; see ``checkpoint.layer_checks``.

        Args:
            entry: Where in the layer's state it stands, for messages.
            state: What should be a result of ``to_state``, not empty.
            holder: The layer.
        """

    @abstractmethod
    def inverse_findings(self, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of an inverse, which is not empty."""
