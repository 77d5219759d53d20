"""What the rates of a device choose, and that every choice gives the same numbers but for rounding."""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from thinned import diagonal
from torch import Tensor, nn

from kfac_sua.preconditioner import DeviceRates, KroneckerPreconditioner
from kfac_sua.preconditioner.forms import DenseInverse, LowRankInverse, PatchInverse, SplitInverse, SplitLowRankInverse
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.dense import FEWEST_CHUNK_ROWS, gram, inverted_triangles, row_chunks
from kfac_sua.preconditioner.forms.rates import CPU, CUDA, Flops, rates_in_force, rates_of, use_rates
from kfac_sua.preconditioner.structures import kronecker

STRUCTURES: dict[str, dict[str, Any]] = {
    "kfac": {"structure": "kfac"},
    "sua": {"structure": "sua"},
    "grouped": {"structure": "kfac", "group_size": 8},
    "sua_grouped": {"structure": "sua", "group_size": 8},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "auto": {"application": "auto"},
    "pi": {"damping_rule": "factored_pi"},
    "exact": {"damping_rule": "exact"},
    "reduce": {"weight_sharing": "reduce"},
    "average": {"ema_decay": 0.5},
    "cholesky": {"inverse_method": "cholesky"},
    "low_rank": {"inverse_method": "low_rank"},
    "sampled": {"activation_rows": 30},
}
NO_LAUNCHES = dataclasses.replace(CUDA, launch_s=1e-12, kernel_s=0.0)
"""A GPU whose launches take next to nothing: it does what saves arithmetic, in many operations."""


def make_net() -> nn.Sequential:
    """Return a net whose last convolutions have few rows, and whose blocks are wider than a leaf of a triangle."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.Tanh(), nn.MaxPool2d(4)),
        *(nn.Conv2d(12, 18, 3, padding=1), nn.Tanh(), nn.MaxPool2d(2)),
        *(nn.Conv2d(18, 70, 3, padding=1, bias=False), nn.Tanh(), nn.Flatten()),
        nn.Linear(280, 10),
    ).double()


def train(options: dict[str, Any], rates: DeviceRates) -> tuple[list[Tensor], set[type]]:
    """Return the parameters after some steps, and the forms of the inverses."""
    with rates_in_force(rates, "cpu"):
        net = make_net().to(memory_format=torch.channels_last)
        preconditioner = KroneckerPreconditioner(net, inverse_period=2, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            inputs = torch.randn(6, 3, 16, 16, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(inputs), torch.arange(6)).backward()
            preconditioner.step()
            optimizer.step()
    inverses = [layer.inverse for layer in preconditioner.layers]
    assert all(inverse is not None for inverse in inverses)
    forms = {type(side) for one in inverses if one.by_sides for side in (one.activation, one.gradient)}
    return [*net.parameters()], forms


@pytest.mark.parametrize(("structure", "name"), diagonal(STRUCTURES, VARIANTS))
def test_every_choice_gives_the_same_numbers(structure, name):
    """Training by the rates of a GPU, and of one whose launches are free, is that by counted FLOPs, to 1e-9."""
    options = STRUCTURES[structure] | VARIANTS[name]
    want, _ = train(options, CPU)
    for rates in (CUDA, NO_LAUNCHES):
        got, _ = train(options, rates)
        for parameter, other in zip(got, want, strict=True):
            torch.testing.assert_close(parameter, other, rtol=1e-9, atol=1e-9)


def test_a_gpu_keeps_other_forms_than_a_cpu():
    """Patches are for counted FLOPs: on a GPU what they give is made dense, or at least a root."""
    _, on_cpu = train(STRUCTURES["kfac"], CPU)
    _, on_gpu = train(STRUCTURES["kfac"], CUDA)
    assert PatchInverse in on_cpu
    assert PatchInverse not in on_gpu
    assert on_gpu <= {DenseInverse, LowRankInverse}
    _, always_woodbury = train(STRUCTURES["kfac"] | {"inverse_method": "low_rank"}, CUDA)
    assert DenseInverse not in always_woodbury
    _, split = train(STRUCTURES["kfac"] | {"products": "bf16x3"}, CPU)
    assert split <= {SplitInverse, SplitLowRankInverse}


@settings(deadline=None, max_examples=60)
@given(
    blocks=st.integers(1, 4), rows=st.integers(1, 3000), width=st.integers(1, 70), parallel=st.sampled_from([1, 7, 132])
)
def test_a_gram_matrix_in_chunks_is_that_in_one(blocks, rows, width, parallel):
    """Whatever the rest; also of a view of channels."""
    rates = dataclasses.replace(NO_LAUNCHES, parallel=parallel)
    values = torch.randn(rows, blocks, width, dtype=torch.float64).transpose(0, 1)  # [blocks, rows, width]
    with rates_in_force(rates, "cpu"):
        got = gram(values)
    torch.testing.assert_close(got, values.mT @ values, rtol=1e-12, atol=1e-10)
    chunks = row_chunks(blocks, rows, width, rates)
    assert 1 <= chunks <= max(1, rows // FEWEST_CHUNK_ROWS)
    assert parallel > 1 or chunks == 1


def test_what_was_measured_is_split():
    """The products of VGG11 and ResNet50 that took most of a refresh, and not those that fill the device."""
    for blocks, rows, width in ((2, 102_400, 32), (4, 25_600, 32), (32, 6_400, 64)):
        assert row_chunks(blocks, rows, width, CUDA) >= 8
    assert row_chunks(16, 6_400, 512, CUDA) == 1  # wide enough
    assert row_chunks(1, 1_600, 32, CUDA) == 1  # over before the launches of its chunks are


@settings(deadline=None, max_examples=60)
@given(blocks=st.integers(1, 3), width=st.integers(1, 300))
def test_triangles_are_inverted_by_products(blocks, width):
    """L⁻¹ L = I, above the diagonal too, at every width around the leaves'."""
    generator = torch.Generator().manual_seed(width)
    triangles = torch.randn(blocks, width, width, generator=generator, dtype=torch.float64).tril() / width
    triangles.diagonal(dim1=-2, dim2=-1).abs_().add_(1)
    inverse = inverted_triangles(triangles)
    assert torch.equal(inverse, inverse.tril())
    torch.testing.assert_close(inverse @ triangles, torch.eye(width, dtype=torch.float64).expand(blocks, -1, -1))


