"""A campaign with known numbers, for the report: every frame is made by hand."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd

from kfac_sua.campaign.definition import Campaign, Curve, Panel, Scale
from kfac_sua.campaign.judge import judge
from kfac_sua.campaign.report import ReportInput, write_report
from kfac_sua.campaign.selection import Choice
from kfac_sua.campaign.targets import target_table
from kfac_sua.runs.run_info import RunInfo

EPOCHS = 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Elements that need no end.
VOID = {"meta", "link", "img", "br", "hr"}
# For what does not depend on the methods, and takes a fraction of the time.
TWO = {"vgg11": ["baseline", "sua"]}
# What a method does, in units of the baseline: its training loss is divided by, its seconds multiplied with it.
PROGRESS = {"baseline": 1.0, "kfac": 3.0, "grouped": 2.9, "sua": 2.8, "sua_grouped": 2.7}
COST = {"baseline": 1.0, "kfac": 3.0, "grouped": 1.5, "sua": 1.25, "sua_grouped": 1.125}


def campaign(panels: Mapping[str, Sequence[str]] | None = None, **values: Any) -> Campaign:
    """Return a campaign with these methods per panel; all five in one panel if not given."""
    panels = {"vgg11": list(PROGRESS)} if panels is None else panels
    made = [
        Panel(name=name, title=f"Panel {name}", curves=[_curve(method) for method in methods])
        for name, methods in panels.items()
    ]
    fields: dict[str, Any] = {
        "name": "fig1",
        "title": "Figure 1: VGG11 on CIFAR-10",
        "figure": "fig1",
        "claims": ["C1", "C2", "C3"],
        "differences": ["The head is one linear layer."],
        "panels": made,
    }
    return Campaign(**fields | values)


def run_frame(panel: str, method: str, seed: int, *, stage: str = "final", **values: Any) -> pd.DataFrame:
    """Return the rows of one run, epoch 0 to the last, whose numbers follow from method, seed and epoch."""
    settings: dict[str, Any] = {"lr": 0.1, "damping": math.nan if method == "baseline" else 0.01, "status": "finished"}
    settings |= {"precision": "float32"} | values
    name = f"{stage}-{panel}-{method}-{settings['lr']:g}-{settings['damping']:g}"
    rows = []
    for epoch in range(EPOCHS + 1):
        loss = 2.0 / (1 + epoch * PROGRESS.get(method, 1.0)) + 0.01 * seed
        seconds = (10.0 + 0.2 * seed) * COST.get(method, 1.0) * epoch
        rows.append(
            {
                **{"panel": panel, "method": method, "run": f"{name}/seed={seed}", "dataset": "cifar10"},
                **{"model": "vgg11", "preconditioner": method, "base_lr": settings["lr"]},
                "precision": settings["precision"],
                **{"damping": settings["damping"], "fingerprint": name, "seed": seed, "status": settings["status"]},
                "test_error": 0.25 + 0.01 * seed if settings["status"] == "finished" else math.nan,
                **{"epoch": epoch, "step": 450 * epoch, "lr": settings["lr"], "train_loss": loss},
                **{"train_error": loss / 4, "train_eval_loss": 0.9 * loss, "val_loss": loss},
                "val_error": 0.2 + loss / 5 + (0.03 if epoch == EPOCHS else 0.0),
                **{"train_time_s": seconds, "forward_backward_s": seconds, "statistics_s": 0.0},
                **{"inversion_s": 0.0, "application_s": 0.0, "optimizer_s": 0.0},
            }
        )
    return pd.DataFrame(rows)


def run_infos(*frames: pd.DataFrame, **values: Any) -> list[RunInfo]:
    """Return run.json of every run of the frames; ``config`` replaces keys of the configuration."""
    changes = values.pop("config", {})
    infos = []
    for frame in frames:
        for _, run in frame.drop_duplicates("run").iterrows():
            diverged_at = 3 if run["status"] == "diverged" else None
            info = RunInfo(
                status=run["status"],
                config=_config(str(run["method"])) | changes,
                fingerprint=run["fingerprint"],
                seed=int(run["seed"]),
                commit=COMMIT,
                versions={"python": "3.11.7", "torch": "2.14.1", "torchvision": None},
                device="cpu",
                device_name="a processor",
                num_threads=1,
                started="2026-01-02T03:04:05+00:00",
                ended="2026-01-02T04:04:05+00:00",
                diverged_at_epoch=diverged_at,
            )
            infos.append(dataclasses.replace(info, **values))
    return infos


def grid_frame(definition: Campaign, cells: Mapping[str, int] | None = None) -> pd.DataFrame:
    """Return grids of two learning rates and so many dampings per method; three unless told."""
    frames = []
    for panel in definition.panels:
        for curve in panel.curves:
            number = (cells or {}).get(curve.method, 6)
            for index in range(number):
                damping = math.nan if curve.method == "baseline" else 10.0 ** -(index // 2)
                lr = 0.3 * 0.5**index if curve.method == "baseline" else (0.3, 0.1)[index % 2]
                frames.append(run_frame(panel.name, curve.method, 0, stage="grid", lr=lr, damping=damping))
    return pd.concat(frames, ignore_index=True)


def report_input(definition: Campaign, finals: pd.DataFrame, figure: Path | None = None, **values: Any) -> ReportInput:
    """Return what a campaign with these final runs hands to the report."""
    grid = values.pop("grid", None)
    grid = grid_frame(definition) if grid is None else grid
    curves = [(panel.name, curve.method) for panel in definition.panels for curve in panel.curves]
    fields: dict[str, Any] = {
        "campaign": definition,
        "scale": "small",
        "scale_settings": Scale(run=["scale=small"], grid=["epochs=2"], sweeps={"lr": "lr_fine"}, growth_steps=1),
        "device": "cpu",
        "seeds": 3,
        "selection_rule": "The lowest validation error.",
        "command": "python -m kfac_sua.reproduce fig1 --scale small",
        "cell_commands": {curve: f"python -m kfac_sua.train experiment={'_'.join(curve)} seed=0" for curve in curves},
        "grid": grid,
        "finals": finals,
        "choices": [choice(*curve) for curve in curves],
        "targets": target_table(finals),
        "verdicts": [judge(claim, finals) for claim in definition.claims],
        "figures": {} if figure is None else {"The curves.": figure},
        "infos": run_infos(grid, finals),
    }
    return ReportInput(**fields | values)


def choice(panel: str, method: str, **values: Any) -> Choice:
    """Return the choice of lr 0.1 and, but for the baseline, damping 0.01."""
    has_damping = method != "baseline"
    made = Choice(
        panel=panel,
        method=method,
        lr=0.1,
        damping=0.01 if has_damping else None,
        fingerprint=f"grid-{panel}-{method}",
        num_cells=6,
        num_diverged=0,
        num_grown=0,
        lr_range=(0.1, 0.3),
        damping_range=(0.01, 1.0) if has_damping else None,
        train_loss=0.4321,
        val_error=0.1234,
        edges=(),
    )
    return dataclasses.replace(made, **values)


def final_frame(definition: Campaign, seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    """Return the final runs of all curves."""
    frames = [
        run_frame(panel.name, curve.method, seed)
        for panel in definition.panels
        for curve in panel.curves
        for seed in seeds
    ]
    return pd.concat(frames, ignore_index=True)


class Page(HTMLParser):
    """A page that is well-formed, with its addresses and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[tuple[str, str]] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep addresses, and what has to be closed."""
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [(tag, value or "") for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        """Check that the last one opened is closed."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keep the text."""
        self.words.append(data)


