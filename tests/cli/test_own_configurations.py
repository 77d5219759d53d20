"""Configurations from elsewhere: that of a run, a directory of the user's own, and what neither may hold."""

import os
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from kfac_sua import train
from kfac_sua.compose import compose_cells, compose_config
from kfac_sua.compose.saved import saved_overrides
from kfac_sua.config import Config, ConfigError, to_plain
from kfac_sua.runs.directory import fingerprint, resolved
from kfac_sua.training.files import write_config

UNUSUAL = (
    *(
        "preconditioner=kfac",
        "preconditioner.skip=['*.4',classifier]",
        "schedule=step",
        "schedule.milestones=[0.1,0.25]",
    ),
    *(
        "model=tiny",
        "dataset=digits",
        "dataset.train_size=null",
        "optimizer.lr=1e-5",
        "dataset.data_dir='it\\'s here, [1]'",
    ),
    *("checkpoint_interval_s=null", "capture=false", "preconditioner.damping_rule=exact"),
)


def main(monkeypatch, *arguments: str) -> int:
    """Return the exit code of the training command in this process."""
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    return train.main()


def saved(directory: Path, config: Config) -> Path:
    """Write the configuration of a run as a run does, and return its directory."""
    directory.mkdir(parents=True)
    write_config(directory / "config.yaml", resolved(config, "cpu"))
    return directory


@pytest.mark.parametrize("arguments", [(), UNUSUAL, ("preconditioner=baseline", "optimizer=muon", "model=transformer")])
def test_a_saved_configuration_composes_to_itself(tmp_path, arguments):
    """Numbers, nulls, lists, odd strings and patterns come back as they were, under every optimizer and schedule."""
    config = compose_config([*arguments, "device=cpu", "precision=float32"])
    again = compose_config(saved_overrides(saved(tmp_path / "run", config)))
    assert to_plain(again) == to_plain(config)


def test_a_key_that_came_later_has_the_value_of_what_the_run_did(tmp_path):
    """A configuration of before ``precision`` and ``kl_clip`` keeps its fingerprint."""
    config = compose_config(["device=cpu", "precision=float32", "preconditioner.kl_clip=null"])
    run = saved(tmp_path / "run", config)
    path = run / "config.yaml"
    lines = [line for line in path.read_text().splitlines() if "precision:" not in line and "kl_clip" not in line]
    path.write_text("\n".join(lines))
    assert fingerprint(compose_config(saved_overrides(run)), "cpu") == fingerprint(config, "cpu")


def test_a_run_again_from_its_directory_is_the_run_itself_and_overrides_come_on_top(tmp_path, monkeypatch, capsys):
    """``--rerun`` finds the finished run, shows its configuration, and with another seed trains another one."""
    monkeypatch.chdir(tmp_path)
    tiny = ("model=tiny", "dataset=digits", "dataset.train_size=100", "device=cpu", "epochs=1", "optimizer.lr=0.02")
    assert main(monkeypatch, *tiny) == 0
    (run,) = (path.parent for path in tmp_path.rglob("config.yaml"))
    capsys.readouterr()
    assert main(monkeypatch, f"--rerun={run}") == 0
    assert capsys.readouterr().out.startswith("already finished: ")
    with pytest.raises(SystemExit):  # as Hydra ends what it shows
        raise SystemExit(main(monkeypatch, "--rerun", str(run), "--cfg", "job"))
    assert "lr: 0.02" in capsys.readouterr().out
    assert main(monkeypatch, "seed=1", "--rerun", str(run), "progress=none") == 0
    assert sorted(path.parent.name for path in tmp_path.rglob("run.json")) == ["seed=0", "seed=1"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: 3\n", "is not the configuration of a run: it must name model, dataset"),
        ("[1]\n", "is not the configuration of a run"),
        ("a: [\n", "Cannot read .*config.yaml"),
        ("!!python/object/apply:os.getcwd []\n", "Cannot read .*config.yaml"),
    ],
)
def test_what_is_no_configuration_of_a_run_is_refused(tmp_path, text, sentence):
    """A sentence names the file."""
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        saved_overrides(tmp_path)


def test_another_option_of_a_group_comes_with_its_own_keys(tmp_path):
    """Of the saved keys those of the group are left out; keys beside it stay, and values come on top."""
    run = saved(tmp_path / "run", compose_config(["preconditioner.damping=3", "optimizer.lr=0.5"]))
    config = compose_config(saved_overrides(run, ["preconditioner=kfac", "epochs=3"]))
    assert config.preconditioner == compose_config(["preconditioner=kfac"]).preconditioner
    assert (config.optimizer.lr, config.epochs) == (0.5, 3)
    assert compose_config(saved_overrides(run, ["preconditioner=baseline"])).optimizer.lr == 0.5


@pytest.mark.parametrize("override", ["experiment=quickstart_sua", "scale=smoke", "sweep=lr"])
def test_what_saved_keys_would_win_over_is_refused(tmp_path, override):
    """An experiment, a scale and a grid set keys in files, which the saved ones would pass over in silence."""
    run = saved(tmp_path / "run", compose_config())
    with pytest.raises(ConfigError, match=f"{override} would be passed over"):
        saved_overrides(run, [override])


