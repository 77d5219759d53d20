"""In what runs compute: bfloat16 by autocast, and the switches of float32 arithmetic on a CUDA device."""

import math

import pytest
import torch
import torch.nn.functional as F
from thinned import one_in
from tiny_runs import TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.config import Precision
from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner.precision import IEEE, factor_precision
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.precision import compute_logits, computing_in

SETTINGS = {
    "sua": ("preconditioner=sua", TINY_PERIOD),
    "kfac-mc": ("preconditioner=kfac", TINY_PERIOD, "preconditioner.fisher_type=mc"),
    "baseline": ("preconditioner=baseline",),
}


@pytest.mark.parametrize("name", one_in(3, SETTINGS))
def test_a_run_in_bfloat16_learns_what_one_in_float32_does(tmp_path, name):
    """Its losses are close to float32's but not the same, and everything that it keeps is in float32."""
    half, full = (
        tiny_config(tmp_path, *SETTINGS[name], "epochs=3", f"precision={precision}")
        for precision in ("bfloat16", "float32")
    )
    assert directory_of(half).path != directory_of(full).path
    for config in (half, full):
        assert run(config).status == "finished"
    rows = [metrics_without_times(config)[-1] for config in (half, full)]
    assert rows[0]["train_loss"] != rows[1]["train_loss"]
    assert math.isclose(rows[0]["train_loss"], rows[1]["train_loss"], rel_tol=0.03)
    directory = directory_of(half)
    assert read_run_info(directory.info).config["precision"] == "bfloat16"
    checkpoint = load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=0, device=torch.device("cpu")
    )
    for state in (checkpoint.model, checkpoint.optimizer, checkpoint.preconditioner):
        assert {tensor.dtype for tensor in tensors(state)} <= {torch.float32, torch.int64}


def test_the_default_precision_keeps_the_directories_of_older_runs(tmp_path):
    """A run of before there was this setting is found again."""
    assert directory_of(tiny_config(tmp_path)) == directory_of(tiny_config(tmp_path, "precision=float32"))


def test_logits_are_in_the_precision_of_losses():
    """Rounded to bfloat16 on the way, but returned in that of the images."""
    torch.manual_seed(0)
    model, images = TinyConvNet(10), torch.randn(4, 3, 32, 32)
    half, full = (compute_logits(model, images, precision) for precision in (Precision.bfloat16, Precision.float32))
    assert half.dtype == full.dtype == torch.float32
    torch.testing.assert_close(half, full, rtol=0.1, atol=0.05)
    assert not torch.equal(half, full)
    assert torch.equal(half, half.bfloat16().float())


def tensors(state):
    """Yield every tensor in nested dictionaries and lists."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict):
        yield from (one for value in state.values() for one in tensors(value))
    elif isinstance(state, list | tuple):
        yield from (one for value in state for one in tensors(value))


def switches() -> tuple[str, ...]:
    """Return in what float32 convolutions and products compute on a CUDA device."""
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision


def set_older() -> None:
    """Allow TF32 in products through PyTorch's older interface."""
    torch.backends.cuda.matmul.allow_tf32 = True


def set_newer() -> None:
    """Allow TF32 in products through the newer one, and forbid it in convolutions."""
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("prepare", [lambda: None, set_older, set_newer], ids=["default", "older", "newer"])
@pytest.mark.parametrize("precision", [Precision.float32, Precision.tf32, Precision.bfloat16])
def test_convolutions_and_products_compute_in_one_precision(prepare, precision):
    """On CUDA inside, through both of PyTorch's interfaces; outside, everything is as the caller has set it."""
    untouched = switches()
    try:
        prepare()
        before = switches()
        with computing_in(precision, torch.device("cpu")):
            assert switches() == before
        with computing_in(precision, torch.device("cuda")):
            is_tf32 = precision is not Precision.float32
            assert [value == "tf32" for value in switches()] == [is_tf32] * 3
            assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == is_tf32
            with factor_precision():
                assert torch.backends.cuda.matmul.fp32_precision in IEEE
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is is_tf32
        assert switches() == before
        with pytest.raises(KeyboardInterrupt), computing_in(precision, torch.device("cuda")):
            raise KeyboardInterrupt
        assert switches() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.fp32_precision = untouched[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "error"), [("float32", (0, 1e-5)), ("tf32", (1e-4, 1e-2))])
def test_a_cuda_device_computes_in_the_precision(precision, error):
    """Of a convolution and of a product, against float64: TF32 has 10 bits of mantissa."""
    if precision == "tf32" and not torch.cuda.is_tf32_supported():
        pytest.skip("needs a CUDA device that has TF32")
    torch.manual_seed(0)
    images, weight = torch.randn(8, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    matrix = torch.randn(512, 512, device="cuda")
    with computing_in(Precision[precision], torch.device("cuda")):
        results = [F.conv2d(images, weight), matrix @ matrix]
    exact = [F.conv2d(images.double(), weight.double()), matrix.double() @ matrix.double()]
    for got, want in zip(results, exact, strict=True):
        assert error[0] <= ((got - want).norm() / want.norm()).item() <= error[1]
