"""The approximations under the lens: what each gives of a layer, taken from the preconditioner that trains with it.

This file is the only one that knows what a structure keeps. A structure is asked for two things: its preconditioned
directions, through :class:`KroneckerPreconditioner` as a training loop asks, and its undamped block K in eigenvectors
and eigenvalues. Of a structure that does not give these (``RowStructure.spectrum``) the directions are judged, and its
closeness is left empty.
"""

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.introspect.block import Overlap
from kfac_sua.introspect.gradients import Batch
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.apply import coordinates, stacked_blocks
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.geometry import BiasBlock, BlockLayout
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.registry import structure_class
from kfac_sua.preconditioner.settings import (
    Application,
    FisherType,
    KroneckerSettings,
    Likelihood,
    LossReduction,
)
from kfac_sua.preconditioner.structures.row_structure import RowMeasurement, RowStructure, Spectrum

ROTATED_BYTES = 64 * 2**20
"""Bytes of rows that are rotated at a time; the copies that a rotation makes are a few times as large."""


class Block(ABC):
    """An approximation K of one layer's Fisher block, undamped."""

    @abstractmethod
    def overlap(self, rows: Tensor) -> Overlap:
        """Return the sums from which the closeness of K and F = Σ_r g_r g_rᵀ follows, for rows g_r, ``[R, P]``.

        A structure that can multiply by K alone has ⟨F, K⟩ = Σ_r g_r · K g_r, and a NaN for what needs an eigenbasis.
        """


