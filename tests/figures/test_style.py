"""The look of the methods: told apart in colour, by colour-blind readers and in grey."""

import matplotlib
import pytest

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.style import apply_style, method_styles, short_number, wrapped
from kfac_sua.methods import METHODS

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
PAPER = ["baseline", "kfac", "grouped", "sua", "sua_grouped"]


def _assert_distinct(styles) -> None:
    """Check that no two looks share a colour, a marker, a line style or a label."""
    for attribute in ("color", "marker", "label", "linestyle"):
        values = [getattr(style, attribute) for style in styles]
        assert len(set(values)) == len(values), attribute


def test_every_method_has_its_own_colour_of_the_palette_and_its_own_marker():
    """The paper's five curves come first; all colours are Okabe and Ito's, and a grey."""
    assert list(METHODS) == [*PAPER, "adamw", "muon", "sgd_no_bn"]
    assert {style.color for style in METHODS.values()} <= OKABE_ITO | {"#7F7F7F"}
    _assert_distinct(METHODS.values())


def test_known_methods_keep_their_look_and_may_get_another_label():
    """Order as given, look as everywhere, label replaced."""
    styles = method_styles(["sua", "baseline"], {"sua": "SUA of 64"})
    assert list(styles) == ["sua", "baseline"]
    assert styles["baseline"] == METHODS["baseline"]
    assert styles["sua"].label == "SUA of 64"
    assert (styles["sua"].color, styles["sua"].marker) == (METHODS["sua"].color, METHODS["sua"].marker)


@pytest.mark.parametrize("known", [["baseline", "sua"], PAPER, []])
def test_other_methods_get_looks_of_their_own(known):
    """Six settings of an ablation differ from each other and from the known methods, and are called by their names."""
    others = [f"group_size={size}" for size in (8, 16, 32, 64)]
    styles = method_styles([*known, *others], {others[0]: "Groups of 8"})
    _assert_distinct(styles.values())
    assert styles[others[0]].label == "Groups of 8"
    assert styles[others[1]].label == others[1]
    assert not {styles[name].color for name in others} & {style.color for style in METHODS.values()}


def test_more_methods_than_looks_are_refused():
    """Nine others fit beside one known method, ten do not."""
    others = [f"setting {index}" for index in range(10)]
    styles = method_styles(["baseline", *others[:9]])
    assert len({(style.color, style.marker) for style in styles.values()}) == 10
    with pytest.raises(FigureError, match="9 can be told apart in one figure, got 10"):
        method_styles(["baseline", *others])


def test_numbers_are_short():
    """Five characters at most, three significant digits where they fit, and never an exponent of leading zeros."""
    expected = {0: "0", 0.0001: "1e-4", 0.0054: "5e-3", 0.0356: "0.036", 0.3536: "0.354", 1.376: "1.38"}
    expected |= {
        24.16: "24.2",
        150.9: "151",
        1224: "1224",
        9.999: "10.0",
        0.99996: "1.00",
        2.5e8: "2e8",
        1e308: "1e308",
    }
    assert {value: short_number(value) for value in expected} == expected


def test_labels_are_wrapped_between_words_only():
    """A long word stays whole."""
    assert wrapped("SGD without batch norm", 14) == "SGD without\nbatch norm"
    assert wrapped("incomprehensibilities", 14) == "incomprehensibilities"


def test_style_is_limited_by_a_context():
    """The settings act inside a context and are gone after it."""
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context():
        apply_style()
        assert matplotlib.rcParams["savefig.dpi"] == 200
    assert dict(matplotlib.rcParams) == before
