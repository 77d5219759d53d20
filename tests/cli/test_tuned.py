"""What ``auto`` stands for: numbers before anything is recorded, for every network, structure, width and optimizer."""

import itertools
import re
import sys

import pytest
import yaml
from hydra import compose, initialize_config_dir

from kfac_sua import train
from kfac_sua import tuned as tuned_module
from kfac_sua.checks import check
from kfac_sua.compose import compose_config, to_config
from kfac_sua.config import (
    CONFIG_DIR,
    CONFIG_NAME,
    VERSION_BASE,
    ConfigError,
    KroneckerConfig,
    ModelName,
    OptimizerName,
    PreconditionerName,
)
from kfac_sua.runs.directory import fingerprint
from kfac_sua.tuned import auto_keys, opening_line, tuned


@pytest.mark.parametrize(("preconditioner", "model"), list(itertools.product(PreconditionerName, ModelName)))
def test_every_structure_and_network_has_numbers(preconditioner, model):
    """A command without a learning rate can be run, at any width, and stays a valid configuration."""
    config = compose_config([f"preconditioner={preconditioner}", f"model={model}", "model.width=0.3"])
    check(config)
    assert isinstance(config.optimizer.lr, float)
    if isinstance(config.preconditioner, KroneckerConfig):
        assert isinstance(config.preconditioner.damping, float)


@pytest.mark.parametrize("optimizer", OptimizerName)
def test_every_optimizer_has_a_learning_rate(optimizer):
    """The comparators have those of their authors."""
    config = compose_config(["preconditioner=baseline", f"optimizer={optimizer}"])
    assert config.optimizer.lr == {"adamw": 0.001, "muon": 0.02}.get(optimizer, config.optimizer.lr)
    assert config.optimizer.lr > 0


@pytest.mark.parametrize("width", [1.0, 0.25])
def test_numbers_differ_where_the_network_asks_for_it(width):
    """The nearest width decides, and what was not tried at this width says so."""
    exact = tuned(PreconditionerName.sua, ModelName.vgg11, width)
    near = tuned(PreconditionerName.sua, ModelName.vgg11, width * 1.01)
    assert (near.lr, near.damping) == (exact.lr, exact.damping)
    assert "provisional at this width" not in exact.evidence
    assert "provisional at this width" in near.evidence


def test_auto_and_its_number_are_one_run():
    """The word never reaches the fingerprint: giving the numbers by hand is the same run."""
    by_word = compose_config(["preconditioner=sua", "optimizer.lr=auto", "preconditioner.damping=auto"])
    numbers = [f"optimizer.lr={by_word.optimizer.lr!r}", f"preconditioner.damping={by_word.preconditioner.damping!r}"]
    by_hand = compose_config(["preconditioner=sua", *numbers])
    assert fingerprint(by_word, "cpu") == fingerprint(by_hand, "cpu")
    assert compose_config(["preconditioner=sua"]) == by_hand


def test_one_of_the_two_may_be_given():
    """A damping of one's own keeps the learning rate that the network has."""
    config = compose_config(["preconditioner=sua", "preconditioner.damping=0.7"])
    assert config.preconditioner.damping == 0.7
    assert config.optimizer.lr == compose_config(["preconditioner=sua"]).optimizer.lr


@pytest.mark.parametrize(
    ("override", "shown"),
    [
        ("optimizer.lr=fast", "'fast'"),
        ("optimizer.lr=null", "null"),
        ("preconditioner.damping=[1,2]", "[1, 2]"),
        ("optimizer.lr=true", "true"),
        ("preconditioner.damping=AUTO", "'AUTO'"),
    ],
)
def test_anything_else_is_refused_by_key_and_value(override, shown):
    """Neither a number nor the word: one sentence."""
    with pytest.raises(ConfigError) as refusal:
        compose_config([override])
    assert str(refusal.value) == f"{override.partition('=')[0]} must be a number or auto, got {shown}."


def test_numbers_are_converted():
    """Whole numbers and text that is one are what they say."""
    for text in ("1", "1.0", "'1'", "1e0"):
        assert repr(compose_config([f"optimizer.lr={text}"]).optimizer.lr) == "1.0"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["preconditioner=sua", "optimizer.lr=0.5", "preconditioner.damping=2"], r"lr 0\.5, damping 2"),
        (["preconditioner=baseline", "optimizer.lr=0.5"], r"lr 0\.5"),
        (["experiment=quickstart_grouped"], r"lr 0\.1, damping 1, groups of 8"),
        (["preconditioner=sua"], r"lr \S+, damping \S+ \(auto lr and damping: .+\)"),
        (["preconditioner=sua", "optimizer.lr=0.5"], r"lr 0\.5, damping \S+ \(auto damping: .+\)"),
        (["preconditioner=baseline"], r"lr \S+ \(auto lr: .+\)"),
        (["preconditioner=sua", "model.batch_norm=false"], r".+, with batch normalisation\)"),
        (["experiment=quickstart_sua"], r"lr 0\.1, damping 1"),  # numbers of its own, be they those of the table
    ],
)
def test_a_run_says_which_numbers_are_the_tables(overrides, expected):
    """Those that were given stand by themselves; of the others the line says where they were tried."""
    with initialize_config_dir(version_base=VERSION_BASE, config_dir=str(CONFIG_DIR)):
        raw = compose(CONFIG_NAME, overrides)
    assert re.fullmatch(expected, opening_line(to_config(raw), auto_keys(raw)))


def test_the_command_prints_numbers_and_writes_them(monkeypatch, tmp_path, capsys):
    """The opening line gives both numbers, and config.yaml holds them instead of the word."""
    overrides = ["dataset=digits", "model=tiny", "epochs=1", "device=cpu"]
    monkeypatch.setattr(sys, "argv", ["train", *overrides, f"output_dir={tmp_path}"])
    assert train.main() == 0
    config = compose_config(overrides)
    line = f"lr {config.optimizer.lr:g}, damping {config.preconditioner.damping:g} (auto lr and damping: "
    assert line in capsys.readouterr().out
    (path,) = tmp_path.rglob("config.yaml")
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert written["optimizer"]["lr"] == config.optimizer.lr
    assert written["preconditioner"]["damping"] == config.preconditioner.damping


def test_what_the_table_does_not_know_is_refused_for_auto_alone(monkeypatch):
    """A network that was just added, or an optimizer, must not train with the numbers of another one."""
    monkeypatch.setattr(tuned_module, "TABLE", tuple(row for row in tuned_module.TABLE if row.model != "tiny"))
    with pytest.raises(ConfigError, match=r"auto has no value for model=tiny yet; give optimizer\.lr, and"):
        compose_config(["model=tiny", "dataset=digits"])
    numbers = ["optimizer.lr=0.1", "preconditioner.damping=1"]
    assert compose_config(["model=tiny", "dataset=digits", *numbers]).optimizer.lr == 0.1
    monkeypatch.setattr(tuned_module, "_COMPARATORS", {})
    with pytest.raises(ConfigError, match="auto has no value for optimizer=adamw yet"):
        compose_config(["optimizer=adamw", "preconditioner=baseline"])
