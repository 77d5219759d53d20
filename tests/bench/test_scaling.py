"""The scaling study: counts, fits, what it measures and keeps, and what it refuses."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

from kfac_sua.bench.scaling import __main__ as command
from kfac_sua.bench.scaling import measure, study
from kfac_sua.bench.scaling.cases import COSTS, METHODS, SWEEPS, Case, Layer, Sweep
from kfac_sua.bench.scaling.exponents import PAPER_INVERSION, exponent_table, fit_exponent, upper_half
from kfac_sua.bench.scaling.measure import Contender, Measurement, Seconds, _tensors, measure_layer
from kfac_sua.bench.scaling.record import COLUMN_TYPES, Machine, from_frame, read_table, to_frame
from kfac_sua.bench.scaling.report import describe_study
from kfac_sua.config import PreconditionerName
from kfac_sua.figures.scaling import draw_scaling
from kfac_sua.preconditioner import InverseMethod, KroneckerPreconditioner

CPU = torch.device("cpu")
MACHINE = Machine("cpu", "A processor", 1, "2.9.0", "0.1.0")
TINY = (
    Sweep("width", "channels", (2, 4, 8), Layer(0, 3, 100)),
    Sweep("kernel", "kernel_size", (1,), Layer(128, 0, 100)),
)
BY_NAME = {sweep.name: sweep for sweep in SWEEPS}


def case(layer, method="kfac", group_size=None, inverse_method="cholesky") -> Case:
    """Return a case from plain values."""
    return Case(layer, PreconditionerName(method), group_size, InverseMethod(inverse_method))


def study_frame(seconds=lambda case, cost: 1e-11 * case.dense_flops(cost), low_rank_from=None) -> pd.DataFrame:
    """Return the table of all sweeps with seconds from a formula, repeated three times."""
    measurements = {}
    for one in dict.fromkeys(one for sweep in SWEEPS for one in sweep.up_to(1024).cases()):
        is_low_rank = one.inverse_method is InverseMethod.auto and one.activation_blocks[1] >= (low_rank_from or 1e9)
        spreads = {cost: Seconds(*3 * (float(seconds(one, cost)),)) for cost in COSTS}
        measurements[one] = Measurement(spreads, 3, is_low_rank)
    return to_frame(measurements, MACHINE)


@pytest.fixture
def tiny(monkeypatch) -> None:
    """Make the command measure layers of milliseconds."""
    monkeypatch.setattr(command, "SWEEPS", TINY)
    monkeypatch.setattr(measure, "_SHORT_S", 0.0)
    monkeypatch.setattr(command, "draw_scaling", lambda frame, out_dir: [])


def run(tmp_path, *arguments) -> int:
    """Carry out the command in a directory of its own."""
    return command.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--repeats", "1", *arguments])


@pytest.mark.parametrize(("method", "group_size"), [("kfac", None), ("sua", None), ("grouped", 8), ("sua_grouped", 8)])
def test_blocks_and_flops_are_those_of_the_preconditioner(method, group_size):
    """What the study counts by itself is what describe() says, and SUA forms no taps."""
    one = case(Layer(32, 3, 2), method, group_size)
    contender = Contender(one.layer, one, *_tensors(one.layer, CPU))
    (row,) = contender.preconditioner.describe().rows
    assert (row.activation_blocks, row.gradient_blocks) == (one.activation_blocks, one.gradient_blocks)
    assert (row.inverse_flops, row.apply_flops) == (one.dense_flops("inversion"), one.dense_flops("application"))


def test_paper_exponents_are_the_limits_of_the_counted_flops():
    """Where sizes are enormous, doubling one multiplies the counted inversion by two to the paper's exponent."""
    bases = {"width": Layer(0, 3, 100), "kernel": Layer(128, 0, 100), "group": Layer(2**50, 3, 100)}
    bases["batch"] = Layer(128, 3, 0)
    for name, by_method in PAPER_INVERSION.items():
        sweep = dataclasses.replace(BY_NAME[name], base=bases[name], values=(2**30, 2**31))
        flops = {(one.method, sweep.size_of(one)): one.dense_flops("inversion") for one in sweep.cases()}
        assert {method.value for method, _ in flops} == set(by_method)
        for method, exponent in by_method.items():
            ratio = flops[PreconditionerName(method), 2**31] / flops[PreconditionerName(method), 2**30]
            assert math.log2(ratio) == pytest.approx(exponent, abs=1e-6), (name, method)


