"""Structures that are computed from all rows of a mini-batch at once: the protocol of a structure in one file.

A subclass says in four methods what it measures, what a refresh makes of it, how a gradient is multiplied, and what the
block is as a matrix. What it measures and keeps are named tensors; checkpoints, captured steps, running averages,
several processes and the table of layers follow from their shapes.
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from kfac_sua.preconditioner.apply import from_blocks, to_blocks
from kfac_sua.preconditioner.checkpoint.layer_checks import (
    Finding,
    StateHolder,
    check_entries,
    check_scale,
    tensor_findings,
)
from kfac_sua.preconditioner.distributed.collectives import Processes
from kfac_sua.preconditioner.factors import LayerMeasurement
from kfac_sua.preconditioner.forms.inverse import Shape
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.invert import DAMPING_RAISES, Inverter
from kfac_sua.preconditioner.kronecker import BOTH_SIDES, LayerInverse, Sides
from kfac_sua.preconditioner.precision import on_one_device
from kfac_sua.preconditioner.refresh import Refreshed
from kfac_sua.preconditioner.settings import KroneckerSettings, Structure
from kfac_sua.preconditioner.statistics import LayerStatistics
from kfac_sua.preconditioner.structures.row_statistics import RowStatistics
from kfac_sua.preconditioner.structures.rows import LayerRows, ReadCall, joined_rows
from kfac_sua.preconditioner.structures.structure import BlockSizes, FisherStructure

Tensors = dict[str, Tensor]


@dataclass
class RowMeasurement(LayerMeasurement):
    """What :meth:`RowStructure.measure` returned of a mini-batch, or an average of it."""

    tensors: Tensors
    scale: float
    num_rows: int = 0

    @property
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the measurement."""
        return next(iter(self.tensors.values()))

    def is_finite(self) -> Tensor:
        """Whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""
        return _all_finite(self.tensors)

    def blended(self, old: "RowMeasurement | None", decay: float) -> "RowMeasurement":
        """Return ``decay · old + (1 − decay) · self``."""
        blended = {name: tensor * (1 - decay) for name, tensor in self.tensors.items()}
        if old is not None:
            for name, tensor in blended.items():
                tensor += decay * old.tensors[name].to(tensor)
        return RowMeasurement(blended, self.scale)

    def divided(self, weight: float) -> "RowMeasurement":
        """Return all tensors divided by a number."""
        return RowMeasurement({name: tensor / weight for name, tensor in self.tensors.items()}, self.scale)

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return {"scale": self.scale, **self.tensors}


@dataclass(frozen=True)
class Spectrum:
    """K = Q diag(λ) Qᵀ.

    Args:
        values: λ, ``[g, p, d]``, a number for each coordinate.
        rotate: Multiplies vectors ``[..., g, p, d]`` by Qᵀ, which keeps their shape.
    """

    values: Tensor
    rotate: Callable[[Tensor], Tensor]


class RowStructure(FisherStructure[RowMeasurement]):
    """A structure of the blocks ``[g, p · d, p · d]`` of a layer's gradient ``[g, p, d]``, computed from its rows.

    g are the groups of a convolution, p its output channels per group, and d the taps times input channels per group,
    one more where there is a bias: the last column.

    Attributes:
        measured_shapes: Name and shape of what :meth:`measure` returns, by the letters g, p and d.
        kept_shapes: Name and shape of what :meth:`invert` returns.
        forms: What the table of layers says about how the inverse is applied, on both sides.
        can_be_averaged: Whether measurements are means over examples, so that their average is the measurement of more
            examples. Then ``ema_decay`` may be given, and several processes may share a mini-batch.
    """

    measured_shapes: ClassVar[Mapping[str, Shape]]
    kept_shapes: ClassVar[Mapping[str, Shape]]
    forms: ClassVar[tuple[str, str]]
    can_be_averaged: ClassVar[bool] = False

    def __init__(self, geometry: LayerGeometry, settings: KroneckerSettings, device: torch.device) -> None:
        super().__init__(geometry, settings, device)
        self._layout = BlockLayout.of(geometry, Structure.kfac, None)

    def __init_subclass__(cls) -> None:
        """Let structures that can be averaged read what that needs, and no others."""
        super().__init_subclass__()
        cls.reads = cls.reads | {"ema_decay"} if cls.can_be_averaged else cls.reads - {"ema_decay"}
        cls.can_be_shared = cls.can_be_averaged

    # --- what a structure defines -----------------------------------------------------------------------------------

    @abstractmethod
    def measure(self, rows: LayerRows) -> Tensors:
        """Return what defines the block, without damping, by :attr:`measured_shapes`."""

    @abstractmethod
    def invert(self, measured: Tensors, damping: float) -> Tensors:
        """Return what :meth:`precondition` needs, by :attr:`kept_shapes`.

        Raises:
            torch.linalg.LinAlgError: If it cannot be computed. It is then called with more damping, as where a number
                that it returns is not finite; if that fails too, the layer keeps its last inverse.
        """

    @abstractmethod
    def precondition(self, gradient: Tensor, kept: Tensors) -> Tensor:
        """Multiply a gradient ``[g, p, d]`` by the inverse of the damped block, ``(K + ε I)⁻¹``."""

    @abstractmethod
    def product(self, vector: Tensor, measured: Tensors) -> Tensor:
        """Multiply a vector ``[g, p, d]`` by the block K."""

    @abstractmethod
    def dense(self, rows: LayerRows) -> Tensor:
        """Return K by its definition, ``[g, p · d, p · d]``: the oracle of all other methods, for small layers."""

    @abstractmethod
    def inversion_flops(self) -> int:
        """Return the FLOPs of a refresh that do not depend on the number of rows, wherever they are spent.

        Decompositions that :meth:`measure` makes are among them, though their time counts as that of statistics.
        """

    @abstractmethod
    def application_flops(self) -> int:
        """Return the FLOPs of :meth:`precondition`."""

    def spectrum(self, measured: Tensors) -> "Spectrum | None":
        """Return K's eigenvalues and eigenbasis, from which introspection tells how near K is to F.

        ``None``, the default, if they are not at hand; then only the directions of the structure are judged.
        """
        del measured
        return None

    # --- what follows from it ---------------------------------------------------------------------------------------

    @property
    def sizes_by_letter(self) -> dict[str, int]:
        """g, p and d of the layer."""
        g, _, p, _, _, d = self.layout.weight_shape
        return {"g": g, "p": p, "d": d}

    @property
    def label(self) -> str:
        """The name that it is registered by, in words."""
        return self.settings.structure.replace("_", " ")

    @property
    def layout(self) -> BlockLayout:
        """The view ``[g, 1, p, 1, 1, d]`` of a gradient."""
        return self._layout

    def sizes(self) -> BlockSizes:
        """Return memory and FLOPs."""
        sizes = self.sizes_by_letter
        shapes = [*self.kept_shapes.values(), *(self.measured_shapes.values() if self.settings.ema_decay > 0 else ())]
        return BlockSizes(
            activation_blocks=(sizes["g"], sizes["d"]) if ("g", "d", "d") in shapes else (0, 0),
            gradient_blocks=(sizes["g"], sizes["p"]) if ("g", "p", "p") in shapes else (0, 0),
            memory_bytes=4 * sum(prod(_numbers(shape, sizes)) for shape in shapes),
            inverse_flops=self.inversion_flops(),
            apply_flops=self.application_flops(),
            forms=self.forms,
        )

    def new_statistics(self, name: str, num_processes: int) -> LayerStatistics:
        """Return what keeps a copy of all inputs and output gradients until the step."""
        del num_processes
        return RowStatistics(name, self.geometry, self._measured, needs_output_grads=self.needs_output_grads)

    @classmethod
    def average_over_processes(
        cls,
        structures: Sequence[Self],
        measured: Sequence[RowMeasurement | None],
        likes: Sequence[Tensor],
        processes: Processes,
    ) -> list[RowMeasurement | None]:
        """Return the means over all processes' examples, in two collective calls."""
        counts = [[0, 0] if one is None else [one.num_rows, round(one.num_rows / one.scale)] for one in measured]
        of_all = processes.all_gather_integers(counts, likes[0].device, "header")  # [processes, layers, 2]
        before = processes.sent_bytes.total()
        totals = [[sum(of_process[i][k] for of_process in of_all) for k in (0, 1)] for i in range(len(measured))]
        sums: list[Tensor] = []
        for structure, one, like, (_, num_examples), (_, own) in zip(
            structures, measured, likes, totals, counts, strict=True
        ):
            for name, shape in cls.measured_shapes.items():
                empty = like.new_zeros(_numbers(shape, structure.sizes_by_letter))
                sums.append(empty if one is None else one.tensors[name] * (own / num_examples))
        flat = torch.cat(on_one_device([tensor.flatten() for tensor in sums]))  # [numbers of all layers]
        processes.all_reduce_(flat, "moments")
        parts = iter(flat.split([tensor.numel() for tensor in sums]))
        result: list[RowMeasurement | None] = []
        for structure, like, (num_rows, num_examples) in zip(structures, likes, totals, strict=True):
            tensors = {
                name: next(parts).view(_numbers(shape, structure.sizes_by_letter)).to(like)
                for name, shape in cls.measured_shapes.items()
            }
            result.append(RowMeasurement(tensors, num_rows / num_examples, num_rows) if num_rows else None)
        processes.statistics_bytes = processes.sent_bytes.total() - before
        return result

    @classmethod
    def refresh(
        cls,
        structures: Sequence[Self],
        measured: Sequence[RowMeasurement],
        settings: KroneckerSettings,
        inverter: Inverter,
    ) -> list[Refreshed]:
        """Invert layer by layer, every process by itself, with one wait for the device in all unless one fails."""
        del inverter
        pairs = list(zip(structures, measured, strict=True))
        kept = [structure._inverted(one, settings.damping) for structure, one in pairs]
        flags = [_all_finite(tensors) for tensors in kept if tensors is not None]
        are_finite = iter(torch.stack(on_one_device(flags)).tolist() if flags else [])  # of [layers]
        return [
            Refreshed(RowInverse(structure, tensors))
            if tensors is not None and next(are_finite)
            else structure._repaired(one, settings.damping)
            for (structure, one), tensors in zip(pairs, kept, strict=True)
        ]

    def multiply(self, weight: Tensor, bias: Tensor | None, measured: RowMeasurement) -> tuple[Tensor, Tensor | None]:
        """Multiply by the block, without damping."""
        dtype = measured.reference_tensor.dtype
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        blocks = to_blocks(weight, bias, self.layout)  # [g, 1, p, 1, 1, d]
        vector = self._as_matrices(blocks)
        product = self._of_shape("product", self.product(vector, measured.tensors), vector).view(blocks.shape)
        result = torch.empty_like(weight)
        bias_product = from_blocks(product, self.layout, result)
        return result, None if bias is None or bias_product is None else bias_product.reshape(bias.shape)  # [out]

    def measurement_from_state(self, state: Mapping[str, Any]) -> RowMeasurement | None:
        """Undo ``to_state`` of a measurement."""
        return RowMeasurement({name: state[name] for name in self.measured_shapes}, state["scale"]) if state else None

    def inverse_from_state(self, state: Mapping[str, Any]) -> "RowInverse | None":
        """Undo ``to_state`` of an inverse."""
        return RowInverse(self, dict(state)) if state else None

    def measurement_findings(self, entry: str, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check names, shapes and numbers."""
        check_entries(entry, state, ("scale", *self.measured_shapes), holder)
        check_scale(entry, state["scale"], holder)
        for name, shape in self.measured_shapes.items():
            yield from tensor_findings(f"{entry}.{name}", state[name], shape, self.sizes_by_letter, holder)

    def inverse_findings(self, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check names, shapes and numbers."""
        check_entries("inverse", state, tuple(self.kept_shapes), holder)
        for name, shape in self.kept_shapes.items():
            yield from tensor_findings(f"inverse.{name}", state[name], shape, self.sizes_by_letter, holder)

    def _as_matrices(self, blocks: Tensor) -> Tensor:
        """View ``[g, 1, p, 1, 1, d]`` as ``[g, p, d]``."""
        sizes = self.sizes_by_letter
        return blocks.reshape(sizes["g"], sizes["p"], sizes["d"])  # [g, p, d]

    def _measured(
        self,
        passes: Sequence[Sequence[ReadCall]],
        num_examples: int,
        num_rows: int,
        grad_scale: float,
        inverse: LayerInverse | None,
    ) -> RowMeasurement:
        """Return what a mini-batch says (``row_statistics.Measure``)."""
        kept = inverse.kept if isinstance(inverse, RowInverse) else None
        rows = joined_rows(passes, self.geometry, grad_scale, kept)
        tensors = self._declared("measure", self.measure(rows), self.measured_shapes, rows.inputs)
        return RowMeasurement(tensors, num_rows / num_examples, num_rows)

    def _inverted(self, measured: RowMeasurement, damping: float) -> Tensors | None:
        """Return what :meth:`invert` returns; ``None`` if it fails."""
        try:
            kept = self.invert(measured.tensors, damping)
        except torch.linalg.LinAlgError:
            return None
        return self._declared("invert", kept, self.kept_shapes, measured.reference_tensor)

    def _repaired(self, measured: RowMeasurement, damping: float) -> Refreshed:
        """Invert with more and more damping."""
        for multiple in DAMPING_RAISES if bool(measured.is_finite()) else ():  # otherwise no damping helps
            kept = self._inverted(measured, damping * multiple)
            if kept is not None and bool(_all_finite(kept)):
                return Refreshed(RowInverse(self, kept), num_raised=1, raised_by=multiple)
        return Refreshed(None, num_failed=1)

    def _declared(self, method: str, tensors: Tensors, shapes: Mapping[str, Shape], like: Tensor) -> Tensors:
        """Return what a method has returned, if it is what the class declares.

        Raises:
            TypeError: If it has other names, shapes, dtypes or devices.
        """
        wanted = {
            name: (_numbers(shape, self.sizes_by_letter), like.dtype, like.device) for name, shape in shapes.items()
        }
        got = {
            name: (list(one.shape), one.dtype, one.device) if isinstance(one, Tensor) else type(one).__name__
            for name, one in tensors.items()
        }
        if got != wanted:
            name = next(name for name in [*wanted, *got] if got.get(name) != wanted.get(name))
            raise TypeError(
                f"structure={self.settings.structure}: {method}() returned {name!r} as {_told(got.get(name))}, but its "
                f"class declares {_told(wanted.get(name))}."
            )
        return tensors

    def _of_shape(self, method: str, result: Tensor, vector: Tensor) -> Tensor:
        """Return the result of a method that keeps the shape ``[g, p, d]``, if it has."""
        if result.shape != vector.shape:
            raise TypeError(
                f"structure={self.settings.structure}: {method}() made {list(result.shape)} of {list(vector.shape)}."
            )
        return result


@dataclass
class RowInverse(LayerInverse):
    """Inverse of a damped block, as a structure computed from rows keeps it.

    Args:
        structure: The structure.
        kept: What its ``invert`` returned.
    """

    structure: RowStructure
    kept: Tensors

    @property
    def by_sides(self) -> None:
        """``None``: it is applied as a whole."""
        return None

    @property
    def forms(self) -> tuple[str, str]:
        """What the structure says."""
        return self.structure.forms

    @property
    def reference_tensor(self) -> Tensor:
        """A tensor that has the device and the dtype of the inverse."""
        return next(iter(self.kept.values()))

    def to_state(self) -> dict[str, Any]:
        """Return what a checkpoint stores."""
        return dict(self.kept)

    def apply(self, blocks: Tensor, sides: Sides = BOTH_SIDES) -> Tensor:
        """Multiply ``[g, 1, p, 1, 1, d]`` by the inverse."""
        assert sides == BOTH_SIDES, "one side does not determine an inverse"
        gradient = self.structure._as_matrices(blocks)
        result = self.structure.precondition(gradient, self.kept)
        return self.structure._of_shape("precondition", result, gradient).view(blocks.shape)

    def apply_to_bias(self, columns: Tensor) -> Tensor:
        """Never called: the bias is a column of the gradient."""
        raise AssertionError("the bias is a column of the gradient")


def _numbers(shape: Shape, sizes: Mapping[str, int]) -> list[int]:
    """Return a shape with its letters replaced by sizes."""
    return [size if isinstance(size, int) else sizes[size] for size in shape]


def _all_finite(tensors: Tensors) -> Tensor:
    """Return whether no entry is NaN or infinite, as a 0-d bool tensor on the device."""
    return torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).all()  # of [tensors]


def _told(what: object) -> str:
    """Return a shape with dtype and device in words."""
    if isinstance(what, tuple):
        shape, dtype, device = what
        return f"{shape} in {dtype} on {device}"
    return "nothing" if what is None else str(what)
