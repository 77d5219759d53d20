"""Inverses shared out over processes: who inverts what, and that all end with the same bits."""

import math
import random

import pytest
import torch
from identical import assert_identical
from thread_processes import run_ranks
from torch import nn

from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.distributed.assignment import FLOPS_PER_BYTE, Work, machine_balance, plan_assignment
from kfac_sua.preconditioner.distributed.inversion import SharedInversion
from kfac_sua.preconditioner.forms import DenseFactor, Factor, PatchFactor, RowsFactor
from kfac_sua.preconditioner.forms.dense import gram
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.triangles import PACKED_WIDTH, mirrored_, packed, triangle_numbers, unpack_
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.invert import eigendecompose_factors, invert_factors
from kfac_sua.preconditioner.model.module_geometry import geometry_of
from kfac_sua.preconditioner.report import SharingReport

# --- who inverts what -------------------------------------------------------------------------------------------------


def random_works(seed: int) -> list[Work]:
    """Return factors as a model with channel groups has: single wide blocks, and many narrow ones."""
    numbers = random.Random(seed)
    blocks = [(numbers.choice([1, 1, 1, 3, 16, 64]), numbers.randint(1, 600)) for _ in range(numbers.randint(1, 30))]
    return [Work.dense(one, torch.float32, is_eigenbasis=numbers.random() < 0.3) for one in blocks]


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_every_block_is_inverted_once_and_the_work_is_balanced(seed, size):
    """The processes' slices cover each factor; no process has more than one block's work more than another."""
    works = random_works(seed)
    plan = plan_assignment(works, size, 0.0)
    for index, work in enumerate(works):
        slices = [plan.blocks_of(index, rank) for rank in range(size)]
        assert [block for part in slices for block in range(part.start, part.stop)] == [*range(work.num_blocks)]
    loads = [plan.flops_of(rank) for rank in range(size)]
    assert sum(loads) == plan.flops_alone == sum(work.num_blocks * work.flops for work in works)
    assert max(loads) - min(loads) <= max(work.flops for work in works)
    assert max(loads) == plan.most_flops
    assert (plan.num_shared, plan.num_everywhere) == (sum(work.num_blocks for work in works), 0)


@pytest.mark.parametrize("seed", range(5))
def test_the_plan_follows_from_the_works_alone(seed):
    """Made twice it is the same, as it must be on processes that do not ask each other."""
    assert plan_assignment(random_works(seed), 5, 10.0) == plan_assignment(random_works(seed), 5, 10.0)


@pytest.mark.parametrize(("size", "balance"), [(2, math.inf), (1, 0.0), (64, math.inf)])
def test_nothing_is_shared_where_bytes_cost_everything_or_nobody_else_is_there(size, balance):
    """Every process inverts all blocks and sends nothing."""
    plan = plan_assignment(random_works(0), size, balance)
    assert (plan.num_shared, plan.sent_bytes, plan.dtypes) == (0, 0, [])
    assert all(plan.flops_of(rank) == plan.flops_alone for rank in range(size))


def test_a_block_is_shared_where_its_flops_saved_exceed_its_bytes():
    """Of 2 processes each saves half of 64³ FLOPs per block of width 64, which is sent whole, as 4 · 64² bytes."""
    works = [Work.dense((10, 64), torch.float32, is_eigenbasis=False)] * 2
    assert plan_assignment(works, 2, 7.9).num_shared == 20  # 64³ / 2 = 8 · 4 · 64²
    assert plan_assignment(works, 2, 8.0).num_shared == 0
    wide = Work.dense((10, 128), torch.float32, is_eigenbasis=False)  # 128³ / 2 = 1048576 against 4 · 12288 bytes
    assert plan_assignment([works[0], wide], 2, 10.0).shares == (None, (5, 5))


