"""The checked configuration of one run, composed by Hydra from ``configs`` and overrides."""

import copy
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, version
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from kfac_sua.checks import check
from kfac_sua.compose.explain import explain, explain_unknown_key
from kfac_sua.compose.overrides import GROUPS, parse
from kfac_sua.config import (
    CONFIG_DIR,
    CONFIG_NAME,
    VERSION_BASE,
    Config,
    ConfigError,
    register_structures,
    settings_error,
)
from kfac_sua.tuned import resolve_auto

# Hydra has one state per process, which threads share.
_one_at_a_time = threading.RLock()


def compose_config(overrides: Sequence[str] = ()) -> Config:
    """Return the checked configuration of one run, as ``python -m kfac_sua.train <overrides>`` would use it.

    Args:
        overrides: Arguments such as ``"preconditioner=sua"`` and ``"optimizer.lr=0.1"``.

    Returns:
        The configuration.

    Raises:
        ConfigError: If the overrides cannot be composed or a check fails.
    """
    with initialized_hydra():
        return to_config(compose_raw(overrides))


def group_options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the options of every group that a command line chooses from.

    Args:
        config_dir: Directory with configurations of the user's own.
    """
    with initialized_hydra(config_dir):
        loader = GlobalHydra.instance().config_loader()
        return {group: loader.get_group_options(group) for group in GROUPS}


@contextmanager
def composed_hydra(overrides: Sequence[str], own: Sequence[str] = ()) -> Iterator[tuple[DictConfig, ConfigLoader]]:
    """Compose a configuration together with Hydra's own node.

    Args:
        overrides: Arguments such as ``"hydra/launcher=slurm"`` and ``"hydra.launcher.partition=gpu"``.
        own: Overrides that this package adds; they may set any of Hydra's keys.

    Yields:
        The configuration, and the loader with which a launcher composes others from the same files.

    Raises:
        ConfigError: If it cannot be composed, names code to run, or needs a plugin that is not installed.
    """
    with initialized_hydra():
        parse(overrides)
        yield compose_raw([*overrides, *own], with_hydra=True), GlobalHydra.instance().config_loader()


def to_config(raw: DictConfig) -> Config:
    """Convert a composed configuration to checked dataclasses; no other code sees a ``DictConfig``.

    Args:
        raw: What Hydra composed, without its own ``hydra`` node.

    Returns:
        The configuration.

    Raises:
        ConfigError: If a key was added or removed, a value is missing, or :func:`check` refuses one.
    """
    _refuse_changed_keys(raw, "")
    raw = copy.deepcopy(raw)
    try:
        resolve_auto(raw)
        config = OmegaConf.to_object(raw)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error)) from error
    except ValueError as error:  # from KroneckerSettings, which checks itself when made
        raise settings_error(error) from error
    assert isinstance(config, Config)
    check(config)
    return config


@contextmanager
def initialized_hydra(config_dir: Path | None = None) -> Iterator[None]:
    """Have Hydra read the configurations inside, and leave it as it was: the caller's program may use Hydra itself.

    Args:
        config_dir: Directory with configurations of the user's own.
    """
    register_structures()  # again, as a program may have registered one since
    path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:  # where Hydra's flag --config-dir puts it
        path.prepend("command-line", f"file://{config_dir.absolute()}", SearchPathQuery(provider="schema"))
    with _one_at_a_time:
        state, base, job = GlobalHydra.instance(), version.VersionBase.instance(), JobRuntime()
        before = state.hydra, base.version_base, job.conf
        state.hydra, job.conf = None, OmegaConf.create()
        try:
            version.setbase(VERSION_BASE)
            Hydra.create_main_hydra2("train", path)
            yield
        finally:
            state.hydra, base.version_base, job.conf = before


def compose_raw(overrides: Sequence[str], *, with_hydra: bool = False) -> DictConfig:
    """Return what Hydra composes, unchecked; to be called within :func:`initialized_hydra`.

    Args:
        overrides: Arguments, one value each.
        with_hydra: Whether Hydra's own node ``hydra`` is among the keys.

    Raises:
        ConfigError: If it cannot be composed.
    """
    try:
        return compose(CONFIG_NAME, list(overrides), return_hydra_config=with_hydra)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{', '.join(_files_of_other_encodings())} is not in UTF-8 ({error.reason}).") from error
    except Exception as error:  # Hydra raises some two dozen types here, all caused by overrides or YAML files
        raise ConfigError(explain(error)) from error


def _files_of_other_encodings() -> Iterator[str]:
    """Yield the YAML files that cannot be read as UTF-8; the error itself does not name them."""
    for element in GlobalHydra.instance().config_loader().get_search_path().get_path():
        scheme, _, place = str(element.path).partition("://")
        for path in sorted(Path(place).rglob("*.yaml")) if scheme == "file" else ():
            try:
                path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                yield str(path)


def _refuse_changed_keys(node: DictConfig, prefix: str) -> None:
    """Refuse keys that ``+key=value`` added or ``~key`` removed, which Hydra allows even with a schema."""
    kind = OmegaConf.get_type(node)
    if not dataclasses.is_dataclass(kind):
        return
    known = {field.name for field in dataclasses.fields(kind)}
    for key in map(str, node):
        if key not in known:
            raise ConfigError(explain_unknown_key(f"{prefix}{key}", kind))
        if not OmegaConf.is_missing(node, key) and isinstance(node._get_node(key), DictConfig):
            _refuse_changed_keys(node[key], f"{prefix}{key}.")
    for key in known - set(node):
        raise ConfigError(f"The key '{prefix}{key}' was removed but is needed; leave out '~{prefix}{key}'.")
