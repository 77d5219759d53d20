"""Names and looks of what is compared: those of the methods, and of the lines of reference."""

import dataclasses
from collections.abc import Mapping, Sequence

from kfac_sua.introspect.measure import DIAGONAL, EXACT, PLAIN, WHOLE
from kfac_sua.methods import BASELINE, METHODS, MethodStyle

_REFERENCES = {
    DIAGONAL: MethodStyle("Diagonal", "#7F7F7F", (0, (1, 2.2)), "<", "the diagonal"),
    PLAIN: dataclasses.replace(METHODS[BASELINE], label="Plain gradient", prose="the plain gradient"),
    EXACT: MethodStyle("Exact block", "#332288", "-", "p", "the exact block"),
    WHOLE: MethodStyle("Exact, all layers at once", "#882255", "-", "h", "the exact Fisher over all layers"),
}
# Structures that the paper does not have, in colours of Paul Tol's that no method has.
_OTHERS = {
    "activation_only": MethodStyle("Activation factor (FOOF)", "#44AA99", (0, (3, 1)), "d", "the activation factor"),
    "eigenvalue_corrected": MethodStyle("EKFAC", "#117733", (0, (6, 1, 1, 1)), "*", "EKFAC"),
}
# Looks of a second and a third item of one method, such as kfac and kfac:weight_sharing=reduce, in its colour.
_VARIANTS: tuple[tuple[tuple[int, tuple[float, ...]], str], ...] = (((0, (1, 1)), "P"), ((0, (4, 1, 1, 1)), "X"))


def styles_of(items: Mapping[str, Sequence[str]], group_sizes: Mapping[str, int | None]) -> dict[str, MethodStyle]:
    """Return the look of every method and line of reference, in the order of the legend.

    Args:
        items: By item of ``--methods``, such as ``kfac:weight_sharing=reduce``, the method and its own keys,
            ``[kfac, weight_sharing=reduce]``.
        group_sizes: Channels per group by item; ``None`` without groups.
    """
    styles: dict[str, MethodStyle] = {}
    taken: dict[str, int] = {}
    for item, (method, *keys) in items.items():
        base = METHODS.get(method) or _OTHERS.get(method) or MethodStyle(method, "#999933", "-", "8")
        said = [key.partition("=")[2] for key in keys if not key.startswith("group_size")]
        size = group_sizes[item]
        label = base.label if size is None else f"{base.label.removesuffix(', groups')}, groups of {size}"
        label = ", ".join([label, *said])
        number = taken[method] = taken.get(method, -1) + 1
        linestyle, marker = (base.linestyle, base.marker) if number == 0 else _VARIANTS[(number - 1) % len(_VARIANTS)]
        styles[item] = dataclasses.replace(base, label=label, linestyle=linestyle, marker=marker, prose=label)
    return styles | _REFERENCES
