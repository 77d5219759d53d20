"""The documentation's pages: links lead somewhere, code runs, every key is named, numbers are those of the records."""

import argparse
import functools
import importlib
import inspect
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from thinned import one_in
from torch import nn

from kfac_sua.cli.options import read_command_line
from kfac_sua.compose import compose_cells, compose_config
from kfac_sua.config import CONFIG_DIR, ModelName, to_plain
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
CONFIGURATION = runpy.run_path(str(ROOT / "scripts" / "docs_configuration.py"))
PAGES_HOOK = runpy.run_path(str(ROOT / "scripts" / "docs_pages.py"))
GROUPS = ("model", "dataset", "preconditioner", "optimizer", "schedule")


@functools.cache
def configuration_page() -> str:
    """Return the generated page, which takes a second."""
    return CONFIGURATION["configuration_page"]()


def pages() -> dict[str, str]:
    """Return the text of every page as the site has it, the generated one included."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
    texts[CONFIGURATION["PAGE"]] = configuration_page()
    return {name: PAGES_HOOK["as_on_site"](text) for name, text in texts.items()}


def without_code(text: str) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of a page's headings, as MkDocs makes them."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


def python_blocks(name: str) -> list[str]:
    """Return the blocks of Python of a page, with included files in place."""
    blocks = re.findall(r"^```python.*?\n(.*?)^```$", pages()[name], flags=re.MULTILINE | re.DOTALL)
    return [re.sub(r'--8<-- "(.+)"', lambda match: (ROOT / match[1]).read_text(encoding="utf-8"), b) for b in blocks]


def test_navigation_lists_every_page_once():
    """A page that nobody reaches is as good as none."""
    listed = [path for entry in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for path in entry.values()]
    assert sorted(listed) == sorted(pages())


@pytest.mark.parametrize("name", sorted([*(path.name for path in DOCS.glob("*.md")), "README.md"]))
def test_pages_can_be_read_as_they_stand(name):
    """On a forge, too: tables are those of the records, figures lie where the page says, and nothing is a template."""
    path = ROOT / name if name == "README.md" else DOCS / name
    text = path.read_text(encoding="utf-8")
    assert PAGES_HOOK["with_tables"](text) == text, "python scripts/docs_pages.py writes the tables anew"
    assert not re.search(r"\{\{|\{%|^\{:|\{[.#]\w", without_code(text), flags=re.MULTILINE)
    for figure in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (path.parent / figure).is_file(), figure
    if "::: " in text or "--8<--" in text:  # docstrings and files, which only the site has
        assert "make docs" in text


@pytest.mark.parametrize("name", sorted([*(path.name for path in DOCS.glob("*.md")), "configuration.md", "README.md"]))
def test_links_lead_somewhere(name):
    """Pages, headings and figures that a page links to exist; so do the files that README.md links to."""
    texts = pages()
    text = (ROOT / name).read_text(encoding="utf-8") if name == "README.md" else texts[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        page, _, anchor = target.partition("#")
        if target.startswith("https://"):
            continue
        if name == "README.md":
            assert (ROOT / page).exists(), target
        elif page.startswith("reference/"):
            assert page.removeprefix("reference/") in PAGES_HOOK["FIGURES"], target
        else:
            assert page in texts or not page, target
            assert not anchor or anchor in anchors(texts[page or name]), target


def test_figures_and_files_named_exist():
    """What a page names below outputs/, tests/, examples/, scripts/, configs/ or kfac_sua/ is there."""
    for name in PAGES_HOOK["FIGURES"]:
        assert (PAGES_HOOK["REFERENCE"] / name).is_file(), name
    folders = "outputs/reference|tests|examples|scripts|configs|kfac_sua"
    for page, text in pages().items():
        for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
            assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("name", sorted(path.name for path in DOCS.glob("*.md")))
def test_python_compiles(name):
    """Every block marked as Python is Python."""
    for number, block in enumerate(python_blocks(name)):
        compile(block, f"{name}, block {number}", "exec")


def test_page_of_examples_shows_every_file():
    """Each in a block of its own, as it stands."""
    shown = [block.rstrip("\n") for block in python_blocks("examples.md")]
    files = [path.read_text(encoding="utf-8").rstrip("\n") for path in (ROOT / "examples").glob("*.py")]
    assert sorted(shown) == sorted(files)


def test_quickstart_runs(capsys):
    """The first page's snippet runs as it stands and prints the table of layers."""
    (snippet,) = python_blocks("index.md")
    exec(snippet, {})
    assert "SUA" in capsys.readouterr().out


