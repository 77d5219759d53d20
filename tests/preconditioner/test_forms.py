"""What every form of a factor must do, and that the rest of the package knows none of them."""

import ast
import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import kfac_sua
from kfac_sua.preconditioner import forms
from kfac_sua.preconditioner.distributed.inversion import read_inverse
from kfac_sua.preconditioner.forms import (
    LOW_RANK_FORMS,
    MOMENT_FORMS,
    DenseFactor,
    EigenBasis,
    Factor,
    PatchFactor,
    RefreshResult,
    RowsFactor,
    described_rows,
    description_of,
    factor_from_state,
    inverse_from_state,
    moment_form,
)
from kfac_sua.preconditioner.forms.accumulator import MomentAccumulator, Scalings
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.triangles import packed, unpack_
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.invert import Outcome, eigendecompose_factors, invert_factors
from kfac_sua.preconditioner.model.module_geometry import geometry_of

GEOMETRY = geometry_of(nn.Conv2d(2, 3, 3, padding=1, bias=False))
FORMS = {form.__name__: form for form in (*MOMENT_FORMS, *LOW_RANK_FORMS)}
FACTORS = ["DenseFactor", "RowsFactor", "PatchFactor"]
PREPARED = [*FACTORS, "eigenbasis"]


def patches_of(num_examples: int) -> PatchRows:
    """Return the patches of random 4×3 images."""
    inputs = torch.randn(num_examples, 2, 4, 3, dtype=torch.float64)
    return PatchRows.read(to_locations(inputs, GEOMETRY), GEOMETRY)


def factor_of(name: str) -> Factor:
    """Return a factor of the form of this name."""
    torch.manual_seed(0)
    return {
        "DenseFactor": lambda: DenseFactor.of_rows(torch.randn(3, 9, 90, dtype=torch.float64)),
        "RowsFactor": lambda: RowsFactor(torch.randn(3, 5, 18, dtype=torch.float64)),
        "PatchFactor": lambda: PatchFactor(patches_of(2)),
    }[name]()


def prepared_of(name: str) -> tuple[Factor, RefreshResult]:
    """Return a factor, and the inverse or the eigenbasis that a refresh makes of it."""
    factor = factor_of("RowsFactor" if name == "eigenbasis" else name)
    if name == "eigenbasis":
        (basis,) = eigendecompose_factors([factor])
        assert basis is not None
        return factor, basis
    (outcome,) = invert_factors([factor], [torch.linspace(0.1, 0.3, factor.num_blocks, dtype=torch.float64)])
    assert type(outcome.inverse) is factor.inverse_form
    return factor, outcome.inverse


def assert_same_tensors(one: RefreshResult, other: RefreshResult) -> None:
    """Both are of the same form and have the same bits."""
    assert type(one) is type(other)
    assert one.tensors().keys() == other.tensors().keys()
    for key, tensor in one.tensors().items():
        assert torch.equal(other.tensors()[key], tensor), key


def test_these_tests_see_every_form():
    """Whoever adds a form adds it here."""
    assert set(FACTORS) == set(FORMS)


def test_checkpoints_tell_the_forms_apart():
    """No two factors, and no two inverses, have the same names."""
    factors = [form.names for form in FORMS.values()]
    inverses = [frozenset(form.inverse_form.names) for form in FORMS.values()]
    assert len(set(factors)) == len(set(inverses)) == len(FORMS)
    assert frozenset(EigenBasis.names) not in inverses


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_is_what_its_blocks_are(name):
    """Traces, products, cores and parts agree with the dense blocks."""
    factor = factor_of(name)
    blocks = factor.dense()
    assert blocks.shape == (factor.num_blocks, factor.width, factor.width)
    torch.testing.assert_close(factor.traces(), blocks.diagonal(dim1=-2, dim2=-1).sum(-1))
    values = torch.randn(factor.num_blocks, factor.width, 4, dtype=torch.float64)
    torch.testing.assert_close(factor.matmul(values), blocks @ values)
    assert torch.equal(factor.as_moment(DenseFactor).values, blocks)
    core = factor.core()
    assert core.shape == (factor.num_blocks, factor.core_width, factor.core_width)
    rank = min(factor.width, factor.core_width)
    largest = [torch.linalg.eigvalsh(one)[:, -rank:].clamp(min=0) for one in (core, blocks)]
    torch.testing.assert_close(*largest, rtol=1e-9, atol=1e-9)
    core.zero_()
    assert torch.equal(factor.dense(), blocks)  # a core is the caller's to change
    part = slice(0, max(1, factor.num_blocks - 1))
    assert torch.equal(factor.part(part).dense(), blocks[part])
    assert torch.equal(factor.with_values(factor.values * 1).dense(), blocks)


