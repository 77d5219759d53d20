"""The benchmark command measures what it says, on a tiny network, and compares with an earlier measurement."""

import contextlib
import dataclasses
import json
import re

import pytest
import torch
from bench_runs import TINY, shrink_rates
from thinned import one_in

from kfac_sua.bench import arithmetic
from kfac_sua.bench.__main__ import main
from kfac_sua.bench.against import refuse_other_conditions
from kfac_sua.bench.contender import PHASES, Contender
from kfac_sua.bench.record import read_record, write_record
from kfac_sua.runs.run_info import RecordError

AVERAGED = "kfac:ema_decay=0.9,factor_period=5"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Measure three settings and return the exit code, the JSON file, and the path of it."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink_rates(monkeypatch)
        rounds = ["--rounds", "5", "--refresh-rounds", "3"]
        code = main([*TINY, *rounds, "--json", str(path), "--layers", "--settings", "sua", AVERAGED, "seed=1"])
    return code, json.loads(path.read_text()), path


def remeasure(monkeypatch, *options: str) -> int:
    """Measure plain SGD and SUA again, as little as possible."""
    shrink_rates(monkeypatch)
    return main([*TINY, "--settings", "sua", *options])


def altered(path, tmp_path, change):
    """Write a changed copy of a measurement and return its path."""
    content = json.loads(path.read_text())
    change(content)
    copy = tmp_path / "altered.json"
    copy.write_text(json.dumps(content))
    return copy


def scale_ratios(factor):
    """Return a change that multiplies every amortised ratio."""

    def change(content):
        for cost in content["costs"]:
            for key in ("median", "low", "high"):
                cost["time"]["amortised_ratio"][key] *= factor

    return change


def test_the_file_says_what_was_measured(measured):
    """Plain SGD comes first by itself, an override after --settings is not taken for one, and nothing is left out."""
    code, content, _ = measured
    assert code == 0
    assert content["format"] == 4
    assert set(content["costs"][1]["operations"]) == {"plain", "refresh"}
    assert [content["costs"][i]["operations"]["plain"]["launches"] > 0 for i in range(3)] == [True] * 3
    assert [cost["setting"] for cost in content["costs"]] == ["baseline", "sua", AVERAGED]
    arguments = content["arguments"]
    assert (arguments["model"], arguments["batch_size"], arguments["period"]) == ("tiny", 8, 50)
    assert (arguments["num_threads"], arguments["overrides"]) == (1, ["seed=1"])
    assert set(content["environment"]) == {"versions", "commit", "device_name"}
    assert [rate["operation"] for rate in content["rates"]] == ["gemm", "cholesky_inverse"]
    assert all(rate["gflop_per_s"] > 0 for rate in content["rates"])
    assert {work["setting"] for work in content["layers"]} == {"sua", AVERAGED}
    assert {(work["setting"], work["step"]) for work in content["steps"]} >= {("baseline", "plain"), ("sua", "refresh")}


def test_the_numbers_of_the_file_agree(measured):
    """Ratios, the amortised mean and the split follow from the seconds beside them."""
    baseline, sua, averaged = (cost["time"] for cost in measured[1]["costs"])
    unit = baseline["plain"]["seconds"]["median"]
    assert baseline["amortised_ratio"]["median"] == baseline["plain"]["ratio"]["median"] == 1
    assert sua["statistics"] is None
    mean = (sua["refresh"]["seconds"]["median"] + 49 * sua["plain"]["seconds"]["median"]) / 50
    assert sua["amortised_ratio"]["median"] == pytest.approx(mean / unit)
    seconds = {kind: averaged[kind]["seconds"]["median"] for kind in ("plain", "statistics", "refresh")}
    mean = (seconds["refresh"] + 9 * seconds["statistics"] + 40 * seconds["plain"]) / 50
    assert averaged["amortised_ratio"]["median"] == pytest.approx(mean / unit)
    for step in (baseline["plain"], sua["plain"], sua["refresh"], averaged["statistics"]):
        assert set(step["split"]) == set(PHASES)
        assert sum(step["split"].values()) == pytest.approx(step["seconds"]["median"], rel=0.3)
        assert step["ratio"]["median"] == pytest.approx(step["seconds"]["median"] / unit)
    assert sua["plain"]["split"]["statistics"] == sua["plain"]["split"]["inversion"] == 0
    memory = [cost["memory"] for cost in measured[1]["costs"]]
    assert memory[0]["ratio"] == 1
    assert memory[2]["peak_bytes"] > memory[0]["peak_bytes"] > 0


def test_tables_and_progress(monkeypatch, capsys):
    """Every setting has a row in each table on stdout; stderr says how far it is."""
    assert remeasure(monkeypatch, "--repeats", "2") == 0
    out, err = capsys.readouterr()
    titles = [block.splitlines()[0] for block in out.split("\n\n")]
    assert [title.split()[0] for title in titles] == ["Time", "Seconds", "Peak", "Operations", "Machine"]
    assert "tiny width 1, batch 8, refresh every 50, float32, cpu, 1 thread, process CPU time" in titles[0]
    for block in out.split("\n\n")[:4]:
        assert [line.split()[0] for line in block.splitlines()[2:4]] == ["baseline", "sua"]
    assert " to " in out.splitlines()[3]  # low to high over the repeats
    assert "plain steps, round 1 of 1 (repeat 2 of 2)" in err


