"""The options of the training command: one entry each, from which parsing, errors and ``--help`` follow.

All settings are ``key=value``; an option stands for what no key can say. Hydra's own options are among them, but for
those that would change its primary configuration.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kfac_sua.cli.help import help_text, version_text
from kfac_sua.compose import quoted
from kfac_sua.compose.saved import saved_overrides
from kfac_sua.config import CONFIG_DIR, CONFIG_NAME, ConfigError
from kfac_sua.files.openers import cannot_use, refuse_special

DEBUG = "--debug"  # the same as HYDRA_FULL_ERROR=1
COMPLETION = "--shell-completion"


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """What the arguments of the training command say.

    Attributes:
        overrides: ``key=value`` arguments, in order.
        is_multirun: Whether all combinations of several values are to be run.
        config_dir: Directory with configurations of the user's own.
        saved: Directory of a run whose saved configuration comes before the overrides.
        added: Overrides that options stand for; they come between these two.
        answer: What is printed instead of running anything; None to run.
        for_hydra_alone: Options with which Hydra shows something instead of running anything.
    """

    overrides: tuple[str, ...] = ()
    is_multirun: bool = False
    config_dir: Path | None = None
    saved: Path | None = None
    added: tuple[str, ...] = ()
    answer: "Callable[[CommandLine], str] | None" = None
    for_hydra_alone: tuple[str, ...] = ()

    @property
    def is_completion(self) -> bool:
        """Whether a shell asks for completions."""
        return COMPLETION in self.for_hydra_alone

    def all_overrides(self) -> list[str]:
        """Return the overrides that make the configuration: saved ones first, the user's last.

        Raises:
            ConfigError: If there is no saved configuration where one is asked for, or it does not bear the overrides.
        """
        given = [*self.added, *self.overrides]
        return given if self.saved is None else saved_overrides(self.saved, given)

    def for_hydra(self, overrides: Sequence[str]) -> list[str]:
        """Return the arguments that Hydra takes, which wants its options before all overrides.

        Args:
            overrides: Those of all runs.
        """
        run = ["-m"] if self.is_multirun else []
        where = [f"--config-dir={self.config_dir}"] if self.config_dir is not None else []
        return [*run, *self.for_hydra_alone, *where, *overrides]


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of the command line.

    Attributes:
        names: How it is written, as listed; the last name is the one in messages.
        act: What it does to the command line, given that and the option's value, which is empty without one.
        help: Line of ``--help``; empty for an option that is not listed.
        aliases: Other names, which are not listed.
        metavar: What its value is called; empty for an option without a value, or with ``choices``.
        choices: Its values, where these are few.
        default: The value where none is given; None where one is needed.
    """

    names: tuple[str, ...]
    act: Callable[[CommandLine, str], CommandLine]
    help: str = ""
    aliases: tuple[str, ...] = ()
    metavar: str = ""
    choices: tuple[str, ...] | None = None
    default: str | None = None

    @property
    def usage(self) -> str:
        """The option as ``--help`` writes it."""
        value = self.metavar or (self.choices[0] if self.choices and self.default is None else "")
        return f"{', '.join(self.names)} {value}".rstrip()

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Let a parser take the option, and keep its value under its last name; None if it is not given."""
        names, dest = (*self.aliases, *self.names), self.names[-1]
        if not self.metavar and self.choices is None:
            parser.add_argument(*names, dest=dest, action="store_const", const="")
        elif self.default is not None:
            parser.add_argument(*names, dest=dest, choices=self.choices, nargs="?", const=self.default)
        else:
            parser.add_argument(*names, dest=dest, choices=self.choices)


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Read the arguments of the training command.

    Args:
        arguments: Without the program's name.

    Raises:
        ConfigError: If there is no such option, one lacks its value, or asks for another primary configuration.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in OPTIONS:
        option.add_to(parser)
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
    line = CommandLine(overrides=tuple(rest))
    for option in OPTIONS:
        value = vars(given)[option.names[-1]]
        if value is not None:
            line = option.act(line, value)
    return line


def _of_hydra(*names: str, **rest: Any) -> Option:
    """Return an option with which Hydra shows something instead of running anything."""
    *aliases, name = names

    def act(line: CommandLine, value: str) -> CommandLine:
        text = f"{name}={value}" if value else name
        return dataclasses.replace(line, for_hydra_alone=(*line.for_hydra_alone, text))

    return Option((name,), act, aliases=tuple(aliases), **rest)


def _refuse(line: CommandLine, value: str) -> CommandLine:
    del line, value
    raise ConfigError(
        f"--config-path and --config-name would replace configs/{CONFIG_NAME}.yaml, which every run is composed "
        "from; give --rerun RUN for the saved configuration of a run, or --config-dir DIR experiment=NAME for "
        "DIR/experiment/NAME.yaml of your own."
    )


def _start_from(line: CommandLine, value: str) -> CommandLine:
    if line.saved is not None:
        raise ConfigError("--start-from begins with the configuration of its run; give it alone, or --rerun.")
    source = f"start_from={quoted(str(Path(value).absolute()))}"
    return dataclasses.replace(line, saved=Path(value), added=(*line.added, source))


def _help(line: CommandLine) -> str:
    return help_text({option.usage: option.help for option in OPTIONS if option.help}, line.config_dir)


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


# In the order of --help, in which they also act.
OPTIONS = (
    Option(("--config-path",), _refuse, aliases=("-cp",), metavar="DIR"),
    Option(("--config-name",), _refuse, aliases=("-cn",), metavar="NAME"),
    Option(("--run",), lambda line, _: line, aliases=("-r",)),
    Option(
        ("-m", "--multirun"),
        lambda line, _: dataclasses.replace(line, is_multirun=True),
        help="run every combination of values that are given with commas",
    ),
    Option(
        ("--rerun",),
        lambda line, value: dataclasses.replace(line, saved=Path(value)),
        help="begin from the configuration saved in the directory of a run; overrides come on top",
        metavar="RUN",
    ),
    Option(
        ("--start-from",),
        _start_from,
        help="train a finished run on, with epochs= more than it has (schedule=constant)",
        metavar="RUN",
    ),
    Option(
        ("--config-dir",),
        lambda line, value: dataclasses.replace(line, config_dir=_checked_directory(Path(value))),
        help="look for configurations of your own there, such as DIR/experiment/mine.yaml: experiment=mine",
        aliases=("-cd",),
        metavar="DIR",
    ),
    _of_hydra(
        *("-c", "--cfg"),
        help="show the composed configuration instead of running it (also: hydra, all)",
        choices=("job", "hydra", "all"),
    ),
    _of_hydra(
        *("-i", "--info"),
        help="show how it is composed",
        choices=("all", "config", "defaults", "defaults-tree", "plugins", "searchpath"),
        default="all",
    ),
    _of_hydra("-p", "--package", metavar="PACKAGE"),
    _of_hydra("--resolve"),
    _of_hydra("--hydra-help"),
    # train.py looks for it before the options are read, which may fail.
    Option((DEBUG,), lambda line, _: line, help="a traceback instead of a sentence"),
    _of_hydra("-sc", COMPLETION, help="how the shell completes keys and values: --hydra-help"),
    Option(
        ("--version",),
        lambda line, _: dataclasses.replace(line, answer=lambda _: version_text()),
        help="versions of this package, PyTorch and Hydra",
    ),
    Option(("--help",), lambda line, _: dataclasses.replace(line, answer=_help), aliases=("-h",)),
)