def test_files_that_the_packages_own_would_be_read_before_are_refused(tmp_path, monkeypatch, capsys):
    """An experiment of a name that there is, and an option of a group."""
    for name in ("experiment/quickstart_sua.yaml", "preconditioner/sua.yaml"):
        own = tmp_path / name.replace("/", "-")
        (own / name).parent.mkdir(parents=True)
        (own / name).write_text("epochs: 77\n")
        assert main(monkeypatch, f"--config-dir={own}", "--cfg=job") == 2
        assert f"{name} would not be read, as configs/{name} comes first" in capsys.readouterr().err


def test_a_named_pipe_among_the_files_is_refused(tmp_path, monkeypatch, capsys):
    """Hydra would wait for it."""
    (tmp_path / "experiment").mkdir()
    os.mkfifo(tmp_path / "experiment/mine.yaml")
    assert main(monkeypatch, f"--config-dir={tmp_path}", "experiment=mine") == 2
    assert "it is a named pipe, not a regular file" in capsys.readouterr().err


def experiment(directory: Path, text: str) -> Path:
    """Write an experiment of the user's own, called mine, and return the directory for ``--config-dir``."""
    (directory / "experiment").mkdir(parents=True)
    (directory / "experiment/mine.yaml").write_text("# @package _global_\n" + text)
    return directory


def test_an_experiment_of_the_users_own_is_checked_numbered_and_summed_up(tmp_path, monkeypatch, capsys):
    """With ``--config-dir`` a sweep is what it is without: every cell is checked before the first one starts."""
    monkeypatch.chdir(tmp_path)
    own = experiment(
        tmp_path / "own", "defaults:\n  - override /model: tiny\n  - override /dataset: digits\nepochs: 1\n"
    )
    arguments = ("-m", f"--config-dir={own}", "experiment=mine", "dataset.train_size=100", "device=cpu")
    assert main(monkeypatch, *arguments, "seed=0,-1") == 2
    assert capsys.readouterr().err == "seed must be between 0 and 4294967295, got -1.\n"
    assert not (tmp_path / "outputs").exists()
    assert main(monkeypatch, *arguments, "seed=0,1") == 0
    out = capsys.readouterr().out
    assert "#2 of 2 started on cpu" in out
    assert "\n2 runs: 2 finished.\n" in out


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hydra: {callbacks: {x: {_target_: os.system}}}", "A file sets hydra.callbacks.x._target_ to 'os.system': "),
        ("hydra: {launcher: {_target_: os.system}}", "hydra.launcher._target_=os.system names code to run"),
        ("hydra: {sweeper: {_target_: hydra_plugins.os.system}}", "_target_=hydra_plugins.os.system names code to run"),
        ("hydra: {run: {dir: x}}", "A file sets hydra.run.dir to 'x': hydra.run.dir is no setting of this command"),
        ("hydra: {job_logging: {root: {handlers: [a]}}}", r"A file sets hydra.job_logging.root.handlers to \['a'\]"),
        ("hydra: {job: {chdir: true}}", "A file sets hydra.job.chdir to true: hydra.job.chdir is no setting"),
        (
            "hydra: {job: {env_set: {A: b}}}",
            "A file sets hydra.job.env_set.A to 'b': hydra.job.env_set.A is",
        ),
        ("hydra: {sweeper: {max_batch_size: '${oc.decode:${oc.env:HOME}}'}}", "names code to run"),
        ("optimizer: {lr: null}", "optimizer.lr must be a number or auto, got null"),
    ],
)
def test_files_of_the_users_own_change_no_more_than_arguments_may(tmp_path, text, sentence):
    """Code, handlers and directories in Hydra's node are refused wherever they stand."""
    with pytest.raises(ConfigError, match=sentence):
        compose_cells(["experiment=mine"], config_dir=experiment(tmp_path, text))


def test_the_directory_of_a_run_is_no_directory_of_configurations(tmp_path, monkeypatch, capsys):
    """``--config-dir RUN`` would pass over the configuration there, and says what reads it."""
    run = saved(tmp_path / "run", compose_config())
    assert main(monkeypatch, f"--config-dir={run}", "--cfg=job") == 2
    assert f"give --rerun {run} if it is that of a run" in capsys.readouterr().err


def test_composing_leaves_the_callers_own_hydra_as_it_was():
    """Twice in a program that uses Hydra itself, and once where composing fails."""
    state = GlobalHydra.instance()
    before, mark = state.hydra, object()
    try:
        state.hydra = mark  # type: ignore[assignment]
        compose_config(["preconditioner=kfac"])
        with pytest.raises(ConfigError):
            compose_config(["nothing=1"])
        assert state.hydra is mark
    finally:
        state.hydra = before


def test_help_and_version_are_the_commands_own(monkeypatch, capsys):
    """``--help`` shows choices and keys but no group that only files use, and ``--version`` this package's."""
    assert main(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    assert "  model           preact_resnet50, tiny, transformer, vgg11 (default)\n" in shown
    assert "  seed=0 " in shown
    assert "damping_rule" in shown
    assert "schema" not in shown
    assert "campaign" not in shown
    assert main(monkeypatch, "--version") == 0
    version = capsys.readouterr().out
    assert version.startswith("kfac_sua 0.")