class EigenBlock(Block):
    """A K whose eigenbasis is at hand, so that its error can be split.

    Attributes:
        eigenvalues: Those of K, ``[coordinates]``.
    """

    eigenvalues: Tensor

    @abstractmethod
    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, P]`` in K's eigenbasis, ``[n, coordinates]``."""

    def overlap(self, rows: Tensor) -> Overlap:
        """Return the sums, from the rows' squares in the eigenbasis."""
        diagonal = torch.zeros_like(self.eigenvalues)
        for chunk in rows.split(max(1, ROTATED_BYTES // (rows.shape[1] * rows.element_size()))):
            diagonal += self.coordinates(chunk).square().sum(0)
        return Overlap.of(diagonal, self.eigenvalues)


class DiagonalBlock(EigenBlock):
    """A diagonal K, such as the Fisher's own diagonal, or a multiple of the identity: the plain gradient's."""

    def __init__(self, diagonal: Tensor) -> None:
        self.eigenvalues = diagonal

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows


class KroneckerBlock(EigenBlock):
    """K = scale · Ḡ ⊗ Ā in the product of the factors' eigenbases, block by block where they have channel groups.

    Where eigenvalues are equal, as over the taps of SUA, the basis is the one in which the product is written.
    """

    def __init__(self, weight_shape: torch.Size, layout: BlockLayout, factors: LayerFactors) -> None:
        self._weight_shape, self._layout = weight_shape, layout
        gradient_values, self._gradient_vectors = _eigenbasis(factors.gradient.dense(), _gradient_padding(layout))
        values, self._activation_vectors = _eigenbasis(factors.activation.dense(), _activation_padding(layout))
        g, num_p, p, t, num_q, d = layout.weight_shape
        products = gradient_values.view(g, num_p, p, 1, 1, 1) * values.view(g, 1, 1, 1, num_q, d)
        eigenvalues = products.expand(g, num_p, p, t, num_q, d).flatten()  # [g · P · p · t · Q · d]
        if layout.bias is BiasBlock.SEPARATE:  # whose activation factor is 1
            eigenvalues = torch.cat([eigenvalues, gradient_values.flatten()])  # [coordinates]
        self.eigenvalues = factors.scale * eigenvalues

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows in the product of the eigenbases."""
        weights, biases = split_rows(rows, self._weight_shape)
        return coordinates(weights, biases, self._layout, self._gradient_vectors, self._activation_vectors)


class SpectrumBlock(EigenBlock):
    """K of a structure that gives its eigenvalues and its eigenbasis."""

    def __init__(self, weight_shape: torch.Size, layout: BlockLayout, spectrum: Spectrum) -> None:
        self._weight_shape, self._layout, self._spectrum = weight_shape, layout, spectrum
        self.eigenvalues = spectrum.values.flatten()  # [g · p · d]

    def coordinates(self, rows: Tensor) -> Tensor:
        """Return rows in the structure's basis."""
        weights, biases = split_rows(rows, self._weight_shape)
        blocks = stacked_blocks(weights, biases, self._layout)  # [n, g, 1, p, 1, 1, d]
        vectors = blocks.reshape(len(rows), *self._spectrum.values.shape)  # [n, g, p, d]
        return self._spectrum.rotate(vectors).flatten(1)  # [n, g · p · d]


def split_rows(rows: Tensor, weight_shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Return rows ``[n, P]`` as weights ``[n, *weight_shape]`` and biases ``[n, out]``, ``None`` if there are none."""
    num_weights = weight_shape.numel()
    biases = rows[:, num_weights:]
    return rows[:, :num_weights].unflatten(1, weight_shape), biases if biases.shape[1] else None


@dataclasses.dataclass(frozen=True)
class Approximation:
    """What a structure makes of one batch.

    Attributes:
        directions: Preconditioned gradients by ε and layer, ``[P]`` each.
        blocks: Makes K of a layer, which takes an eigendecomposition.
    """

    directions: Mapping[float, Mapping[str, Tensor]]
    blocks: Mapping[str, Callable[[], Block]]


def approximate(
    model: nn.Module,
    settings: KroneckerSettings,
    batch: Batch,
    fisher: FisherType,
    grads: Mapping[str, Tensor],
    dampings: Sequence[float],
) -> Approximation:
    """Measure a structure's statistics on a batch, and precondition gradients with them.

    Args:
        model: The network, in evaluation mode and in float64.
        settings: Those of the structure.
        batch: The images that its statistics are of.
        fisher: The Fisher that it approximates.
        grads: Gradients by layer, ``[P]`` each: the weight's, one number after the other, then the bias's.
        dampings: Values of ε.
    """
    needs_all_labels = fisher is FisherType.exact and structure_class(settings.structure).needs_output_grads
    own = dataclasses.replace(
        settings,
        # Labels that are drawn once make every structure and the exact block see the same sample.
        fisher_type=FisherType.exact if needs_all_labels else FisherType.empirical,
        likelihood=Likelihood.categorical,
        loss_reduction=LossReduction.sum,
        application=Application.weight,  # the same to rounding
        # One mini-batch, directions rather than steps, and every layer.
        ema_decay=0.0,
        factor_period=None,
        kl_clip=None,
        skip=[],
    )
    preconditioner = KroneckerPreconditioner(model, settings=own, distributed=False)
    try:
        layers = {layer.name: layer for layer in preconditioner.layers}
        for layer in layers.values():
            layer.keeps_factors = True
        with preconditioner.capture():
            logits = model(batch.inputs)
            if needs_all_labels:
                preconditioner.fisher_backward(logits)
            else:
                F.cross_entropy(logits, batch.fisher_labels(fisher), reduction="sum").backward()
        preconditioner.update_factors()
        directions = {}
        for damping in dampings:
            preconditioner.damping = damping
            for layer in layers.values():
                if layer.factors is not None:  # the refresh for the damping before has taken them
                    layer.add_measurement(layer.factors)
            preconditioner.update_inverses()
            directions[damping] = _preconditioned(preconditioner, layers, grads)
    finally:
        preconditioner.remove_hooks()
        model.zero_grad(set_to_none=True)
    blocks = {name: block for name in grads if (block := _block_maker(layers[name])) is not None}
    return Approximation(directions, blocks)


def _preconditioned(
    preconditioner: KroneckerPreconditioner, layers: Mapping[str, PreconditionedLayer], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return preconditioned gradients, ``[P]`` by layer."""
    preconditioner.model.zero_grad(set_to_none=True)
    for name, grad in grads.items():
        parameters = trained_parameters(layers[name].module)
        for parameter, part in zip(parameters, grad.split([one.numel() for one in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).clone()
    preconditioner.precondition_()
    return {name: flat_gradient(layers[name].module) for name in grads}


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return weight and bias of a layer, without a bias that is not there or not trained."""
    found = (module.weight, module.bias)
    return [one for one in found if isinstance(one, nn.Parameter) and one.requires_grad]


def flat_gradient(module: nn.Module) -> Tensor:
    """Return the gradient of a layer, ``[P]``: the weight's, one number after the other, then the bias's."""
    grads = [one.grad for one in trained_parameters(module)]
    return torch.cat([grad.flatten() for grad in grads if grad is not None])  # [P]


def _block_maker(layer: PreconditionedLayer) -> Callable[[], Block] | None:
    """Return what makes K of a layer that has been refreshed; ``None`` if its structure does not give its spectrum."""
    shape, layout, measured, structure = layer.weight.shape, layer.layout, layer.factors, layer.structure
    if isinstance(measured, LayerFactors):
        return functools.partial(KroneckerBlock, shape, layout, measured)
    if isinstance(structure, RowStructure) and isinstance(measured, RowMeasurement):
        spectrum = structure.spectrum(measured.tensors)
        return None if spectrum is None else functools.partial(SpectrumBlock, shape, layout, spectrum)
    return None


def _eigenbasis(blocks: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[blocks, d]`` and eigenvectors ``[blocks, d, d]`` of blocks whose padding stays apart.

    Args:
        blocks: ``[blocks, d, d]``; zero in rows and columns that fill a last group.
        padding: Which these are, ``[blocks, d]``.
    """
    # Zero is also an eigenvalue of others, with which padding would mix; −1 is not one of a factor.
    marked = blocks - torch.diag_embed(padding.to(blocks))  # [blocks, d, d]
    values, vectors = torch.linalg.eigh(marked)
    return values.clamp(min=0), vectors


def _gradient_padding(layout: BlockLayout) -> Tensor:
    """Return which rows of the gradient factor's blocks fill a last group, ``[g · P, p]``."""
    groups = layout.gradient
    return groups.split(torch.ones(layout.conv_groups, groups.num_channels)).flatten(0, 1) == 0  # [g · P, p]


def _activation_padding(layout: BlockLayout) -> Tensor:
    """Return which rows of the activation factor's blocks fill a last group, ``[g · Q, d]``."""
    groups = layout.activation
    present = groups.split(torch.ones(layout.conv_groups, groups.num_channels)).flatten(0, 1)  # [g · Q, a]
    present = present.repeat(1, layout.feature_taps)  # [g · Q, taps · a]
    return F.pad(present, (0, int(layout.bias is BiasBlock.JOINT)), value=1.0) == 0  # [g · Q, d]


def keeps_rows(settings: KroneckerSettings) -> bool:
    """Return whether a structure keeps copies of a mini-batch's inputs and output gradients until it is measured."""
    return issubclass(structure_class(settings.structure), RowStructure)


def factor_numbers(model: nn.Module, settings: KroneckerSettings) -> dict[str, int]:
    """Return how many numbers a structure keeps of each layer, if dense."""
    preconditioner = KroneckerPreconditioner(model, settings=dataclasses.replace(settings, skip=[]), distributed=False)
    preconditioner.remove_hooks()
    return {layer.name: layer.structure.sizes().memory_bytes // 4 for layer in preconditioner.layers}  # of float32


def layers_of(model: nn.Module) -> Iterator[tuple[str, nn.Linear | nn.Conv2d]]:
    """Yield the layers that are preconditioned, with their names."""
    preconditioner = KroneckerPreconditioner(model, distributed=False)
    preconditioner.remove_hooks()
    for layer in preconditioner.layers:
        assert isinstance(layer.module, nn.Linear | nn.Conv2d)
        yield layer.name, layer.module
