"""Every file in configs composes, converts and passes the checks."""

import functools
from pathlib import Path

import pytest
import yaml

from kfac_sua.checks import RANGES, check
from kfac_sua.compose import cells, compose_cells, compose_config
from kfac_sua.config import (
    CONFIG_DIR,
    Config,
    ConfigError,
    KroneckerConfig,
    ModelName,
    OptimizerName,
    SGDConfig,
    StepScheduleConfig,
    to_plain,
)
from kfac_sua.preconditioner import KroneckerSettings

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment").glob("*.yaml"))
SETTINGS = ("baseline", "kfac", "sua", "grouped", "sua_grouped")


def options(group: str) -> list[str]:
    """Return the files of a group."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


@functools.cache
def experiment(name: str) -> Config:
    """Return the configuration of an experiment, composed once."""
    return compose_config([f"experiment={name}"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_is_called_after_its_preconditioner(name):
    """An experiment is a valid run of the preconditioner that ends its name."""
    config = experiment(name)
    assert name.endswith(f"_{config.preconditioner.name}")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_says_what_it_is_for(name):
    """The first lines give figure and curve, command, where lr and damping come from, and the expected time."""
    lines = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith("# Figure ")
    assert f"python -m kfac_sua.train experiment={name}" in lines[2]
    assert lines[3].startswith("# lr and damping: ")
    if name.startswith("fig"):  # trained at any width, for which one number would not do
        assert "auto" in lines[3]
        assert not {"lr:", "damping:"} & {line.strip().split(" ")[0] for line in lines}
    else:
        grid = lines[3].rsplit(" in the grid of ", 1)[1].rstrip(".")
        assert (CONFIG_DIR.parent / grid).is_file()
    assert lines[4].startswith("# Expected time: ")


@pytest.mark.parametrize("family", ["quickstart", "first_light", "fig1"])
def test_experiments_of_a_figure_differ_in_preconditioner_and_learning_rate_alone(family):
    """The five curves of one figure share everything but what each was tuned for."""
    configs = [to_plain(experiment(f"{family}_{name}")) for name in SETTINGS]
    assert all(config["optimizer"].pop("lr") > 0 for config in configs)
    preconditioners = [config.pop("preconditioner")["name"] for config in configs]
    assert preconditioners == list(SETTINGS)
    assert all(config == configs[0] for config in configs)


def test_command_line_wins_over_the_experiment():
    """An experiment is a starting point: what is typed replaces what it says."""
    config = compose_config(["experiment=quickstart_sua", "epochs=3", "dataset=cifar10"])
    assert (config.epochs, config.dataset.name, config.model.width) == (3, "cifar10", 0.25)


@pytest.mark.parametrize("group", ["model", "dataset", "preconditioner", "optimizer", "schedule"])
def test_every_option_composes_under_its_own_name(group):
    """The name inside a file is that of the file."""
    for name in options(group):
        assert getattr(compose_config(["preconditioner=baseline", f"{group}={name}"]), group).name == name


def test_every_option_explains_every_key():
    """A comment stands beside or above every value of the groups, so that the YAML files document themselves."""
    groups = ("model", "dataset", "kronecker", "optimizer", "schedule", "preconditioner")
    for path in [CONFIG_DIR / "config.yaml", *(path for group in groups for path in (CONFIG_DIR / group).iterdir())]:
        text = path.read_text()
        values = text.split("hydra:\n")[0].split("- override")[-1] if path.stem == "config" else text
        for line in values.splitlines():
            is_value = ": " in line and not line.startswith(("#", "name:", " "))
            assert not is_value or "#" in line, f"{path.name}: {line}"


# Short ones: composing takes a fifth of a second per cell.
QUICK = {"lr_damping_short", "lr_short", "optuna_lr_damping"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in options("sweep")]
)
def test_sweep_is_the_product_of_its_grids(name):
    """A sweep needs no -m, and has one cell per combination of its values; of an interval both ends are checked."""
    content = yaml.safe_load((CONFIG_DIR / "sweep" / f"{name}.yaml").read_text())
    params = content.get("hydra", content)["sweeper"]["params"]
    expected = 1
    for values in params.values():
        expected *= 2 if "interval" in str(values) else len(str(values).split(","))
    found = compose_cells([f"sweep={name}", "preconditioner=kfac"])
    cells = found.configs
    assert found.are_all == ("interval" not in str(params))
    assert found.num_runs == (expected if found.are_all else content["hydra"]["sweeper"]["n_trials"])
    assert len({str(to_plain(cell)) for cell in cells}) == len(cells) == expected


def test_multirun_multiplies_settings_and_values():
    """Two preconditioners times two learning rates are four runs, the last key varying fastest."""
    cells = compose_cells(["preconditioner=sua,grouped", "optimizer.lr=0.1,0.2", "epochs=3"], multirun=True).configs
    assert [(cell.preconditioner.name, cell.optimizer.lr) for cell in cells] == [
        ("sua", 0.1),
        ("sua", 0.2),
        ("grouped", 0.1),
        ("grouped", 0.2),
    ]


def test_a_long_sweep_says_that_it_is_being_checked(monkeypatch, capsys):
    """Checking every cell takes a while before the first run; a short sweep says nothing."""
    compose_cells(["seed=0,1,2"], multirun=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cells, "_MANY_CELLS", 2)
    compose_cells(["seed=0,1,2"], multirun=True)
    assert capsys.readouterr().err == "checking the configurations of 3 runs\n"


def test_command_line_replaces_a_grid_of_the_sweep():
    """sweep=lr with a learning rate on the command line is that one run."""
    (cell,) = compose_cells(["sweep=lr", "optimizer.lr=0.5"]).configs
    assert cell.optimizer.lr == 0.5


def test_several_experiments_by_pattern():
    """The five quickstart curves can be asked for by one pattern."""
    cells = compose_cells(["experiment=glob(quickstart_*)"], multirun=True).configs
    assert {cell.preconditioner.name for cell in cells} == set(SETTINGS)


def test_defaults_in_yaml_are_the_package_defaults():
    """The command line starts from the settings of the class, but for damping and where the inverse is applied."""
    config = compose_config(["preconditioner=kfac", "preconditioner.damping=0.1"]).preconditioner
    assert isinstance(config, KroneckerConfig)
    assert config.settings(width=1) == KroneckerSettings(application="auto")


def test_types_are_converted():
    """What comes out is dataclasses with enums and numbers, not text."""
    config = compose_config(["optimizer.lr=1", "schedule=step", "schedule.milestones=[0.25,0.5]"])
    assert isinstance(config.optimizer, SGDConfig)
    assert isinstance(config.optimizer.lr, float)
    assert isinstance(config.schedule, StepScheduleConfig)
    assert config.schedule.milestones == [0.25, 0.5]


def test_every_range_is_that_of_a_key():
    """A range whose key is in no option of its group would check nothing."""
    chosen = [f"{group}={name}" for group in ("model", "optimizer", "schedule") for name in options(group)]
    configs = [to_plain(compose_config(["preconditioner=baseline", choice])) for choice in chosen]
    configs.append(to_plain(compose_config(["preconditioner=sua"])))
    keys = {
        f"{group}.{key}"
        for config in configs
        for group in config
        if isinstance(config[group], dict)
        for key in config[group]
    } | set(configs[0])
    assert set(RANGES) <= keys


@pytest.mark.parametrize(("group", "name"), [("optimizer", OptimizerName.muon), ("model", ModelName.preact_resnet50)])
def test_name_without_its_keys_is_refused(group, name):
    """A YAML file that sets the name alone would run one option and be recorded as another."""
    config = compose_config(["preconditioner=baseline"])
    getattr(config, group).name = name
    with pytest.raises(ConfigError, match=f"changes the name but not the other keys of {group}; give {group}={name}"):
        check(config)


def test_plain_values_hold_no_enums():
    """What goes to run.json is made of JSON's own types."""

    def kinds(value):
        if isinstance(value, dict):
            return set().union(*map(kinds, value.values()))
        return set().union(*map(kinds, value)) if isinstance(value, list) else {type(value)}

    assert kinds(to_plain(compose_config(["preconditioner.skip=[a]"]))) == {int, float, str, bool, type(None)}


def test_config_directory_is_the_checkout():
    """In a checkout the YAML files are those at its root."""
    assert Path(__file__).parents[2] / "configs" == CONFIG_DIR
