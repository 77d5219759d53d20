"""The study on paper: hand-computed seconds of collectives and mini-batches, and the files it writes."""

import dataclasses

import pandas as pd
import pytest
from bench_runs import tiny_contenders

from kfac_sua.bench.communication import scaling_out, study
from kfac_sua.bench.communication.cluster import Cluster
from kfac_sua.bench.communication.counted import Costs, ShapeModel, count_costs
from kfac_sua.bench.communication.study import Flops, step_seconds, study_frame
from kfac_sua.bench.communication.study_report import _ranges, describe_study
from kfac_sua.bench.communication.work import Work
from kfac_sua.bench.flops import count_flops
from kfac_sua.bench.settings import compose_settings, parse_items
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.figures.scaling_out import draw_scaling_out

# A second per 10 bytes and a latency of 1 s within a node of two; 5 bytes and 2 s beyond it; rates in FLOPs per second.
SLOW = Cluster(100.0, 50.0, 10.0, 2, 10.0, 1.0, 5.0, 2.0)
COSTS = Costs(
    setting="kfac",
    num_processes=2,
    batch_size=8,
    factor_period=2,
    inverse_period=4,
    header_bytes=10,
    rows_bytes=20,
    moments_bytes=40,
    inverse_bytes=30,
    inverses_are_summed=False,
    gradient_bytes=100,
    kept_bytes=0,
    buffer_bytes=0,
    num_factors=6,
    num_low_rank=1,
    num_shared=2,
    num_everywhere=4,
    inversion_flops=400,
    inversion_flops_alone=600,
)


@pytest.mark.parametrize(
    ("size", "num_bytes", "seconds"),
    [(1, 10, 0), (2, 0, 0), (2, 10, 1 * (1 + 1)), (4, 10, 3 * (2 + 2))],
)
def test_a_gather_takes_a_hop_per_other_process(size, num_bytes, seconds):
    """Each of N − 1 hops has its latency and carries a whole message, over the slowest kind of link."""
    assert SLOW.gather_s(num_bytes, size) == seconds


@pytest.mark.parametrize(
    ("size", "num_bytes", "seconds"),
    [
        (1, 10, 0),
        (4, 0, 0),
        (2, 10, 2 * (1 + 5 / 10)),  # ring: half the bytes each way; a tree takes 2 (1 + 1)
        (4, 200, 6 * (2 + 50 / 5)),  # ring: 72 against a tree's 2 (2 · 2 + 40) = 88
        (64, 10, 2 * (6 * 2 + 10 / 5)),  # tree: 28, as the ring has 126 latencies
    ],
)
def test_a_sum_takes_a_ring_or_a_tree(size, num_bytes, seconds):
    """Whichever is faster."""
    assert SLOW.sum_s(num_bytes, size) == pytest.approx(seconds)


def test_seconds_of_a_mini_batch_by_hand():
    """Two processes of a node: every part from its FLOPs or bytes, over its period."""
    seconds = step_seconds(COSTS, Flops(training=300, statistics=100, application=25), SLOW)
    # Forward 1 s; backward 2 s, longer behind it the gradients' 2 (1 + 50/10) = 12 s.
    assert seconds.sgd == pytest.approx(1 + 12)
    assert seconds.parts == pytest.approx(
        {
            "statistics": 100 / 50 / 2,
            "statistics_exchange": ((1 + 1) + (1 + 2) + 2 * (1 + 2)) / 2,
            "inversion": 400 / 10 / 4,
            "inversion_exchange": (1 + 3) / 4,
            "application": 25 / 50,
        }
    )
    assert seconds.overhead == pytest.approx((1 + 5.5 + 10 + 1 + 0.5) / 13)
    summed = step_seconds(dataclasses.replace(COSTS, inverses_are_summed=True), Flops(300, 100, 25), SLOW)
    assert summed.parts["inversion_exchange"] == pytest.approx(2 * (1 + 1.5) / 4)


def test_gradients_hide_behind_a_long_backward_pass():
    """SGD's mini-batch is then its computation alone."""
    assert step_seconds(COSTS, Flops(30_000, 0, 0), SLOW).sgd == pytest.approx(300)


@pytest.mark.parametrize("item", ["kfac", "sua_grouped", "kfac:application=weight,inverse_method=cholesky"])
def test_flops_of_shapes_are_those_of_a_training_step(item):
    """Counted without data, they are what the benchmark counts on a real mini-batch."""
    contender = tiny_contenders(item)[item]
    refresh = count_flops(contender.step)
    contender.make_due(StepKind.plain)
    plain = count_flops(contender.step)
    shapes = ShapeModel(compose_settings(parse_items([item]), [], {"model": "tiny", "device": "cpu"})[1].config)
    work, costs = Work(shapes), count_costs(item, shapes, 1, 8, 0.0)
    assert work.training(8) == plain["forward_backward"] == refresh["forward_backward"]
    assert work.statistics(8) == refresh["statistics"]
    assert work.application(8, costs) == plain["application"]


@pytest.mark.slow
def test_the_study_is_written_and_drawn(tmp_path, monkeypatch):
    """A row per model, scaling, structure and size; the report says that nothing was measured, and what was stated."""
    monkeypatch.setitem(study._PAPER, "tiny", {"period": 50, "group_size": 4})
    frame = study_frame(["tiny"], [1, 2, 8], 10, 16, Cluster())
    assert len(frame) == 2 * 4 * 3
    weak = frame[(frame["scaling"] == "weak") & (frame["method"] == "kfac")]
    assert weak["batch_per_process"].tolist() == [10, 10, 10]
    strong = frame[(frame["scaling"] == "strong") & (frame["method"] == "kfac")]
    assert strong["batch_per_process"].tolist() == [16, 8, 2]
    assert (frame[frame["num_processes"] == 1][["statistics_exchange_s", "inversion_exchange_s"]] == 0).all(axis=None)
    parts = sum(frame[f"{part}_s"] for part in study.PARTS)
    pd.testing.assert_series_equal(parts / frame["sgd_s"], frame["overhead"], check_names=False)
    text = describe_study(frame, Cluster(), "a command")
    assert "arithmetic, not a measurement" in text
    assert "network_bandwidth 5e+10" in text
    assert "strong scaling: 16 examples on all GPUs together" in text
    paths = draw_scaling_out(frame, tmp_path, 0.05)
    assert [path.name for path in paths] == ["study.png", "study.svg", "study.csv"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_sizes_in_a_row_are_joined():
    """As a reader would say them."""
    assert _ranges([1, 2, 4, 16], [1, 2, 4, 8, 16]) == "1 to 4 and 16"


@pytest.mark.parametrize("value", ["0", "-3", "inf", "fast"])
def test_a_rate_that_is_none_is_refused(capsys, value):
    """Before anything is counted."""
    with pytest.raises(SystemExit):
        scaling_out.main(["--out", "out", "--network-bandwidth", value])
    assert f"must be a number above 0, got '{value}'" in capsys.readouterr().err


def test_too_few_examples_are_named(tmp_path, capsys):
    """Exit code 2."""
    arguments = ["--out", str(tmp_path), "--model", "vgg11", "--processes", "4", "--global-batch-size", "3"]
    assert scaling_out.main([*arguments, "--batch-size", "1"]) == 2
    assert "batch_size=3 leaves some of 4 processes without an example" in capsys.readouterr().err
