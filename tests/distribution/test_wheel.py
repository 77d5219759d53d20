"""What is built for distribution: which files it holds, and that it works far away from the checkout."""

import configparser
import email
import importlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

import kfac_sua

pytest.importorskip("hatchling", reason="needs hatchling, which builds the wheel (extra dev)")

ROOT = Path(__file__).resolve().parents[2]

CHECK_LIBRARY = """
import sys
from pathlib import Path
import torch
from torch import nn
import kfac_sua
from kfac_sua import KroneckerPreconditioner
target, checkout = map(Path, sys.argv[1:])
assert Path(kfac_sua.__file__).is_relative_to(target), kfac_sua.__file__
assert checkout not in map(Path, sys.path)
model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))
preconditioner = KroneckerPreconditioner(model, structure="sua", group_size=2)
model(torch.randn(5, 3, 4, 4)).square().sum(1).mean().backward()
before = model[0].weight.grad.clone()
preconditioner.step()
assert not torch.equal(model[0].weight.grad, before)
print(kfac_sua.__version__)
"""


def build(source: Path, target: str, directory: Path) -> Path:
    """Build a ``wheel`` or an ``sdist`` from a source tree, without a network, and return its path."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(directory)]
    subprocess.run(command, cwd=source, check=True, capture_output=True, text=True, timeout=120)
    (path,) = directory.glob("*.whl" if target == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel of the checkout."""
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> set[str]:
    """Return the files of a wheel, but for those that describe it."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_wheel_holds_the_package_and_all_configs_and_nothing_else(wheel):
    """Its files are those of kfac_sua and of configs; no tests, outputs or data, and the mark of a typed package."""
    package = [path for path in (ROOT / "kfac_sua").rglob("*") if path.is_file() and path.suffix != ".pyc"]
    configs = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]
    expected = {path.relative_to(ROOT).as_posix() for path in package}
    expected |= {f"kfac_sua/{path.relative_to(ROOT).as_posix()}" for path in configs}
    assert names(wheel) == expected
    assert {"kfac_sua/py.typed", "kfac_sua/configs/config.yaml"} <= expected


def test_wheel_says_what_it_is(wheel):
    """The version is the package's own, and name, licence, Python, classifiers and description are there."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    assert metadata["Name"] == "kfac_sua"
    assert metadata["Version"] == kfac_sua.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert metadata.get_payload().startswith("# kfac_sua")


def test_wheel_has_the_commands(wheel):
    """Each installed command names a function that there is."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(name).decode())
    scripts = dict(entries["console_scripts"])
    assert scripts.keys() == {
        f"kfac-sua-{command}" for command in ("train", "reproduce", "evaluate", "bench", "introspect")
    }
    for value in scripts.values():
        module, _, function = value.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_source_distribution_builds_the_same_wheel(wheel, tmp_path):
    """A wheel from the unpacked source distribution holds the files of the checkout's."""
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    assert {"README.md", "LICENSE", "Makefile", "configs", "docs", "examples", "outputs", "tests"} <= {
        path.name for path in source.iterdir()
    }
    assert names(build(source, "wheel", tmp_path / "wheel")) == names(wheel)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel, without its dependencies, into a directory of its own."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return target


def call(installed: Path, cwd: Path, arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run Python with the installed wheel and the dependencies alone, and with no path to the checkout.

    ``-S`` leaves out the .pth file through which an editable installation finds the checkout.
    """
    paths = [str(installed), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HYDRA_FULL_ERROR")}
    return subprocess.run(
        [sys.executable, "-S", *arguments],
        cwd=cwd,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_library_works_outside_the_checkout(installed, tmp_path):
    """The import is that of the wheel, and a step preconditions."""
    result = call(installed, tmp_path, ["-c", CHECK_LIBRARY, str(installed), str(ROOT)])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == kfac_sua.__version__


@pytest.mark.slow
def test_the_command_trains_outside_the_checkout(installed, tmp_path):
    """It finds its configs in the wheel and writes below the working directory; the same command again trains not."""
    arguments = ["model=tiny", "dataset=digits", "dataset.train_size=400", "epochs=1", "device=cpu"]
    result = call(installed, tmp_path, ["-m", "kfac_sua.train", *arguments, "experiment=quickstart_sua"])
    assert (result.returncode, result.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert len(list((tmp_path / "outputs" / "runs").rglob("metrics.csv"))) == 1
    again = call(installed, tmp_path, ["-m", "kfac_sua.train", *arguments, "experiment=quickstart_sua"])
    assert again.stdout.startswith("already finished")


COMPLETE = """
eval "$(kfac-sua-train -sc install=bash)"
COMP_LINE=$1 COMP_POINT=${#1} COMP_CWORD=1
hydra_bash_completion
echo "${COMPREPLY[@]}"
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_completes_the_installed_command(installed, tmp_path):
    """As the documentation says: what bash is given to evaluate asks the command itself."""
    paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PATH": os.pathsep.join([str(installed / "bin"), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = ["bash", "-c", COMPLETE, "bash", "kfac-sua-train preconditioner=su"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (result.stdout.split(), result.stderr) == (["preconditioner=sua", "preconditioner=sua_grouped"], "")


@pytest.mark.slow
def test_the_other_commands_start_outside_the_checkout(installed, tmp_path):
    """Help, the plan of a figure and the benchmark's help appear; missing images name a command that a wheel has."""
    help_text = call(installed, tmp_path, ["-m", "kfac_sua.train", "--help"])
    assert help_text.returncode == 0, help_text.stderr
    assert "Train one network" in help_text.stdout
    plan = call(installed, tmp_path, ["-m", "kfac_sua.reproduce", "fig1", "--scale", "smoke", "--dry-run"])
    assert (plan.returncode, plan.stderr) == (0, "")
    assert "sua_grouped" in plan.stdout
    for module in (
        "kfac_sua.bench",
        "kfac_sua.bench.scaling",
        "kfac_sua.introspect",
        "kfac_sua.runs.collect",
        "kfac_sua.data.download",
    ):
        result = call(installed, tmp_path, ["-m", module, "--help"])
        assert result.returncode == 0, result.stderr
    no_images = call(installed, tmp_path, ["-m", "kfac_sua.train", "dataset=cifar10", "dataset.download=false"])
    assert no_images.returncode == 2
    assert "python -m kfac_sua.data.download" in no_images.stderr
    assert list(tmp_path.iterdir()) == []