def test_one_block_that_is_most_of_the_work_is_not_sent():
    """Its owner would need as long as alone, and the others would wait for it and for its bytes."""
    works = [Work.dense((1, 1000), torch.float32, is_eigenbasis=False)]
    assert plan_assignment(works, 4, 1.0).num_shared == 0
    assert plan_assignment(works * 4, 4, 1.0).shares == ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))


def test_parts_travel_in_the_way_that_moves_fewer_bytes():
    """Equal parts are gathered; where few processes have most to send they are added up, and no buffer is N parts."""
    work = Work.dense((1, 512), torch.float32, is_eigenbasis=False)
    equal, uneven = plan_assignment([work] * 6, 6, 0.0), plan_assignment([work] * 2, 6, 0.0)
    part = 3 + triangle_numbers(512)
    assert equal.parts(torch.float32) == [part] * 6
    assert uneven.parts(torch.float32) == [part, part, 0, 0, 0, 0]
    assert not equal.is_summed(torch.float32)
    assert uneven.is_summed(torch.float32)
    assert (equal.sent_bytes, equal.received_bytes) == (4 * part, 4 * 5 * part)
    assert (uneven.sent_bytes, uneven.received_bytes) == (4 * 2 * part, pytest.approx(4 * 2 * 5 / 6 * 2 * part))


def test_work_is_counted_in_the_form_that_is_factorised():
    """Dense d³; rows 2r²d + r³/3 + r²d; patches in products of pixels; 9d³ for an eigenbasis, of rows too."""
    dense, rows = DenseFactor(torch.zeros(2, 70, 70)), RowsFactor(torch.zeros(3, 5, 70))
    patches = make_factors()["patches"]
    inverses = [Work.of(factor, is_eigenbasis=False) for factor in (dense, rows, patches)]
    assert [(work.num_blocks, work.flops) for work in inverses] == [
        (2, 70**3),
        (3, 3 * 25 * 70 + 125 // 3),
        (1, 2 * 75**2 * 2 + 75**3 // 3),
    ]
    assert [work.form.numbers for work in inverses] == [35**2 * 3, 5 * 70 + 1, triangle_numbers(75) + 1]
    bases = [Work.of(factor, is_eigenbasis=True) for factor in (dense, rows)]
    assert [(work.flops, work.form.numbers) for work in bases] == [(9 * 70**3, 70 * 70 + 70)] * 2


@pytest.mark.parametrize("value", [-1.0, float("nan")])
def test_a_balance_that_is_none_is_refused(value):
    """Without processes too: the message says what there may be."""
    with pytest.raises(ValueError, match=rf"flops_per_byte must be a number >= 0 .* got {value}"):
        KroneckerPreconditioner(nn.Linear(2, 2), flops_per_byte=value)


def test_every_device_has_a_balance_or_asks_for_one():
    """The number given wins; a device without one is named."""
    assert machine_balance(torch.device("cuda"), None) == FLOPS_PER_BYTE["cuda"]
    assert machine_balance(torch.device("cuda"), 3.0) == 3.0
    with pytest.raises(ValueError, match=r"known for device meta .only for cpu, cuda.; give flops_per_byte"):
        machine_balance(torch.device("meta"), None)


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, PACKED_WIDTH, PACKED_WIDTH + 1, 131, 300])
def test_a_triangle_says_all_of_a_symmetric_block(width):
    """Packed and unpacked, several blocks are what they were; wide ones are sent as hardly more than a triangle."""
    blocks = gram(torch.randn(3, 2, width))
    blocks = (blocks + blocks.mT) / 2
    flat = packed(blocks)
    assert len(flat) == 3 * triangle_numbers(width)
    assert torch.equal(mirrored_(unpack_(torch.full_like(blocks, math.nan), flat)), blocks)
    assert triangle_numbers(width) <= width * (width + PACKED_WIDTH) / 2 + width


