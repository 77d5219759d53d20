"""Reports of campaigns made by hand: tuning, provenance, and what differs from the paper."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from campaign.report_inputs import (
    COMMIT,
    EPOCHS,
    TWO,
    campaign,
    choice,
    final_frame,
    grid_frame,
    report_input,
    rows,
    run_infos,
    section,
    written,
)

from kfac_sua.campaign.report.tuning import budget_sentence
from kfac_sua.markdown import escape, number
from kfac_sua.runs.final_table import CollectError


def test_tuning_table_has_grid_bounds_and_the_choice(tmp_path):
    """Bounds and counts are the grid's; edges, diverged cells and missing choices are named."""
    definition = campaign(claims=[])
    grid = grid_frame(definition)
    diverged = (grid["method"] == "sua") & (grid["base_lr"] == 0.3) & (grid["damping"] == 0.01)
    grid.loc[diverged, "status"] = "diverged"
    choices = [choice("vgg11", method, num_grown=2 * (method == "sua")) for method in ("baseline", "sua")]
    edge = "damping 0.01 is the lowest tried"
    choices[1] = dataclasses.replace(choices[1], edges=(edge,))
    markdown, _ = written(report_input(definition, final_frame(definition), grid=grid, choices=choices), tmp_path)
    text = section(markdown, "Tuning")
    assert rows(text, "SUA")[0][1:] == [
        *("0.1 to 0.3 (2)", "0.01 to 1 (3)", "6", "2", "1", "0"),
        *("**0.1**", "**0.01**", "12.3 %", "0.4321"),
    ]
    assert rows(text, "Batch-norm baseline")[0][2] == "–"
    assert rows(text, "Batch-norm baseline")[0][8] == "–"
    assert rows(text, "K-FAC")[0][4:] == ["–", "0", "0", "–", "–", "–", "–"]
    assert f"SUA: the choice is on an edge of its grid, {edge}" in text
    assert "SUA: diverged at lr 0.3, damping 0.01." in text
    assert "K-FAC: no cell was chosen" in text
    assert "Selection rule: The lowest validation error." in text


@pytest.mark.parametrize(
    ("cells", "grown", "expected"),
    [
        ({"a": 12, "b": 12}, {"a": 0, "b": 0}, "Tuning budgets are **equal**: 12 runs for each of 2 methods."),
        (
            {"a": 12, "b": 15},
            {"a": 0, "b": 3},
            "Tuning budgets in runs are **not equal** (a: 12; b: 15)."
            " Before grids grew beyond an edge, all methods had 12.",
        ),
        (
            {"a": 6, "b": 15},
            {"a": 0, "b": 3},
            "Tuning budgets in runs are **not equal** (a: 6; b: 15)."
            " They differed before grids grew, too (a: 6; b: 12).",
        ),
        (
            {"a": 6, "b": 12},
            {"a": 0, "b": 0},
            "Tuning budgets in runs are **not equal** (a: 6; b: 12). No grid has grown: they differ from the start.",
        ),
        ({"a": 6}, {"a": 0}, "Tuning budget in runs: a: 6."),
    ],
)
def test_budget_sentence(cells, grown, expected):
    """It says whether budgets are equal, and whether growth is the reason if not."""
    assert budget_sentence(cells, grown) == expected


def test_budgets_are_counted_in_the_grid(tmp_path):
    """The sentence counts the runs that there are."""
    definition = campaign(claims=[])
    finals = final_frame(definition)
    assert "**equal**: 6 runs" in written(report_input(definition, finals), tmp_path)[0]
    grid = grid_frame(definition, {"kfac": 8})
    choices = [choice("vgg11", method, num_grown=2 * (method == "kfac")) for method in definition.methods()]
    text = section(written(report_input(definition, finals, grid=grid, choices=choices), tmp_path)[0], "Tuning")
    assert "**not equal** (Batch-norm baseline: 6; K-FAC: 8;" in text
    assert "all methods had 6." in text


def test_limits_state_the_number_of_distinct_resamples(tmp_path):
    """It is the number of multisets of three seeds."""
    markdown, _ = written(report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO))), tmp_path)
    distinct = {tuple(sorted(draw)) for draw in np.ndindex(3, 3, 3)}
    assert "With 3 finished seeds, the fewest of all methods that have any" in markdown
    assert f"a bootstrap can form {len(distinct)} different means" in markdown


