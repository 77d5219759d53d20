"""``--help`` and ``--version`` of the training command: every choice and every key, as the command line spells them."""

import platform
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from kfac_sua import __version__
from kfac_sua.compose import group_options
from kfac_sua.compose.explain import all_keys
from kfac_sua.config import CONFIG_DIR, CONFIG_NAME

_WIDTH = 100  # columns, as of all tables

_INTRODUCTION = """\
Train one network:                  python -m kfac_sua.train preconditioner=sua model=vgg11 optimizer.lr=0.03
Several, one after the other:       python -m kfac_sua.train -m preconditioner=kfac,sua optimizer.lr=0.1,0.03
A published curve:                  python -m kfac_sua.train experiment=quickstart_sua
The same command again resumes what was interrupted and skips what has finished."""


def help_text(flags: Mapping[str, str], config_dir: Path | None = None) -> str:
    """Return what ``--help`` prints.

    Args:
        flags: What each option of the command line does, by how it is written.
        config_dir: Directory with configurations of the user's own, whose options are listed too.

    Raises:
        ConfigError: If the configurations cannot be read.
    """
    pairs = (line.strip().removeprefix("- ").partition("#")[0].partition(":") for line in _primary())
    chosen = {group: option.strip() for group, _, option in pairs if option.strip()}
    options = {
        group: ", ".join(f"{name} (default)" if name == chosen.get(group) else name for name in names)
        for group, names in group_options(config_dir).items()
    }
    keys: dict[str, list[str]] = {}
    for key in all_keys():
        node, _, leaf = key.rpartition(".")
        keys.setdefault(node, []).append(leaf)
    nodes = {f"{node}.": ", ".join(dict.fromkeys(keys[node])) for node in keys if node and node in options}
    width = max(map(len, flags)) + 3
    parts = [
        _INTRODUCTION,
        "Choices, group=option\n" + _listed(options),
        "Keys, key=value, and what they are unless given\n" + textwrap.indent(_top_level(), "  "),
        "Keys of the chosen options, such as optimizer.lr=0.1\n" + _listed(nodes),
        "Flags\n" + "\n".join(f"  {usage:<{width}}{text}" for usage, text in flags.items()),
    ]
    return "\n\n".join(parts)


def version_text() -> str:
    """Return what ``--version`` prints."""
    parts = [f"kfac_sua {__version__}", *(f"{name} {version(name)}" for name in ("torch", "hydra-core"))]
    return f"{', '.join(parts)}, Python {platform.python_version()}"


def _listed(rows: Mapping[str, str]) -> str:
    """Return names with what belongs to each, wrapped beside them."""
    width = max(map(len, rows)) + 2
    return "\n".join(
        textwrap.fill(
            text,
            _WIDTH,
            initial_indent=f"  {name:<{width}}",
            subsequent_indent=" " * (width + 2),
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    )


def _top_level() -> str:
    """Return the keys at the top of the primary configuration, with its own comments, wrapped."""
    lines = []
    for line in _primary():
        setting, _, comment = line.partition("#")
        if comment and not line.startswith((" ", "-", "#")) and ":" in setting:
            key, _, value = setting.partition(":")
            start = f"{f'{key}={value.strip()}':<28}"
            lines.append(textwrap.fill(comment.strip(), _WIDTH - 2, initial_indent=start, subsequent_indent=" " * 28))
    return "\n".join(lines)


def _primary() -> Sequence[str]:
    return (CONFIG_DIR / f"{CONFIG_NAME}.yaml").read_text(encoding="utf-8").splitlines()
