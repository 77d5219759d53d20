"""Every campaign at every scale is made of runs that can start."""

import dataclasses

import pytest

from kfac_sua.campaign.cell import Stage
from kfac_sua.campaign.claims import CLAIMS
from kfac_sua.campaign.definition import campaign_names, keep_methods, load_campaign, load_scale, scale_names
from kfac_sua.campaign.plan import Plan
from kfac_sua.config import CONFIG_DIR, ConfigError, KroneckerConfig


def make_plan(root, name="fig1", scale="smoke", *, seeds=2, overrides=("device=cpu",), extra=()) -> Plan:
    """Return a plan that writes below ``root``."""
    campaign = keep_methods(load_campaign(name), (), extra)
    return Plan(campaign, load_scale(campaign, scale), root, seeds, tuple(overrides))


# Composing takes a tenth of a second per curve: the figures at every scale, the ablations at one; each kind once in
# the fast tests.
QUICK = {("fig1", "smoke"), ("fig2", "small"), ("ablation_fisher", "small")}
COMPOSED = [
    pytest.param(name, scale, marks=() if (name, scale) in QUICK else pytest.mark.slow)
    for name in campaign_names()
    for scale in scale_names()
    if name[:3] == "fig" or scale == "small"
]


@pytest.mark.parametrize(("name", "scale"), COMPOSED)
def test_every_run_composes(tmp_path, name, scale):
    """Every cell of every grid passes the checks, optional curves included."""
    campaign = load_campaign(name)
    optional = [curve.method for panel in campaign.panels for curve in panel.curves if curve.optional]
    plan = make_plan(tmp_path, name, scale, extra=optional)
    grids = plan.grids()
    cells = plan.all_grid_cells(grids)
    assert len({cell.name for cell in cells}) == len(cells) == sum(len(list(grid.points())) for grid in grids.values())
    finals = plan.final_cells({key: next(grid.points()) for key, grid in grids.items()})
    assert len(finals) == plan.seeds * len(grids)
    assert all(tmp_path in cell.directory.path.parents for cell in (*cells, *finals))


def test_curves_of_several_precisions_are_refused_before_they_are_trained(tmp_path):
    """Their seconds could not be compared after hours of training; one precision for all is the cure."""
    campaign = load_campaign("fig1")
    (panel,) = campaign.panels
    panel = dataclasses.replace(panel, curves=panel.curves[:2])
    panel.curves[0] = dataclasses.replace(panel.curves[0], overrides=[*panel.curves[0].overrides, "precision=bfloat16"])
    campaign = dataclasses.replace(campaign, panels=[panel])
    scale = load_scale(campaign, "smoke")
    with pytest.raises(ConfigError, match=r"curves of fig1 compute in bfloat16 and float32, .* precision=float32\."):
        Plan(campaign, scale, tmp_path, 1, ("device=cpu",)).check()
    Plan(campaign, scale, tmp_path, 1, ("device=cpu", "precision=float32")).check()


@pytest.mark.parametrize("method", ["baseline", "sua"])
def test_a_label_with_channels_per_group_needs_groups(tmp_path, method):
    """It would stand in figure and report as it is written."""
    campaign = load_campaign("fig1")
    (panel,) = campaign.panels
    curves = [curve for curve in panel.curves if curve.method in (method, "grouped")]
    named = [dataclasses.replace(curve, label="Of {group_size}") for curve in curves]
    plan = Plan(
        dataclasses.replace(campaign, panels=[dataclasses.replace(panel, curves=named)]),
        *(load_scale(campaign, "smoke"), tmp_path, 1, ("device=cpu",)),
    )
    sentence = f"label 'Of {{group_size}}' of {method} in panel vgg11 of fig1 .* preconditioner={method} has no groups"
    with pytest.raises(ConfigError, match=sentence):
        plan.check()


@pytest.mark.parametrize("scale", scale_names())
@pytest.mark.parametrize("name", campaign_names())
def test_tuning_budgets_are_equal(tmp_path, name, scale):
    """Before any grid grows, every curve of a campaign has as many cells."""
    assert len({len(list(grid.points())) for grid in make_plan(tmp_path, name, scale).grids().values()}) == 1


@pytest.mark.parametrize("name", campaign_names())
def test_claims_are_known(name):
    """What a campaign says it decides, claims.py can decide."""
    assert set(load_campaign(name).claims) <= set(CLAIMS)


def test_all_claims_are_decided_by_the_two_figures():
    """Figure 1 and Figure 2 together decide all six claims."""
    assert {claim for name in ("fig1", "fig2") for claim in load_campaign(name).claims} == set(CLAIMS)


def test_every_published_curve_has_its_experiment():
    """The curves that are not optional are the experiments of the figure, one to one."""
    for name in ("fig1", "fig2"):
        curves = [curve for panel in load_campaign(name).panels for curve in panel.curves if not curve.optional]
        used = {curve.overrides[0].removeprefix("experiment=") for curve in curves}
        assert used == {path.stem for path in (CONFIG_DIR / "experiment").glob(f"{name}_*.yaml")}
        assert all(len(curve.overrides) == 1 for curve in curves)