def test_page_on_other_libraries_names_arguments_that_there_are():
    """With their defaults; and its example makes a preconditioner."""
    (snippet,) = python_blocks("migration.md")
    names: dict[str, Any] = {}
    exec(snippet, names)
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    model.add_module("head", nn.Linear(3, 2))
    assert [layer.name for layer in names["preconditioner_of"](model).layers] == ["0"]
    here = re.findall(r"^\| .+? \| (.+) \|$", pages()["migration.md"], flags=re.MULTILINE)
    functions = (KroneckerPreconditioner, KroneckerPreconditioner.step)
    arguments = {name for function in functions for name in inspect.signature(function).parameters}
    assert set(re.findall(r"(\w+)=", " ".join(here))) <= arguments
    defaults = to_plain(KroneckerSettings())
    for name in ("inverse_period", "factor_period", "ema_decay", "kl_clip", "damping"):
        assert any(row.startswith(f"`{name}={defaults[name]}`") for row in here), name


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_training_steps_of_the_pages_run(fisher_type):
    """The functions shown train a small network; accumulated and distributed ones agree with the plain one."""
    names: dict[str, Any] = {"torch": torch}
    for block in [*python_blocks("your-model.md"), *python_blocks("distributed.md")]:
        functions = dict(names)
        exec(block, functions)
        names |= {("in_all_" if "num_in_all" in block else "") + key: value for key, value in functions.items()}
    images, labels = torch.randn(12, 1, 6, 6), torch.arange(12) % 3

    def trained(step: Any, *data: Any) -> torch.Tensor:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type)
        step(net, preconditioner, torch.optim.SGD(net.parameters(), lr=0.1), *data)
        return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])

    whole = trained(names["train_step"], images, labels)
    if fisher_type == "empirical":
        halves = [(images[:6], labels[:6]), (images[6:], labels[6:])]
        torch.testing.assert_close(trained(names["train_step_in_parts"], halves), whole, rtol=1e-4, atol=1e-6)
        alone = trained(names["in_all_train_step"], images, labels, 12, 1)
        torch.testing.assert_close(alone, whole, rtol=1e-5, atol=1e-7)
    assert whole.isfinite().all()


def commands(module: str) -> list[list[str]]:
    """Return the arguments of every ``python -m <module>`` in a block of a page or of README.md."""
    text = "\n".join([*pages().values(), (ROOT / "README.md").read_text(encoding="utf-8")])
    blocks = re.findall(r"^```bash\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    found = [line[3:] for line in lines if line[:3] == ["python", "-m", module]]
    assert found, module
    return found


@pytest.mark.parametrize("is_sweep", one_in(2, [False, True]))
def test_training_commands_of_the_pages_are_valid(tmp_path, monkeypatch, is_sweep):
    """They compose and pass the checks, with the files that the pages show; sweeps cell by cell, which takes longer."""
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r'^```yaml title="([^"]+)"\n(.*?)^```$', "\n".join(pages().values()), re.M | re.S):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text(text)
    for arguments in commands("kfac_sua.train"):
        line = read_command_line(arguments)
        many = line.is_multirun or any(one.startswith("sweep=") for one in line.overrides)
        if line.answer is None and many == is_sweep:
            assert compose_cells(line.overrides, multirun=line.is_multirun, config_dir=line.config_dir).configs, (
                arguments
            )


class Parsed(Exception):
    """The arguments of a command are valid; it goes no further."""


