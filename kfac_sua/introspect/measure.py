"""Measures every approximation of one network's Fisher, layer by layer and for all layers together, in float64."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.introspect.approximations import Approximation, Block, DiagonalBlock, approximate, flat_gradient
from kfac_sua.introspect.block import Direction, ExactBlock, Fit, Overlap
from kfac_sua.introspect.gradients import Batch, Passes, gradient_rows, record_passes
from kfac_sua.introspect.record import BLOCKS, LAYER, NETWORK, OTHER, SAME, IntrospectionError, Row
from kfac_sua.preconditioner.settings import FisherType, KroneckerSettings

PLAIN, DIAGONAL, EXACT, WHOLE = "plain", "diagonal", "exact", "whole"
REFERENCES = (PLAIN, DIAGONAL, EXACT, WHOLE)
"""Lines of reference: v itself, the Fisher's diagonal, its exact block, and the exact block over all layers at once."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value", Tensor, Overlap, Direction, Fit)

_UNKNOWN = Overlap(*[float("nan")] * 4)  # of a structure whose block is not at hand


class _Layer:
    """The exact block of one layer with the gradient, and that of other images.

    Args:
        rows: G by statistics, ``[R, P]``.
        gradient: v, ``[P]``.
    """

    def __init__(self, rows: Mapping[str, Tensor], gradient: Tensor) -> None:
        self.rows, self.gradient = rows, gradient
        square = float(gradient @ gradient)
        self.blocks = {name: ExactBlock(own @ own.mT, own @ gradient, square) for name, own in rows.items()}
        self.crosses = {SAME: self.blocks[SAME].gram, OTHER: rows[SAME] @ rows[OTHER].mT}

    def diagonal_lines(
        self, statistics: str, dampings: Sequence[float]
    ) -> Iterator[tuple[str, Block, dict[float, Tensor]]]:
        """Yield the plain gradient and the Fisher's diagonal: name, block, and direction by ε."""
        diagonal = torch.linalg.vector_norm(self.rows[statistics], dim=0).square()  # [P]; without squares of all rows
        # As a block, the plain gradient's is the multiple of the identity that is nearest to F.
        yield PLAIN, DiagonalBlock(diagonal.mean().expand_as(diagonal)), dict.fromkeys(dampings, self.gradient)
        directions = {damping: self.gradient / (diagonal + damping) for damping in dampings}
        yield DIAGONAL, DiagonalBlock(diagonal), directions