def test_a_record_reads_back_as_written(measured, tmp_path):
    """Writing what was read gives the same file."""
    path = measured[2]
    write_record(tmp_path / "again.json", read_record(path))
    assert (tmp_path / "again.json").read_text() == path.read_text()


def test_against_finds_what_got_slower(measured, tmp_path, monkeypatch, capsys):
    """Beside a measurement whose ratios were a hundredth, SUA is slower now; settings not measured now are left out."""
    old = altered(measured[2], tmp_path, scale_ratios(0.01))
    assert remeasure(monkeypatch, "--against", str(old)) == 1
    comparison = capsys.readouterr().out.split("\n\n")[-1].splitlines()
    assert comparison[0] == "Amortised ratio, tolerance 3 %"
    assert comparison[2].split()[0] == "sua"
    assert comparison[2].endswith("slower")
    assert comparison[3:] == ["note: overrides seed=1 then, none now"]


def test_against_lets_pass_what_got_faster(measured, tmp_path, monkeypatch, capsys):
    """Beside a measurement whose ratios were a hundred times as large, nothing is slower."""
    old = altered(measured[2], tmp_path, scale_ratios(100))
    assert remeasure(monkeypatch, "--against", str(old), "--tolerance", "0") == 0
    assert "slower" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda content: content.update(format=1), "has format 1, where this version reads 2 to 4"),
        (lambda content: content.pop("format"), "has format null"),
        (lambda content: content["arguments"].pop("width"), "the file.arguments has missing or unknown fields (width)"),
        (lambda content: content["costs"][0].update(extra=1), "unknown fields (extra)"),
        (
            lambda content: content["costs"][0]["memory"].update(ratio="1"),
            'the file.costs[0].memory.ratio must be float, got "1"',
        ),
        (lambda content: content.update(rates=None), "the file.rates must be list"),
        (lambda content: content["arguments"].update(rounds=True), "the file.arguments.rounds must be int, got true"),
    ],
)
def test_other_files_are_refused(change, sentence, measured, tmp_path):
    """A file that this version has not written is named, with what is wrong in it."""
    path = altered(measured[2], tmp_path, change)
    with pytest.raises(RecordError, match=re.escape(sentence)) as error:
        read_record(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (
            {"model": "vgg11"},
            "model=tiny, this is model=vgg11; give --model tiny or leave out --against.",
        ),
        ({"width": 0.5}, "width=1.0, this is width=0.5; give --width 1.0"),
        ({"batch_size": 4}, "batch_size=8, this is batch_size=4; give --batch-size 8"),
        ({"period": 7}, "period=50, this is period=7; give --period 50"),
        ({"device": "cuda"}, "device=cpu, this is device=cuda; give --device cpu"),
        ({"precision": "float64"}, "precision=float32, this is precision=float64; give --precision float32"),
    ],
)
def test_other_conditions_are_refused(other, sentence, measured):
    """Ratios under other conditions are not compared; how often they were measured is no condition."""
    path = measured[2]
    old = read_record(path).arguments
    new = dataclasses.replace(old, rounds=1, **other)
    with pytest.raises(RecordError, match=re.escape(sentence)):
        refuse_other_conditions(path, old, new, ["baseline", "sua"])
    refuse_other_conditions(path, old, dataclasses.replace(old, rounds=1, repeats=3), ["baseline", "sua"])


def in_format_3(content):
    """Put a measurement on a CPU as the version before wrote it."""
    content["format"] = 3
    for cost in content["costs"]:
        del cost["operations"]


def in_format_2(content):
    """Put it as the version before that."""
    in_format_3(content)
    content["format"] = 2
    content["arguments"]["dtype"] = content["arguments"].pop("precision")
    del content["arguments"]["steps_together"], content["why_not_compiled"]
    for cost in content["costs"]:
        del cost["is_captured"], cost["why_eager"]


@pytest.mark.parametrize("change", [in_format_2, in_format_3])
def test_older_formats_are_read(measured, tmp_path, change):
    """They hold the same numbers; of a CPU they are of the same quantity."""
    path = altered(measured[2], tmp_path, change)
    old, new = read_record(path), read_record(measured[2])
    assert all(cost.why_eager == "device=cpu has no CUDA graphs" for cost in new.costs)
    missing = {"operations": {}} | ({"why_eager": ""} if change is in_format_2 else {})
    assert old == dataclasses.replace(new, costs=[dataclasses.replace(cost, **missing) for cost in new.costs])
    refuse_other_conditions(path, old.arguments, new.arguments, ["baseline", "sua"])


