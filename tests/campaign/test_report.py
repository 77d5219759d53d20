"""Reports of campaigns made by hand: every number of the results is that of the frames."""

import dataclasses
import math
import re

import pandas as pd
import pytest
from campaign.report_inputs import (
    EPOCHS,
    campaign,
    final_frame,
    report_input,
    rows,
    run_frame,
    run_infos,
    section,
    written,
)

from kfac_sua.campaign.judge import Part, Verdict
from kfac_sua.campaign.report import write_report
from kfac_sua.markdown import number
from kfac_sua.runs.final_table import CollectError


def test_final_numbers_are_those_of_the_frame(tmp_path):
    """Every cell is the mean ± sample standard deviation over seeds of its column, the ratio that of mean seconds."""
    finals = final_frame(campaign())
    markdown, _ = written(report_input(campaign(), finals), tmp_path)
    runs = finals[finals["method"] == "sua"]
    last = runs[runs["epoch"] == EPOCHS]

    def expected(values: pd.Series, factor: float, decimals: int) -> str:
        return f"{factor * values.mean():.{decimals}f} ± {factor * values.std(ddof=1):.{decimals}f}"

    seconds = last["train_time_s"] / EPOCHS
    baseline = finals[(finals["method"] == "baseline") & (finals["epoch"] == EPOCHS)]["train_time_s"] / EPOCHS
    (row,) = rows(section(markdown, "Final numbers"), "SUA")
    assert row[1:] == [
        "3",
        expected(last["train_loss"], 1, 4),
        expected(last["train_eval_loss"], 1, 4),
        expected(runs.groupby("seed")["val_error"].min(), 100, 1) + " %",
        expected(last["val_error"], 100, 1) + " %",
        expected(last["test_error"], 100, 1) + " %",
        expected(seconds, 1, 1),
        f"{seconds.mean() / baseline.mean():.2f}",
    ]
    assert row[4] != row[5], "the best and the last epoch must differ for this test to tell them apart"


def test_methods_come_in_the_order_of_the_campaign(tmp_path):
    """Labels are the campaign's, then those of the figures."""
    definition = campaign({"vgg11": ["sua_grouped", "baseline", "kfac"]}, claims=[])
    definition.panels[0].curves[2].label = "Full K-FAC"
    markdown, _ = written(report_input(definition, final_frame(definition)), tmp_path)
    names = re.findall(r"^\| ([^|]+) \| 3 \|", section(markdown, "Final numbers"), flags=re.MULTILINE)
    assert names == ["SUA, groups", "Batch-norm baseline", "Full K-FAC"]


def test_verdicts_show_all_they_hold(tmp_path):
    """Statement, outcome, deciding parts, intervals, thresholds, seeds and note are there, outcomes as words."""
    parts = (
        Part("Seconds, SUA / K-FAC", 0.4567, 0.4012, 0.5, "< 1", "holds"),
        Part("Error, SUA − K-FAC", -0.0312, -1.2, math.inf, "< 0.5 points", "undecided"),
        Part("Seconds, SUA / baseline", math.inf, math.inf, math.inf, "< 1", "does not hold"),
        Part("Epochs, SUA / baseline", 1.1, math.nan, math.nan, "< 1", "undecided"),
    )
    verdict = Verdict("C2", "SUA is cheaper.", "does not hold", parts, 3, "kfac: 1 of 4 seeds diverged.")
    report = report_input(campaign(), final_frame(campaign()), verdicts=[verdict])
    markdown, page = written(report, tmp_path)
    text = section(markdown, "Verdicts")
    (summary,) = rows(text, "C2")
    decided_by = "Seconds, SUA / baseline: never (never), needed < 1"
    assert summary == ["C2", "SUA is cheaper.", "**does not hold**", decided_by, "3"]
    shown = [rows(text, part.text)[0][1:] for part in parts]
    assert shown == [
        ["0.457", "0.401 to 0.500", "< 1", "**holds**"],
        ["−0.031", "−1.20 to never", "< 0.5 points", "**undecided**"],
        ["never", "never", "< 1", "**does not hold**"],
        ["1.10", "–", "< 1", "**undecided**"],
    ]
    assert "kfac: 1 of 4 seeds diverged." in text
    for outcome in ("holds", "does not hold", "undecided"):
        assert f'<strong class="verdict {outcome.replace(" ", "-")}">{outcome}</strong>' in page


