"""The command: a fresh run and a finished one, resuming, refusals, and a report that follows from the records."""

import dataclasses
import logging
import re
import shutil
import signal
from pathlib import Path

import pandas as pd
import pytest
import torch
from tiny_runs import TINY, directory_of, tiny_config
from torch import nn

from kfac_sua.introspect import __main__ as command
from kfac_sua.introspect import approximations, memory, study
from kfac_sua.introspect.measure import REFERENCES
from kfac_sua.introspect.record import COLUMNS, MEASURES, Row, as_csv, read_table
from kfac_sua.preconditioner.settings import FisherType
from kfac_sua.runs.run_info import RecordError, read_run_info, write_run_info
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted
from kfac_sua.training.writer import RunWriter

FEW = ("--images", "20", "--exact-images", "6", "--methods", "kfac", "sua:damping_rule=exact", "--damping", "0.03", "1")
FRESH = (*TINY, "preconditioner=sua", *FEW, "--steps", "6")


def measured(out: Path) -> pd.DataFrame:
    """Return the table of a study."""
    return pd.read_csv(out / "introspect.csv", keep_default_na=False, na_values={"basis_error": [""]})


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A study of a fresh run's first and last state, and what it printed."""
    out = tmp_path_factory.mktemp("introspect")
    assert command.main([*FRESH, "--checkpoints", "untrained", "end", "--out", str(out)]) == 0
    return out


def test_a_fresh_run_is_trained_and_looked_at(fresh):
    """A row per state, Fisher, statistics, layer, method and damping; shares and cosines are within their bounds."""
    frame = measured(fresh)
    assert logging.getLogger("kfac_sua.preconditioner").level == logging.NOTSET, (
        "the program's loggers are as they were"
    )
    assert tuple(frame.columns) == COLUMNS
    assert set(zip(frame["checkpoint"], frame["step"], strict=True)) == {("untrained", 0), ("end", 6)}
    assert set(frame["fisher"]) == {"empirical", "exact"}
    assert set(frame["method"]) == {"kfac", "sua:damping_rule=exact", *REFERENCES}
    assert len(frame) == 4 * 2 * 2 * (5 * (3 + 2) + 1)  # 3 layers and both ways to see all; the whole, once
    assert frame["share"].between(0, 1 + 1e-6).all()
    assert frame["direction_cosine"].between(-1, 1 + 1e-6).all()
    by_loss = frame.groupby("checkpoint")["loss"].mean()
    assert by_loss["end"] < by_loss["untrained"]


def test_files_are_drawn_again_and_nothing_is_measured_twice(fresh, monkeypatch, capsys):
    """The same command gives the same files to the byte, all from the records."""
    names = ("introspect.csv", "introspect.svg", "report.md", "report.html")
    before = {name: (fresh / name).read_bytes() for name in names}
    for name in names:
        (fresh / name).unlink()
    monkeypatch.setattr(command, "measure_part", None)
    assert command.main([*FRESH, "--checkpoints", "untrained", "end", "--out", str(fresh)]) == 0
    assert {name: (fresh / name).read_bytes() for name in names} == before
    assert before["report.md"].decode() in capsys.readouterr().out


def test_the_report_says_what_the_table_says(fresh):
    """Its first finding has the mean shares of all layers together, in their order."""
    frame, text = measured(fresh), (fresh / "report.md").read_text(encoding="utf-8")
    where = (frame["scope"] == "network") & (frame["statistics"] == "same") & (frame["checkpoint"] == "end")
    shares = frame[where & (frame["fisher"] == "exact") & (frame["damping"] == 1)].groupby("method")["share"].mean()
    sentence = re.search(r"Share of the attainable decrease, all layers at once \(the exact.*", text)[0]
    for name, label in (("kfac", "K-FAC"), ("sua:damping_rule=exact", "SUA, exact"), ("diagonal", "Diagonal")):
        assert f"{label} {shares[name]:.2f}" in sentence
    assert sentence.index("K-FAC") < sentence.index("SUA, exact") or shares["kfac"] < shares["sua:damping_rule=exact"]
    assert "evaluation mode" in text


