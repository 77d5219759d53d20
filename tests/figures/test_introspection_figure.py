"""The figure of the introspection: what it refuses, and that a table gives the same bytes."""

import pandas as pd
import pytest

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.introspection import draw_introspection
from kfac_sua.introspect.looks import styles_of

ITEMS = {"kfac": ["kfac"], "kfac:weight_sharing=reduce": ["kfac", "weight_sharing=reduce"]}
STYLES = styles_of(ITEMS, dict.fromkeys(ITEMS))


def table(**changed: object) -> pd.DataFrame:
    """Return two checkpoints, dampings and seeds of every method."""
    rows = [
        {
            "seed": seed,
            "checkpoint": checkpoint,
            "fisher": fisher,
            "statistics": statistics,
            "scope": scope,
            "method": method,
            "damping": damping,
            "relative_error": 0.1 * number,
            "basis_error": 0.08 * number,
            "eigenvalue_error": 0.06 * number,
            "share": 0.9 - 0.1 * number + 0.01 * seed,
        }
        for seed in (0, 1)
        for checkpoint in ("untrained", "end")
        for fisher in ("empirical", "exact")
        for statistics in ("same", "other")
        for scope in ("blocks", "network")
        for number, method in enumerate(STYLES)
        for damping in (0.1, 1.0)
    ]
    return pd.DataFrame(rows).assign(**changed)


def test_the_same_table_gives_the_same_files(tmp_path):
    """PNG, SVG and the table itself."""
    paths = [draw_introspection(table(), tmp_path / name, 0.1, STYLES, "A title") for name in ("one", "two")]
    assert [path.name for path in paths[0]] == ["introspect.png", "introspect.svg", "introspect.csv"]
    for one, other in zip(*paths, strict=True):
        assert one.read_bytes() == other.read_bytes()
    pd.testing.assert_frame_equal(pd.read_csv(paths[0][2]), table())
    svg = paths[0][1].read_text(encoding="utf-8")
    for style in STYLES.values():
        assert style.color.lower() in svg.lower() or style.label.startswith("Exact, all")


def test_a_structure_of_another_scale_does_not_hide_the_others(tmp_path):
    """Its bar and its markers end at the edge, with the number beside them."""
    frame = table()
    is_far = frame["method"] == "kfac:weight_sharing=reduce"
    frame.loc[is_far, ["relative_error", "eigenvalue_error"]] = 475.0
    _, svg, _ = draw_introspection(frame, tmp_path, 0.1, STYLES)
    text = svg.read_text(encoding="utf-8")
    assert "475 →" in text
    assert "2e5 →" in text


def test_variants_of_a_method_keep_its_colour_and_are_told_apart():
    """By dashes, marker and label."""
    one, other = (STYLES[name] for name in ("kfac", "kfac:weight_sharing=reduce"))
    assert one.color == other.color
    assert (one.linestyle, one.marker) != (other.linestyle, other.marker)
    assert (one.label, other.label) == ("K-FAC", "K-FAC, reduce")


def test_groups_are_named_by_their_size():
    """With the size that they had."""
    styles = styles_of(
        {"sua_grouped:group_size=16": ["sua_grouped", "group_size=16"]}, {"sua_grouped:group_size=16": 16}
    )
    assert styles["sua_grouped:group_size=16"].label == "SUA, groups of 16"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [({"damping": 0.3}, "Nothing was measured at damping 0.1"), ({"method": "own"}, "No style for method 'own'")],
)
def test_what_cannot_be_drawn_is_refused(changed, sentence, tmp_path):
    """With what is missing."""
    with pytest.raises(FigureError, match=sentence):
        draw_introspection(table(**changed), tmp_path, 0.1, STYLES)