def test_sweeps_share_cases():
    """Figure 1's group of 32 at 128 channels lies on three sweeps, a group of 64 on one."""
    shared = case(Layer(128, 3, 100), "grouped", 32)
    assert [sweep.size_of(shared) for sweep in SWEEPS] == [128, 3, None, 100]
    alone = case(Layer(256, 3, 100), "grouped", 64)
    assert [sweep.size_of(alone) for sweep in SWEEPS] == [None, None, 64, None]
    for sweep in SWEEPS:
        assert [sweep.size_of(one) for one in sweep.cases()] == sorted(sweep.size_of(one) for one in sweep.cases())


def test_fit_is_the_textbook_regression():
    """A power law is found exactly; slope and standard error are scipy's."""
    exact = fit_exponent([2, 4, 8, 16], [5 * size**2.5 for size in (2, 4, 8, 16)])
    assert exact.slope == pytest.approx(2.5, rel=1e-12)
    assert exact.standard_error == pytest.approx(0, abs=1e-7)
    sizes, values = [3, 5, 7, 11], [1.0, 2.9, 4.1, 20.0]
    expected = scipy.stats.linregress(np.log(sizes), np.log(values))
    found = fit_exponent(sizes, values)
    assert (found.slope, found.standard_error) == pytest.approx((expected.slope, expected.stderr), rel=1e-10)


def test_few_points_have_no_error_and_one_has_no_slope():
    """NaN says so."""
    two = fit_exponent([1, 2], [1, 4])
    assert two.slope == pytest.approx(2)
    assert math.isnan(two.standard_error)
    assert math.isnan(fit_exponent([2], [1]).slope)


def test_upper_half_has_three_sizes_at_least():
    """The larger half, whatever the order, or the three largest."""
    assert upper_half([64, 1024, 128, 512, 256]) == [256, 512, 1024]
    assert upper_half([1, 3, 5, 7]) == [3, 5, 7]
    assert upper_half(list(range(1, 9))) == [5, 6, 7, 8]
    assert upper_half([2, 1, 2]) == [1, 2]


def test_exponents_of_counted_seconds_are_the_counted_exponents():
    """With seconds proportional to FLOPs the two agree in every line; the paper's stand at the inversion alone."""
    table = exponent_table(study_frame())
    assert len(table) == (3 * 4 + 2) * 2 * 3
    np.testing.assert_allclose(table["exponent"], table["counted_exponent"], atol=1e-9)
    assert (table["paper_exponent"].notna() == (table["cost"] == "inversion")).all()
    lines = table.set_index(["sweep", "method", "inverse_method", "cost"])
    assert lines.loc[("width", "kfac", "cholesky", "inversion"), "exponent"] == pytest.approx(3, abs=1e-9)
    assert lines.loc[("kernel", "kfac", "cholesky", "inversion"), "exponent"] == pytest.approx(6, abs=0.01)
    assert lines.loc[("kernel", "sua", "cholesky", "inversion"), "exponent"] == pytest.approx(0, abs=1e-9)
    assert lines.loc[("width", "kfac", "cholesky", "inversion"), ["smallest", "largest"]].tolist() == [256, 1024]


def test_no_line_goes_through_dense_and_low_rank_inverses():
    """Where the form changes within the sizes fitted there is no exponent."""
    lines = exponent_table(study_frame(low_rank_from=4608)).set_index(["sweep", "method", "inverse_method", "cost"])
    assert math.isnan(lines.loc[("width", "kfac", "auto", "application"), "exponent"])
    assert lines.loc[("width", "sua", "auto", "application"), "exponent"] == pytest.approx(3, abs=1e-9)


def test_every_case_of_a_layer_is_measured():
    """Four costs each, the bare layer's forward and backward shared, the median between the extremes."""
    layer = Layer(8, 3, 2)
    cases = [case(layer, method.value, 4 if "grouped" in method else None) for method in METHODS]
    measured = measure_layer(layer, cases, CPU, repeats=2)
    assert list(measured) == cases
    for result in measured.values():
        assert list(result.seconds) == list(COSTS)
        assert result.repeats >= 2
        assert all(0 < spread.low <= spread.median <= spread.high for spread in result.seconds.values())
    assert len({result.seconds["forward_backward"] for result in measured.values()}) == 1


def test_low_rank_is_noted_where_it_is_used():
    """64 rows of 1600 features are kept as rows with inverse_method=auto, and never with cholesky."""
    layer = Layer(64, 5, 4)
    cases = [case(layer), case(layer, inverse_method="auto"), case(layer, "sua", inverse_method="auto")]
    measured = measure_layer(layer, cases, CPU, repeats=1)
    assert [result.is_low_rank for result in measured.values()] == [False, True, False]
    dense, low_rank, _ = (result.seconds["inversion"].median for result in measured.values())
    assert low_rank < dense


