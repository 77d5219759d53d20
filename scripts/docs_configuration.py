"""The page of the documentation that lists every key of the configuration, from the schema and the YAML files.

A hook of MkDocs: the page exists while the site is built, so that it cannot fall behind.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from kfac_sua.checks import RANGES
from kfac_sua.compose import compose_config
from kfac_sua.config import AUTO, CONFIG_DIR, AutoFloat, to_plain
from kfac_sua.preconditioner.settings import KroneckerSettings, choices_of, texts_below_names

PAGE = "configuration.md"

GROUPS = {
    "model": "The network.",
    "dataset": "Images, their split and their augmentation.",
    "preconditioner": "`baseline` is the plain gradient and has no keys; the others share all of theirs.",
    "optimizer": "`adamw` and `muon` are comparators on the plain gradient and need `preconditioner=baseline`.",
    "schedule": "The learning rate over time.",
}
FILES = {
    "experiment": "One published curve each, such as `experiment=quickstart_sua`.",
    "scale": "How large, such as `scale=small`.",
    "sweep": "A grid, such as `sweep=lr_damping`.",
    "campaign": "What `python -m kfac_sua.reproduce NAME` carries out; not for `kfac_sua.train`.",
}
_INTRODUCTION = """# Configuration

Every key of `python -m kfac_sua.train`, with its type, its default and what it means. This page is generated from
`kfac_sua/config.py`, `kfac_sua/checks.py` and `configs/` whenever the site is built.

A key is given as `key=value`, an option of a group as `group=option`; a comma makes a sweep (with `-m`). Values out of
range and keys that contradict each other end with one sentence before anything is written. Relative paths, such as the
defaults of `output_dir` and `dataset.data_dir`, are relative to the working directory.
"""


def on_files(files: Any, config: Any) -> Any:
    """Add the page to the files of the site (a hook of MkDocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, PAGE, content=configuration_page()))
    return files


def configuration_page() -> str:
    """Return the page, in Markdown."""
    top = _keys_of_file(CONFIG_DIR / "config.yaml", compose_config())
    parts = [_INTRODUCTION, "## At the top\n", _table(top)]
    for group, sentence in GROUPS.items():
        options = _options(group)
        names = ", ".join(f"`{option}`" for option in options)
        rows = _merged({option: list(_keys_of_option(group, option)) for option in options})
        parts += [f"## `{group}`\n", f"One of {names}; without a choice the first. {sentence}\n", _table(rows)]
    for folder, sentence in FILES.items():
        parts += [f"## `{folder}`\n", f"{sentence}\n", _file_table(folder)]
    return "\n".join(parts)


@dataclasses.dataclass(frozen=True)
class Key:
    """One key.

    Args:
        name: As on the command line.
        kind: Its type, in words.
        default: Its value where nothing is given, as YAML.
        meaning: What it means, in Markdown.
    """

    name: str
    kind: str
    default: str
    meaning: str


def _options(group: str) -> list[str]:
    """Return the options of a group, the default one first."""
    defaults = yaml.safe_load((CONFIG_DIR / "config.yaml").read_text(encoding="utf-8"))["defaults"]
    (default,) = (entry[group] for entry in defaults if isinstance(entry, dict) and group in entry)
    others = sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml") if path.stem != default)
    return [default, *others]


def _keys_of_file(path: Path, node: Any, prefix: str = "", also: Path | None = None) -> Iterator[Key]:
    """Yield the keys of a node of the configuration that are no nodes themselves."""
    comments = (_comments(also) if also else {}) | _comments(path)
    described = _settings_docs() if isinstance(node, KroneckerSettings) else {}
    hints = get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            continue
        name = f"{prefix}{field.name}"
        meaning = described.get(field.name) or comments.get(field.name, "")
        if field.name == "name" and prefix:
            meaning = f"Comes with the file; give `{prefix.rstrip('.')}=…` instead."
        default = AUTO if hints[field.name] is AutoFloat else to_plain(value)  # ``value`` is what auto came to
        yield Key(name, _kind(hints[field.name]), _yaml(default), meaning)