def make_factors(dtype: torch.dtype = torch.float64) -> dict[str, Factor]:
    """Return a factor of every form, some with more blocks than others."""
    torch.manual_seed(0)
    geometry = geometry_of(nn.Conv2d(2, 3, 3, padding=1, bias=False))
    pixels = torch.randn(3, 2, 5, 5, dtype=dtype)
    return {
        "dense": DenseFactor(gram(torch.randn(5, 90, 80, dtype=dtype))),
        "narrow": DenseFactor(gram(torch.randn(7, 6, 4, dtype=dtype))),
        "rows": RowsFactor(torch.randn(3, 4, 30, dtype=dtype)),
        "patches": PatchFactor(PatchRows.read(to_locations(pixels, geometry), geometry)),
        "scalar": DenseFactor(torch.rand(1, 1, 1, dtype=dtype)),
    }


def dampings_of(factors: list[Factor]) -> list[torch.Tensor]:
    """Return another damping for every block."""
    return [torch.linspace(0.1, 0.3, one.num_blocks, dtype=one.values.dtype) for one in factors]


@pytest.mark.parametrize("size", [2, 3, 12])  # gathered, gathered, added up
@pytest.mark.parametrize("balance", [0.0, 1.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shared_inverses_are_those_of_one_process(size, balance, dtype):
    """Every form, in one message, though the processes' parts differ in size; all ranks have the same bits."""
    factors = [*make_factors(dtype).values()]
    dampings = dampings_of(factors)

    def work(processes):
        shared = SharedInversion(processes, balance)
        results = shared.invert_factors(factors, dampings)
        assert processes.sent_bytes.total() == shared.plan.sent_bytes
        return [
            [result.inverse.tensors(), result.num_failed, result.num_raised, result.raised_by] for result in results
        ]

    got = run_ranks(size, work)
    for other in got[1:]:
        assert_identical(other, got[0])
    for (tensors, *counts), want in zip(got[0], invert_factors(factors, dampings), strict=True):
        assert counts == [0, 0, 1]
        for name, tensor in want.inverse.tensors().items():
            torch.testing.assert_close(tensors[name], tensor)


@pytest.mark.parametrize("balance", [0.0, math.inf])
def test_both_precisions_of_a_model_are_shared(balance):
    """Factors in float32 and float64 travel in a message each."""
    factors = [*make_factors(torch.float32).values(), *make_factors(torch.float64).values()]
    dampings = dampings_of(factors)
    got = run_ranks(2, lambda processes: SharedInversion(processes, balance).invert_factors(factors, dampings))
    for one, want in zip(got[1], invert_factors(factors, dampings), strict=True):
        for name, tensor in want.inverse.tensors().items():
            torch.testing.assert_close(one.inverse.tensors()[name], tensor)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("balance", [0.0, math.inf])
def test_shared_eigenbases_rebuild_their_factors(size, balance):
    """The bases are the same on all ranks, whatever form the factor is in."""
    factors = [*make_factors().values()]
    got = run_ranks(size, lambda processes: SharedInversion(processes, balance).eigendecompose_factors(factors))
    for other in got[1:]:
        assert_identical([basis.tensors() for basis in other], [basis.tensors() for basis in got[0]])
    for factor, basis in zip(factors, got[0], strict=True):
        rebuilt = basis.vectors @ torch.diag_embed(basis.values) @ basis.vectors.mT
        torch.testing.assert_close(rebuilt, factor.dense(), rtol=1e-9, atol=1e-9)


# --- faults on one rank -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, math.inf])
@pytest.mark.parametrize(("pivot", "counts"), [(-3.0, (0, 1, 100)), (-1e6, (1, 0, 1)), (math.nan, (1, 0, 1))])
def test_all_ranks_know_what_became_of_a_block_on_one(balance, pivot, counts):
    """A raised damping and a failure are reported alike everywhere, and the other blocks are what they are alone."""
    factors = [*make_factors().values()]
    factors[1].blocks[4] = pivot * torch.eye(4)
    dampings = dampings_of(factors)
    got = run_ranks(3, lambda processes: SharedInversion(processes, balance).invert_factors(factors, dampings))
    want = invert_factors(factors, dampings)
    for results in got:
        assert (results[1].num_failed, results[1].num_raised, results[1].raised_by) == counts
        assert [one.num_failed + one.num_raised for one in results] == [0, 1, 0, 0, 0]
        good = [0, 1, 2, 3, 5, 6]
        torch.testing.assert_close(results[1].inverse.blocks[good], want[1].inverse.blocks[good])
        assert_identical(results[1].inverse.tensors(), got[0][1].inverse.tensors())


def test_several_failures_of_a_factor_add_up():
    """Blocks that fail on different ranks are counted together, and the largest raise is told."""
    factors = [*make_factors().values()]
    factors[1].blocks[0], factors[1].blocks[3] = -1e6 * torch.eye(4), -1e6 * torch.eye(4)
    factors[1].blocks[5], factors[1].blocks[6] = -0.5 * torch.eye(4), -20.0 * torch.eye(4)
    dampings = dampings_of(factors)
    want = invert_factors(factors, dampings)[1]
    got = run_ranks(7, lambda processes: SharedInversion(processes, 0.0).invert_factors(factors, dampings)[1])
    assert (want.num_failed, want.num_raised) == (2, 2)
    for one in got:
        assert (one.num_failed, one.num_raised, one.raised_by) == (want.num_failed, want.num_raised, want.raised_by)


@pytest.mark.parametrize("balance", [0.0, math.inf])
def test_an_eigenbasis_that_does_not_converge_on_one_rank_is_lost_on_all(balance):
    """The others are kept."""
    factors = [*make_factors().values()]
    factors[0].blocks[2, 0, 0] = math.nan
    got = run_ranks(2, lambda processes: SharedInversion(processes, balance).eigendecompose_factors(factors))
    assert [basis is None for basis in eigendecompose_factors(factors)] == [True, False, False, False, False]
    for bases in got:
        assert [basis is None for basis in bases] == [True, False, False, False, False]


# --- what the user reads ----------------------------------------------------------------------------------------------


def test_describe_says_what_is_shared_and_sent():
    """Before the first refresh by hand-counted dense blocks, after it by what was handed to the collectives."""

    def work(processes):
        net = nn.Linear(70, 3, bias=False)
        preconditioner = KroneckerPreconditioner(net, flops_per_byte=0.0, distributed=False)
        preconditioner._processes = processes
        preconditioner._shared_inversion = SharedInversion(processes, 0.0)
        before = preconditioner.describe()
        net(torch.randn(2, 70)).square().sum(1).mean().backward()
        preconditioner.step()
        return before, preconditioner.describe(), processes.sent_bytes

    (before, after, sent), (_, other, _) = run_ranks(2, work)
    assert before.sharing == SharingReport(
        num_processes=2,
        is_estimate=True,
        num_shared=2,
        num_everywhere=0,
        flops=70**3,
        flops_alone=70**3 + 3**3,
        refresh_bytes=4 * (3 + 3 * 35**2),  # counts and three quarters of the wide block
        statistics_bytes=96 + 4 * (3 * 35**2 + 3**2),
    )
    assert " ".join(str(before).split()).endswith(
        " 2 processes, if dense: 2 blocks shared out, 0 inverted by every process, "
        "0.000 GFLOP per process (0.000 alone) "
        "each process sends 0.014 MiB per refresh and 0.014 MiB per measurement of the statistics"
    )
    assert after.sharing == other.sharing
    assert not after.sharing.is_estimate
    assert after.sharing.refresh_bytes == sent["inverses"]
    assert after.sharing.statistics_bytes == sent["header"] + sent["rows"] + sent["moments"]
    assert sent["rows"] == 4 * 2 * 70  # two examples of each process
    assert "2 processes, at the last refresh: 2 blocks shared out" in str(after)


def test_alone_there_is_nothing_to_say():
    """Without processes the table is the layers' alone."""
    table = KroneckerPreconditioner(nn.Linear(2, 2), flops_per_byte=0.0).describe()
    assert table.sharing is None
    assert "processes" not in str(table)
