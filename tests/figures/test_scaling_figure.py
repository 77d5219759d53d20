"""The figure of the scaling study: one panel per sweep, refresh and application of every structure."""

import numpy as np
import pandas as pd
import pytest
from figures.layout import assert_readable, assert_same_bytes, assert_written, texts
from matplotlib.colors import to_hex

from kfac_sua.figures.curves import FigureError
from kfac_sua.figures.scaling import draw_scaling, main
from kfac_sua.methods import METHODS

SIZES = {"width": (64, 128, 256, 512, 1024), "kernel": (1, 3, 5, 7), "group": (8, 32, 128), "batch": (25, 100, 400)}
AXES = {"width": "channels", "kernel": "kernel_size", "group": "group_size", "batch": "batch_size"}
NAMES = ("kfac", "sua", "grouped", "sua_grouped")
COSTS = ("forward_backward", "statistics", "inversion", "application")
SPEED = {"kfac": 30.0, "sua": 2.0, "grouped": 8.0, "sua_grouped": 1.0}


def scaling_frame(sweeps=tuple(SIZES), low_rank_from=512) -> pd.DataFrame:
    """Return a table as the study writes it, from formulas; K-FAC in low rank is a third of dense."""
    rows = []
    for sweep in sweeps:
        for size in SIZES[sweep]:
            for method in NAMES if sweep != "group" else NAMES[2:]:
                for inverse_method in ("cholesky", "auto"):
                    is_low_rank = inverse_method == "auto" and method == "kfac" and size >= low_rank_from
                    shared = {"sweep": sweep, "size": size, "channels": 128, "kernel_size": 3, "batch_size": 100}
                    shared["group_size"] = 32 if "grouped" in method else None
                    own = {"method": method, "inverse_method": inverse_method, "is_low_rank": is_low_rank, "note": ""}
                    for weight, cost in enumerate(COSTS, start=1):
                        speed = SPEED[method] if weight > 1 else 5.0
                        seconds = 1e-6 * speed * weight * size**1.5 / (3 if is_low_rank else 1)
                        rows.append(shared | {AXES[sweep]: size} | own | {"cost": cost, "seconds": seconds})
    return pd.DataFrame(rows).astype({"group_size": "Int64"})


def lines_of(axes, method) -> list:
    """Return the lines in a method's colour."""
    return [line for line in axes.get_lines() if to_hex(line.get_color()).upper() == METHODS[method].color]


def test_lines_are_the_numbers_of_the_table(drawn, tmp_path):
    """Solid with filled markers: statistics and inversion together; dashed with empty ones: application."""
    frame = scaling_frame()
    draw_scaling(frame, tmp_path)
    for axes, sweep in zip(drawn[0].axes, SIZES, strict=True):
        for method in NAMES if sweep != "group" else NAMES[2:]:
            refresh, application = lines_of(axes, method)[:2]
            rows = frame[(frame["sweep"] == sweep) & (frame["method"] == method)]
            rows = rows[rows["inverse_method"] == "cholesky"].set_index(["cost", "size"])["seconds"]
            np.testing.assert_array_equal(refresh.get_xdata(), SIZES[sweep])
            np.testing.assert_allclose(refresh.get_ydata(), (rows["statistics"] + rows["inversion"]), rtol=1e-12)
            np.testing.assert_allclose(application.get_ydata(), rows["application"], rtol=1e-12)
            assert (refresh.get_linestyle(), application.get_linestyle()) == ("-", "--")
            assert (refresh.get_markerfacecolor(), application.get_markerfacecolor()) == (
                METHODS[method].color,
                "white",
            )
        own = axes.get_lines()[0]
        assert own.get_color() == METHODS["baseline"].color
        np.testing.assert_allclose(own.get_ydata(), [5e-6 * size**1.5 for size in SIZES[sweep]], rtol=1e-12)