def test_differences_are_computed_from_the_configurations(tmp_path):
    """What departs is named with the paper's value, and with whose it is if it is not everyone's."""
    definition = campaign({"vgg11": ["baseline", "sua", "adamw"]}, claims=[])
    finals = final_frame(definition)
    infos = run_infos(finals, config={"batch_size": 50})
    for info in infos:
        info.config["model"] = info.config["model"] | {"width": 0.25}
        info.config["dataset"] = info.config["dataset"] | {"train_size": 10_000}
        if info.config["preconditioner"]["name"] == "adamw":
            info.config["optimizer"] = {"name": "adamw", "lr": 0.1}
    markdown, _ = written(report_input(definition, finals, infos=infos), tmp_path)
    text = section(markdown, "What differs from the paper")
    assert (
        "depart from it in: width 0.25 instead of 1; training images 10,000 of 45,000 instead of all;"
        " batch size 50 instead of 100; optimizer adamw instead of sgd for AdamW."
    ) in text
    assert "- The head is one linear layer." in text
    assert rows(text, "optimizer")[0][1:] == ["sgd", "sgd; adamw (AdamW)", "**no**"]
    assert rows(text, "epochs")[0][1:] == ["not stated", str(EPOCHS), "–"]
    assert rows(text, "seeds per method")[0][2] == "3 (0, 1, 2)"
    assert f"Runs of {EPOCHS} epochs on 10,000 of 45,000 training images." in section(markdown, "Final numbers")


def test_runs_as_in_the_paper_are_said_to_follow_it(tmp_path):
    """Full width, all images and the paper's batch leave nothing to declare."""
    markdown, _ = written(report_input(campaign(), final_frame(campaign())), tmp_path)
    text = section(markdown, "What differs from the paper")
    assert "these runs follow it" in text
    assert "**no**" not in text
    assert rows(text, "training images")[0][1:] == ["all", "all 45,000", "yes"]


@pytest.mark.parametrize(
    ("group_size", "width", "changes", "expected"),
    [
        (32, 1.0, {}, ["32", "yes"]),
        (64, 1.0, {}, ["64", "**no**"]),
        (32, 0.25, {"group_size_scaling": "width"}, ["8 at width 0.25 (as many groups as of 32 at width 1)", "yes"]),
        (32, 0.25, {}, ["32 at width 0.25 (as many groups as of 128 at width 1)", "**no**"]),
        (8, 0.25, {"group_size_scaling": "none"}, ["8 at width 0.25 (as many groups as of 32 at width 1)", "yes"]),
    ],
)
def test_groups_are_as_in_the_paper_where_a_layer_has_as_many(tmp_path, group_size, width, changes, expected):
    """At a reduced width as many channels per group are fewer groups; runs from before the key scaled nothing."""
    definition = campaign({"vgg11": ["baseline", "grouped"]}, claims=[])
    finals = final_frame(definition)
    infos = run_infos(finals)
    for info in infos:
        info.config["model"] = info.config["model"] | {"width": width}
        if info.config["preconditioner"]["name"] == "grouped":
            info.config["preconditioner"] |= {"group_size": group_size} | changes
    markdown, _ = written(report_input(definition, finals, infos=infos), tmp_path)
    text = section(markdown, "What differs from the paper")
    assert rows(text, "group size")[0][1:] == ["32", *expected]
    assert ("group size" in text.split("\n\n")[0]) == (expected[1] != "yes")


def test_settings_that_a_structure_does_not_read_are_none_of_its_runs(tmp_path):
    """Their defaults in its configuration change nothing; of a structure that is unknown here they may."""
    definition = campaign({"vgg11": ["kfac", "sua"]}, claims=[])
    finals = final_frame(definition)
    settings = {"weight_sharing": "expand", "damping_rule": "factored", "inverse_period": 50}

    def rows_of(*structures: str) -> list[list[list[str]]]:
        """Return the rows of three settings where the curves have these structures."""
        infos = run_infos(finals)
        for info in infos:
            method = info.config["preconditioner"]["name"]
            structure = dict(zip(("kfac", "sua"), structures, strict=True))[method]
            info.config["preconditioner"] |= settings | {"structure": structure}
        markdown, _ = written(report_input(definition, finals, infos=infos), tmp_path)
        text = section(markdown, "What differs from the paper")
        return [rows(text, name) for name in ("weight sharing", "damping rule", "mini-batches between inverses")]

    def here(*structures: str) -> list[str | None]:
        """Return their values; None without a row."""
        return [found[0][2] if found else None for found in rows_of(*structures)]

    assert here("kfac", "sua") == ["expand", "factored", "50"]
    assert here("activation_only", "eigenvalue_corrected") == [None, None, "50"]
    assert here("not_installed", "not_installed") == ["expand", "factored", "50"]


