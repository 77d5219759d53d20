"""The Markdown report as one HTML file, which needs neither a network nor another file."""

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path

from markdown import Markdown

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
p, ul { max-width: 52rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 1px solid #d0d0d0; }
h3 { font-size: 1.05rem; margin: 1.8rem 0 0.6rem; max-width: 52rem; }
li { margin: 0.25rem 0; }
a { color: #0050a0; }
.toc ul { display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; list-style: none; padding: 0; max-width: none; }
.toc { margin: 1.2rem 0; padding: 0.4rem 0; border-block: 1px solid #d0d0d0; font-size: 0.9rem; }
.table { overflow-x: auto; margin: 1rem 0 1.3rem; }
table { border-collapse: collapse; font-size: 0.875rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
thead { border-block: 1.5px solid #1a1a1a; }
tbody { border-bottom: 1.5px solid #1a1a1a; }
th, td { padding: 0.4rem 0.7rem; vertical-align: top; text-align: left; }
td:first-child, td[style*="right"] { white-space: nowrap; }
th { vertical-align: bottom; font-weight: 600; }
tbody tr + tr { border-top: 1px solid #e4e4e4; }
code { font: 0.875em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; background: #f3f3f3;
  padding: 0.1em 0.3em; border-radius: 3px; overflow-wrap: anywhere; }
pre { background: #f3f3f3; padding: 0.8rem 1rem; border-radius: 4px; white-space: pre-wrap; line-height: 1.45; }
pre code { background: none; padding: 0; font-size: 0.8rem; }
figure { margin: 1.5rem 0 2rem; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; }
figcaption { font-size: 0.9rem; color: #444; margin-top: 0.4rem; max-width: 52rem; }
.verdict { display: inline-block; padding: 0.05rem 0.5rem; border: 1.5px solid; border-radius: 3px;
  font-size: 0.93em; line-height: 1.35; font-weight: 600; white-space: nowrap; }
.holds { color: #0b5e2b; background: #eaf6ee; }
.does-not-hold { color: #8f1d14; background: #fdefed; }
.undecided { color: #4a4a4a; background: #f3f3f3; border-style: dashed; }
@media screen and (max-width: 48rem) { table { min-width: 44rem; } }
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } .toc { display: none; }
  .table { overflow: visible; } table { font-size: 8pt; } th, td { padding: 0.2rem 0.35rem; }
  td:first-child { white-space: normal; }
  tr, h2, h3 { break-inside: avoid; } h2, h3 { break-after: avoid; } a { color: inherit; }
  * { print-color-adjust: exact; }
}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_FIGURE = re.compile(r'<p><img alt="(?P<alt>[^"]*)" src="(?P<src>[^"]*)"></p>\n<p><em>(?P<caption>.*?)</em></p>')
_VERDICT = re.compile(r"<strong>(holds|does not hold|undecided)</strong>")


def render_html(text: str, title: str, figures: Mapping[str, Path]) -> str:
    """Return the Markdown report as a page.

    Args:
        text: The report in Markdown; the list of sections goes after its first heading.
        title: Title of the page, as plain text.
        figures: From the address of an image in the Markdown to its PNG file, which is embedded.

    Raises:
        OSError: If an image cannot be read.
        KeyError: If the Markdown shows an image that is not among the figures.
    """
    markdown = Markdown(
        extensions=["tables", "fenced_code", "toc"],
        extension_configs={"toc": {"toc_depth": "2-2"}},
        output_format="html",
    )
    body = markdown.convert(text)
    body = _FIGURE.sub(lambda match: _figure(match, figures), body)
    # Colour comes on top of the word, which stays.
    body = _VERDICT.sub(lambda match: f'<strong class="verdict {match[1].replace(" ", "-")}">{match[1]}</strong>', body)
    # Wide tables scroll by themselves instead of widening the page.
    body = body.replace("<table>", '<div class="table">\n<table>').replace("</table>", "</table>\n</div>")
    body = body.replace("</h1>", f"</h1>\n<nav>{markdown.toc}</nav>", 1)
    return _PAGE.format(title=html.escape(title), style=_STYLE, body=body)


def _figure(match: re.Match[str], figures: Mapping[str, Path]) -> str:
    content = figures[html.unescape(match["src"])].read_bytes()
    source = f"data:image/png;base64,{base64.b64encode(content).decode('ascii')}"
    return (
        f'<figure>\n<img alt="{match["alt"]}" src="{source}">\n<figcaption>{match["caption"]}</figcaption>\n</figure>'
    )