def test_full_scale_is_the_paper(tmp_path):
    """Width 1, batch 100, momentum 0.9, groups and periods of Sec. 3."""
    for name, group_size, period in (("fig1", 32, 50), ("fig2", 64, 64)):
        plan = make_plan(tmp_path, name, "full")
        for cell in plan.final_cells({key: next(grid.points()) for key, grid in plan.grids().items()}):
            config = cell.config
            assert (config.model.width, config.batch_size, config.optimizer.momentum) == (1.0, 100, 0.9)
            assert config.dataset.train_size is None
            if isinstance(config.preconditioner, KroneckerConfig):
                assert config.preconditioner.inverse_period == period
                assert config.preconditioner.group_size in (None, group_size)
                assert (config.preconditioner.group_size is None) != ("grouped" in cell.method)


def test_later_overrides_win(tmp_path):
    """The user's overrides replace those of the scale, and the grid's those of the run."""
    plan = make_plan(tmp_path, "fig2", "small", overrides=("device=cpu", "epochs=2", "model.width=0.25"))
    cell = plan.all_grid_cells(plan.grids())[0]
    assert (cell.config.epochs, cell.config.model.width) == (2, 0.25)
    assert cell.stage is Stage.grid
    assert cell.command.count("epochs=") == 1


def test_seeds_are_interleaved(tmp_path):
    """All curves of one seed run before the next seed, so that a drift of the machine meets all alike."""
    plan = make_plan(tmp_path, seeds=2)
    finals = plan.final_cells({key: next(grid.points()) for key, grid in plan.grids().items()})
    assert [cell.config.seed for cell in finals] == [0] * 5 + [1] * 5


def test_command_of_a_cell_is_that_run(tmp_path):
    """The printed command, composed by Hydra, gives the very configuration and directory."""
    from kfac_sua.campaign.cell import run_directory
    from kfac_sua.compose import compose_config

    plan = make_plan(tmp_path)
    for cell in plan.all_grid_cells(plan.grids())[::7]:
        config = compose_config(cell.overrides)
        assert config == cell.config
        assert run_directory(config, "cpu") == cell.directory


def test_unknown_names_are_answered_with_the_known():
    """Campaigns, scales and methods."""
    with pytest.raises(ConfigError, match=r"no campaign 'fig3'; choose one of .*fig1, fig2"):
        load_campaign("fig3")
    with pytest.raises(ConfigError, match=r"no scale 'tiny'; choose one of full, small, smoke"):
        load_scale(load_campaign("fig1"), "tiny")
    with pytest.raises(ConfigError, match=r"fig1 has no method 'adam'; it has baseline, .*adamw"):
        keep_methods(load_campaign("fig1"), (), ("adam",))


def test_optional_curves_are_off_by_default():
    """Comparators run only when asked for."""
    assert keep_methods(load_campaign("fig1"), (), ()).methods() == [
        "baseline",
        "kfac",
        "grouped",
        "sua",
        "sua_grouped",
    ]
    assert "muon" in keep_methods(load_campaign("fig1"), (), ("muon",)).methods()
    assert keep_methods(load_campaign("fig1"), ("sua", "baseline"), ()).methods() == ["baseline", "sua"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("name: fig9", "calls itself 'fig9'"),
        ("figure: fig3", "figure must be fig1 or fig2"),
        ("sacle: 3", "sacle"),
    ],
)
def test_a_broken_campaign_file_is_named(tmp_path, monkeypatch, change, message):
    """The message gives the file and what is wrong in it."""
    key = change.split(":")[0]
    lines = (CONFIG_DIR / "campaign" / "fig1.yaml").read_text().splitlines()
    text = "\n".join([*(line for line in lines if not line.startswith(f"{key}:")), change])
    (tmp_path / "fig1.yaml").write_text(text)
    monkeypatch.setattr("kfac_sua.campaign.definition._CAMPAIGNS", tmp_path)
    with pytest.raises(ConfigError, match=r"configs/campaign/fig1.yaml.*" + message):
        load_campaign("fig1")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=0.5", "optimizer.lr comes from the grids"),
        ("preconditioner=sua", "preconditioner makes the curves"),
        ("scale=full", "scale is given as --scale"),
        ("seed=3", "seed is given as --seeds"),
        ("epochs", "cannot be read as key=value"),
    ],
)
def test_what_the_campaign_sets_is_not_overridden(tmp_path, override, message):
    """A key that would be ignored, or would turn one curve into another, is refused."""
    with pytest.raises(ConfigError, match=message):
        make_plan(tmp_path, overrides=(override,))


@pytest.mark.parametrize("name", ["a b", "lr=0.3", "it's", "${x}", "(1,2)", "~", "back\\slash"])
def test_any_directory_can_be_given(tmp_path, name):
    """Characters that mean something to Hydra stay characters."""
    plan = make_plan(tmp_path / name)
    cell = plan.grid_cells(*next(iter(plan.grids().items())))[0]
    assert cell.config.output_dir == str(tmp_path / name / "grid")


def test_only_optional_methods_are_added():
    """A method that is there anyway is no addition."""
    with pytest.raises(ConfigError, match="kfac is no optional method of fig1; these are adamw, muon, sgd_no_bn"):
        keep_methods(load_campaign("fig1"), (), ("kfac",))