def test_the_initialisation_is_an_open_choice_that_older_runs_made_too(tmp_path):
    """Runs from before the key had what is its default now."""
    finals = final_frame(campaign())
    infos = run_infos(finals)
    for info in infos:
        if info.config["preconditioner"]["name"] == "sua":
            info.config["model"] = info.config["model"] | {"initialisation": "pytorch"}
    markdown, _ = written(report_input(campaign(), finals, infos=infos), tmp_path)
    text = section(markdown, "What differs from the paper")
    assert rows(text, "initialisation")[0][1:] == ["not stated", r"he\_fan\_out; pytorch (SUA)", "–"]
    assert "What it leaves open was chosen here, as in the table: initialisation, " in text


def test_provenance_is_that_of_the_records(tmp_path):
    """Where runs differ in machine or commit, all are listed with their numbers, and the opening warns."""
    finals = final_frame(campaign(TWO))
    report = report_input(campaign(TWO, claims=[]), finals)
    infos = [*report.infos[:-2], dataclasses.replace(report.infos[-2], commit=f"{COMMIT}+dirty")]
    infos.append(dataclasses.replace(report.infos[-1], commit=None, device_name="another", num_threads=2))
    markdown, _ = written(dataclasses.replace(report, infos=infos), tmp_path)
    text = section(markdown, "Hardware, versions and commit")
    assert f"a processor (cpu), 1 CPU thread: {len(infos) - 1} runs; another (cpu), 2 CPU threads: 1 run" in text
    assert f"`{COMMIT}`: {len(infos) - 2} runs; `{COMMIT}+dirty` (**uncommitted changes**): 1 run" in text
    assert "not recorded (not a git checkout): 1 run" in text
    assert "python 3.11.7, torch 2.14.1, torchvision not installed" in text
    assert "2026-01-02 03:04 UTC to 2026-01-02 04:04 UTC" in text
    hours = finals[finals["epoch"] == EPOCHS]["train_time_s"].sum() / 3600
    assert f"6 final runs with {number(hours, 3)} hours of training" in text
    assert "**Caution: 1 run was made with uncommitted changes and the runs are of 3 different states" in markdown
    commands = section(markdown, "Commands")
    assert report.command in commands
    assert all(command in commands for command in report.cell_commands.values())
    assert "every run: `scale=small`" in commands
    assert "`sweep=lr_fine`" in commands


@pytest.mark.parametrize(
    ("changes", "caution"),
    [
        ({}, ""),
        ({"machines": ["node2 (a processor)"]}, "2 machines; their seconds cannot be compared, unless these are alike"),
        (
            {"machines": ["node1 (a processor)", "node2 (a processor)"]},
            "2 machines; their seconds cannot be compared, unless these are alike and were equally busy**",
        ),
        (
            {"device_name": "another", "machines": ["node2 (another)"]},
            "2 devices and 2 machines; their seconds cannot be compared**",
        ),
    ],
)
def test_seconds_from_several_machines_are_not_compared_without_a_word(tmp_path, changes, caution):
    """Final runs of a cluster come from many hosts, one that was queued again even from two: the opening says so."""
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)))
    infos = [dataclasses.replace(info, machines=["node1 (a processor)"]) for info in report.infos]
    finals = [*infos[-6:-1], dataclasses.replace(infos[-1], **changes)]
    report = dataclasses.replace(report, infos=[*infos[:-6], *finals], final_infos=finals)
    markdown, _ = written(report, tmp_path)
    assert f"**Caution: the final runs are of {caution}" in markdown if caution else "Caution" not in markdown
    where = section(markdown, "Hardware, versions and commit")
    last = escape(" and then ".join(finals[-1].machines))
    assert (f"Machines: node1 (a processor): {len(infos) - 1} runs; {last}: 1 run" in where) == bool(changes)


def test_precision_is_told_beside_the_hardware_and_the_settings(tmp_path):
    """One for all runs; grids may have been searched in another, which is counted."""
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)))
    new = {"capture": "auto", "deterministic": False, "precision": "tf32"}
    infos = [dataclasses.replace(info, device="cuda", config=info.config | new) for info in report.infos]
    markdown, _ = written(dataclasses.replace(report, infos=infos, final_infos=infos[-6:]), tmp_path)
    where = section(markdown, "Hardware, versions and commit")
    assert "Precision of convolutions and products: tf32\n" in where
    assert rows(section(markdown, "What differs from the paper"), "precision")[0][1:] == ["not stated", "tf32", "–"]
    assert "Caution" not in markdown
    infos[0] = dataclasses.replace(infos[0], config=infos[0].config | {"precision": "float32"})
    markdown, _ = written(dataclasses.replace(report, infos=infos, final_infos=infos[-6:]), tmp_path)
    assert f"tf32: {len(infos) - 1} runs; float32: 1 run\n" in section(markdown, "Hardware, versions and commit")