def _keys_of_option(group: str, option: str) -> Iterator[Key]:
    overrides = [f"{group}={option}"]
    if group == "optimizer" and option != "sgd":
        overrides.append("preconditioner=baseline")
    node = getattr(compose_config(overrides), group)
    shared = CONFIG_DIR / "kronecker" / "defaults.yaml" if isinstance(node, KroneckerSettings) else None
    yield from _keys_of_file(CONFIG_DIR / group / f"{option}.yaml", node, f"{group}.", shared)


def _merged(options: Mapping[str, list[Key]]) -> Iterator[Key]:
    """Yield every key once, with the defaults and meanings of all options that have it."""
    by_name: dict[str, dict[str, Key]] = {}
    for option, keys in options.items():
        for key in keys:
            by_name.setdefault(key.name, {})[option] = key
    num_options = sum(len(keys) > 1 for keys in options.values())  # the baseline has no keys but its name
    for keys_by_option in by_name.values():
        first = next(iter(keys_by_option.values()))
        default = _joined({option: key.default for option, key in keys_by_option.items()})
        if "<br>" not in default and len(keys_by_option) < num_options:
            default += f" ({', '.join(keys_by_option)})"
        meaning = _joined({option: key.meaning for option, key in keys_by_option.items()})
        yield dataclasses.replace(first, default=default, meaning=meaning)


def _joined(texts: Mapping[str, str]) -> str:
    """Return the text that all options share, or a line for each."""
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    return "<br>".join(f"{option}: {text}" for option, text in texts.items())


def _comments(path: Path) -> dict[str, str]:
    """Return the comment behind each top-level key of a YAML file."""
    pairs = re.findall(r"^(\w+):[^#\n]*#\s*(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {key: comment.strip() for key, comment in pairs}


def _settings_docs() -> dict[str, str]:
    """Return the meaning of each field of :class:`KroneckerSettings`, of each of its choices, and its range."""
    texts, meanings = texts_below_names(), {}
    for field in dataclasses.fields(KroneckerSettings):
        choices = texts.get(choices_of(field).__name__, {})
        lines = [f"`{name}`: {text}" for name, text in choices.items()] or [texts["KroneckerSettings"][field.name]]
        if field.metadata:
            lines.append(f"Must be {field.metadata['allowed']}.")
        meanings[field.name] = _one_line("<br>".join(lines))
    return meanings


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("``", "`")


def _kind(hint: Any) -> str:
    """Return a type in the words of a user of YAML."""
    if get_origin(hint) is UnionType:
        kinds = ["null" if part is NoneType else _kind(part) for part in get_args(hint)]
        return " or ".join(kinds)
    if get_origin(hint) is list:
        return f"list of {_kind(get_args(hint)[0])}"
    if hint is AutoFloat:
        return f"number or {AUTO}"
    if issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    return {int: "integer", float: "number", bool: "true or false", str: "text"}[hint]


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
    return f"`{text}`"


def _table(keys: Iterator[Key]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        meaning = key.meaning.replace("|", "or")
        if key.name in RANGES:
            meaning += f"<br>Must be {RANGES[key.name][1]}."
        lines.append(f"| `{key.name}` | {key.kind} | {key.default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _file_table(folder: str) -> str:
    """Return a table of the files of a folder, with what their first lines say."""
    lines = ["| name | |", "|---|---|"]
    for path in sorted((CONFIG_DIR / folder).glob("*.yaml")):
        head = re.match(r"(?:#.*\n)+", path.read_text(encoding="utf-8"))
        said = [line.lstrip("# ") for line in (head.group() if head else "").splitlines()]
        text = "<br>".join(line for line in said if not line.startswith("@package"))
        lines.append(f"| `{path.stem}` | {text.replace('|', 'or')} |")
    return "\n".join(lines) + "\n"