def test_inverses_by_products_are_as_exact_as_lapacks():
    """In float32, at a damping of 1e-6 of the largest eigenvalue: what the residual is divided by is not larger."""
    torch.manual_seed(0)
    rows = torch.randn(1, 400, 300, dtype=torch.float64) * torch.logspace(0, -3, 300, dtype=torch.float64)
    blocks = rows.mT @ rows + 1e-3 * torch.eye(300, dtype=torch.float64)
    triangle = torch.linalg.cholesky(blocks.float())
    want = torch.linalg.inv(blocks)
    by_lapack = (torch.cholesky_inverse(triangle) - want).norm()
    by_products = (gram(inverted_triangles(triangle)) - want).norm()
    assert by_products < 3 * by_lapack
    assert by_products < 1e-2 * want.norm()


@settings(deadline=None)
@given(
    width=st.integers(1, 600),
    vectors=st.integers(1, 600),
    period=st.integers(1, 200),
    blocks=st.integers(1, 20),
    is_patches=st.booleans(),
)
def test_kept_rows_take_less_time_than_moments(width, vectors, period, blocks, is_patches):
    """By the rates of a GPU too, up to the crossover."""
    cost = SideCost(blocks, width, vectors, period, patch_width=width * is_patches, rates=CUDA)
    rows = cost.most_low_rank_rows()
    assert rows <= width
    if rows:
        assert cost.low_rank_total(rows) < cost.dense_total(rows)


@pytest.mark.parametrize("vectors", [1, 10, 512, 4608])
def test_a_side_goes_into_the_backward_pass_only_for_what_its_launches_take(vectors):
    """By counted FLOPs wherever there are fewer rows; on a GPU where the saving is worth more than the launches."""
    assert SideCost(1, 512, vectors, 50).backward_rows == vectors
    rows = SideCost(1, 512, vectors, 50, rates=CUDA).backward_rows
    saved = 2 * 512**2 * (vectors - rows) / CUDA.split_product
    assert saved == pytest.approx(6 * CUDA.launch_s)


def test_no_side_of_vgg11_goes_into_the_backward_pass_on_a_gpu():
    """There ``auto`` is ``weight`` for the paper's network and mini-batch, and so never slower."""
    for num_vectors, width in ((512 * 9, 512), (512, 512)):
        assert SideCost(1, width, num_vectors, 50, rates=CUDA).backward_rows < 400  # rows of its smallest maps