def test_a_measured_step_is_a_training_step():
    """The gradient that a contender leaves is that of backward() and step() in an ordinary loop."""
    one = case(Layer(8, 3, 5), "sua")
    inputs, output_grads = _tensors(one.layer, CPU)
    contender = Contender(one.layer, one, inputs, output_grads)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False)).to(memory_format=torch.channels_last)
    preconditioner = KroneckerPreconditioner(model, structure="sua")
    model(inputs.detach()).backward(output_grads)
    preconditioner.step()
    for _ in range(2):  # the second refresh replaces the first one's inverses and gradients
        contender.step()
    torch.testing.assert_close(contender._model[0].weight.grad, model[0].weight.grad)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_measures_the_same_phases():
    """Event times are positive for every cost."""
    layer = Layer(32, 3, 8)
    cases = [case(layer), case(layer, "sua_grouped", 8)]
    for result in measure_layer(layer, cases, torch.device("cuda"), repeats=1).values():
        assert all(spread.low > 0 for spread in result.seconds.values())


def test_table_reads_back_bit_equal(tmp_path):
    """Numbers, empty cells and texts that look like numbers survive; all measurements come back."""
    measured = Measurement({cost: Seconds(0.1 + 0.2, 1 / 3, 1e-9) for cost in COSTS}, 3, True, "12e4567")
    left_out = Measurement({}, 0, note="not measured: needs 9.0 GiB")
    cases = {case(Layer(64, 3, 100)): measured, case(Layer(128, 3, 100), "grouped", 32): left_out}
    machine = dataclasses.replace(MACHINE, torch="2.9", device_name="NA")
    frame = to_frame(cases, machine)
    path = tmp_path / "scaling.csv"
    frame.to_csv(path, index=False)
    pd.testing.assert_frame_equal(read_table(path), frame)
    assert from_frame(read_table(path), path, machine) == cases


def test_command_writes_everything_and_measures_once(tiny, tmp_path, capsys, monkeypatch):
    """Five files and the printed report; the same command again measures nothing and leaves the numbers alone."""
    monkeypatch.setattr(command, "draw_scaling", draw_scaling)
    assert run(tmp_path) == 0
    out = tmp_path / "out"
    names = {"scaling.csv", "scaling-exponents.csv", "scaling.md", "scaling.png", "scaling.svg"}
    assert names <= {path.name for path in out.iterdir()}
    printed = capsys.readouterr()
    assert (out / "scaling.md").read_text() in printed.out
    assert "[1/4] 2 channels, 3×3, batch 100: 8 cases" in printed.err
    frame = read_table(out / "scaling.csv")
    assert len(frame) == (3 + 1) * 8 * len(COSTS)
    assert list(frame.columns) == list(COLUMN_TYPES)
    before = (out / "scaling.csv").read_bytes()
    monkeypatch.setattr(study, "measure_layer", None)  # would raise if called
    assert run(tmp_path, "--sweep", "kernel") == 0
    assert (out / "scaling.csv").read_bytes() == before
    assert capsys.readouterr().err == ""


def test_interruption_keeps_what_is_done(tiny, tmp_path, capsys, monkeypatch):
    """After Ctrl-C the same command measures the layers that are missing, and those only."""
    layers = []

    def interrupted(layer, *arguments):
        layers.append(layer)
        if layer.channels == 4:
            raise KeyboardInterrupt
        return measure_layer(layer, *arguments)

    monkeypatch.setattr(study, "measure_layer", interrupted)
    assert run(tmp_path) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = read_table(tmp_path / "out" / "scaling.csv")
    assert set(first["channels"]) == {2}
    monkeypatch.setattr(
        study, "measure_layer", lambda layer, *rest: layers.append(layer) or measure_layer(layer, *rest)
    )
    assert run(tmp_path) == 0
    assert [layer.channels for layer in layers] == [2, 4, 4, 8, 128]
    second = read_table(tmp_path / "out" / "scaling.csv")
    pd.testing.assert_frame_equal(second[second["channels"] == 2], first)


def test_more_repeats_are_measured_again(tiny, tmp_path, monkeypatch):
    """Medians of fewer turns than asked for are replaced; of more, kept."""
    cases = [one for sweep in TINY for one in sweep.cases()]
    known = {one: Measurement({cost: Seconds(1, 1, 1) for cost in COSTS}, 3) for one in cases}
    assert study.missing_cases(cases, known, repeats=2) == []
    assert study.missing_cases(cases, known, repeats=4) == cases


