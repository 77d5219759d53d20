"""What is said where the runs that are compared ran under different circumstances."""

import io

import pandas as pd
import pytest
from runs.synthetic_runs import epoch_record, write_run

from kfac_sua.runs.collect import collect_runs, main
from kfac_sua.runs.comparable import CIRCUMSTANCES, seconds_cautions

OTHER_MACHINE = "Seconds are not comparable unless these machines are alike and were equally busy: "


def _frame(root, **runs: dict) -> pd.DataFrame:
    """Return the table of one run per method."""
    for name, values in runs.items():
        write_run(root, [epoch_record(1)], name, **values)
    return collect_runs(root)


@pytest.mark.parametrize(
    ("baseline", "kfac", "sua", "expected"),
    [
        ({}, {}, {}, []),
        (
            {"num_threads": 2},
            {},
            {"num_threads": 2, "status": "running"},
            ["baseline ran with 2 CPU threads, kfac with 1"],
        ),
        ({}, {}, {"num_threads": 2}, ["baseline and kfac ran with 1 CPU thread; sua with 2"]),
        (
            {},
            {"process_counts": [1, 4]},
            {"process_counts": [4]},
            ["baseline ran as 1 process, kfac as 1 and 4, sua as 4"],
        ),
        (
            {"machines": ["a (X)"]},
            {"machines": []},
            {"machines": ["a (X)", "b (X)"]},
            ["baseline ran on a (X), sua on a (X) and b (X)"],
        ),
        (
            {"device_name": "X", "machines": ["a (X)"]},
            {"device_name": "Y", "machines": ["a (Y)"], "num_threads": 8},
            {"device_name": "X", "machines": ["a (X)"]},
            ["baseline and sua ran on X; kfac on Y", "baseline and sua ran with 1 CPU thread; kfac with 8"],
        ),
    ],
)
def test_each_difference_is_a_sentence_by_method(tmp_path, baseline, kfac, sua, expected):
    """Unended runs, what was not recorded, and machines told by their devices say nothing."""
    frame = _frame(tmp_path, baseline=baseline, kfac=kfac, sua=sua)
    is_machine = "machines" in sua and "device_name" not in sua
    start = OTHER_MACHINE if is_machine else "Seconds are not comparable: "
    assert seconds_cautions(frame) == [f"{start}{who}." for who in expected]
    assert seconds_cautions(frame[frame["preconditioner"] == "kfac"]) == []
    read_back = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    assert seconds_cautions(read_back) == seconds_cautions(frame)
    assert seconds_cautions(read_back.drop(columns=list(CIRCUMSTANCES))) == []


def test_only_what_is_compared_is_held_against_each_other(tmp_path):
    """A panel, or a network on a data set, is of one kind; which is named where the others differ from it."""
    frame = _frame(tmp_path, baseline={}, sua={"num_threads": 2})
    other = frame.assign(model="vgg11", num_threads="2")
    (sentence,) = seconds_cautions(pd.concat([frame, other]))
    assert sentence == (
        "Seconds of digits, tiny, 1, float32 are not comparable: baseline ran with 1 CPU thread, sua with 2."
    )
    panels = pd.concat([frame.assign(panel=panel, method=frame["preconditioner"]) for panel in ("left", "right")])
    assert seconds_cautions(panels) == [sentence.replace(" of digits, tiny, 1, float32", "")]
    alike = panels.assign(num_threads=panels["panel"].map({"left": "1", "right": "2"}))
    assert seconds_cautions(alike) == []


def test_comparators_are_methods_of_their_own_and_nodes_are_counted(tmp_path):
    """AdamW and SGD share the preconditioner; a cluster's nodes fill no line."""
    frame = _frame(tmp_path, baseline={"machines": ["a"]})
    others = [frame.assign(optimizer="adamw", machines=f"node{index}") for index in range(12)]
    assert seconds_cautions(pd.concat([frame, *others])) == [
        f"{OTHER_MACHINE}baseline ran on a, baseline with adamw on 12 machines."
    ]


def test_the_table_says_it_below(tmp_path, capsys):
    """The command prints the sentence after the last row, and nothing where there is nothing to say."""
    _frame(tmp_path, baseline={"num_threads": 2}, sua={})
    main([str(tmp_path)])
    assert capsys.readouterr().out.endswith(
        "\nSeconds are not comparable: baseline ran with 2 CPU threads, sua with 1.\n"
    )
    main([str(tmp_path / "digits-tiny-sua")])
    assert "comparable" not in capsys.readouterr().out
