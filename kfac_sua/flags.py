"""Flags of the training command: Hydra's, but for those that would change its primary configuration, and two more."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from kfac_sua.config import CONFIG_DIR, CONFIG_NAME, ConfigError
from kfac_sua.runs.openers import cannot_use, refuse_special

DEBUG = "--debug"  # the same as HYDRA_FULL_ERROR=1
# Hydra's flags that show something instead of running: those without a value, and those with one of these.
_SHOWING = ("--hydra-help", "--resolve", "--shell-completion")
_INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
_SHOWING_VALUED = {"--cfg": ("job", "hydra", "all"), "--package": None, "--info": _INFO}


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the arguments of the training command say.

    Attributes:
        overrides: ``key=value`` arguments, in order.
        is_multirun: Whether ``-m`` was given.
        config_dir: Directory with configurations of the user's own, by ``--config-dir``.
        rerun: Directory of a run whose saved configuration comes before the overrides, by ``--rerun``.
        start_from: Directory of a run to train on, by ``--start-from``, whose configuration comes before them too.
        is_help: Whether ``--help`` was given.
        is_version: Whether ``--version`` was given.
        is_completion: Whether a shell asks for completions.
        shows: Whether something is to be shown instead of run.
    """

    overrides: tuple[str, ...] = ()
    is_multirun: bool = False
    config_dir: Path | None = None
    rerun: Path | None = None
    start_from: Path | None = None
    is_help: bool = False
    is_version: bool = False
    is_completion: bool = False
    _hydra: tuple[str, ...] = ()

    @property
    def shows(self) -> bool:
        """Whether something is to be shown instead of run."""
        return bool(self._hydra)

    def for_hydra(self, overrides: Sequence[str]) -> list[str]:
        """Return the arguments that Hydra takes, which wants its flags before all overrides.

        Args:
            overrides: Those of all runs.
        """
        run = ["-m"] if self.is_multirun else []
        where = [f"--config-dir={self.config_dir}"] if self.config_dir is not None else []
        return [*run, *self._hydra, *where, *overrides]


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Read the arguments of the training command.

    Args:
        arguments: Without the program's name.

    Raises:
        ConfigError: If there is no such flag, one lacks its value, or asks for another primary configuration.
    """
    parser = _parser()
    try:
        given, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        name = str(error.argument_name).rpartition("/")[2]
        raise ConfigError(f"The flag {name} cannot be read: {error.message}.") from error
    for argument in rest:
        if argument.startswith("-"):
            raise ConfigError(
                f"There is no flag '{argument}'; give settings as key=value, for example optimizer.lr=0.1."
            )
    if given.config_path is not None or given.config_name is not None:
        raise ConfigError(
            f"--config-path and --config-name would replace configs/{CONFIG_NAME}.yaml, which every run is composed "
            "from; give --rerun RUN for the saved configuration of a run, or --config-dir DIR experiment=NAME for "
            "DIR/experiment/NAME.yaml of your own."
        )
    values = vars(given)
    if given.rerun is not None and given.start_from is not None:
        raise ConfigError("--start-from begins with the configuration of its run; give it alone, or --rerun.")
    hydra = [flag for flag in _SHOWING if values[_attribute(flag)]]
    hydra += [f"{flag}={values[_attribute(flag)]}" for flag in _SHOWING_VALUED if values[_attribute(flag)] is not None]
    return CommandLine(
        overrides=tuple(rest),
        is_multirun=given.multirun,
        config_dir=None if given.config_dir is None else _checked_directory(Path(given.config_dir)),
        rerun=None if given.rerun is None else Path(given.rerun),
        start_from=None if given.start_from is None else Path(given.start_from),
        is_help=given.help,
        is_version=given.version,
        is_completion=given.shell_completion,
        _hydra=tuple(hydra),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for names in (("-h", "--help"), ("--version",), ("-m", "--multirun"), ("-r", "--run")):
        parser.add_argument(*names, action="store_true")
    for names in (("--hydra-help",), ("--resolve",), ("-sc", "--shell-completion")):
        parser.add_argument(*names, action="store_true")
    for name, choices in _SHOWING_VALUED.items():
        if choices is _INFO:  # whose value can be left out
            parser.add_argument(name[1:3], name, choices=choices, nargs="?", const=_INFO[0])
        else:
            parser.add_argument(name[1:3], name, choices=choices)
    for names in (("-cp", "--config-path"), ("-cn", "--config-name"), ("-cd", "--config-dir")):
        parser.add_argument(*names)
    for name in ("--rerun", "--start-from"):
        parser.add_argument(name)
    return parser


def _attribute(flag: str) -> str:
    """Return under which name a flag's value stands."""
    return flag.removeprefix("--").replace("-", "_")


def _checked_directory(path: Path) -> Path:
    """Refuse a directory that is not there, or whose configuration would be passed over."""
    if not path.is_dir():
        raise ConfigError(f"--config-dir={path} is not a directory; give one that holds experiment/NAME.yaml.")
    if (path / f"{CONFIG_NAME}.yaml").exists():
        raise ConfigError(
            f"{path / CONFIG_NAME}.yaml would not be read, as configs/{CONFIG_NAME}.yaml comes first; give --rerun "
            f"{path} if it is that of a run, or rename it to experiment/NAME.yaml and give experiment=NAME."
        )
    for file in sorted(path.rglob("*.yaml")):
        name = file.relative_to(path)
        if (CONFIG_DIR / name).exists():
            raise ConfigError(f"{file} would not be read, as configs/{name} comes first; give it another name.")
        try:  # Hydra opens them by itself, and would wait for a named pipe
            refuse_special(file)
        except OSError as error:
            raise ConfigError(cannot_use(error)) from error
    return path.absolute()