def test_verdicts_are_summed_up_at_the_top(tmp_path):
    """The opening says the outcome of each claim."""
    report = report_input(campaign(), final_frame(campaign()))
    markdown, _ = written(report, tmp_path)
    phrases = [f"{v.claim} {'is ' * (v.outcome == 'undecided')}**{v.outcome}**" for v in report.verdicts]
    assert f"Verdicts: {phrases[0]}, {phrases[1]} and {phrases[2]}." in markdown


def test_campaign_without_claims_says_so(tmp_path):
    """An ablation has a sentence instead of verdicts, and its methods go by their names."""
    definition = campaign({"vgg11": ["baseline", "sua_reduce"]}, name="ablation", claims=[])
    markdown, _ = written(report_input(definition, final_frame(definition)), tmp_path)
    assert section(markdown, "Verdicts").strip() == (
        "These curves decide none of the paper's claims, so there is no verdict."
    )
    assert "Verdicts:" not in markdown
    assert "without a correction" not in section(markdown, "Limits")
    assert rows(section(markdown, "Final numbers"), r"sua\_reduce")


def test_targets_show_what_their_table_says(tmp_path):
    """Times, intervals and the ratio of seconds to the baseline's; infinity is never."""
    definition = campaign(claims=[])
    finals = final_frame(definition)
    report = report_input(definition, finals)
    targets = report.targets.copy()
    never = (targets["method"] == "kfac") & (targets["target"] == "val_error")
    targets.loc[never, ["seconds", "seconds_low", "seconds_high", "epochs", "epochs_low", "epochs_high"]] = math.inf
    markdown, _ = written(dataclasses.replace(report, targets=targets), tmp_path)
    text = section(markdown, "Time to the baseline's level")
    by_error, by_loss = rows(text, "SUA")
    baseline = targets[targets["method"] == "baseline"].set_index("target")
    for shown, target in ((by_error, "val_error"), (by_loss, "train_loss")):
        row = targets[(targets["method"] == "sua") & (targets["target"] == target)].iloc[0]
        ratio = row["seconds"] / baseline.loc[target, "seconds"]
        assert shown[1:] == [
            number(row["seconds"], 3),
            f"{number(row['seconds_low'], 3)} to {number(row['seconds_high'], 3)}",
            number(ratio, 3),
            number(row["epochs"], 3),
            f"{number(row['epochs_low'], 3)} to {number(row['epochs_high'], 3)}",
            "3",
        ]
    assert rows(text, "K-FAC")[0][1:] == ["never"] * 5 + ["3"]
    assert f"validation error, {100 * baseline.loc['val_error', 'target_value']:.1f} %" in text


def test_panel_without_finished_baseline_has_no_target(tmp_path):
    """The report says so, and there is no ratio of seconds."""
    definition = campaign({"vgg11": ["sua"]}, claims=[])
    markdown, _ = written(report_input(definition, final_frame(definition)), tmp_path)
    assert "There is no target" in section(markdown, "Time to the baseline's level")
    assert rows(section(markdown, "Final numbers"), "SUA")[0][-1] == "–"


def test_one_seed_has_neither_deviation_nor_interval(tmp_path):
    """One seed leaves dashes, open verdicts and a sentence under the limits."""
    definition = campaign()
    finals = final_frame(definition, seeds=[0])
    markdown, _ = written(report_input(definition, finals, seeds=1), tmp_path)
    last = finals[(finals["method"] == "sua") & (finals["epoch"] == EPOCHS)].iloc[0]
    (row,) = rows(section(markdown, "Final numbers"), "SUA")
    assert row[1:4] == ["1", f"{last['train_loss']:.4f}", f"{last['train_eval_loss']:.4f}"]
    assert not any("±" in cell for cell in row)
    assert rows(section(markdown, "Time to the baseline's level"), "SUA")[0][2] == "–"
    assert "**undecided**" in section(markdown, "Verdicts")
    assert "single finished seed" in section(markdown, "Limits")
    assert "different means" not in markdown