@pytest.mark.parametrize(
    ("device", "changes", "caution"),
    [
        ("cuda", {"capture": False}, "2 settings of capture; their seconds cannot be compared**"),
        ("cuda", {"deterministic": True}, "2 settings of deterministic; their seconds cannot be compared**"),
        ("cuda", {"capture": True}, ""),
        ("cpu", {"capture": False, "deterministic": True}, ""),
    ],
)
def test_seconds_of_runs_that_compute_in_other_ways_are_not_compared_without_a_word(tmp_path, device, changes, caution):
    """On a GPU it costs time not to capture steps, or to give the same bits every time; on a CPU it is all the same."""
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)))
    new = {"capture": "auto", "deterministic": False, "precision": "float32"}
    infos = [dataclasses.replace(info, device=device, config=info.config | new) for info in report.infos]
    infos[-1] = dataclasses.replace(infos[-1], config=infos[-1].config | changes)
    markdown, _ = written(dataclasses.replace(report, infos=infos, final_infos=infos[-6:]), tmp_path)
    assert f"**Caution: the final runs are of {caution}" in markdown if caution else "Caution" not in markdown


def test_final_runs_of_several_precisions_are_refused(tmp_path):
    """Their seconds per epoch stand side by side in one table, so there is no report, whatever else it would say."""
    definition = campaign(TWO, claims=[])
    finals = final_frame(definition)
    report = report_input(definition, finals)
    finals = finals.assign(precision=finals["method"].map({"baseline": "tf32", "sua": "float32"}))
    with pytest.raises(CollectError, match=r"\(float32: sua; tf32: baseline\)"):
        written(dataclasses.replace(report, finals=finals), tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_clean_commit_needs_no_caution(tmp_path):
    """The warning is for uncommitted changes and mixed commits."""
    markdown, _ = written(report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO))), tmp_path)
    assert f"Commit of the runs: `{COMMIT}`\n" in markdown
    assert "Caution" not in markdown


def test_the_commit_of_the_report_stands_beside_that_of_the_runs(tmp_path):
    """Statistics may be younger than the runs they are computed from."""
    definition = campaign(TWO, claims=[])
    report = dataclasses.replace(report_input(definition, final_frame(definition)), source_commit="f" * 40)
    markdown, _ = written(report, tmp_path)
    assert f"Commit of figures, statistics and verdicts: `{'f' * 40}`\n" in markdown


def test_cells_that_learned_nothing_are_counted(tmp_path):
    """A loss that rose above the untrained network's without becoming infinite has not diverged, and is told."""
    definition = campaign(claims=[])
    grid = grid_frame(definition)
    untrained = grid.drop_duplicates("run").assign(epoch=0, train_loss=2.3)
    grid = pd.concat([untrained, grid[grid["epoch"] > 0]], ignore_index=True)
    exploded = (grid["method"] == "sua") & (grid["base_lr"] == 0.3) & (grid["epoch"] > 0)
    grid.loc[exploded, "train_loss"] = 3e5
    markdown, _ = written(report_input(definition, final_frame(definition), grid=grid), tmp_path)
    row = rows(section(markdown, "Tuning"), "SUA")[0]
    assert row[5:7] == ["0", "3"]


def test_numbers_under_other_rules_are_shown(tmp_path):
    """One column per rule, a dash where a number does not exist, a word where a target is never reached."""
    table = pd.DataFrame(
        [{"claim": "C1", "part": "Epochs, SUA / K-FAC", "threshold": "< 1.25", "a": 1.5, "b": 1.126, "c": math.inf}]
    )
    definition = campaign(claims=[])
    report = dataclasses.replace(report_input(definition, final_frame(definition)), by_rule=table)
    markdown, _ = written(report, tmp_path)
    assert "How much hangs on the selection rule" in markdown
    line = next(line for line in markdown.splitlines() if "Epochs, SUA / K-FAC" in line)
    assert [cell.strip() for cell in line.strip("|").split("|")][-3:] == ["1.50", "1.13", "never"]