@pytest.mark.parametrize(
    "module", ["runs.collect", "evaluate", "reproduce", "bench.__main__", "introspect.__main__", "data.download"]
)
def test_other_commands_of_the_pages_are_valid(module, monkeypatch):
    """Their parsers take the arguments."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse_and_stop(parser: Any, arguments: Any, original: Any = original) -> None:
            original(parser, arguments)
            raise Parsed

        monkeypatch.setattr(argparse.ArgumentParser, name, parse_and_stop)
    main = importlib.import_module(f"kfac_sua.{module}").main
    for arguments in commands(f"kfac_sua.{module.removesuffix('.__main__')}"):
        with pytest.raises(Parsed):
            main(arguments)


# --- generated parts --------------------------------------------------------------------------------------------------


def keys(values: dict[str, Any], prefix: str = "") -> set[str]:
    """Return the dotted keys of a configuration."""
    nested = {name: value for name, value in values.items() if isinstance(value, dict)}
    found = {f"{prefix}{name}" for name in values.keys() - nested.keys()}
    return found.union(*(keys(value, f"{prefix}{name}.") for name, value in nested.items()))


def options(group: str) -> list[str]:
    """Return the files of a folder of configs."""
    return [path.stem for path in (CONFIG_DIR / group).glob("*.yaml")]


def test_configuration_page_names_every_key_with_its_meaning():
    """Of every option of every group; none has an empty cell."""
    page = configuration_page()
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", page, flags=re.MULTILINE))
    expected = set()
    for group in GROUPS:
        for option in options(group):
            plain = ["preconditioner=baseline"] if option in ("adamw", "muon") else []
            expected |= keys(to_plain(compose_config([f"{group}={option}", *plain])))
    assert expected <= rows.keys()
    assert {f"preconditioner.{name}" for name in vars(KroneckerSettings())} <= expected
    for key in expected:
        kind, default, meaning = rows[key].split(" | ")
        assert kind, key
        assert default.strip("`"), key
        assert meaning.strip(), key


def test_configuration_page_names_every_file():
    """Options, experiments, scales, grids and campaigns, each with what its first lines say."""
    page = configuration_page()
    for folder in (*GROUPS, "experiment", "scale", "sweep", "campaign"):
        for option in options(folder):
            assert f"`{option}`" in page, f"{folder}/{option}"
    assert re.search(r"\| `small` \| .*a quarter of the width", page)


def test_configuration_page_shows_defaults_as_a_run_gets_them():
    """Those that differ between options are listed by option."""
    page = configuration_page()
    assert "| `optimizer.lr` | number or auto | `auto` |" in page
    assert "| `preconditioner.damping` | number or auto | `auto`" in page
    assert "| `optimizer.momentum` | number | sgd: `0.9`<br>muon: `0.95` |" in page
    assert "| `preconditioner.application` | `weight`, `auto` | `auto` | `weight`: To the weight gradient" in page


def test_table_of_best_learning_rates_is_that_of_the_records():
    """Each entry is the lowest of its column of the grid."""
    grid = pd.read_csv(PAGES_HOOK["REFERENCE"] / "fig1-small-cpu" / "grid.csv")
    sua = grid[(grid["method"] == "sua") & (grid["damping"] == 1)]
    best = sua.loc[sua["train_loss"].idxmin()]
    lines = PAGES_HOOK["best_lr_by_damping"]().splitlines()
    (row,) = (line for line in lines if line.startswith("| training loss | SUA |"))
    assert row.split(" | ")[4] == f"lr {best['lr']:g} ({best['train_loss']:.3f})"
    assert len(lines) == 2 + 2 * 4


def test_table_of_auto_has_every_network():
    """A row per network and width, with a number for every structure."""
    rows = PAGES_HOOK["auto_settings"]().splitlines()[2:]
    assert {row.split("`")[1] for row in rows} == set(ModelName)
    assert all(re.search(r"\| 0\.\d+ \| 0\.\d+, [\d.]+ \|", row) for row in rows)


def test_table_of_costs_has_every_setting_of_the_benchmark():
    """All but plain SGD, which the others are compared with."""
    rows = PAGES_HOOK["bench_vgg11"]().splitlines()[2:]
    assert [row.split("`")[1] for row in rows][:4] == ["sua", "sua_grouped", "grouped", "kfac"]
    assert rows[0] == "| `sua` | 1.074× | 1.438× | 1.080× |"


def test_docstrings_lose_what_only_sphinx_reads():
    """Roles before names and second colons go; the rest of the page stays."""
    html = "<p>see :meth:<code>step</code>, for a loop::</p><pre>a::b</pre>"
    assert PAGES_HOOK["without_roles"](html) == "<p>see <code>step</code>, for a loop:</p><pre>a::b</pre>"


@pytest.mark.parametrize("page", ["api.md", "internals.md"])
def test_objects_of_the_reference_exist(page):
    """What a page asks the docstrings of can be imported, and has one."""
    names = re.findall(r"^::: (\S+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(names) > 5
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
        assert found.__doc__, name


@pytest.mark.slow
def test_site_builds_strictly_and_asks_no_other_host_for_anything(tmp_path):
    """No warning, every page of the navigation, and no script, style, font or image from elsewhere."""
    pytest.importorskip("mkdocs", reason="needs mkdocs (extra docs)")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404"} == {Path(name).stem for name in pages()}
    assert (tmp_path / "site" / "search" / "search_index.js").read_text(encoding="utf-8").startswith("var __index = ")
    assert "accelerator.unscale_gradients" in re.sub("<.*?>", "", (tmp_path / "site" / "examples.html").read_text())
    for path in (tmp_path / "site").glob("*.html"):
        html = path.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+", html), path.name
        prose = re.sub(r"<(pre|script).*?</\1>", "", html, flags=re.DOTALL)
        assert not re.search(r":(?:class|meth|func|attr|mod):|\{\{", prose), path.name