def test_diverged_seeds_are_left_out_and_named(tmp_path):
    """A method without a finished seed stays in every table."""
    definition = campaign()
    finals = final_frame(definition)
    finals.loc[finals["method"] == "kfac", ["status", "test_error"]] = ["diverged", math.nan]
    one = (finals["method"] == "sua") & (finals["seed"] == 1)
    finals.loc[one, ["status", "test_error"]] = ["diverged", math.nan]
    markdown, _ = written(report_input(definition, finals), tmp_path)
    text = section(markdown, "Final numbers")
    assert rows(text, "K-FAC")[0][1:] == ["0 of 3"] + ["–"] * 7
    assert rows(text, "SUA")[0][1] == "2 of 3"
    assert "K-FAC: seed 0 diverged in epoch 3, seed 1 diverged in epoch 3 and seed 2 diverged in epoch 3." in text
    assert "SUA: seed 1 diverged in epoch 3." in text
    assert "**Of 15 final runs, 4 diverged**" in markdown
    assert rows(section(markdown, "Time to the baseline's level"), "K-FAC")[0][1:] == ["–"] * 5 + ["0"]


def test_unfinished_and_missing_runs_are_named(tmp_path):
    """The opening counts them, the section of final numbers says whose they are."""
    definition = campaign(claims=[])
    finals = final_frame(definition)
    finals.loc[(finals["method"] == "sua") & (finals["seed"] == 2), "status"] = "running"
    finals.loc[(finals["method"] == "sua") & (finals["seed"] == 1), "status"] = "failed"
    finals = finals[finals["method"] != "kfac"]
    finals = finals[(finals["method"] != "grouped") | (finals["seed"] == 0)]
    infos = run_infos(finals, failure="Cannot use a_file: No space left on device.")
    markdown, _ = written(report_input(definition, finals, infos=infos), tmp_path)
    assert "**Of 15 final runs, 2 did not finish and 5 are missing**" in markdown
    text = section(markdown, "Final numbers")
    assert "SUA: seed 1 failed: Cannot use a\\_file: No space left on device and seed 2 has not finished." in text
    assert "K-FAC: 3 runs missing." in text
    assert "K-FAC, groups: 2 runs missing." in text
    assert rows(text, "K-FAC")[0][1] == "0 of 3"


def test_several_settings_of_one_method_are_an_error(tmp_path):
    """Their mean would be one of nothing in particular."""
    definition = campaign(claims=[])
    finals = pd.concat([final_frame(definition), run_frame("vgg11", "sua", 7, lr=0.5)])
    report = report_input(definition, final_frame(definition))
    with pytest.raises(CollectError, match="sua in panel vgg11 must have one setting, got 2"):
        write_report(dataclasses.replace(report, finals=finals), tmp_path)


def test_three_panels_each_have_their_tables(tmp_path):
    """Panels are headings, and what differs from the paper is said per panel."""
    methods = ["baseline", "sua_grouped"]
    definition = campaign({"left": methods, "middle": methods, "right": methods}, name="fig2", figure="fig2", claims=[])
    finals = final_frame(definition)
    markdown, _ = written(report_input(definition, finals), tmp_path)
    for heading in ("Final numbers", "Tuning", "Time to the baseline's level"):
        text = section(markdown, heading)
        assert re.findall(r"^### (.*)$", text, flags=re.MULTILINE) == ["Panel left", "Panel middle", "Panel right"]
    assert len(rows(section(markdown, "Final numbers"), "SUA, groups")) == 3
    differences = section(markdown, "What differs from the paper")
    assert rows(differences, "data set")[0][1:] == ["cifar10; cifar100 (Panel right)", "cifar10", "**no**"]
    assert "data set cifar10 instead of cifar100 for Panel right" in differences
    assert "learning rate over time constant instead of decay for Panel middle; Panel right" in differences
    assert "group size 32 instead of 64;" in differences
