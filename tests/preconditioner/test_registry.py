"""Which classes and names can be a structure's, and what installed packages that are broken or clash lead to."""

import importlib
import sys
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

import pytest
from hydra.core.config_store import ConfigStore
from torch import nn

from kfac_sua.compose import compose_config
from kfac_sua.config import ConfigError, PreconditionerName
from kfac_sua.preconditioner import FisherStructure, RowStructure, registry
from kfac_sua.preconditioner.registry import BUILT_IN, RESERVED, register_structure, structure_class, structure_names


class Plain(RowStructure):
    """The identity: a class of which registering and composing look at nothing but the outside."""

    measured_shapes: ClassVar = {"nothing": ("g", 1)}
    kept_shapes: ClassVar = {"nothing": ("g", 1)}
    forms = ("plain", "plain")

    def measure(self, rows):
        """Return zeros."""
        return {"nothing": rows.inputs.new_zeros(rows.inputs.shape[0], 1)}  # [g, 1]

    def invert(self, measured, damping):
        """Return what was measured."""
        return measured

    def precondition(self, gradient, kept):
        """Return the gradient."""
        return gradient

    def product(self, vector, measured):
        """Return the vector."""
        return vector

    def dense(self, rows):
        """Say that there is none."""
        raise NotImplementedError

    def inversion_flops(self):
        """Return none."""
        return 0

    def application_flops(self):
        """Return none."""
        return 0


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package, by its name, with entry points and modules; and put all back."""
    monkeypatch.setattr(registry, "_registered", {})
    options = ConfigStore.instance().repo.setdefault("preconditioner", {})
    monkeypatch.setitem(ConfigStore.instance().repo, "preconditioner", dict(options))

    def installed(package: str, points: dict[str, str], modules: dict[str, str] = MappingProxyType({})) -> None:
        home = tmp_path / package
        metadata = home / f"{package}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", encoding="utf-8")
        lines = ["[kfac_sua.structures]", *(f"{name} = {place}" for name, place in points.items())]
        (metadata / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        for name, text in modules.items():
            (home / f"{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.syspath_prepend(str(home))
        importlib.invalidate_caches()
        registry._entry_points.cache_clear()

    yield installed
    monkeypatch.undo()
    registry._entry_points.cache_clear()


HERE = f"{Path(__file__).stem}:Plain"


def test_the_reserved_names_are_the_preconditioners_that_are_no_structures():
    """``registry.py`` cannot import the list of the command line's preconditioners, which is of a higher floor."""
    assert {*RESERVED} == {name.value for name in PreconditionerName} - BUILT_IN.keys()


