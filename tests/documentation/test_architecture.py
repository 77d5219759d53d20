"""Imports keep to the floors that docs/architecture.md gives them."""

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("kfac_sua", "kfac_sua.preconditioner")


def module_of(path: Path) -> str:
    """Return the dotted name of a file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in (ROOT / "kfac_sua").rglob("*.py")}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of this project that a file imports anywhere, also in functions and for type checkers."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names if one.name.split(".")[0] == "kfac_sua")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kfac_sua":
            for one in node.names:
                name = f"{node.module}.{one.name}"
                yield name if name in FILES else str(node.module)


def part_of(module: str, package: str) -> str:
    """Return the part of a package that a module belongs to: ``training`` for ``kfac_sua.training.loop``."""
    return module.removeprefix(f"{package}.").split(".")[0]


def floors(package: str) -> dict[str, int]:
    """Return the floor of each part of a package, as the page has it."""
    table = PAGE.split(f"| floor | {package} |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", table, flags=re.MULTILINE)
    return {part: int(floor) for floor, parts in rows for part in parts.split(", ")}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_part_is_on_a_floor(package):
    """And the page names no part that there is not."""
    parts = {part_of(module, package) for module in FILES if module.startswith(f"{package}.")}
    assert floors(package).keys() == parts


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_lead_to_lower_floors(package):
    """None goes up, and none to a neighbour."""
    floor_of = floors(package)
    wrong = [
        f"{module} imports {imported}"
        for module, path in FILES.items()
        for imported in imports(path)
        if module.startswith(f"{package}.") and imported.startswith(f"{package}.")
        if (own := part_of(module, package)) != (other := part_of(imported, package))
        if floor_of[own] <= floor_of[other]
    ]
    assert wrong == []


def test_no_file_imports_itself_through_others():
    """Also not within a package; a package's ``__init__`` only hands names on."""
    graph = {module: set(imports(path)) - {module} for module, path in FILES.items() if path.name != "__init__.py"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the files


def test_the_library_imports_nothing_of_the_command_line():
    """It can be installed beside PyTorch alone (``tests/distribution/test_torch_alone.py`` runs it so)."""
    outside = [
        f"{module} imports {imported}"
        for module, path in FILES.items()
        if module.startswith("kfac_sua.preconditioner")
        for imported in imports(path)
        if not imported.startswith("kfac_sua.preconditioner")
    ]
    assert outside == []


def test_files_that_the_page_names_exist():
    """Paths below kfac_sua, its preconditioner, or the repository."""
    names = set(re.findall(r"`([\w/]+\.(?:py|yaml))`", PAGE)) - {
        "forms/NAME.py",
        "models/NAME.py",
        "optimizers/NAME.py",
    }
    roots = (ROOT, ROOT / "kfac_sua", ROOT / "kfac_sua" / "preconditioner")
    for name in names:
        assert "NAME" in name or any((root / name).is_file() for root in roots), name


def test_names_that_the_page_names_are_defined():
    """Tables and enumerations to which a new part is added."""
    source = "\n".join(path.read_text(encoding="utf-8") for path in FILES.values())
    for name in (
        "ModelName",
        "MODEL_TYPES",
        "TABLE",
        "OptimizerName",
        "OPTIMIZER_TYPES",
        "RANGES",
        "BUILT_IN",
        "RowStructure",
    ):
        assert f"`{name}`" in PAGE
        assert re.search(rf"^(class )?{name}\b", source, flags=re.MULTILINE), name


def test_the_mathematics_knows_no_modules():
    """``torch.nn`` is used where a model or a step of its training is at hand, and nowhere else."""
    home = ROOT / "kfac_sua" / "preconditioner"
    users = {
        path.relative_to(home).parts[0]
        for path in home.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "nn"
    }
    assert users == {"model", "captured", "kfac.py", "layer.py", "adaptive_damping.py"}