def test_a_structure_without_two_factors_is_judged_by_its_directions(tmp_path, monkeypatch):
    """What is not known of its block stays empty, in the table and in the report."""
    monkeypatch.setattr(approximations, "_block_maker", lambda layer: None)
    arguments = [*FRESH, "--checkpoints", "untrained", "--fisher", "empirical", "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    own = pd.read_csv(tmp_path / "introspect.csv").query("method == 'kfac'")
    assert own[["relative_error", "cosine", "trace_ratio", "basis_error", "eigenvalue_error"]].isna().all(axis=None)
    assert own[["share", "direction_cosine"]].notna().all(axis=None)
    assert re.search(r"\| K-FAC \| – \| – \| – \| – \| – \| 0\.", (tmp_path / "report.md").read_text(encoding="utf-8"))


def test_equal_shares_have_no_order(fresh, tmp_path):
    """The report says how the errors rank, and compares that with nothing."""
    shutil.copytree(fresh, tmp_path, dirs_exist_ok=True)
    for path in (tmp_path / "parts").glob("*.csv"):
        frame = read_table(path)
        path.write_bytes(as_csv(frame.assign(share=0.5)))
    assert command.main([*FRESH, "--checkpoints", "untrained", "end", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.search(r"Frobenius' error .* ranks .* first \(0\.\d\d\) and .* last \(0\.\d\d\)\.\n", text)
    assert "rank correlation" not in text
    assert "rank correlation" in (fresh / "report.md").read_text(encoding="utf-8")


def test_a_dead_network_is_measured_where_it_lives(tmp_path, monkeypatch):
    """Layers without gradient and Fisher have dashes; the others, and all together, have numbers."""
    original = command.FreshRun.state

    def dead(*given):
        state = original(*given)
        for name, parameter in state.network.named_parameters():
            if name.startswith("features"):
                parameter.data.zero_()
        return state

    monkeypatch.setattr(command.FreshRun, "state", dead)
    arguments = [*TINY, *FEW, "--steps", "6", "--checkpoints", "end"]
    assert command.main([*arguments, "--out", str(tmp_path / "all")]) == 0
    frame = pd.read_csv(tmp_path / "all" / "introspect.csv")
    is_dead = frame["layer"].str.startswith("features", na=False)
    assert frame.loc[is_dead, list(MEASURES)].isna().all(axis=None)
    assert frame.loc[~is_dead, ["share", "relative_error"]].notna().all(axis=None)
    assert re.search(
        r"\| features\.0 \| 432 (\| – ){4}\|", (tmp_path / "all" / "report.md").read_text(encoding="utf-8")
    )
    # Nothing at all is left of these.
    assert command.main([*arguments, "--layers", "features.*", "--out", str(tmp_path / "features")]) == 0
    text = (tmp_path / "features" / "report.md").read_text(encoding="utf-8")
    assert "K-FAC –, SUA, exact –, Diagonal –, Plain gradient –; the exact blocks, layer by layer, –." in text
    assert "nan" not in text


@pytest.mark.parametrize("damping", ["1e-50", "1e50", "0", "nan", "inf"])
def test_dampings_are_within_the_range_of_the_preconditioner(damping, capsys):
    """Which computes in float32 in training."""
    with pytest.raises(SystemExit) as found:
        command.main(["--damping", "0.1", damping])
    assert found.value.code == 2
    assert f"--damping: must be a number from 1e-37 to 1e+37, got '{damping}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (RuntimeError("no such kernel"), "RuntimeError: no such kernel\n"),
        (MemoryError(), "Out of memory; lower batch_size or model.width, or --images or --exact-images.\n"),
    ],
)
def test_only_a_lack_of_memory_is_one_of_images(error, sentence, tmp_path, monkeypatch, capsys):
    """Other errors say what they are."""

    def fail(*given):
        raise error

    monkeypatch.setattr(command, "measure_part", fail)
    assert command.main([*FRESH, "--checkpoints", "end", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.endswith(sentence)


def test_further_seeds_are_added_and_an_interruption_keeps_what_is_done(fresh, tmp_path, monkeypatch, capsys):
    """Ctrl-C leaves whole parts; the same command goes on after them."""
    arguments = [*FRESH, "--checkpoints", "untrained", "--fisher", "empirical", "--seeds", "2", "--out", str(tmp_path)]
    original, done = command.measure_part, []

    def measure_one(*given):
        if done:
            raise KeyboardInterrupt
        done.append(original(*given))

    monkeypatch.setattr(command, "measure_part", measure_one)
    assert command.main(arguments) == 130
    assert "goes on where this one stopped" in capsys.readouterr().err
    kept = {path.name: path.read_bytes() for path in (tmp_path / "parts").glob("*.csv")}
    assert [*kept] == ["seed0-untrained-empirical.csv"]
    same = measured(fresh)
    assert len(same[(same["checkpoint"] == "untrained") & (same["fisher"] == "empirical")]) == len(
        pd.read_csv(tmp_path / "parts" / "seed0-untrained-empirical.csv")
    )
    monkeypatch.setattr(command, "measure_part", original)
    assert command.main(arguments) == 0
    assert "1 of 2 parts to measure" in capsys.readouterr().err
    assert (tmp_path / "parts" / "seed0-untrained-empirical.csv").read_bytes() == kept["seed0-untrained-empirical.csv"]
    assert set(measured(tmp_path)["seed"]) == {0, 1}


def test_a_finished_run_is_looked_at(tmp_path):
    """Before its first step, at its best epoch and at its last, with its own damping rule and damping."""
    config = tiny_config(
        tmp_path, "preconditioner=kfac", "preconditioner.damping_rule=exact", "preconditioner.damping=1", "epochs=2"
    )
    run(config)
    out = tmp_path / "out"
    arguments = [str(directory_of(config).path), *FEW, "--fisher", "empirical", "mc", "--out", str(out)]
    assert command.main(arguments) == 0
    frame = measured(out)
    steps = frame.drop_duplicates("checkpoint").set_index("checkpoint")["step"]
    assert list(steps.index) == ["untrained", "best", "last"]
    assert steps["untrained"] == 0
    assert steps["last"] == 8
    assert "damping_rule=exact for" in (out / "report.md").read_text(encoding="utf-8")
    assert "ε = 1" in (out / "report.md").read_text(encoding="utf-8")


def test_methods_take_from_the_run_what_they_do_not_say():
    """Where their structure reads it, groups by the run's own name; what a method says comes first."""
    config = tiny_config(
        Path(),
        *("preconditioner=grouped", "preconditioner.group_size=12", "preconditioner.group_size_scaling=none"),
        *("preconditioner.activation_rows=64", "preconditioner.inverse_method=low_rank", "model.width=2"),
    )
    items = ["grouped", "sua_grouped", "kfac", "grouped:group_size=8", "kfac:activation_rows=9", "activation_only"]
    items += ["kfac:weight_sharing=reduce", "sua:damping_rule=exact", "eigenvalue_corrected"]
    methods = command._methods(command.parse_items(items, "--methods"), config)
    found = {
        name: (one.group_size, one.activation_rows, str(one.weight_sharing), str(one.inverse_method))
        for name, one in methods.items()
    }
    assert found == {
        "grouped": (12, 64, "expand", "low_rank"),
        "sua_grouped": (64, 64, "expand", "low_rank"),
        "kfac": (None, 64, "expand", "low_rank"),
        "grouped:group_size=8": (8, 64, "expand", "low_rank"),
        "kfac:activation_rows=9": (None, 9, "expand", "low_rank"),
        "activation_only": (None, None, "expand", "auto"),
        "kfac:weight_sharing=reduce": (None, None, "reduce", "low_rank"),
        "sua:damping_rule=exact": (None, 64, "expand", "auto"),
        "eigenvalue_corrected": (None, None, "expand", "auto"),
    }
    reduced = tiny_config(Path(), "preconditioner=kfac", "preconditioner.weight_sharing=reduce")
    methods = command._methods(command.parse_items(["kfac", "kfac:activation_rows=9"], "--methods"), reduced)
    assert [str(one.weight_sharing) for one in methods.values()] == ["reduce", "expand"]


def test_a_run_of_defaults_changes_no_method():
    """So that what an earlier version measured stays what the same command measures."""
    items = command.parse_items(command.METHODS, "--methods")
    plain, own = (
        command._methods(items, tiny_config(Path(), f"preconditioner={name}")) for name in ("baseline", "sua")
    )
    assert own == plain


def test_a_run_without_a_whole_epoch_has_no_best_state(tmp_path, monkeypatch):
    """Its first state and its last are looked at."""
    config = tiny_config(tmp_path, "preconditioner=kfac", "epochs=2")
    between = RunWriter.after_batch

    def stop(writer: RunWriter) -> None:
        if writer.training.batch == 2:
            writer._stop.signal_number = signal.SIGINT
        between(writer)

    monkeypatch.setattr(RunWriter, "after_batch", stop)
    with pytest.raises(Interrupted):
        run(config)
    source = command.SavedRun(directory_of(config).path)
    assert source.checkpoints == source.defaults == ("untrained", "last")
    assert source.state(0, "last", lambda line: None).step == 2


def test_a_run_that_diverged_has_no_last_state(tmp_path):
    """Its best state is looked at; a damaged file is an error, whichever it is."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")
    run(config)
    path = directory_of(config).path
    info = read_run_info(path / "run.json")
    write_run_info(path / "run.json", dataclasses.replace(info, status="diverged", diverged_at_epoch=2))
    (path / "last.pt").unlink()
    source = command.SavedRun(path)
    assert source.checkpoints == ("untrained", "best")
    assert source.description.endswith(
        "trained for 1 epochs with preconditioner=baseline before it diverged in epoch 2"
    )
    assert f"of the run {'/'.join(path.parts[-3:])}, " in source.description
    (path / "best.pt").write_bytes(b"")
    with pytest.raises(RecordError, match=r"best\.pt is damaged"):
        command.SavedRun(path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--fisher", "mc"), ("--methods", "kfac:weight_sharing=reduce"), ("--damping", "1"), ("--layers", "features.*")],
)
@pytest.mark.parametrize("swallowed", ["model=tiny", "outputs/runs/mine", "dataset.data_dir=/somewhere:else"])
def test_an_option_that_takes_what_follows_says_so(option, value, swallowed, capsys):
    """With the order that works."""
    with pytest.raises(SystemExit) as found:
        command.main([option, value, swallowed])
    assert found.value.code == 2
    sentence = f"argument {option}: takes all values up to the next option, and '{swallowed}' is none of its;"
    assert f"{sentence} put RUN_DIR or key=value first\n" in capsys.readouterr().err


def test_the_untrained_state_is_the_one_that_training_begins_with(tmp_path):
    """Of a fresh run and of a finished one: initialisation follows from configuration and seed."""
    config = tiny_config(tmp_path, "preconditioner=kfac", "epochs=1")
    run(config)
    out = tmp_path / "out"
    of_fresh = command.FreshRun(config, 2, out, ["untrained"]).state(0, "untrained", lambda line: None).network
    of_saved = command.SavedRun(directory_of(config).path).state(0, "untrained", lambda line: None).network
    for one, other in zip(of_fresh.state_dict().values(), of_saved.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("model=huge",), "huge"),
        (("--methods", "kfak"), "--methods must name"),
        (("--methods", "baseline"), "line of reference"),
        (("--methods", "sua", "kfac:damping=1"), "--methods kfac:damping=1: damping has no influence here (--damping"),
        (("--methods", "kfac:fisher_type=mc"), "fisher_type has no influence here (--fisher decides it); leave it out"),
        (("--methods", "kfac:skip=[classifier]"), "skip has no influence here (--layers decides it)"),
        (("--methods", "kfac:damping_rule=exact,ema_decay=0.9"), "ema_decay has no influence here (statistics are of"),
        (("--methods", "kfac", "kfac"), "--methods names kfac twice"),
        (("--layers", "nothing.*"), "--layers nothing.* matches no layer; there are features.0"),
        (("--checkpoints", "best"), "--checkpoints best: there are untrained, early, middle, end"),
        (("--images", "300"), "300 images and as many others are more than the 400 training images"),
        (("optimizer.lr=1e20", "--checkpoints", "end"), "lower optimizer.lr"),
    ],
)
def test_bad_input_is_one_sentence(arguments, sentence, tmp_path, capsys):
    """Naming the option, the value and the cure."""
    keys = [one for one in arguments if "=" in one.partition(":")[0]]
    options = [one for one in arguments if one not in keys]
    assert command.main([*TINY, *keys, *options, "--steps", "30", "--out", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err.strip().splitlines()[-1]


def test_what_is_no_run_is_refused(tmp_path, capsys):
    """A directory without run.json, and options that are for fresh runs only."""
    assert command.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "run.json" in capsys.readouterr().err
    assert command.main([str(tmp_path), "--steps", "3", "--out", str(tmp_path / "out")]) == 2
    assert "--steps is for a fresh run" in capsys.readouterr().err


def test_other_settings_do_not_mix(fresh, capsys):
    """A directory holds parts of one study."""
    arguments = [*FRESH, "--checkpoints", "untrained", "--out", str(fresh), "--layers", "classifier"]
    assert command.main(arguments) == 2
    assert 'with layers [], here it is ["classifier"]; give another --out.' in capsys.readouterr().err


def test_the_first_setting_that_differs_is_named(fresh, capsys):
    """A key of a method, or a method that is new, however many there are."""
    methods = ["--methods", "kfac", "sua:damping_rule=exact", "sua"]
    assert command.main([*FRESH, *methods, "--out", str(fresh)]) == 2
    assert "holds measurements without methods.sua, which is given here; give another --out." in capsys.readouterr().err
    assert command.main([*FRESH, "optimizer.lr=0.5", "--out", str(fresh)]) == 2
    assert re.search(r"with config\.optimizer\.lr [\d.]+, here it is 0\.5; give another --out", capsys.readouterr().err)


@pytest.mark.parametrize(
    "wrong", [["--layers", "featurez.*"], ["--images", "300"], ["optimizer.lr=1e20", "--steps", "30"]]
)
def test_a_command_that_failed_does_not_bind_its_directory(wrong, tmp_path, capsys):
    """Refused before anything was measured, or diverged in training: the corrected command goes on."""
    corrected = [*FRESH, "--checkpoints", "end", "--fisher", "empirical", "--out", str(tmp_path)]
    assert command.main([*wrong[:-2], *corrected, *wrong[-2:]]) == 2
    assert "give another --out" not in capsys.readouterr().err
    assert command.main(corrected) == 0
    assert set(measured(tmp_path)["step"]) == {6}


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5])
def test_checkpoints_of_one_step_are_refused(steps, tmp_path, capsys):
    """With the number of steps that sets them apart."""
    assert command.main([*TINY, *FEW, "--steps", str(steps), "--out", str(tmp_path)]) == 2
    sentence = f"--steps {steps} makes untrained and early both step 0; give --steps 6 or more, or leave one of them"
    assert sentence in capsys.readouterr().err
    command.FreshRun(tiny_config(tmp_path), 6, tmp_path, ["untrained", "early", "middle", "end"])
    command.FreshRun(tiny_config(tmp_path), steps, tmp_path, ["untrained", "end"])


def test_too_little_memory_is_refused_with_the_number(tmp_path, monkeypatch, capsys):
    """Before anything is trained, with the cure of the Fisher that needs most."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**20)
    for fisher, cure in (("exact", "lower --exact-images, or take --fisher mc"), ("mc", "lower --images")):
        assert command.main([*FRESH, "--fisher", fisher, "--out", str(tmp_path / fisher)]) == 2
        err = capsys.readouterr().err
        assert re.search(r"needs about 0\.\d GiB of memory, but this machine has 0\.0 GiB free; " + cure, err)
        assert not (tmp_path / fisher / "networks").exists()


def test_memory_grows_with_what_is_asked_for():
    """Images, labels and structures; the two sets of rows alone are within it."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(64 * 16, 10))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    image = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    model.double()
    settings = list(command._methods(command.parse_items(["kfac", "sua"], "--methods"), tiny_config(Path())).values())

    def needed(images: int, passes: int, methods: int = 2) -> int:
        return memory.bytes_needed(
            model, layers, image, settings[:methods], images=images, backward_passes=passes, num_dampings=3
        )

    rows = 2 * 200 * 64 * 64 * 9 * 8
    assert rows < needed(200, 1) - needed(1, 1)
    assert 10 * rows < needed(200, 10) - needed(1, 10)
    assert needed(200, 1, methods=1) < needed(200, 1)


def test_normalisation_is_held_at_the_images():
    """The outputs are those of training mode, and an example's do not depend on the others any more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    inputs = 3 + 2 * torch.randn(50, 3, 8, 8)
    model.double()
    want = model.train()(inputs.double())
    study.renew_normalisation(model, inputs.double())
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    model.eval()
    # The running variance is the unbiased one.
    torch.testing.assert_close(model(inputs.double()), want, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(model(inputs[:1].double()), model(inputs.double())[:1])
    assert [module.momentum for module in model.modules() if isinstance(module, nn.BatchNorm2d)] == [0.1, 0.1]


def test_sampled_labels_are_drawn_from_the_network():
    """And are the same each time for a seed."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    nn.init.zeros_(model[1].weight)
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    inputs = torch.zeros(4000, 4, dtype=torch.float64)
    one, other = (
        study._with_sampled(model, inputs, torch.zeros(4000).long(), torch.Generator().manual_seed(1)).sampled
        for _ in range(2)
    )
    assert torch.equal(one, other)
    frequencies = torch.bincount(one, minlength=3) / 4000
    torch.testing.assert_close(
        frequencies.double(), model[1].bias.detach().softmax(-1), rtol=0, atol=0.03
    )  # 4 standard deviations


def test_the_columns_are_the_rows_fields():
    """And those of the part before them."""
    assert COLUMNS[-len(Row.__dataclass_fields__) :] == tuple(Row.__dataclass_fields__)
    assert {fisher.value for fisher in FisherType} == {"empirical", "mc", "exact"}
