"""What the library returns for printing, raises and logs can be printed wherever a user's own script prints."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import kfac_sua

LIBRARY = Path(kfac_sua.__file__).parent
FILES = [path for folder in ("preconditioner", "optimizers", "models") for path in (LIBRARY / folder).rglob("*.py")]


def texts(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yield the strings of a file that are no docstrings."""
    statements = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in statements:
            yield node


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(LIBRARY)) for path in FILES])
def test_strings_of_the_library_are_ascii(path):
    """Commands replace what their own streams cannot encode; a library has no say in those of its users."""
    found = {node.lineno: node.value for node in texts(ast.parse(path.read_text("utf-8"))) if not node.value.isascii()}
    assert found == {}
