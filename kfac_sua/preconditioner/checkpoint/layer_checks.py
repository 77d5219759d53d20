"""Checks of a layer's state: entries by name and type, tensors by shape, dtype and numbers.

What the host can see is refused at once. The numbers in tensors are checked on the device, and the results of all
layers are read in one copy: until then the check of a tensor is a :data:`Finding`.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor

from kfac_sua.preconditioner.checkpoint.checks import MOST_STEPS, is_number, is_whole, outlined, sentence
from kfac_sua.preconditioner.checkpoint.in_place import PARTS
from kfac_sua.preconditioner.forms import INVERSE_FORMS, LOW_RANK_FORMS, MOMENT_FORMS, EigenBasis, PatchFactor
from kfac_sua.preconditioner.forms.inverse import Shape, holds_pixels, holds_rows
from kfac_sua.preconditioner.forms.patch_rows import can_be_patch_rows
from kfac_sua.preconditioner.forms.split import aligned
from kfac_sua.preconditioner.forms.unfold import output_size
from kfac_sua.preconditioner.geometry import BlockLayout, LayerGeometry
from kfac_sua.preconditioner.kronecker import KroneckerEigenbasis, KroneckerInverse
from kfac_sua.preconditioner.precision import on_one_device
from kfac_sua.preconditioner.settings import LEAST_FLOAT, DampingRule, InverseMethod, KroneckerSettings, Products

LAYER_KEYS = ("average", "is_fresh", "num_examples", "inverse", "factors")
SIDES = ("activation", "gradient")

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_ROUNDING = 1e-9

Finding = tuple[Tensor, str]
"""A 0-d bool tensor on the device, and the message of the error if it is false."""


@dataclass(frozen=True)
class StateHolder:
    """A layer that is to load a state.

    Args:
        name: Its name.
        geometry: Its geometry.
        layout: Its block layout.
        settings: Settings of the preconditioner.
        like: A tensor of the device and the dtype of the tensors that it keeps.
    """

    name: str
    geometry: LayerGeometry
    layout: BlockLayout
    settings: KroneckerSettings
    like: Tensor

    @property
    def needs_moments(self) -> bool:
        """Whether the settings never keep a factor as rows."""
        return self.settings.needs_dense_factors or self.settings.inverse_method is InverseMethod.cholesky

    def refuse(self, entry: str, got: str, expected: str) -> NoReturn:
        """Raise ``ValueError`` for an entry."""
        raise ValueError(self.sentence(entry, got, expected))

    def sentence(self, entry: str, got: str, expected: str) -> str:
        """Return the message that an entry is wrong, with the cure."""
        return sentence(f"{entry} of layer {self.name!r}", got, expected)


class StateReader(Protocol):
    """Checks what a structure keeps of a layer (``structures.structure.FisherStructure``)."""

    def measurement_findings(self, entry: str, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of a measurement."""

    def inverse_findings(self, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
        """Check the state of an inverse."""


def layer_findings(state: object, holder: StateHolder, reader: StateReader) -> Iterator[Finding]:
    """Check everything in a layer's state.

    Args:
        state: What should be a result of ``PreconditionedLayer.state_dict``.
        holder: The layer.
        reader: Checks what the layer's structure keeps.

    Yields:
        The checks of numbers, which the device carries out.

    Raises:
        ValueError: If an entry is missing or unknown, has another type, or a tensor another shape or dtype than the
            layer's; the message names layer and entry.
    """
    if not isinstance(state, Mapping) or set(state) != set(LAYER_KEYS):
        holder.refuse("the state", outlined(state), f"a mapping of {', '.join(LAYER_KEYS)}")
    for key in ("average", "inverse", "factors"):
        if not isinstance(state[key], Mapping):
            holder.refuse(key, outlined(state[key]), "a mapping")
    if not isinstance(state["is_fresh"], bool) or (state["is_fresh"] and not state["average"]):
        expected = "false, as there is no average" if state["is_fresh"] is True else "true or false"
        holder.refuse("is_fresh", outlined(state["is_fresh"]), expected)
    count = state["num_examples"]
    if count is not None and not (is_whole(count) and 1 <= count <= MOST_STEPS):
        holder.refuse("num_examples", outlined(count), f"none, or a whole number in [1, {MOST_STEPS}]")
    if state["average"]:
        yield from _average_findings(state["average"], holder, reader)
    if state["factors"]:
        yield from reader.measurement_findings("factors", state["factors"], holder)
    if state["inverse"]:
        yield from reader.inverse_findings(state["inverse"], holder)


def check_findings(findings: Iterable[Finding]) -> None:
    """Raise the error of the first check that failed; waits for the device once."""
    found = list(findings)
    flags = torch.stack(on_one_device([flag for flag, _ in found])).tolist() if found else []
    for is_good, (_, told) in zip(flags, found, strict=True):
        if not is_good:
            raise ValueError(told)


def _average_findings(state: Mapping[str, Any], holder: StateHolder, reader: StateReader) -> Iterator[Finding]:
    weight, least = state.get("weight"), 1 - holder.settings.ema_decay
    if not is_number(weight) or not least - _ROUNDING <= weight <= 1 + _ROUNDING:
        holder.refuse("average.weight", outlined(weight), f"a number in [1 - ema_decay, 1] = [{least:g}, 1]")
    measured = {key: value for key, value in state.items() if key != "weight"}
    yield from reader.measurement_findings("average", measured, holder)


def check_entries(entry: str, state: Mapping[str, Any], names: Sequence[str], holder: StateHolder) -> None:
    """Refuse a mapping that has other entries than these."""
    if set(state) != set(names):
        holder.refuse(entry, outlined(state), f"a mapping of {', '.join(names)}")


def check_scale(entry: str, scale: object, holder: StateHolder) -> None:
    """Refuse what cannot be a number of locations per example."""
    if not is_number(scale) or not LEAST_FLOAT <= scale <= MOST_STEPS:
        holder.refuse(f"{entry}.scale", outlined(scale), f"a number of locations in (0, {MOST_STEPS}]")


def factors_findings(entry: str, state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
    """Check the state of a layer's two factors (``factors.LayerFactors``)."""
    check_entries(entry, state, ("scale", *SIDES), holder)
    check_scale(entry, state["scale"], holder)
    for side in SIDES:
        forms = (*MOMENT_FORMS, *(() if holder.needs_moments else LOW_RANK_FORMS))
        yield from _form_findings(f"{entry}.{side}", state[side], forms, side, holder)


def kronecker_inverse_findings(state: Mapping[str, Any], holder: StateHolder) -> Iterator[Finding]:
    """Check the state of a layer's inverse by sides, or of its eigenbases (``kronecker``)."""
    is_exact = holder.settings.damping_rule is DampingRule.exact
    names = (KroneckerEigenbasis if is_exact else KroneckerInverse).names
    check_entries("inverse", state, names, holder)
    for side in SIDES:
        forms = (EigenBasis,) if is_exact else _inverse_forms(holder)
        yield from _form_findings(f"inverse.{side}", state[side], forms, side, holder)
    for name in names[len(SIDES) :]:
        shape: Shape = () if is_exact else ("b",)
        yield from tensor_findings(
            f"inverse.{name}", state[name], shape, {"b": holder.layout.conv_groups}, holder, is_positive=True
        )


def _inverse_forms(holder: StateHolder) -> list[Any]:
    """Return the forms that an inverse can have under the settings."""
    forms = [form for form in INVERSE_FORMS if not (holder.needs_moments and holds_rows(form))]
    if holder.settings.products is Products.ieee:
        forms = [form for form in forms if not any(name.endswith(PARTS) for name in form.names)]
    return forms


def _form_findings(
    entry: str, state: object, forms: Sequence[Any], side: str, holder: StateHolder
) -> Iterator[Finding]:
    """Check the tensors of a factor, an inverse or an eigenbasis in one of the given forms."""
    is_activation = side == "activation"
    if not (is_activation and can_be_patch_rows(holder.geometry, holder.layout)):
        forms = [form for form in forms if not holds_pixels(form.names)]
    form = next((form for form in forms if isinstance(state, Mapping) and set(state) == set(form.names)), None)
    if form is None:
        known = "; or ".join(", ".join(form.names) for form in forms)
        holder.refuse(entry, outlined(state), f"a mapping of {known}")
    assert isinstance(state, Mapping)
    num_blocks, width = holder.layout.activation_blocks if is_activation else holder.layout.gradient_blocks
    sizes = {"b": num_blocks, "d": width, "d'": aligned(width), "c": holder.geometry.in_channels}
    for name, shape in zip(form.names, form.shapes, strict=True):
        yield from tensor_findings(
            f"{entry}.{name}",
            state[name],
            shape,
            sizes,
            holder,
            is_positive=name == "scale",
            is_not_negative=name in form.never_negative,
            is_triangle=name == "triangle",
        )
        if name == "pixels":
            sizes["rows"] = _num_patches(f"{entry}.{name}", state[name], holder)


def _num_patches(entry: str, pixels: Tensor, holder: StateHolder) -> int:
    """Return the number of patches that a layer reads from pixels ``[h, w, n, channels]``."""
    sizes = list(pixels.shape)
    if min(output_size(holder.geometry, sizes[0], sizes[1])) < 1:
        holder.refuse(entry, f"an image of {sizes[0]} x {sizes[1]} pixels", "one that the kernel fits into")
    return PatchFactor.num_rows_of(sizes, holder.geometry)


def tensor_findings(
    entry: str,
    tensor: object,
    shape: Shape,
    sizes: dict[str, int],
    holder: StateHolder,
    *,
    is_positive: bool = False,
    is_not_negative: bool = False,
    is_triangle: bool = False,
) -> Iterator[Finding]:
    """Check a tensor, and note in ``sizes`` those that no tensor before it has fixed.

    Args:
        entry: Where in the layer's state it stands, for messages.
        tensor: What should be a tensor.
        shape: Its shape: numbers, and letters for sizes.
        sizes: Sizes by their letters.
        holder: The layer.
        is_positive: Whether all numbers must be > 0.
        is_not_negative: Whether all numbers must be ≥ 0.
        is_triangle: Whether it holds lower triangles with positive diagonals.
    """
    wanted = f"[{', '.join(str(sizes.get(str(size), size)) for size in shape)}]"
    if not isinstance(tensor, Tensor) or not _fits(tensor, shape, sizes):
        holder.refuse(entry, outlined(tensor), f"a tensor of shape {wanted}")
    dtypes = (torch.bfloat16,) if entry.endswith(PARTS) else _DTYPES
    if tensor.dtype not in dtypes or tensor.layout is not torch.strided or tensor.is_meta:
        kind = f"{tensor.dtype} ({tensor.layout}, {tensor.device})"
        holder.refuse(entry, kind, f"numbers in {' or '.join(str(dtype) for dtype in dtypes)}")
    # In the dtype in which they will be kept: a number of float64 may be infinite in float32.
    largest = min(torch.finfo(tensor.dtype).max, torch.finfo(holder.like.dtype).max)
    read = tensor.tril() if is_triangle else tensor  # nothing reads the other triangle
    yield (read.abs() <= largest).all(), holder.sentence(entry, "not finite everywhere", "finite numbers")
    if is_triangle:
        tensor, is_positive = tensor.diagonal(dim1=-2, dim2=-1), True
    if is_positive:
        got = "not positive" + (" on its diagonal" if is_triangle else "")
        yield (tensor.to(holder.like.dtype) > 0).all(), holder.sentence(entry, got, "numbers > 0 there")
    if is_not_negative:
        yield (tensor >= 0).all(), holder.sentence(entry, "negative somewhere", "numbers >= 0")


def _fits(tensor: Tensor, shape: Shape, sizes: dict[str, int]) -> bool:
    """Return whether a tensor has a shape; open sizes are taken from it if they are ≥ 1."""
    if tensor.ndim != len(shape) or tensor.is_nested:
        return False
    for got, size in zip(tensor.shape, shape, strict=True):
        wanted = size if isinstance(size, int) else sizes.setdefault(size, max(got, 1))
        if got != wanted:
            return False
    return True