def test_older_files_of_cuda_are_refused(measured, tmp_path):
    """They are of other arithmetic, whatever their precision is called."""
    path = altered(measured[2], tmp_path, in_format_2)
    old = dataclasses.replace(read_record(path).arguments, device="cuda")
    new = dataclasses.replace(old, steps_together=10)
    with pytest.raises(RecordError, match="with convolutions in TF32 but products in IEEE float32"):
        refuse_other_conditions(path, old, new, ["baseline", "sua"])
    refuse_other_conditions(path, new, new, ["baseline", "sua"])


PRECISIONS = [
    (["--precision", "bfloat16"], "bfloat16", torch.bfloat16),
    ([], "float32", torch.float32),
    (["--precision", "float64"], "float64", torch.float64),
    (["--precision", "bfloat16", "precision=float32"], "float32", torch.float32),
    (["--precision", "float64", "precision=bfloat16"], "bfloat16", torch.bfloat16),
]


@pytest.mark.parametrize(("options", "precision", "dtype"), one_in(3, PRECISIONS))
def test_steps_compute_in_the_precision_that_the_file_says(options, precision, dtype, tmp_path, monkeypatch):
    """Within the context of training, in which an override stands above the option as for other keys."""
    entered, seen, forward = [], set(), Contender.forward

    @contextlib.contextmanager
    def computing_in(precision, device):
        entered.append(precision)
        yield
        entered.pop()

    def watched(contender):
        assert len(entered) == 1
        handle = contender.model.classifier.register_forward_hook(lambda *given: seen.add(given[-1].dtype))
        result = forward(contender)
        handle.remove()
        return result

    monkeypatch.setattr(arithmetic, "computing_in", computing_in)
    monkeypatch.setattr(Contender, "forward", watched)
    assert remeasure(monkeypatch, *options, "--json", str(tmp_path / "new.json")) == 0
    assert read_record(tmp_path / "new.json").arguments.precision == precision
    assert seen == {dtype}
    assert not entered


def test_a_comparison_that_compares_nothing_is_refused_before_measuring(measured, capsys):
    """Plain SGD has the ratio 1 by definition, so that it alone is nothing to compare."""
    assert main([*TINY, "--settings", "grouped", "--against", str(measured[2])]) == 2
    out, err = capsys.readouterr()
    assert "share no setting but baseline" in err
    assert err.count("\n") == 1
    assert out == ""


def test_a_file_that_is_no_json_is_refused(tmp_path):
    """A torn or foreign file is named."""
    path = tmp_path / "torn.json"
    path.write_text('{"format": 3,')
    with pytest.raises(RecordError, match=r"torn\.json is not valid JSON"):
        read_record(path)


BAD = [
    (["--settings", "kfca"], "--settings must name baseline, kfac, sua, grouped, sua_grouped, activation_only, "),
    (["--settings", "kfac:dampin=1"], "There is no key 'preconditioner.dampin' (did you mean"),
    (["--settings", "kfac:damping=-1"], "preconditioner.damping must be"),
    (["--settings", "kfac:damping=1,group"], "write keys as kfac:key=value,key=value"),
    (["--settings", "kfac:"], "write keys as kfac:key=value"),
    (["--settings", "baseline:damping=1"], "plain SGD has no keys of its own"),
    (["--settings", "sua", "sua"], "--settings names sua twice"),
    (["--settings", "kfac:group_size=8"], "give preconditioner=grouped"),
    (["--settings", "sua:fisher_type=exact", "--layers"], "--layers measures one backward pass per layer"),
    (["preconditioner=sua"], "give --settings sua instead"),
    (["--width", "-1"], "model.width must be"),
    (["--period", "0"], "preconditioner.inverse_period must be"),
    (["--threads", "0"], "num_threads must be"),
    (["lr=1"], "There is no key 'lr'"),
    (["--precision", "tf32"], "precision=tf32, which the CPU does not have; use precision=float32"),
    (["precision=tf32"], "precision=tf32, which the CPU does not have; use precision=float32"),
    (["--json", "/no/such/directory/bench.json", "--settings", "sua"], "Cannot use /no/such/directory/bench.json"),
    (["--against", "/no/such/bench.json", "--settings", "sua"], "Cannot read /no/such/bench.json"),
]


@pytest.mark.parametrize(("arguments", "sentence"), one_in(2, BAD))
def test_bad_input_is_one_sentence(arguments, sentence, capsys):
    """Bad input ends with exit code 2 before anything is measured."""
    assert main([*TINY, *arguments]) == 2
    out, err = capsys.readouterr()
    assert sentence in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.parametrize(
    ("option", "value"), [("--rounds", "0"), ("--repeats", "x"), ("--tolerance", "-1"), ("--precision", "float16")]
)
def test_options_out_of_range_name_what_they_take(option, value, capsys):
    """The parser's own errors name option and value, with exit code 2 too."""
    with pytest.raises(SystemExit) as stop:
        main([option, value])
    assert stop.value.code == 2
    assert f"argument {option}: " in capsys.readouterr().err


def test_a_json_path_that_can_be_written_is_left_alone_until_the_end(tmp_path):
    """A command refused after the check of --json leaves no empty file behind."""
    path = tmp_path / "new.json"
    assert main([*TINY, "--json", str(path), "--settings", "sua:skip=[nothing]"]) == 2
    assert not path.exists()
