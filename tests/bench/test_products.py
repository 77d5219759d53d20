"""Errors of the ways to multiply, on a network that has been trained."""

import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kfac_sua.bench import products
from kfac_sua.bench.products import PRODUCTS, rounded, train_and_measure
from kfac_sua.compose import compose_config
from kfac_sua.preconditioner.forms import DenseInverse, LowRankInverse
from kfac_sua.preconditioner.precision import application_precision


@pytest.fixture(scope="module")
def errors():
    """Return those of the tiny network after an epoch of digits."""
    return train_and_measure(compose_config(["model=tiny", "dataset=digits", "device=cpu"]))


def worst(errors, norm, **where):
    """Return the largest error in a norm."""
    return max(getattr(e, norm) for e in errors if all(getattr(e, key) == value for key, value in where.items()))


@pytest.mark.parametrize("structure", ["kfac", "sua"])
@pytest.mark.parametrize("damping", [1.0, 0.1, 0.01])
def test_parts_keep_curvature_right(errors, structure, damping):
    """In both norms: three products are 20 times as exact as one of TF32, and one of bfloat16 is of no use."""
    for norm in ("plain", "fisher"):
        error = {name: worst(errors, norm, product=name, structure=structure, damping=damping) for name in PRODUCTS}
        assert error["float32"] < 3e-5
        assert error["bf16x3"] < 2e-3
        assert error["bf16x3"] < error["TF32"] / 8
        assert error["TF32"] < error["bfloat16"]
    assert error["bfloat16"] > 2e-2


def test_every_layer_is_measured(errors):
    """Three layers, four products, two structures, three dampings."""
    assert len(errors) == 3 * 4 * 2 * 3
    assert len({(e.layer, e.product, e.structure, e.damping) for e in errors}) == len(errors)


@given(st.floats(1e-30, 1e30), st.booleans())
def test_rounding_to_bfloat16_is_pytorchs(value, is_negative):
    """To the nearest, ties to even."""
    number = torch.tensor([-value if is_negative else value], dtype=torch.float32)
    assert torch.equal(rounded(number, 7), number.bfloat16().float())
    assert torch.equal(rounded(number, 22), rounded(rounded(number, 22), 22))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["dense", "rows"])
def test_parts_are_high_and_low(form, side):
    """What is multiplied is the high parts, and each with the other's low part, summed in float32."""
    torch.manual_seed(0)
    root = torch.randn(2, 5, 9) / 4
    inverse = LowRankInverse(root, torch.tensor([0.5, 2.0])[:, None, None])
    if form == "dense":
        inverse = DenseInverse(inverse.dense())
    values = torch.randn(2, 9, 7) if side == "left" else torch.randn(2, 7, 9)
    got, want = (getattr(one, side)(values) for one in (inverse.split(), inverse))
    error = (got - want).norm() / want.norm()
    assert 1e-7 < error < 1e-4
    for one, tensor in inverse.split().tensors().items():
        if one.endswith("parts"):
            assert tensor.dtype == torch.bfloat16
            whole = inverse.blocks if form == "dense" else inverse.root
            assert tensor.shape[-1] == 16
            padding = tensor[..., 9:]
            high, again, low = tensor[..., :9].float().unbind(-2)
            assert torch.equal(high, whole.bfloat16().float())
            assert torch.equal(high, again)
            torch.testing.assert_close(high + low, whole, rtol=2**-15, atol=1e-9)
            assert not padding.float().any()


@pytest.mark.parametrize("form", ["dense", "rows"])
def test_tensor_cores_are_asked_for_float32_sums(form):
    """On CUDA each product multiplies bfloat16 parts to float32 results; fake tensors tell, without a device."""
    seen = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        root = torch.empty(2, 30, 96, device="cuda")
        made = LowRankInverse(root, torch.empty(2, 1, 1, device="cuda"))
        inverse = (DenseInverse(made.dense()) if form == "dense" else made).split()
        values = torch.empty(2, 96, 50, device="cuda")
        with Names():
            result = inverse.left(values)
    num_products = 1 if form == "dense" else 2
    assert (result.shape, result.dtype, result.device.type) == (values.shape, torch.float32, "cuda")
    assert seen.count("aten.bmm.dtype") == num_products
    assert "aten.bmm.default" not in seen
    assert "aten.matmul.default" not in seen


def test_sums_of_the_application_are_float32():
    """The switch that would let them be less is off meanwhile, and comes back with its second half."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    try:
        for allowed in (True, False):
            matmul.allow_bf16_reduced_precision_reduction = allowed
            with application_precision():
                assert matmul.allow_bf16_reduced_precision_reduction is False
            assert matmul.allow_bf16_reduced_precision_reduction is allowed
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before


def test_the_command_prints_and_writes(tmp_path, capsys):
    """A table of worst layers, and every number as JSON."""
    path = tmp_path / "errors.json"
    assert products.main(["model=tiny", "dataset=digits", "--json", str(path)]) == 0
    out = capsys.readouterr().out
    assert "tiny width 1 on digits" in out
    for name in PRODUCTS:
        assert re.search(rf"^{name} .* / ", out, re.MULTILINE)
    assert len(json.loads(path.read_text())) == 72


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["model=huge"], 2, "huge"),
        (["device=cuda"], 2, "device=cuda"),
        (["--json", "/nonexistent/x.json"], 2, "Cannot use /nonexistent/x.json"),
        (["model=tiny", "dataset=digits", "optimizer.lr=1e20", "dataset.train_size=300"], 1, "lower optimizer.lr"),
    ],
)
def test_bad_input_is_one_sentence(arguments, code, sentence, capsys):
    """Before anything is measured, where that can be known."""
    assert products.main(arguments) == code
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert sentence in err