@pytest.mark.parametrize("name", FACTORS)
def test_a_factor_comes_back_from_a_checkpoint(name):
    """In its form, with its bits."""
    factor = factor_of(name)
    back = factor_from_state(factor.to_state(), GEOMETRY)
    assert type(back) is type(factor)
    assert torch.equal(back.dense(), factor.dense())


@pytest.mark.parametrize("name", FACTORS)
def test_an_inverse_comes_back_from_a_checkpoint(name):
    """In its form, with its bits."""
    _, inverse = prepared_of(name)
    assert set(inverse.tensors()) == set(inverse.names)
    assert_same_tensors(inverse_from_state(inverse.tensors(), GEOMETRY), inverse)


@pytest.mark.parametrize(
    "state", [{}, {"blocks": torch.eye(2)[None], "other": torch.eye(2)}, {"diagonal": torch.eye(2)}]
)
def test_an_entry_of_no_form_is_refused(state):
    """The message names what there is and what there may be."""
    for read in (factor_from_state, inverse_from_state):
        with pytest.raises(ValueError, match=f"an entry of {', '.join(state) or 'nothing'}, expected one of: blocks; "):
            read(state, GEOMETRY)


def test_an_eigenbasis_comes_back_from_a_checkpoint():
    """With its bits."""
    _, basis = prepared_of("eigenbasis")
    assert set(basis.tensors()) == set(basis.names)
    assert_same_tensors(EigenBasis.from_tensors(basis.tensors(), GEOMETRY), basis)


