"""What processes send each other: counted from shapes, and what gloo processes really hand over."""

import dataclasses
import math

import pandas as pd
import pytest

from kfac_sua.bench.communication.__main__ import main
from kfac_sua.bench.communication.counted import ShapeModel, count_costs, part_sizes
from kfac_sua.bench.communication.measured import Measurement
from kfac_sua.bench.communication.report import AGREEING, disagreements
from kfac_sua.bench.settings import compose_settings, parse_items
from kfac_sua.config import ConfigError
from kfac_sua.preconditioner.events import GradientEvent
from kfac_sua.preconditioner.forms.triangles import triangle_numbers


def shape_model(item: str, model: str = "tiny") -> ShapeModel:
    """Return a network of shapes under one setting."""
    return ShapeModel(compose_settings(parse_items([item]), [], {"model": model, "device": "cpu"})[1].config)


@pytest.mark.slow
def test_measured_bytes_are_the_counted_ones(tmp_path, capsys):
    """Two gloo processes, uneven parts, everything shared out: the command compares and says so, and keeps both."""
    arguments = ["--out", str(tmp_path), "--model", "tiny", "--settings", "kfac", "sua_grouped", "kfac:ema_decay=0.5"]
    arguments += ["--batch-size", "21", "--fixed", "--processes", "7", "--measure", "2", "--repeats", "1"]
    assert main([*arguments, "--flops-per-byte", "0"]) == 0
    assert "All bytes measured are the bytes counted." in capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "communication-tiny-width-1.csv")
    measured = frame[frame["num_processes"] == 2]
    assert len(frame) == 6
    for name in AGREEING:
        assert (measured[f"measured_{name}"] == measured[name]).all()
    assert (measured[["header_bytes", "inverse_bytes", "gradient_bytes", "measured_peak_bytes"]] > 0).all(axis=None)
    assert (measured["rows_bytes"] > 0).any()
    text = (tmp_path / "communication-tiny-width-1.md").read_text(encoding="utf-8")
    assert "python -m kfac_sua.bench.communication --out" in text


def test_bytes_are_those_of_hand_counted_blocks():
    """Three layers of triangles, 12 numbers said of each; gradients of all parameters; nothing is sent alone."""
    shapes = shape_model("kfac")
    blocks = [
        side for layer in shapes.layers for side in (layer.layout.activation_blocks, layer.layout.gradient_blocks)
    ]
    costs = count_costs("kfac", shapes, 8, 8000, math.inf)
    assert costs.header_bytes == 3 * 12 * 8
    assert (costs.rows_bytes, costs.num_low_rank, costs.num_factors) == (0, 0, 6)
    flags = 3 * 4 * len(GradientEvent)  # of three layers
    assert costs.moments_bytes == flags + sum(4 * number * triangle_numbers(width) for number, width in blocks)
    assert (costs.inverse_bytes, costs.num_shared, costs.num_everywhere) == (0, 0, 6)
    assert costs.inversion_flops == costs.inversion_flops_alone == sum(count * width**3 for count, width in blocks)
    assert costs.gradient_bytes == sum(4 * parameter.numel() for parameter in shapes.model.parameters())
    assert costs.bytes_per_step == (costs.header_bytes + costs.moments_bytes) / 50
    assert costs.received_per_step == (7 * costs.header_bytes + 2 * 7 / 8 * costs.moments_bytes) / 50
    alone = count_costs("kfac", shapes, 1, 1000, 0.0)
    assert (alone.bytes_per_step, alone.gradient_bytes, alone.buffer_bytes) == (0, 0, 0)


def test_sharing_everything_divides_the_work():
    """With free bytes each of two processes inverts less than both would alone, and inverses are sent."""
    shapes = shape_model("grouped")
    costs = count_costs("grouped", shapes, 2, 200, 0.0)
    assert costs.num_everywhere == 0
    assert costs.inversion_flops_alone / 2 <= costs.inversion_flops < costs.inversion_flops_alone
    assert costs.inverse_bytes > 0


def test_rows_are_sent_until_there_are_too_many():
    """With more examples a factor has more rows, and is at last sent as a triangle."""
    shapes = shape_model("kfac")
    few, many = (count_costs("kfac", shapes, 2, batch_size, math.inf) for batch_size in (4, 4000))
    assert few.rows_bytes > 0
    assert few.num_low_rank > many.num_low_rank == 0
    assert few.moments_bytes < many.moments_bytes
    assert many.rows_bytes == 0


def test_parts_of_a_mini_batch_are_as_equal_as_can_be():
    """The first processes have one example more; every process needs one."""
    assert part_sizes(11, 3) == [4, 4, 3]
    with pytest.raises(ConfigError, match="batch_size=2 leaves some of 3 processes without an example"):
        part_sizes(2, 3)


def test_what_cannot_be_counted_is_named():
    """Sampled labels need data, sampled rows the number of processes, and plain SGD has no statistics."""
    with pytest.raises(ConfigError, match="fisher_type=empirical, got mc"):
        shape_model("kfac:fisher_type=mc")
    with pytest.raises(ConfigError, match="activation_rows=null, got 64"):
        shape_model("kfac:activation_rows=64")
    with pytest.raises(ConfigError, match="Plain SGD has no statistics"):
        ShapeModel(compose_settings([], [], {"model": "tiny", "device": "cpu"})[0].config)


def test_a_number_measured_differently_is_named():
    """The sentence says which, and both values."""
    costs = count_costs("kfac", shape_model("kfac"), 2, 20, 0.0)
    equal = {name: getattr(costs, name) for name in ("setting", "num_processes", "batch_size", *AGREEING)}
    same = Measurement(**equal, peak_bytes=1, refresh_s={}, plain_s={})
    assert disagreements([costs], [same]) == []
    (sentence,) = disagreements([costs], [dataclasses.replace(same, rows_bytes=-1)])
    assert sentence == f"kfac, 2 processes: rows_bytes was counted as {costs.rows_bytes}, measured as -1."


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--settings", "baseline"], "--settings names plain SGD alone"),
        (["--settings", "kfca"], "did you mean kfac"),
        (["--batch-size", "3", "--fixed", "--processes", "8"], "batch_size=3 leaves some of 8 processes"),
    ],
)
def test_bad_input_ends_with_a_sentence(tmp_path, capsys, arguments, sentence):
    """Exit code 2, nothing written."""
    assert main(["--out", str(tmp_path / "out"), "--model", "tiny", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("value", ["-1", "nan", "much"])
def test_a_balance_below_zero_is_refused(capsys, value):
    """The parser names the option and the value."""
    with pytest.raises(SystemExit):
        main(["--out", "out", "--flops-per-byte", value])
    assert f"must be a number of at least 0, or inf, got '{value}'" in capsys.readouterr().err
