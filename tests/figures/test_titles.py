"""Titles that come from the records of runs."""

import pandas as pd
import pytest
from figures.synthetic_frames import finals

from kfac_sua.figures.titles import panel_subjects, subject


def _panel(name: str, **values: object) -> pd.DataFrame:
    """Return the runs of one panel, as they are collected today."""
    return finals(["baseline"], 1, name).assign(**{"width": 1.0, "schedule": "constant"} | values)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, "VGG11 on CIFAR-10"),
        ({"model": "tiny", "dataset": "digits"}, "tiny on digits"),
        ({"model": "preact_resnet50", "width": 0.125}, "PreAct-ResNet50 (width 0.125) on CIFAR-10"),
    ],
)
def test_subject_names_network_and_data_set(values, expected):
    """As the literature writes them, with a width that is not the published one."""
    assert subject(_panel("vgg11", **values)) == expected
    assert panel_subjects(_panel("vgg11", **values)) == {"vgg11": expected}


def test_a_table_of_before_says_less():
    """Without width and schedule there is still a title."""
    assert subject(finals(["baseline"], 1)) == "VGG11 on CIFAR-10"


def test_panels_are_told_apart_by_what_differs():
    """The data set always, the schedule where it differs, and all data sets in what is said of the whole."""
    parts = [_panel("left"), _panel("middle", schedule="step"), _panel("right", schedule="step", dataset="cifar100")]
    frame = pd.concat(parts, ignore_index=True)
    assert list(panel_subjects(frame).values()) == [
        "CIFAR-10, constant learning rate",
        "CIFAR-10, decay",
        "CIFAR-100, decay",
    ]
    assert subject(frame) == "VGG11 on CIFAR-10 and CIFAR-100"


def test_networks_are_named_where_they_differ():
    """Two widths of one network are two networks."""
    frame = pd.concat([_panel("a"), _panel("b", width=0.5)], ignore_index=True)
    assert panel_subjects(frame) == {"a": "VGG11 on CIFAR-10", "b": "VGG11 (width 0.5) on CIFAR-10"}


def test_panels_of_one_configuration_have_their_names():
    """Nothing else tells them apart."""
    frame = pd.concat([_panel("left"), _panel("right")], ignore_index=True)
    assert panel_subjects(frame) == {"left": "left: CIFAR-10", "right": "right: CIFAR-10"}
