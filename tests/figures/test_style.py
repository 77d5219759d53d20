"""The look of the methods: told apart in colour, by colour-blind readers and in grey."""

import matplotlib

from kfac_sua.figures.style import METHODS, apply_style

OKABE_ITO = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}


def test_every_method_has_its_own_colour_of_the_palette_and_its_own_marker():
    """No two methods share a colour, a marker or a label, and all colours are Okabe and Ito's."""
    styles = list(METHODS.values())
    assert set(METHODS) == {"baseline", "kfac", "sua", "grouped", "sua_grouped"}
    assert {style.color for style in styles} <= OKABE_ITO
    for attribute in ("color", "marker", "label", "linestyle"):
        assert len({getattr(style, attribute) for style in styles}) == len(styles), attribute


def test_style_is_limited_by_a_context():
    """The settings act inside a context and are gone after it."""
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context():
        apply_style()
        assert matplotlib.rcParams["savefig.dpi"] == 200
    assert dict(matplotlib.rcParams) == before
