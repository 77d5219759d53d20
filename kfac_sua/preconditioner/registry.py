"""The structures by their names: those of the package, those of installed packages, and those registered by hand.

A package outside adds one by an entry point::

    [project.entry-points."kfac_sua.structures"]
    my_structure = "my_package:MyStructure"

The class is imported when it is first asked for. The package's own structures keep their names, whatever others say.
"""

import inspect
import keyword
import logging
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

logger = logging.getLogger(__name__)

GROUP = "kfac_sua.structures"
"""Group of the entry points."""

_HOME = "kfac_sua.preconditioner.structures"

BUILT_IN = {
    "kfac": f"{_HOME}.kronecker:KFAC",
    "sua": f"{_HOME}.kronecker:SUA",
    "activation_only": f"{_HOME}.activation_only:ActivationOnly",
    "eigenvalue_corrected": f"{_HOME}.eigenvalue_corrected:EigenvalueCorrected",
}
"""The package's own structures: name, and where the class is."""

RESERVED = ("baseline", "grouped", "sua_grouped")
"""Names of the command line's preconditioners that are no structures; a structure could not be chosen by them."""

_LETTERS = ("g", "p", "d")  # of the shapes of a ``RowStructure``

_registered: dict[str, type] = {}


def register_structure(name: str, structure: type) -> None:
    """Make a structure known under a name, until the program ends.

    A class replaces one of the same module and qualified name, as when a cell of a notebook is run again.

    Args:
        name: A Python identifier, as ``structure=NAME`` and ``preconditioner=NAME`` give it.
        structure: A subclass of ``FisherStructure``; usually of ``RowStructure``.

    Raises:
        ValueError: If the name is no identifier, is a keyword, or belongs to another structure or preconditioner.
        TypeError: If the name is no string, or the structure is no such class, lacks methods, or says no shapes.
    """
    if not isinstance(name, str):
        raise TypeError(f"The name of a structure must be a string, got {name!r}.")
    if not _is_name(name):
        raise ValueError(f"The name of a structure must be a Python identifier and no keyword, got {name!r}.")
    if name in RESERVED:
        raise ValueError(
            f"The name {name!r} belongs to a preconditioner of the command line, preconditioner={name}; register "
            f"the structure by another."
        )
    if fault := _fault(structure):
        raise TypeError(f"The structure {name!r} cannot be {structure!r}, which {fault}.")
    known = structure_class(name) if name in structure_names() else structure
    if _place(known) != _place(structure):
        raise ValueError(f"The structure {name!r} is {_place(known)} already; register {_place(structure)} by another.")
    _registered[name] = structure


def structure_names() -> tuple[str, ...]:
    """Return the names of all structures: the package's own, then the others in alphabetical order.

    A name that two packages give to different structures is among them; :func:`structure_class` refuses it.
    """
    others = {name for name in _entry_points() if _is_name(name) and name not in RESERVED}
    return (*BUILT_IN, *sorted((others | _registered.keys()) - BUILT_IN.keys()))


def structure_class(name: str) -> Any:
    """Return the class of a structure, a subclass of ``FisherStructure``.

    Raises:
        ValueError: If no structure has the name, several packages have it, or the package that has it cannot be
            imported or has no structure there.
    """
    if name in BUILT_IN:
        return EntryPoint(name, BUILT_IN[name], GROUP).load()
    if name in _registered:
        return _registered[name]
    if name not in _entry_points():
        raise ValueError(f"structure must be one of {', '.join(structure_names())}, got {name!r}.")
    entries = _entry_points()[name]
    if clash := _clash(name, entries):
        raise ValueError(clash)
    what = f"structure={name} is {entries[0].value} of {_package(entries[0])}"
    try:
        found = entries[0].load()
    except Exception as error:  # whatever the code of somebody else raises when it is imported
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{what}, which cannot be imported ({why}); repair or remove that package.") from error
    if fault := _fault(found):
        raise ValueError(f"{what}, which {fault}; repair or remove that package.")
    return found


@cache
def _entry_points() -> dict[str, list[EntryPoint]]:
    """Return the entry points by name, those that mean the same class once; warn of those that cannot be used."""
    entries: dict[str, list[EntryPoint]] = {}
    for entry in entry_points(group=GROUP):
        of_name = entries.setdefault(entry.name, [])
        if entry.value not in {other.value for other in of_name}:
            of_name.append(entry)
    for name, of_name in entries.items():
        if clash := _clash(name, of_name):
            logger.warning(clash)
    return entries


def _clash(name: str, entries: list[EntryPoint]) -> str | None:
    """Return why the entry points of a name cannot be used, in one sentence; ``None`` if there is no reason."""
    whose = " and ".join(f"{entry.value} of {_package(entry)}" for entry in entries)
    if name in BUILT_IN or name in RESERVED:
        return f"The structure {whose} is passed over: {name!r} is a preconditioner of kfac_sua's own; rename it there."
    if not _is_name(name):
        return (
            f"The structure {whose} is passed over: its name must be a Python identifier and no keyword, got {name!r}; "
            f"rename it there."
        )
    if len(entries) > 1:
        return f"structure={name} is {whose}, so that none of them can be chosen; remove all but one."
    return None


def _package(entry: EntryPoint) -> str:
    """Return the distribution that has an entry point, such as ``the package my_package 1.0``."""
    return f"the package {entry.dist.name} {entry.dist.version}" if entry.dist else "an unnamed package"


def _is_name(name: str) -> bool:
    return name.isidentifier() and not keyword.iskeyword(name)


def _fault(structure: object) -> str | None:
    """Return what keeps an object from being a structure, to follow "which"; ``None`` if nothing does."""
    base = EntryPoint("", f"{_HOME}.structure:FisherStructure", GROUP).load()
    if not (isinstance(structure, type) and issubclass(structure, base)):
        return "is no subclass of FisherStructure"
    if inspect.isabstract(structure):
        missing: frozenset[str] = getattr(structure, "__abstractmethods__", frozenset())
        return f"does not define {', '.join(sorted(missing))}"
    by_rows = EntryPoint("", f"{_HOME}.row_structure:RowStructure", GROUP).load()
    for attribute in ("measured_shapes", "kept_shapes") if issubclass(structure, by_rows) else ():
        shapes = getattr(structure, attribute, None)
        if not (isinstance(shapes, Mapping) and shapes):
            return f'does not define {attribute}, a shape by name such as {{"squares": ("g", "p", "d")}}'
        for tensor, shape in shapes.items():
            if not (isinstance(shape, tuple | list) and all(isinstance(n, int) or n in _LETTERS for n in shape)):
                return f"has the shape {shape!r} of {tensor!r} in {attribute}; it may have g, p, d and integers"
    return None


def _place(structure: type) -> str:
    return f"{structure.__module__}.{structure.__qualname__}"
