"""Counted FLOPs agree with formulas, phase by phase and layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from bench_runs import tiny_contenders

from kfac_sua.bench.costs import Rounds, measure_costs
from kfac_sua.bench.flops import count_flops
from kfac_sua.bench.layers import count_steps, measure_layers
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.config import Precision

CASES = {
    "product": (lambda: torch.ones(3, 5) @ torch.ones(5, 7), 2 * 3 * 5 * 7),
    "added": (
        lambda: torch.baddbmm(torch.zeros(2, 3, 7), torch.ones(2, 3, 5), torch.ones(2, 5, 7)),
        2 * 2 * 3 * 5 * 7,
    ),
    "added in place": (
        lambda: torch.zeros(2, 3, 7).baddbmm_(torch.ones(2, 3, 5), torch.ones(2, 5, 7)),
        2 * 2 * 3 * 5 * 7,
    ),
    "Cholesky inverse": (
        lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(torch.eye(10).expand(4, 10, 10))[0]),
        4 * 10**3,
    ),
    "triangular solve": (
        lambda: torch.linalg.solve_triangular(torch.eye(6).expand(2, 6, 6), torch.ones(2, 6, 5), upper=False),
        2 * 6 * 6 * 5,
    ),
    # Two products forward, and five backward, where scores are computed again.
    "attention": (
        lambda: F.scaled_dot_product_attention(*(torch.ones(2, 3, 6, 5, requires_grad=True),) * 3).sum().backward(),
        (2 + 5) * 2 * 2 * 3 * 6 * 6 * 5,
    ),
    "eigenvectors": (lambda: torch.linalg.eigh(torch.eye(6).expand(2, 6, 6)), 2 * 9 * 6**3),
}


@pytest.mark.parametrize("case", CASES)
def test_matrix_operators(case):
    """An operator has the FLOPs of the textbook, a multiply-add counting as two, for every block of a batch."""
    work, flops = CASES[case]

    def step(watch):
        with watch.phase("inversion"):
            work()

    assert count_flops(step)["inversion"] == flops


def test_phases_inside_phases_keep_their_own():
    """FLOPs of a nested phase are not those of the outer one; outside every phase nothing counts."""

    def step(watch):
        torch.ones(2, 2) @ torch.ones(2, 2)
        with watch.phase("application"):
            torch.ones(3, 3) @ torch.ones(3, 3)
            with watch.phase("statistics"):
                torch.ones(4, 4) @ torch.ones(4, 4)

    flops = count_flops(step)
    assert (flops["application"], flops["statistics"], sum(flops.values())) == (2 * 27, 2 * 64, 2 * (27 + 64))


@pytest.mark.parametrize("name", ["kfac", "sua"])
def test_dense_inverses_have_the_flops_that_describe_states(name):
    """With dense inverses, applied to the weight's gradient, what runs is what the layer table counts."""
    item = f"{name}:inverse_method=cholesky,application=weight"
    contender = tiny_contenders(item)[item]
    contender.timed_step()
    contender.make_due(StepKind.refresh)
    flops = count_flops(contender.step)
    rows = [row for row in contender.preconditioner.describe().rows if not row.reason]
    assert flops["inversion"] == sum(row.inverse_flops for row in rows)
    assert flops["application"] == sum(row.apply_flops for row in rows)


@pytest.mark.parametrize(
    "items", [("kfac", "sua_grouped"), ("kfac:inverse_method=cholesky,application=weight", "sua:inverse_period=1")]
)
def test_layers_by_themselves_add_up_to_the_whole_step(items):
    """A layer measured alone does what it does in the whole network."""
    contenders = tiny_contenders(*items)
    costs = measure_costs(contenders, Rounds(1, 1, 1), Announcer())
    steps = count_steps(contenders, costs, Announcer())
    layers = measure_layers(contenders, Precision.float32, 1, Announcer())
    for item, contender in contenders.items():
        whole = {work.step: work.parts for work in steps if work.setting == item}
        own = [work for work in layers if work.setting == item]
        if contender.preconditioner is None:
            assert not own
            assert set(whole) == {"plain"}
            continue
        assert [work.layer for work in own] == ["features.0", "features.4", "classifier"]
        applying = whole["plain"] if "plain" in whole else whole["refresh"]
        assert sum(work.statistics.flops for work in own) == whole["refresh"]["statistics"].flops > 0
        assert sum(work.inversion.flops for work in own) == whole["refresh"]["inversion"].flops > 0
        assert sum(work.application.flops for work in own) == applying["application"].flops > 0
        assert all(part.seconds > 0 for work in own for part in (work.statistics, work.inversion, work.application))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_backward_passes_count_on_a_gpu():
    """The backward pass runs in a thread of its own there, and counts all the same: twice the forward's FLOPs."""
    weight = torch.ones(5, 7, device="cuda", requires_grad=True)
    inputs = torch.ones(3, 5, device="cuda", requires_grad=True)

    def step(watch):
        with watch.phase("forward_backward"):
            (inputs @ weight).sum().backward()

    assert count_flops(step)["forward_backward"] == 3 * 2 * 3 * 5 * 7
