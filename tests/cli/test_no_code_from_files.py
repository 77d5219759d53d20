"""Nothing in the package runs code that a file brings along."""

import ast
from pathlib import Path

import pytest

import kfac_sua

PACKAGE = Path(kfac_sua.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
RUNS_CODE = {"eval", "exec", "compile", "__import__"}
UNPICKLES = {
    *(("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("marshal", "load"), ("marshal", "loads")),
    *(("joblib", "load"), ("yaml", "load"), ("shelve", "open"), ("pandas", "read_pickle"), ("pd", "read_pickle")),
}


def dangers(source: str) -> list[str]:
    """Return what in a source file may run code from a file that it reads."""
    return [danger for node in ast.walk(ast.parse(source)) for danger in _dangers(node)]


def _dangers(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Call):
        return _dangers_of_call(node)
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{name.name}" for name in node.names if (node.module, name.name) in UNPICKLES]
    if isinstance(node, ast.Constant) and node.value == "_target_":
        # hydra_settings.py holds the word to refuse it.
        return ["_target_"]
    return []


def _dangers_of_call(call: ast.Call) -> list[str]:
    function, keywords = call.func, {keyword.arg: keyword.value for keyword in call.keywords}
    found = []
    if isinstance(function, ast.Name) and function.id in RUNS_CODE:
        found.append(function.id)
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        name = (function.value.id, function.attr)
        found += [".".join(name)] if name in UNPICKLES or function.attr == "instantiate" else []
        if name == ("torch", "load") and not _is(keywords.get("weights_only"), True):
            found.append("torch.load without weights_only=True")
        if name == ("np", "load") and not _is(keywords.get("allow_pickle"), False):
            found.append("np.load without allow_pickle=False")
        if keywords.get("shell") is not None and not _is(keywords["shell"], False):
            found.append("shell=True")
    if _is(keywords.get("allow_pickle"), True):
        found.append("allow_pickle=True")
    return found


def _is(node: ast.AST | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_source_runs_no_code_from_files(path):
    """There is no eval, no unpickling, and no ``_target_`` but the one that is refused."""
    admitted = ["_target_"] if path.name == "hydra_settings.py" else []
    assert dangers(path.read_text(encoding="utf-8")) == admitted


@pytest.mark.parametrize(
    ("source", "danger"),
    [
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("import pickle\npickle.load(file)", "pickle.load"),
        ("from pickle import loads", "pickle.loads"),
        ("torch.load(path)", "torch.load without weights_only=True"),
        ("torch.load(path, weights_only=False)", "torch.load without weights_only=True"),
        ("np.load(path)", "np.load without allow_pickle=False"),
        ("read(path, allow_pickle=True)", "allow_pickle=True"),
        ("hydra.utils.call(config['_target_'])", "_target_"),
        ("subprocess.run(command, shell=True)", "shell=True"),
    ],
)
def test_danger_would_be_found(source, danger):
    """The test above can fail."""
    assert danger in dangers(source)