@pytest.mark.parametrize(
    ("module", "said"),
    [
        ("class X(:", "SyntaxError: invalid syntax"),
        ("raise RuntimeError('needs\\na GPU')", "RuntimeError: needs a GPU"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("Y = 1", "AttributeError: module"),
    ],
)
def test_a_package_that_cannot_be_imported_is_named(install, monkeypatch, module, said):
    """Whatever it raises, the sentence names structure, entry point, package and error, for commands as well."""
    install("broken_package", {"broken": "broken_structure:X"}, {"broken_structure": module})
    monkeypatch.delitem(sys.modules, "broken_structure", raising=False)
    with pytest.raises(ValueError, match="cannot be imported") as error:
        structure_class("broken")
    for part in ("structure=broken", "broken_structure:X", "the package broken_package 1.0", said):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.delitem(sys.modules, "broken_structure", raising=False)
    with pytest.raises(ConfigError, match="of the package broken_package"):
        compose_config(["preconditioner=broken"])


class Unfinished(RowStructure):
    """A structure that lacks most of its methods."""

    def measure(self, rows):
        """Return nothing."""
        return {}


BAD_CLASSES = {
    "is no subclass of FisherStructure": nn.Linear,
    "does not define application_flops, dense, inversion_flops, invert, precondition, product": Unfinished,
    "does not define measured_shapes": type("Empty", (Plain,), {"measured_shapes": {}}),
    "does not define kept_shapes": type("Missing", (Plain,), {"kept_shapes": None}),
    "shape ('g', 'r') of 'a' in kept_shapes": type("Lettered", (Plain,), {"kept_shapes": {"a": ("g", "r")}}),
    "shape 'gpd' of 'a' in measured_shapes": type("Text", (Plain,), {"measured_shapes": {"a": "gpd"}}),
}


@pytest.mark.parametrize("said", BAD_CLASSES)
def test_a_class_that_cannot_work_is_refused_at_once(install, monkeypatch, said):
    """What is missing is named, instead of an error of the first layer or step that needs it."""
    with pytest.raises(TypeError, match="cannot be") as error:
        register_structure("bad", BAD_CLASSES[said])
    assert said in str(error.value)
    monkeypatch.setattr(sys.modules[__name__], "Bad", BAD_CLASSES[said], raising=False)
    install("bad_package", {"bad": f"{__name__}:Bad"})
    with pytest.raises(ValueError, match="of the package bad_package") as error:
        structure_class("bad")
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (3, TypeError, "must be a string, got 3"),
        ("not a name", ValueError, "Python identifier"),
        ("lambda", ValueError, "no keyword, got 'lambda'"),
        *((name, ValueError, f"preconditioner={name}") for name in RESERVED),
        ("kfac", ValueError, r"is .*KFAC already"),
    ],
)
def test_a_name_that_cannot_be_a_structures_is_refused(name, kind, said):
    """Neither what cannot be written on a command line, nor what means something else there."""
    with pytest.raises(kind, match=said):
        register_structure(name, Plain)


def test_the_packages_own_names_win_and_others_are_told(install, caplog):
    """An entry point by such a name, or one that is no name, is passed over with a warning, once."""
    install("greedy_package", {"kfac": HERE, "grouped": HERE, "my-name": HERE})
    assert structure_names() == tuple(BUILT_IN)
    assert structure_class("kfac").__name__ == "KFAC"
    for name in ("grouped", "my-name"):
        with pytest.raises(ValueError, match=r"the package greedy_package .* is passed over"):
            structure_class(name)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 3
    assert all("greedy_package" in warning for warning in warnings)
    assert compose_config(["preconditioner=grouped"]).preconditioner.structure == "kfac"


def test_two_packages_by_one_name_are_never_chosen_between(install, caplog):
    """The one that is found last must not win; the error names both."""
    install("first_package", {"twice": HERE, "same": HERE})
    install("second_package", {"twice": f"{Path(__file__).stem}:Unfinished", "same": HERE})
    with pytest.raises(
        ConfigError, match=r"preconditioner\.structure=twice .*second_package 1.0 and .*first_package 1.0"
    ):
        compose_config(["preconditioner=twice"])
    assert [record.getMessage().split(" ")[0] for record in caplog.records] == ["structure=twice"]
    assert structure_class("same").__name__ == "Plain"  # one class, however many packages name it


def test_a_structure_registered_later_is_known_to_configurations(install):
    """Not only those that were registered before ``kfac_sua.config`` was imported."""
    del install  # which puts back what is registered
    register_structure("later", Plain)
    assert compose_config(["preconditioner=later"]).preconditioner.structure == "later"


def test_a_class_that_is_defined_again_replaces_the_older_one(install):
    """As when a cell of a notebook is run again; any other class by the name is still refused."""
    del install
    versions = [type("Mine", (Plain,), {"version": version}) for version in (1, 2)]
    for version in versions:
        register_structure("mine", version)
        assert structure_class("mine") is version
    with pytest.raises(ValueError, match=r"is .*Mine already"):
        register_structure("mine", type("Other", (Plain,), {}))


def test_a_structure_of_ones_own_protocol_needs_no_shapes():
    """Shapes are those of ``RowStructure``; other subclasses of ``FisherStructure`` say theirs themselves."""
    assert not issubclass(structure_class("kfac"), RowStructure)
    assert issubclass(structure_class("kfac"), FisherStructure)
    assert registry._fault(structure_class("kfac")) is None