def test_axes_are_logarithmic_with_the_sizes_as_ticks(drawn, tmp_path):
    """Binary along x and decimal along y; titles name what is fixed."""
    draw_scaling(scaling_frame(), tmp_path)
    for axes, sizes in zip(drawn[0].axes, SIZES.values(), strict=True):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert [label.get_text() for label in axes.get_xticklabels()] == [str(size) for size in sizes]
    assert drawn[0].axes[0].get_title(loc="left") == "Width\n3×3, mini-batch 100, groups of 32"
    assert drawn[0].axes[2].get_title(loc="left") == "Group size\n128 channels, 3×3, mini-batch 100"


def test_low_rank_is_thin_and_where_it_was_used(drawn, tmp_path):
    """K-FAC has two thin lines beside its own over the sizes in low rank; the legend says so only if there are any."""
    draw_scaling(scaling_frame(), tmp_path / "a")
    draw_scaling(scaling_frame(low_rank_from=9999), tmp_path / "b")
    thin = [line for line in lines_of(drawn[0].axes[0], "kfac")[2:] if len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in thin] == [[512, 1024]] * 2
    assert all(line.get_linewidth() < lines_of(drawn[0].axes[0], "kfac")[0].get_linewidth() for line in thin)
    assert "Thin: inverses of low rank" in texts(drawn[0])
    assert "Thin: inverses of low rank" not in texts(drawn[1])


def test_what_was_not_measured_has_no_point_and_is_counted(drawn, tmp_path):
    """A case left out for its memory does not bend a line; the legend counts the cases."""
    frame = scaling_frame()
    is_left_out = (frame["sweep"] == "width") & (frame["size"] == 1024) & (frame["method"] == "kfac")
    frame.loc[is_left_out, "seconds"] = np.nan
    frame.loc[is_left_out, "note"] = "not measured: needs 9.0 GiB"
    table = pd.read_csv(draw_scaling(frame, tmp_path)[2])
    assert list(lines_of(drawn[0].axes[0], "kfac")[0].get_xdata()) == [64, 128, 256, 512]
    assert "2 cases not measured for lack of memory" in texts(drawn[0])
    assert table["note"].notna().sum() == 2 * len(COSTS)


@pytest.mark.parametrize("sweeps", [tuple(SIZES), ("width", "kernel", "batch"), ("group",)])
def test_texts_are_legible_and_apart(sweeps, drawn, tmp_path):
    """From one panel to four, with a title, nothing overlaps."""
    draw_scaling(scaling_frame(sweeps), tmp_path, title="Cost of a layer against its size")
    assert len(drawn[0].axes) == len(sweeps)
    assert_readable(drawn[0])


@pytest.mark.slow
def test_files_are_complete_and_reproducible(written, tmp_path, capsys):
    """The same table gives the same bytes, also when the command reads it back."""
    first = draw_scaling(scaling_frame(), tmp_path / "a")
    assert_written(first, "scaling", written[0])
    main([str(first[2]), "--out", str(tmp_path / "b")])
    assert str(tmp_path / "b" / "scaling.png") in capsys.readouterr().out
    assert_same_bytes(first[:2], [tmp_path / "b" / path.name for path in first[:2]])


def test_what_cannot_be_drawn_is_refused(tmp_path):
    """One sentence says what is wrong, and nothing is written."""
    frame = scaling_frame()
    with pytest.raises(FigureError, match="nothing to draw"):
        draw_scaling(frame.iloc[:0], tmp_path)
    with pytest.raises(FigureError, match="nothing to draw"):
        draw_scaling(frame.assign(note="not measured"), tmp_path)
    with pytest.raises(FigureError, match="lacks the column 'seconds'"):
        draw_scaling(frame.drop(columns="seconds"), tmp_path)
    with pytest.raises(FigureError, match="no panel for sweep 'depth'"):
        draw_scaling(frame.assign(sweep="depth"), tmp_path)
    with pytest.raises(FigureError, match="No style for method 'ekfac'"):
        draw_scaling(frame.assign(method="ekfac"), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("content", "sentence"), [("a,b\n", "lacks the column 'sweep'"), ("", "is not a table")])
def test_a_foreign_table_is_refused(content, sentence, tmp_path, capsys):
    """The command ends with one sentence."""
    (tmp_path / "other.csv").write_text(content)
    assert main([str(tmp_path / "other.csv"), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.count("\n") == 1
