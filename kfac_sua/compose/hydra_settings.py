"""Which of Hydra's own settings may change: its launcher and its sweeper, which spread runs and choose their values.

Hydra's node of a configuration names classes to instantiate, files to write and directories to change to. The command
decides all of these itself. So it refuses every other setting of Hydra, on the command line and in files.
"""

from collections.abc import Iterator
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from kfac_sua.config import ConfigError, shown

# Hydra calls what the value of this key names.
CODE = "_target_"
# Other keys of plugins that name something to call.
_NAMES_OF_CODE = ("custom_search_space", "constraints_func")
_ADMITTED = ("launcher", "sweeper", "mode", "verbose")
# Hydra sets these itself, anew for each run.
_OF_THE_MOMENT = ("runtime", "overrides", "job.name", "job.override_dirname", "job.id", "job.num", "job.config_name")
# Resolvers that make a node of a text. A check of the node would not see what such a text calls.
_HIDE_CODE = ("${oc.decode", "${oc.create")
# A key without hydra., or its first part -> what to use instead.
_INSTEAD = {
    "run": "the directory of a run follows from its configuration; give output_dir=DIR for where all lie",
    "sweep": "a sweep's own files lie in output_dir/.sweep; give output_dir=DIR",
    "output_subdir": "config.yaml of a run lies in its directory",
    "job.chdir": "a run writes to its own directory and stays in the one that it was started in; give output_dir=DIR",
    "job_logging": "a run's log is train.log in its directory, and its stdout",
    "hydra_logging": "a run's log is train.log in its directory, and its stdout",
    "searchpath": "give --config-dir DIR for a directory with configurations of your own",
    "help": "--help is the command's own",
}


def refuse_key(key: str, text: str) -> None:
    """Refuse an override of Hydra's settings, except those of its launcher and its sweeper.

    Args:
        key: The key of an override, such as ``hydra.launcher.partition`` or ``optimizer.lr``.
        text: The override as it was given.

    Raises:
        ConfigError: If it changes another of Hydra's settings, or names code.
    """
    if CODE in key.split("."):
        raise ConfigError(f"{key} names code to run, which no setting does; leave it out.")
    if not key.startswith(("hydra.", "hydra/")) and key != "hydra":
        return
    _, *parts = key.replace("/", ".").split(".")
    if CODE in text or parts[-1:] in ([name] for name in _NAMES_OF_CODE):
        raise ConfigError(f"{key} names code to run, which no setting does; leave it out.")
    if not parts or parts[0] not in _ADMITTED:
        raise ConfigError(_refusal(".".join(["hydra", *parts])))


def check_node(node: DictConfig, plain: DictConfig | None = None) -> None:
    """Refuse what files, or the value of an admitted key, have put into Hydra's node.

    Args:
        node: Hydra's node of a composed configuration.
        plain: The same node, composed from the package's files alone; ``None`` if there are no other files.

    Raises:
        ConfigError: If it calls a class that is no launcher's or sweeper's, lacks one of the two, or changes another
            setting.
    """
    known = set(_targets(ConfigStore.instance().repo.get("hydra", {})))
    for name in ("launcher", "sweeper"):
        if OmegaConf.is_missing(node, name) or not OmegaConf.is_dict(node.get(name)):
            raise ConfigError(f"hydra/{name} was removed but is needed; leave out what removes it.")
        for key, value in _leaves(_plain(node[name]), f"hydra.{name}"):
            last = key.rpartition(".")[2]
            is_hidden = any(resolver in str(value) for resolver in _HIDE_CODE)
            if (last == CODE and value not in known) or (last in _NAMES_OF_CODE and value is not None) or is_hidden:
                raise ConfigError(f"{key}={value} names code to run, which no setting does; leave it out.")
    if plain is None:
        return
    before = dict(_leaves(_plain(plain), "hydra"))
    for key, value in _leaves(_plain(node), "hydra"):
        is_free = any(f"{key}.".startswith(f"hydra.{free}.") for free in (*_ADMITTED, *_OF_THE_MOMENT))
        if not is_free and before.get(key, node) != value:
            raise ConfigError(f"A file sets {key} to {shown(value)}: {_refusal(key)}")


def _refusal(key: str) -> str:
    parts = key.split(".")[1:]
    instead = _INSTEAD.get(".".join(parts)) or _INSTEAD.get(parts[0] if parts else "")
    because = instead or f"of Hydra's own settings only hydra.{', hydra.'.join(_ADMITTED)} can be changed"
    return f"{key} is no setting of this command: {because}."


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _leaves(inner, f"{key}.{name}")
    elif isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{key}.{number}")
    else:
        yield key, value


def _targets(repository: Any) -> Iterator[str]:
    """Yield the classes of all launchers, sweepers and samplers that plugins have registered."""
    if isinstance(repository, ConfigNode):
        yield from (value for key, value in _leaves(_plain(repository.node), "") if key.rpartition(".")[2] == CODE)
    elif isinstance(repository, dict):
        for inner in repository.values():
            yield from _targets(inner)