def test_cases_beyond_the_memory_limit_are_listed(tiny, tmp_path, capsys):
    """They stand in table and report with what they need, and are measured once the limit allows."""
    limit = "5e-5"  # K-FAC of 8 channels needs 5 · 4 · (72² + 8²) bytes
    assert run(tmp_path, "--sweep", "width", "--memory-limit-gib", limit) == 0
    frame = read_table(tmp_path / "out" / "scaling.csv")
    noted = frame[frame["note"] != ""]
    assert set(zip(noted["channels"], noted["method"], strict=True)) == {(8, "kfac"), (8, "grouped")}
    assert noted["seconds"].isna().all()
    report = capsys.readouterr().out
    assert "- K-FAC, 8 channels, 3×3, mini-batch 100, `cholesky`: needs 9.78e-05 GiB." in report
    assert run(tmp_path, "--sweep", "width") == 0
    assert (read_table(tmp_path / "out" / "scaling.csv")["note"] == "").all()
    assert run(tmp_path / "none", "--memory-limit-gib", "1e-9") == 2
    assert "No case fits" in capsys.readouterr().err


def test_report_compares_with_the_layer_and_the_paper():
    """Multiples are ratios of medians; exponents stand beside those of the paper."""
    frame = study_frame(low_rank_from=4608)
    text = describe_study(frame, exponent_table(frame))
    one = case(Layer(1024, 3, 100))
    own = one.dense_flops("forward_backward")
    refresh = (one.dense_flops("statistics") + one.dense_flops("inversion")) / own
    row = next(line for line in text.splitlines() if line.startswith("| 1024 |"))
    assert f" {refresh:.0f}× / {one.dense_flops('application') / own:.1f}× |" in row
    assert "low rank" in text
    assert "| kernel size k | K-FAC | 3 to 7 | 3.99 ± 0.00 (4.0) | 6.00 ± 0.00 (6.0) | 3.90 ± 0.02 (3.9) |" in text
    assert "Not measured" not in text


def test_another_machine_is_refused(tiny, tmp_path, capsys, monkeypatch):
    """Seconds of two machines never mix: one sentence says what differs, and nothing is touched."""
    assert run(tmp_path, "--sweep", "kernel") == 0
    path = tmp_path / "out" / "scaling.csv"
    frame = read_table(path).assign(torch="1.0")
    frame.to_csv(path, index=False)
    before = path.read_bytes()
    capsys.readouterr()
    assert run(tmp_path) == 2
    sentence = capsys.readouterr().err
    assert "measured with torch 1.0, here it is" in sentence
    assert len(sentence.splitlines()) == 1
    assert path.read_bytes() == before


@pytest.mark.parametrize(("content", "reason"), [("a,b\n1,2\n", "other columns"), ("", "columns to parse")])
def test_a_foreign_table_is_refused(tiny, tmp_path, capsys, content, reason):
    """What is not a table of the study is not overwritten."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scaling.csv").write_text(content)
    assert run(tmp_path) == 2
    sentence = capsys.readouterr().err
    assert reason in sentence
    assert len(sentence.splitlines()) == 1
    assert (tmp_path / "out" / "scaling.csv").read_text() == content


def test_a_torn_table_is_refused(tiny, tmp_path, capsys):
    """A case without all its costs is not taken for measured."""
    assert run(tmp_path, "--sweep", "kernel") == 0
    path = tmp_path / "out" / "scaling.csv"
    read_table(path).iloc[:-1].to_csv(path, index=False)
    assert run(tmp_path) == 2
    assert "lacks costs of sua_grouped at 128 channels, 1×1, batch 100" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--repeats", "0"], "whole number of at least 1"),
        (["--largest-width", "32"], "from 64 to 8192"),
        (["--memory-limit-gib", "-1"], "GiB above 0"),
        (["--sweep", "depth"], "invalid choice: 'depth'"),
    ],
)
def test_bad_options_end_before_anything_is_written(arguments, sentence, tmp_path, capsys):
    """Exit code 2 and what would be right."""
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, *arguments)
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quick_keeps_to_small_sizes():
    """No layer beyond 128 channels but the group sweep's, and no kernel beyond 3."""
    options = command._parser().parse_args(["--out", "x", "--quick"])
    cases = command._cases(options)
    assert {one.layer.channels for one in cases} == {64, 128, 256}
    assert {one.layer.kernel_size for one in cases} == {1, 3}
    assert len(cases) == len(set(cases))
    assert max(one.activation_blocks[1] for one in cases) == 1152
    full = command._cases(command._parser().parse_args(["--out", "x"]))
    assert max(one.activation_blocks[1] for one in full) == 9216