def test_flops_take_their_time():
    """Each kind at its rate."""
    work = Flops(products=35 * 10**12, factorisations=7 * 10**11, solves=5 * 10**12, inversions=8 * 10**12)
    assert work.seconds(CUDA) == pytest.approx(4)
    assert work.total == 48_700_000_000_000
    assert CPU.product == CPU.cholesky == CPU.triangular == CPU.inverse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_is_never_split_by_itself(monkeypatch, dtype):
    """Where TF32 is allowed, ``auto`` splits float32 inverses, and leaves float64 ones exact."""
    monkeypatch.setattr(kronecker, "has_fast_products", lambda like: like.dtype == torch.float32)
    net = nn.Sequential(nn.Linear(60, 60, bias=False), nn.Tanh(), nn.Linear(60, 5)).to(dtype)
    with rates_in_force(dataclasses.replace(CUDA, kernel_s=0.0, memory=math.inf), "cpu"):
        preconditioner = KroneckerPreconditioner(net)
        nn.functional.cross_entropy(net(torch.randn(90, 60, dtype=dtype)), torch.randint(0, 5, (90,))).backward()
        preconditioner.step()
    forms = {form for row in preconditioner.describe().rows for form in row.forms if form}
    assert forms == ({"dense bf16x3"} if dtype == torch.float32 else {"dense"})


def test_rates_follow_a_model_to_its_device():
    """Rows are kept by the rates of where the model is when a step is taken."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    before = [layer.statistics.max_rows for layer in preconditioner.layers]
    with rates_in_force(CUDA, "cpu"):
        nn.functional.cross_entropy(net(torch.randn(6, 3, 16, 16, dtype=torch.float64)), torch.arange(6)).backward()
        preconditioner.step()
    assert [layer.statistics.max_rows for layer in preconditioner.layers] != before
    assert preconditioner.describe().chosen_by == CUDA.source


def test_rates_in_force_come_back():
    """After an error too; devices without rates of their own go by counted FLOPs."""

    def fail() -> None:
        assert rates_of(torch.device("cpu")) is CUDA
        raise KeyError

    with pytest.raises(KeyError), rates_in_force(CUDA, "cpu"):
        fail()
    assert rates_of(torch.device("cpu")) is CPU
    assert rates_of(torch.device("meta")) is CPU
    assert rates_of("cpu") is CPU
    with pytest.raises(RuntimeError, match="toaster"):
        use_rates(CPU, "toaster")
    with pytest.raises(TypeError, match=r"DeviceRates\.read\(path\) returns, got 'rates\.json'"):
        use_rates("rates.json", "cpu")


def test_rates_are_written_and_read(tmp_path):
    """All of them, bit for bit."""
    path = tmp_path / "rates.json"
    mine = dataclasses.replace(CUDA, source="mine", product=1 / 3)
    mine.write(path)
    assert DeviceRates.read(path) == mine


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"product": 0.0}, r"product must be > 0, got 0\.0"),
        ({"launch_s": -1.0}, r"launch_s must be >= 0, got -1\.0"),
        ({"memory": math.nan}, "memory must be a number, got nan"),
        ({"cholesky": "fast"}, "cholesky must be a number, got 'fast'"),
        ({"source": 1}, "source must be a text, got 1"),
        ({"product_inverse_width": True}, "product_inverse_width must be a number, got True"),
        ({"product": math.inf}, "product must be finite, got inf"),
        ({"parallel": 132.5}, r"parallel must be a whole number >= 1, got 132\.5"),
        ({"symmetric_width": 1}, "symmetric_width must be a whole number >= 2, got 1"),
        ({"colour": 1}, "must hold source, product, .*, and nothing else"),
    ],
)
def test_rates_that_cannot_be_are_refused(tmp_path, change, message):
    """The message names the file, the rate and its value."""
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(dataclasses.asdict(CUDA) | change))
    with pytest.raises(ValueError, match=f"rates.json.*{message}"):
        DeviceRates.read(path)


def test_a_file_that_is_not_json_is_refused(tmp_path):
    """By its name."""
    path = tmp_path / "rates.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"rates\.json is not JSON"):
        DeviceRates.read(path)
