"""Reports as files: text that is shown as it is, numbers for readers, a page that needs nothing else."""

import math
import re

import pytest
from campaign.report_inputs import (
    TWO,
    campaign,
    final_frame,
    grid_frame,
    read,
    report_input,
    run_infos,
    written,
)

from kfac_sua.campaign.judge import Part, Verdict
from kfac_sua.campaign.report import write_report
from kfac_sua.markdown import code, code_block, escape, number, percent_spread, spread
from kfac_sua.report_page import render_html

# The smallest PNG file: one white pixel.
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63f80f00010101"
    "001bb6ee560000000049454e44ae426082"
)


def test_nothing_on_record_is_still_a_report(tmp_path):
    """Empty tables raise nothing."""
    definition = campaign()
    empty = final_frame(definition).iloc[:0]
    report = report_input(definition, empty, grid=grid_frame(definition).iloc[:0], choices=[], infos=[])
    markdown, _ = written(report, tmp_path)
    assert "**Of 15 final runs, 15 are missing**" in markdown
    assert "nothing here is a result" in markdown


def test_page_embeds_every_figure_and_loads_nothing(tmp_path):
    """The only address outside the page is the link to the paper."""
    figures = {"Left & right: a < b": tmp_path / "figures" / "a b (1).png", "Time [s] *by* phase": tmp_path / "b.png"}
    for index, path in enumerate(figures.values()):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(PNG + bytes([index]))
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)), figures=figures)
    markdown, page = written(report, tmp_path / "report")
    parser = read(page)
    sources = [address for tag, address in parser.addresses if tag == "img"]
    assert len(sources) == 2
    assert len(set(sources)) == 2
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    outside = [(tag, address) for tag, address in parser.addresses if not address.startswith(("data:", "#"))]
    assert outside == [("a", "https://openreview.net/forum?id=ryVC6tkwG")]
    assert not re.search(r"@import|url\(|<script|<iframe", page)
    text = "".join(parser.words)
    assert "Left & right: a < b" in text
    assert "Time [s] *by* phase" in text
    assert "../figures/a%20b%20%281%29.png" in markdown
    assert 'alt="Left &amp; right: a &lt; b"' in page
    assert 'alt="Time [s] *by* phase"' in page


def test_missing_figure_is_an_error(tmp_path):
    """A page without a figure it should show is not written."""
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)), figure=tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        write_report(report, tmp_path)


def test_image_that_is_not_among_the_figures_is_an_error():
    """No image is left as a reference to a file."""
    with pytest.raises(KeyError, match=r"x\.png"):
        render_html("# A\n\n![b](x.png)\n\n*b*", "A", {})


NASTY = "a|b *c* `d` <script>alert(1)</script> [e](http://f) _g_ &amp; h\\i ~~j~~ $k$ #l"


def test_text_from_outside_is_shown_as_it_is(tmp_path):
    """Labels, notes, records and commands can hold neither markup nor the end of a table cell."""
    definition = campaign(claims=[], title=f"T {NASTY}", differences=[f"- {NASTY}", "1. one", "# two"])
    definition.panels[0].curves[1].label = NASTY
    finals = final_frame(definition)
    infos = run_infos(finals, device_name=NASTY, versions={NASTY: NASTY}, commit=NASTY)
    verdict = Verdict("C1", NASTY, "holds", (Part(NASTY, 1.0, 0.9, 1.1, NASTY, "holds"),), 3, NASTY)
    report = report_input(definition, finals, infos=infos, verdicts=[verdict], selection_rule=NASTY, command=NASTY)
    _, page = written(report, tmp_path)
    parser = read(page)
    text = "".join(parser.words)
    assert "<script" not in page
    assert "http://f" not in [address for _, address in parser.addresses]
    # Title twice, label, differences, device, package and version, commit, claim, part, rule, command and more.
    assert text.count(NASTY) >= 15
    assert f"- {NASTY}" in text
    assert "1. one" in text
    assert "# two" in text
    # As many cells in every row as in its heading.
    for table in re.findall(r"<table>.*?</table>", page, flags=re.DOTALL):
        widths = {len(re.findall(r"<t[hd]", row)) for row in re.findall(r"<tr>.*?</tr>", table, flags=re.DOTALL)}
        assert len(widths) == 1


@pytest.mark.parametrize("text", ["- a", "+ a", "12. a", "3) a", "# a", "> a", "---", "***", "&lt;", "a\n\nb", "2.5 a"])
def test_escaped_text_is_one_plain_paragraph(text):
    """What Markdown takes for a block or an entity is text once escaped."""
    page = render_html(f"# Title\n\n{escape(text)}", "Title", {})
    parser = read(page.split("</nav>")[1].split("</main>")[0])
    assert parser.addresses == []
    assert "".join(parser.words).strip() == " ".join(text.split())
    assert "<p>" in page
    assert not re.search(r"<(ul|ol|h2|hr|blockquote|em|strong)\b", page.split("</nav>")[1])


def test_code_holds_backticks():
    """Spans and blocks have a longer fence than their content."""
    page = render_html(f"# T\n\n{code('a `b` c`')}\n\n{code_block(['x', '```', '<y>'])}", "T", {})
    assert "<code>a `b` c`</code>" in page
    assert ">x\n```\n&lt;y&gt;\n</code>" in page


def test_same_input_gives_the_same_files(tmp_path):
    """Nothing in a report depends on when it is written."""
    figure = tmp_path / "fig1.png"
    figure.write_bytes(PNG)
    report = report_input(campaign(TWO, claims=[]), final_frame(campaign(TWO)), figure=figure)
    first = [path.read_bytes() for path in write_report(report, tmp_path)]
    assert first == [path.read_bytes() for path in write_report(report, tmp_path)]


@pytest.mark.parametrize(
    ("value", "digits", "expected"),
    [
        (0.12345, 4, "0.1235"),
        (9.99996, 4, "10.00"),
        (123.456, 3, "123"),
        (12345.6, 3, "12,346"),
        (0.0, 3, "0.00"),
        (-0.5, 2, "−0.50"),
        (-0.0, 2, "0.0"),
        (math.inf, 3, "never"),
        (math.nan, 3, "–"),
    ],
)
def test_number(value, digits, expected):
    """Significant digits, whole integers, words for what is not a number."""
    assert number(value, digits) == expected


def test_deviation_has_the_decimals_of_the_mean():
    """A deviation below these is not shown as zero, rounding errors are."""
    assert spread(0.35364, 0.00512) == "0.3536 ± 0.0051"
    assert spread(0.35364, math.nan) == "0.3536"
    assert spread(math.nan, math.nan) == "–"
    assert percent_spread(0.2839, 0.00028) == "28.4 ± 0.03 %"
    assert percent_spread(0.2839, 1e-17) == "28.4 ± 0.0 %"
    assert percent_spread(0.2839, math.nan) == "28.4 %"
