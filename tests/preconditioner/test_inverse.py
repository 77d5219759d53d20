"""Batched inverses: equal to dense ones, one Cholesky call per size, failures reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kfac_sua.preconditioner.forms import DenseFactor, DenseInverse, LowRankInverse, RowsFactor
from kfac_sua.preconditioner.forms.cost import SideCost
from kfac_sua.preconditioner.forms.dense import gram
from kfac_sua.preconditioner.invert import eigendecompose_factors, invert_factors


def random_rows(num_blocks: int, rows: int, width: int) -> torch.Tensor:
    """Return float64 rows whose Gram matrix is a factor."""
    generator = torch.Generator().manual_seed(num_blocks * 100 + rows * 10 + width)
    return torch.randn(num_blocks, rows, width, generator=generator, dtype=torch.float64)


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.booleans()), min_size=1, max_size=5
    ),
    damping=st.floats(1e-3, 10),
)
def test_inverses_equal_dense_inverses(shapes, damping):
    """Dense and Woodbury inverses of any mix of sizes equal ``torch.linalg.inv``, applied from either side."""
    rows = [random_rows(blocks, n, width) for blocks, n, width, _ in shapes]
    factors = [
        RowsFactor(part) if shape[3] else DenseFactor(gram(part)) for part, shape in zip(rows, shapes, strict=True)
    ]
    dampings = [torch.linspace(damping, 2 * damping, len(part), dtype=torch.float64) for part in rows]
    for part, damp, result in zip(rows, dampings, invert_factors(factors, dampings), strict=True):
        width = part.shape[-1]
        dense = torch.linalg.inv(gram(part) + damp[:, None, None] * torch.eye(width, dtype=torch.float64))
        assert result.num_failed == 0
        values = random_rows(len(part), 3, width)
        torch.testing.assert_close(result.inverse.right(values), values @ dense, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(result.inverse.left(values.mT), dense @ values.mT, rtol=1e-8, atol=1e-9)


def test_wide_matrices_are_factorised_one_by_one(monkeypatch):
    """Beyond MAX_BATCHED_WIDTH nothing is joined, and the inverses are the same."""
    sizes = []
    original = torch.linalg.cholesky_ex

    def counting(batch, *args, **kwargs):
        sizes.append(tuple(batch.shape))
        return original(batch, *args, **kwargs)

    factors = [DenseFactor(gram(random_rows(1, 9, 4))), DenseFactor(gram(random_rows(2, 9, 4)))]
    dampings = [torch.full((len(factor.values),), 0.5, dtype=torch.float64) for factor in factors]
    together = [result.inverse.blocks for result in invert_factors(factors, dampings)]
    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    monkeypatch.setattr("kfac_sua.preconditioner.invert.MAX_BATCHED_WIDTH", 3)
    apart = [result.inverse.blocks for result in invert_factors(factors, dampings)]
    assert sizes == [(1, 4, 4), (2, 4, 4)]
    for one, other in zip(apart, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_one_cholesky_call_per_block_size(monkeypatch):
    """Blocks of equal size go through one call, of whichever layer and side; a low-rank core counts by its rows."""
    sizes = []
    original = torch.linalg.cholesky_ex

    def counting(batch, *args, **kwargs):
        sizes.append(tuple(batch.shape))
        return original(batch, *args, **kwargs)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counting)
    factors = [
        DenseFactor(gram(random_rows(3, 8, 4))),
        DenseFactor(gram(random_rows(2, 8, 5))),
        DenseFactor(gram(random_rows(1, 8, 4))),
        RowsFactor(random_rows(2, 5, 30)),
    ]
    invert_factors(factors, [torch.full((len(f.values),), 0.1, dtype=torch.float64) for f in factors])
    assert sorted(sizes) == [(4, 4, 4), (4, 5, 5)]


def test_a_block_that_fails_in_float32_is_repeated_in_float64():
    """A damping that is lost on a rank-deficient block's diagonal in float32 is rescued; others stay."""
    rows = (random_rows(2, 5, 40) * 3).round()  # integers: the blocks are exact in float32
    blocks = gram(rows).float()
    blocks[0] = torch.eye(40)
    damping = torch.full((2,), 1e-7)
    failed = torch.linalg.cholesky_ex(blocks + damping[:, None, None] * torch.eye(40))[1] != 0
    assert failed.tolist() == [False, True]
    result = invert_factors([DenseFactor(blocks)], [damping])[0]
    assert result.num_failed == 0
    null_vector = torch.linalg.svd(rows[1])[2][-1].float()
    amplified = result.inverse.blocks[1] @ null_vector
    assert amplified.isfinite().all()
    assert float(null_vector @ amplified) == pytest.approx(1e7, rel=0.2)
    torch.testing.assert_close(result.inverse.blocks[0], torch.eye(40) / (1 + 1e-7))


def test_failures_are_counted_per_factor():
    """A block that is not positive definite in float64 and with more damping is reported for its factor alone."""
    good, bad = gram(random_rows(2, 6, 3)), gram(random_rows(2, 6, 3))
    bad[1] = -1000 * torch.eye(3, dtype=torch.float64)
    nan = gram(random_rows(1, 6, 3)) * float("nan")
    damping = [torch.full((n,), 0.1, dtype=torch.float64) for n in (2, 2, 1)]
    results = invert_factors([DenseFactor(good), DenseFactor(bad), DenseFactor(nan)], damping)
    assert [result.num_failed for result in results] == [0, 1, 1]


def test_eigenbases_rebuild_the_factor():
    """Eigenbases of mixed sizes reproduce their blocks, with eigenvalues ≥ 0."""
    factors = [DenseFactor(gram(random_rows(2, 3, 5))), RowsFactor(random_rows(1, 2, 4))]
    for factor, basis in zip(factors, eigendecompose_factors(factors), strict=True):
        assert basis is not None
        rebuilt = (basis.vectors * basis.values[:, None, :]) @ basis.vectors.mT
        torch.testing.assert_close(rebuilt, factor.dense(), rtol=1e-9, atol=1e-9)
        assert (basis.values >= 0).all()


@settings(deadline=None)
@given(width=st.integers(1, 600), vectors=st.integers(1, 600), period=st.integers(1, 200), blocks=st.integers(1, 20))
def test_the_crossover_is_where_the_counts_cross(width, vectors, period, blocks):
    """Up to the crossover the Woodbury form is cheaper by count, one row beyond it is not."""
    cost = SideCost(blocks, width, vectors, period)
    rows = cost.most_low_rank_rows()
    assert rows <= width
    if rows:
        assert cost.low_rank_total(rows) < cost.dense_total(rows)
    if rows < width:
        assert cost.low_rank_total(rows + 1) >= cost.dense_total(rows + 1)


@pytest.mark.parametrize("scale", [0.25, 3.0])
def test_scaling_an_inverse_scales_what_it_gives(scale):
    """What is to be multiplied for a multiple is said by both forms."""
    rows = random_rows(2, 3, 5)
    damping = [torch.full((2,), 0.1, dtype=torch.float64)]
    values = random_rows(2, 4, 5)
    for factor, kind in ((RowsFactor(rows), LowRankInverse), (DenseFactor(gram(rows)), DenseInverse)):
        inverse = invert_factors([factor], damping)[0].inverse
        assert isinstance(inverse, kind)
        before = inverse.right(values)
        inverse.linear_tensor.mul_(scale)
        torch.testing.assert_close(inverse.right(values), before * scale, rtol=1e-12, atol=0)