@pytest.mark.parametrize("name", PREPARED)
def test_a_message_says_all_of_an_inverse(name):
    """Its shapes are known beforehand; of a triangle, what is left out need not arrive."""
    factor, made = prepared_of(name)
    form = made.message_of(factor)
    matrices, extra = made.to_message()
    assert matrices.shape == (factor.num_blocks, form.height, form.width)
    assert extra.shape == (factor.num_blocks, form.num_extra)
    sent = unpack_(torch.zeros_like(matrices), packed(matrices)) if form.is_triangle else matrices.clone()
    back = type(made).from_message(factor, sent, extra)
    for key, tensor in made.tensors().items():
        torch.testing.assert_close(back.tensors()[key], tensor, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", PREPARED)
def test_an_inverse_of_nothing_received_has_the_right_shapes(name):
    """Counting costs without data relies on it."""
    factor, made = prepared_of(name)
    empty = read_inverse(factor, type(made), [])
    shapes = [{key: tensor.shape for key, tensor in one.tensors().items()} for one in (made, empty)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", FACTORS)
def test_other_processes_know_what_rows_to_expect(name):
    """Form and sizes of rows are told; of moments there is nothing to tell."""
    factor = factor_of(name)
    told = described_rows(description_of(factor))
    if factor.is_moment:
        assert told is None
    else:
        form, sizes = told
        assert (form, sizes) == (type(factor), tuple(factor.values.shape))
        assert form.num_rows_of(sizes, GEOMETRY) == factor.core_width


@pytest.mark.parametrize("form", MOMENT_FORMS)
def test_moments_add_up_and_travel(form):
    """The sum of two moments is that of their rows joined; as numbers they say all."""
    rows = torch.randn(2, 7, 90, dtype=torch.float64)
    one, other = form.of_rows(rows[:, :3]), form.of_rows(rows[:, 3:])
    torch.testing.assert_close(one.values + other.values, form.of_rows(rows).values)
    numbers = torch.cat([piece.flatten() for piece in one.pieces()])
    assert len(numbers) == one.num_blocks * form.count_numbers(one.width)
    back = form.zeros(one.num_blocks, one.width, rows).from_numbers_(numbers)
    torch.testing.assert_close(back.values, one.values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [1, 2, 512])
def test_every_moment_has_a_form(width):
    """Whatever the width, the first form in the list that is chosen."""
    assert moment_form(width) in MOMENT_FORMS


def test_rows_of_different_forms_are_kept_together():
    """Patches with patches of equal images, otherwise as rows; beyond the room as a moment, of the same numbers."""
    torch.manual_seed(0)
    first, second, rows = patches_of(2), patches_of(1), torch.randn(1, 5, 18, dtype=torch.float64)
    want = sum(part.rows().mT @ part.rows() for part in (first, second)) + rows[0].mT @ rows[0]
    for room, form in ((100, RowsFactor), (40, DenseFactor)):
        accumulator = MomentAccumulator(room)
        accumulator.keep(PatchFactor(first))
        accumulator.keep(PatchFactor(second))
        accumulator.add(rows)
        scalings = Scalings()
        factor = accumulator.factor(0.25, scalings)
        scalings.carry_out()
        assert type(factor) is form
        torch.testing.assert_close(factor.dense()[0], want / 4)
    accumulator = MomentAccumulator(100)
    accumulator.keep(PatchFactor(first))
    accumulator.keep(PatchFactor(second))
    assert type(accumulator.factor(1.0, Scalings())) is PatchFactor


def test_moments_of_two_forms_are_not_added():
    """Their tensors mean different things."""

    class OtherFactor(DenseFactor):
        """A form that this package does not have."""

    accumulator = MomentAccumulator(0)
    accumulator.add(torch.randn(1, 3, 2))
    with pytest.raises(AssertionError, match="two forms"):
        accumulator.add_moment(OtherFactor(torch.eye(2)[None]))


def test_roots_of_rows_are_made_last(monkeypatch):
    """Beside the copies that batches of dense blocks need, they would lie in memory for nothing."""
    calls = []
    for owner, name in ((torch, "cholesky_inverse"), (torch.linalg, "solve_triangular")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, _o=original, _n=name, **k: calls.append(_n) or _o(*a, **k))
    factors = [factor_of("RowsFactor"), factor_of("DenseFactor"), factor_of("RowsFactor")]
    outcomes = invert_factors(factors, [torch.full((3,), 0.1, dtype=torch.float64)] * 3)
    assert calls == ["cholesky_inverse", "solve_triangular", "solve_triangular"]
    assert [type(one.inverse) for one in outcomes] == [factor.inverse_form for factor in factors]


def test_numbers_in_messages_are_those_of_the_release_before():
    """Rows 1 and patches 2, in whatever order the forms are asked."""
    assert {form.__name__: form.number for form in LOW_RANK_FORMS} == {"RowsFactor": 1, "PatchFactor": 2}


def test_outcomes_add_up():
    """Failures and raised dampings are counted together, and the largest raise is told."""
    parts = [Outcome("a", 1, 2, 10), Outcome("b", 0, 1, 100), Outcome("c")]
    assert Outcome.combined("all", parts) == Outcome("all", num_failed=1, num_raised=3, raised_by=100)
    assert parts[0].with_inverse(7) == Outcome(7, 1, 2, 10)


# --- who knows of the forms -------------------------------------------------------------------------------------------

PACKAGE = Path(kfac_sua.__file__).parent
OUTSIDE = [path for path in sorted(PACKAGE.rglob("*.py")) if PACKAGE / "preconditioner" / "forms" not in path.parents]
CLASSES = {name for name in forms.__all__ if isinstance(getattr(forms, name), type)}
KEPT_NAMES = {
    name for form in (*FORMS.values(), *(one.inverse_form for one in FORMS.values()), EigenBasis) for name in form.names
}


def switches_on_forms(tree: ast.AST) -> list[str]:
    """Return the expressions that ask which form something has: by its class, its type or its names."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = {one.id for one in ast.walk(node.args[1]) if isinstance(one, ast.Name)}
            asked |= {one.attr for one in ast.walk(node.args[1]) if isinstance(one, ast.Attribute)}
            found += [ast.unparse(node)] if asked & CLASSES else []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            names = {one.id for one in operands if isinstance(one, ast.Name)}
            texts = {one.value for one in operands if isinstance(one, ast.Constant) and isinstance(one.value, str)}
            asks_for_name = any(isinstance(one, ast.In | ast.NotIn) for one in node.ops) and texts & KEPT_NAMES
            found += [ast.unparse(node)] if names & CLASSES or asks_for_name else []
    return found


def test_nothing_else_asks_for_the_form():
    """What depends on the form of a factor stands in the form's file."""
    found = {str(path): switches_on_forms(ast.parse(path.read_text(encoding="utf-8"))) for path in OUTSIDE}
    assert len(found) > 100
    assert {path: switches for path, switches in found.items() if switches} == {}


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(inverse, DenseInverse)",
        "isinstance(factor, forms.PatchFactor | int)",
        "'pixels' in state",
        "type(factor) is RowsFactor",
    ],
)
def test_such_questions_are_found(code):
    """Each of the ways to ask that were there once."""
    assert switches_on_forms(ast.parse(code)) == [code]


def test_counted_flops_of_a_factor_are_those_that_choose_its_form():
    """What sharing counts of a factor and what the choice of its form counted are one formula."""
    for name, kind in itertools.product(FACTORS, ("inverse", "eigenbasis")):
        factor = factor_of(name)
        prepared = EigenBasis if kind == "eigenbasis" else factor.inverse_form
        rows, width = factor.core_width, factor.width
        want = {
            ("DenseFactor", "inverse"): width**3,
            ("RowsFactor", "inverse"): 2 * rows**2 * width + rows**3 // 3 + rows**2 * width,
            ("PatchFactor", "inverse"): 2 * rows**2 * 2 + rows**3 // 3,
        }.get((name, kind), 9 * width**3)
        assert prepared.flops_of(factor) == want
        assert math.isfinite(prepared.message_of(factor).numbers)
