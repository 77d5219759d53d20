"""Adds to the pages of the documentation: measured figures, measured tables, and docstrings without Sphinx's roles.

A hook of MkDocs. Tables stand in pages between two comments, ``<!-- table NAME -->`` and ``<!-- end of table -->``, and
are made from the records in ``outputs/reference``; ``python scripts/docs_pages.py`` writes them anew.
"""

import csv
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kfac_sua import tuned
from kfac_sua.bench.settings import Item, parse_items
from kfac_sua.compose import compose_config
from kfac_sua.config import KroneckerConfig
from kfac_sua.introspect.looks import styles_of
from kfac_sua.introspect.measure import REFERENCES
from kfac_sua.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "outputs" / "reference"
FIGURES = (
    "fig1-small-cpu/fig1.png",
    "fig1-small-cpu/grid.png",
    "fig1-small-cpu/time_split.png",
    "fig1-small-cpu/time_to_target.png",
    "fig2-small-cpu/fig2.png",
    "first-light/fig1.png",
    "introspect-cpu/vgg11-width-0.125/introspect.png",
    "scaling/scaling.png",
)


def on_files(files: Any, config: Any) -> Any:
    """Add the measured figures to the site, as ``reference/...``."""
    from mkdocs.structure.files import File

    for name in FIGURES:
        files.append(File.generated(config, f"reference/{name}", abs_src_path=str(REFERENCE / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Return a page as the site has it (a hook of MkDocs)."""
    del page, config, files
    return as_on_site(markdown)


def as_on_site(markdown: str) -> str:
    """Return a page with its tables of today, and its figures where the site has them."""
    return with_tables(markdown).replace("](../outputs/reference/", "](reference/")


def with_tables(markdown: str) -> str:
    """Replace what stands between the comments of a table by the table of that name."""
    return re.sub(
        r"^(<!-- table (\w+) -->\n).*?^(<!-- end of table -->)$",
        lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}",
        markdown,
        flags=re.MULTILINE | re.DOTALL,
    )


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Return a page without the markup in docstrings that only Sphinx reads (a hook of MkDocs)."""
    del page, config, files
    return without_roles(html)


def without_roles(html: str) -> str:
    """Remove roles such as ``:class:`` in front of names, and the second colon before blocks of code."""
    html = re.sub(r":(?:class|meth|func|attr|mod):<code>~?", "<code>", html)
    return html.replace("::</p>", ":</p>")


def best_lr_by_damping() -> str:
    """Return, per structure and damping, the best learning rate by training loss and by validation error."""
    with (REFERENCE / "fig1-small-cpu" / "grid.csv").open(newline="", encoding="utf-8") as file:
        cells = [row for row in csv.DictReader(file) if row["damping"]]
    dampings = sorted({float(row["damping"]) for row in cells})
    lines = [
        "| lowest | structure | " + " | ".join(f"damping {damping:g}" for damping in dampings) + " |",
        "|---|---|" + "---|" * len(dampings),
    ]
    for column, said, style in (
        ("train_loss", "training loss", "{:.3f}"),
        ("val_error_percent", "validation error", "{:.1f} %"),
    ):
        for method in dict.fromkeys(cell["method"] for cell in cells):
            row = [
                f"lr {best[0]:g} ({style.format(best[1])})" if best else "–" for best in _best(cells, method, column)
            ]
            lines.append(f"| {said} | {METHODS[method].label} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _best(cells: list[dict[str, str]], method: str, column: str) -> list[tuple[float, float] | None]:
    """Return learning rate and value of the best cell of a method, per damping."""
    dampings = sorted({float(row["damping"]) for row in cells})
    own = [row for row in cells if row["method"] == method]
    result: list[tuple[float, float] | None] = []
    for damping in dampings:
        values = [(float(row[column]), float(row["lr"])) for row in own if float(row["damping"]) == damping]
        result.append((min(values)[1], min(values)[0]) if values else None)
    return result


def bench_vgg11() -> str:
    """Return the cost of each setting beside plain SGD."""
    text = (REFERENCE / "bench-vgg11.txt").read_text(encoding="utf-8")
    ratios = re.findall(r"^(\S+) +(\S+×) \(.*?\) +(\S+×) \(.*?\) +(\S+×) \(", text, flags=re.MULTILINE)
    lines = ["| setting | plain step | refresh step | amortised |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| `{name}` | {plain} | {refresh} | {mean} |" for name, plain, refresh, mean in ratios])


def auto_settings() -> str:
    """Return what ``auto`` stands for, per network and width."""
    methods = list(tuned.PreconditionerName)
    lines = [f"| network, width | {' | '.join(methods)} | evidence |", "|---|" + "---|" * (len(methods) + 1)]
    for row in tuned.TABLE:
        pairs = (row.settings[method] for method in methods)
        cells = (f"{lr:g}" if damping is None else f"{lr:g}, {damping:g}" for lr, damping in pairs)
        lines.append(f"| `{row.model}`, {row.width:g} | {' | '.join(cells)} | {row.evidence} |")
    return "\n".join(lines)


def introspect_shares() -> str:
    """Return what each approximation's direction is worth at the end of the runs, beside its block's error."""
    blocks = []
    tables = (REFERENCE / "introspect-cpu").glob("*/introspect.csv")
    for table in sorted(tables, key=lambda path: (path.parent.name.count("-"), path)):  # with a note last
        with table.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["scope"] != "layer" and row["damping"] == "0.1"]
        end = [row for row in rows if row["checkpoint"] == "end"]
        items = parse_items(list(dict.fromkeys(row["method"] for row in end if row["method"] not in REFERENCES)))
        network, _, rest = table.parent.name.partition("-width-")
        width, _, note = rest.partition("-")
        sizes = {item.text: _group_size(item, float(width)) for item in items}
        styles = styles_of({item.text: [item.group, *item.keys] for item in items}, sizes)
        blocks += [
            f"{network}, width {width}{f', {note}' if note else ''}:".replace("-", " "),
            "| | " + " | ".join(f"{fisher}: share, same / other; error" for fisher in ("empirical", "exact")) + " |\n"
            "|---|---|---|\n"
            + "\n".join(f"| {style.label} | {' | '.join(_cells(end, name))} |" for name, style in styles.items()),
        ]
    return "\n\n".join(blocks)


def _group_size(item: Item, width: float) -> int | None:
    """Return the channels per group of an item of ``--methods`` in a network of some width."""
    keys = (f"preconditioner.{key}" for key in item.keys)
    preconditioner = compose_config([f"preconditioner={item.group}", *keys]).preconditioner
    assert isinstance(preconditioner, KroneckerConfig)
    return preconditioner.channels_per_group(width)


def _cells(rows: list[dict[str, str]], method: str) -> list[str]:
    """Return, per Fisher, mean shares of all layers at once, and the mean relative error block by block."""
    cells = []
    for fisher in ("empirical", "exact"):
        own = [row for row in rows if row["method"] == method and row["fisher"] == fisher]
        shares = [
            statistics.fmean(
                float(row["share"]) for row in own if row["scope"] == "network" and row["statistics"] == images
            )
            for images in ("same", "other")
        ]
        errors = [
            float(row["relative_error"]) for row in own if row["scope"] == "blocks" and row["statistics"] == "same"
        ]
        error = f"; {statistics.fmean(errors):.2f}" if errors else ""
        cells.append(f"{shares[0]:.2f} / {shares[1]:.2f}{error}")
    return cells


TABLES: dict[str, Callable[[], str]] = {
    "auto_settings": auto_settings,
    "best_lr_by_damping": best_lr_by_damping,
    "bench_vgg11": bench_vgg11,
    "introspect_shares": introspect_shares,
}


if __name__ == "__main__":
    for path in (ROOT / "docs").glob("*.md"):
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")
