"""The table for a person: what it leaves out, what it says above, and that it fits."""

from runs.synthetic_runs import epoch_record, run_info, write_run

from kfac_sua.runs.collect import collect_runs
from kfac_sua.runs.final_table import final_table
from kfac_sua.runs.summary import MAX_WIDTH, format_table


def _epochs(*val_errors: float) -> list:
    """Return records with these validation errors."""
    return [epoch_record(epoch, val_error=error) for epoch, error in enumerate(val_errors, start=1)]


def _printed(root) -> list[str]:
    """Return the lines of the table of all runs below a directory, none of which is too long."""
    lines = format_table(final_table(collect_runs(root))).splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH
    return lines


def test_what_all_rows_share_is_said_once_above(tmp_path):
    """Columns that differ stay, in percent, with the deviation over seeds; all else is one line."""
    for seed, error in ((0, 0.2), (1, 0.4)):
        write_run(tmp_path, _epochs(0.5, error), "baseline", seed=seed)
        write_run(tmp_path, _epochs(0.5, error / 2), "sua", seed=seed)
    shared, header, *rows = _printed(tmp_path)
    assert shared == "tiny on digits, sgd, constant learning rate, float32, 2 epochs, lr 0.1, seeds 0, 1"
    assert header.split("  ")[0] == "method"
    assert [row.split() for row in rows] == [
        ["baseline", "–", "1.00", "30.0", "±", "14.1", "25.0", "10.0"],
        ["sua", "0.01", "1.00", "15.0", "±", "7.1", "25.0", "10.0"],
    ]


def test_outcomes_are_counted_where_not_all_have_finished(tmp_path):
    """A diverged run is in its row, and has no epochs that would make a column."""
    write_run(tmp_path, _epochs(0.2), "baseline")
    write_run(tmp_path, [], "kfac", status="diverged")
    shared, header, baseline, kfac = _printed(tmp_path)
    assert ", 1 epoch, " in shared
    assert "runs" in header.split()
    assert baseline.split()[2] == "1"
    assert "0 +1 diverged" in kfac


def test_one_row_is_named(tmp_path):
    """Its method stays in the row, and everything else is above it."""
    write_run(tmp_path, _epochs(0.2))
    shared, header, row = _printed(tmp_path)
    assert shared.endswith(", lr 0.1, damping 0.01, seed 0")
    assert (header.split()[0], row.split()[0]) == ("method", "sua")


def test_networks_have_tables_of_their_own(tmp_path):
    """What is not compared does not stand in one table."""
    for width in (1.0, 0.25):
        config = run_info().config | {"model": {"name": "tiny", "width": width}}
        write_run(tmp_path / str(width), _epochs(0.2), config=config, fingerprint=f"width {width}")
    lines = _printed(tmp_path)
    assert [line.split(" on ")[0] for line in lines if " on digits" in line] == ["tiny (width 0.25)", "tiny"]


def test_runs_that_differ_in_another_key_are_told_apart(tmp_path):
    """By the digits by which their directories end."""
    for fingerprint in ("abcdef0123", "0123abcdef"):
        write_run(tmp_path / fingerprint, _epochs(0.2), fingerprint=fingerprint)
    _, header, *rows = _printed(tmp_path)
    assert header.split()[0] == "setting"
    assert sorted(row.split()[0] for row in rows) == ["0123abcd", "abcdef01"]


def test_the_channels_per_group_are_told_where_they_are_not_the_published_ones(tmp_path):
    """Runs from before ``group_size_scaling`` had other groups at a reduced width; at width 1 there is one size."""
    for width, scaling in ((0.5, {}), (0.5, {"group_size_scaling": "width"}), (1.0, {"group_size_scaling": "width"})):
        config = run_info("grouped").config | {"model": {"name": "tiny", "width": width}}
        config["preconditioner"] = config["preconditioner"] | {"group_size": 32} | scaling
        fingerprint = f"{width} {scaling}"
        write_run(tmp_path / fingerprint, _epochs(0.2), "grouped", config=config, fingerprint=fingerprint)
    write_run(tmp_path, _epochs(0.2), "kfac", config=run_info("kfac").config | {"model": config["model"]})
    narrow, whole = "\n".join(_printed(tmp_path)).split("\n\n")
    assert "tiny (width 0.5)" in narrow
    header, *rows = narrow.splitlines()[-3:]
    assert header.startswith("group size")
    assert [row.split()[0] for row in rows] == ["16", "32"]
    assert "group size" not in whole


def test_a_table_with_everything_in_it_still_fits(tmp_path):
    """The columns give way to tables of their own, and then the deviations go."""
    for optimizer in ("sgd", "muon"):
        for schedule in ("constant", "cosine"):
            for lr in (0.00056, 0.1):
                for seed in range(4):
                    status = ("finished", "finished", "diverged", "failed")[seed]
                    config = run_info("sua_grouped", seed, lr).config
                    config |= {"optimizer": {"name": optimizer, "lr": lr}, "schedule": {"name": schedule}}
                    fingerprint = f"{optimizer}-{schedule}-{lr}"
                    for other in ("a", "b"):
                        write_run(
                            tmp_path / fingerprint / other,
                            _epochs(0.1 * (seed + 1)),
                            "sua_grouped",
                            seed,
                            lr,
                            status,
                            config=config,
                            fingerprint=other + fingerprint,
                            failure="Out of memory." if status == "failed" else None,
                        )
    text = "\n".join(_printed(tmp_path))
    assert all(word in text for word in ("sgd", "muon", "constant", "cosine", "0.00056", "2 +1 diverged +1 failed"))
