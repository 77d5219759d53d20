"""The structures by their names: those of the package, those of installed packages, and those registered by hand.

A package outside adds one by an entry point::

    [project.entry-points."kfac_sua.structures"]
    my_structure = "my_package:MyStructure"

The class is imported when it is first asked for.
"""

from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

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

_registered: dict[str, type] = {}


def register_structure(name: str, structure: type) -> None:
    """Make a structure known under a name, until the program ends.

    Args:
        name: A Python identifier, as ``structure=NAME`` and ``preconditioner=NAME`` give it.
        structure: A subclass of ``FisherStructure``; usually of ``RowStructure``.

    Raises:
        ValueError: If the name is no identifier, or belongs to another structure.
        TypeError: If the structure is no such class.
    """
    _checked(name, structure)
    known = structure_class(name) if name in structure_names() else structure
    if known is not structure:
        raise ValueError(f"The structure {name!r} is {_place(known)} already; register {_place(structure)} by another.")
    _registered[name] = structure


def structure_names() -> tuple[str, ...]:
    """Return the names of all structures: the package's own, then the others in alphabetical order."""
    others = {*_entry_points(), *_registered} - BUILT_IN.keys()
    return (*BUILT_IN, *sorted(others))


def structure_class(name: str) -> Any:
    """Return the class of a structure, a subclass of ``FisherStructure``.

    Raises:
        ValueError: If no structure has the name, or the package that should have it cannot be imported.
        TypeError: If what has the name is no structure.
    """
    if name in _registered:
        return _registered[name]
    if name in BUILT_IN:
        return EntryPoint(name, BUILT_IN[name], GROUP).load()
    if name not in _entry_points():
        raise ValueError(f"structure must be one of {', '.join(structure_names())}, got {name!r}.")
    entry = _entry_points()[name]
    try:
        found = entry.load()
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"structure={name} is {entry.value}, as an installed package says, which cannot be imported ({error}); "
            f"repair or remove that package."
        ) from error
    _checked(name, found)
    return found


@cache
def _entry_points() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN}


def _checked(name: str, structure: object) -> None:
    base = EntryPoint("", f"{_HOME}.structure:FisherStructure", GROUP).load()
    if not (isinstance(structure, type) and issubclass(structure, base)):
        raise TypeError(f"The structure {name!r} must be a subclass of FisherStructure, got {structure!r}.")
    if not name.isidentifier():
        raise ValueError(f"The name of a structure must be a Python identifier, got {name!r}.")


def _place(structure: type) -> str:
    return f"{structure.__module__}.{structure.__qualname__}"