def measure_network(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    batches: Mapping[str, Batch],
    methods: Mapping[str, KroneckerSettings],
    fisher: FisherType,
    dampings: Sequence[float],
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[list[Row], float]:
    """Measure a network.

    Args:
        model: The network, in evaluation mode and in float64.
        layers: The layers to look at, by name.
        batches: Images of the exact Fisher and of the gradient, ``same``, and equally many others, ``other``.
        methods: Settings by name.
        fisher: Which Fisher is approximated.
        dampings: Values of ε.
        tell: Called with what comes next.

    Returns:
        The rows, and the mean loss of the images, in nats.

    Raises:
        IntrospectionError: If loss or gradient is not finite, or examples have no gradients of their own.
    """
    num_examples = len(batches[SAME].labels)
    loss = F.cross_entropy(model(batches[SAME].inputs), batches[SAME].labels)
    model.zero_grad(set_to_none=True)
    loss.backward()
    try:
        grads = {name: flat_gradient(module) for name, module in layers.items()}
    finally:
        model.zero_grad(set_to_none=True)
    if not all(bool(grad.isfinite().all()) for grad in grads.values()):
        raise IntrospectionError("The network's gradient is not finite: its training diverged; lower optimizer.lr.")
    approximations = {}
    for statistics, (name, settings) in itertools.product(batches, methods.items()):
        tell(f"statistics of {name}, {statistics} images")
        approximations[statistics, name] = approximate(model, settings, batches[statistics], fisher, grads, dampings)
    passes = {}
    for statistics, batch in batches.items():
        tell(f"per-example gradients, {statistics} images")
        passes[statistics] = record_passes(model, layers, batch, fisher)
    totals = _Totals(dampings)
    rows: list[Row] = []
    for number, (name, module) in enumerate(layers.items(), start=1):
        tell(f"layer {number} of {len(layers)}, {name}")
        layer = _Layer(_rows_of(name, module, passes, num_examples), grads[name])
        for own in passes.values():
            del own[name]
        rows += totals.add(name, layer, _judged(name, layer, approximations, dampings))
    return rows + list(totals.rows()), loss.item()


def _rows_of(
    name: str, module: nn.Linear | nn.Conv2d, passes: Mapping[str, Mapping[str, Passes]], num_examples: int
) -> dict[str, Tensor]:
    try:
        return {statistics: gradient_rows(module, own[name], num_examples) for statistics, own in passes.items()}
    except ValueError as error:
        raise IntrospectionError(
            f"Layer {name} {error}, so that examples have no gradients of their own; leave it out with --layers."
        ) from error


_Judged = tuple[str, str, Overlap, dict[float, Direction]]
"""Statistics, method, and what was found."""


@torch.no_grad()
def _judged(
    name: str,
    layer: _Layer,
    approximations: Mapping[tuple[str, str], Approximation],
    dampings: Sequence[float],
) -> Iterator[_Judged]:
    """Yield every method and line of reference on one layer."""
    rows, gradient, block = layer.rows[SAME], layer.gradient, layer.blocks[SAME]
    for (statistics, method), approximation in approximations.items():
        make = approximation.blocks.get(name)
        of_layer = {damping: found[name] for damping, found in approximation.directions.items()}
        directions = {damping: Direction.of(direction, rows, gradient) for damping, direction in of_layer.items()}
        yield statistics, method, _UNKNOWN if make is None else make().overlap(rows), directions
    for statistics, other in layer.blocks.items():
        for method, own, found in layer.diagonal_lines(statistics, dampings):
            directions = {damping: Direction.of(direction, rows, gradient) for damping, direction in found.items()}
            yield statistics, method, own.overlap(rows), directions
        cross = layer.crosses[statistics]
        directions = {damping: block.direction_by(other, cross, damping) for damping in dampings}
        yield statistics, EXACT, block.overlap(other, cross), directions


class _Totals:
    """Sums over layers, from which all layers together are judged."""

    def __init__(self, dampings: Sequence[float]) -> None:
        self._dampings = dampings
        self._parameters = 0
        self._norm_square = 0.0
        self._trace = 0.0
        self._gradient_square = 0.0
        self._grams: dict[str, Tensor] = {}
        self._crosses: dict[str, Tensor] = {}
        self._gradient_rows: dict[str, Tensor] = {}
        self._overlaps: dict[tuple[str, str], Overlap] = {}
        self._directions: dict[tuple[str, str, float], Direction] = {}
        self._fits: dict[tuple[str, str, float], Fit] = {}

    def add(self, name: str, layer: _Layer, judged: Iterator[_Judged]) -> Iterator[Row]:
        """Add a layer, and yield its own rows."""
        block = layer.blocks[SAME]
        self._parameters += len(layer.gradient)
        self._norm_square += block.norm**2
        self._trace += block.trace
        self._gradient_square += block.gradient_square
        for statistics, own in layer.blocks.items():
            _add(self._grams, statistics, own.gram)
            _add(self._crosses, statistics, layer.crosses[statistics])
            _add(self._gradient_rows, statistics, own.gradient_rows)
        for statistics, method, overlap, directions in judged:
            _add(self._overlaps, (statistics, method), overlap)
            for damping, direction in directions.items():
                key = statistics, method, damping
                fit = block.fit(direction, damping)
                _add(self._directions, key, direction)
                _add(self._fits, key, fit)
                yield _row(key, LAYER, name, len(layer.gradient), overlap, (block.norm, block.trace), fit)

    @torch.no_grad()
    def rows(self) -> Iterator[Row]:
        """Yield the rows of all layers together: against the exact blocks, and against the exact whole."""
        of_blocks = self._norm_square**0.5, self._trace
        blocks = {
            statistics: ExactBlock(gram, self._gradient_rows[statistics], self._gradient_square)
            for statistics, gram in self._grams.items()
        }
        whole = blocks[SAME]
        of_whole = whole.norm, whole.trace
        for key, direction in self._directions.items():
            overlap = self._overlaps[key[:2]]
            yield _row(key, BLOCKS, "", self._parameters, overlap, of_blocks, self._fits[key])
            fit = whole.fit(direction, key[2])
            yield _row(key, NETWORK, "", self._parameters, overlap, of_whole, fit)
        for statistics, block in blocks.items():
            cross = self._crosses[statistics]
            for damping in self._dampings:
                fit = whole.fit(whole.direction_by(block, cross, damping), damping)
                key = statistics, WHOLE, damping
                yield _row(key, NETWORK, "", self._parameters, whole.overlap(block, cross), of_whole, fit)


def _add(sums: dict[_Key, _Value], key: _Key, value: _Value) -> None:
    sums[key] = sums[key] + value if key in sums else value


def _row(
    key: tuple[str, str, float],
    scope: str,
    layer: str,
    parameters: int,
    overlap: Overlap,
    size: tuple[float, float],
    fit: Fit,
) -> Row:
    """Return a row for F of a norm and a trace."""
    statistics, method, damping = key
    near = overlap.closeness(*size)
    return Row(
        statistics=statistics,
        scope=scope,
        layer=layer,
        parameters=parameters,
        method=method,
        damping=damping,
        relative_error=near.relative_error,
        cosine=near.cosine,
        trace_ratio=near.trace_ratio,
        basis_error=near.basis_error,
        eigenvalue_error=near.eigenvalue_error,
        direction_cosine=fit.cosine,
        share=fit.share,
    )