def read(page: str) -> Page:
    """Return the page, parsed to its end."""
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def written(report: ReportInput, out_dir: Path) -> tuple[str, str]:
    """Write the report, check that the page is well-formed, and return Markdown and HTML."""
    paths = write_report(report, out_dir)
    assert [path.name for path in paths] == ["report.md", "report.html"]
    markdown, page = (path.read_text(encoding="utf-8") for path in paths)
    read(page)
    return markdown, page


def section(markdown: str, heading: str) -> str:
    """Return one section of the report."""
    return markdown.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str, first: str) -> list[list[str]]:
    """Return the cells of all table rows that begin with a cell."""
    lines = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def _curve(method: str) -> Curve:
    return Curve(method=method, overrides=[f"experiment=fig1_{method}"], tuning="lr")


def _config(method: str) -> dict[str, Any]:
    kronecker = {"damping": 0.01, "inverse_period": 50, "group_size": 32 if "grouped" in method else None}
    return {
        "epochs": EPOCHS,
        "batch_size": 100,
        "model": {"name": "vgg11", "width": 1.0, "batch_norm": True},
        "dataset": {"name": "cifar10", "validation_size": 5000, "train_size": None, "augmentation": "none"},
        "preconditioner": {"name": method} | ({} if method == "baseline" else kronecker),
        "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0},
        "schedule": {"name": "constant"},
    }
