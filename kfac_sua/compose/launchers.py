"""Hydra's launchers, which carry out runs elsewhere than in this process, and the sweeper that optimises.

They are plugins, each a package of its own; ``pip install '.[cluster,tune]'`` in a clone installs them all.
"""

from collections.abc import Sequence
from importlib.util import find_spec

# Option of the group hydra/launcher or hydra/sweeper -> the module that brings it.
PLUGINS = {
    "optuna": "hydra_plugins.hydra_optuna_sweeper",
    "slurm": "hydra_plugins.hydra_submitit_launcher",
    "submitit_slurm": "hydra_plugins.hydra_submitit_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "joblib": "hydra_plugins.hydra_joblib_launcher",
}
# What exceptions of submitit and joblib mean. They are named by text, as neither package need be installed.
_KILLED = {
    "UncompletedJobError": "A job of the sweep was killed or did not complete; the others go on by themselves",
    "FailedJobError": "A job of the sweep could not be submitted, or failed outside of its run",
    "TerminatedWorkerError": "A process of the sweep was killed, and joblib ends all others with it",
    "BrokenProcessPool": "A process of the sweep was killed, and joblib ends all others with it",
}


def missing_plugin(option: str) -> str | None:
    """Return a sentence if a launcher or a sweeper needs a plugin that is not installed.

    Args:
        option: What was given as ``hydra/launcher=…`` or ``hydra/sweeper=…``.
    """
    if option not in PLUGINS or _is_installed(PLUGINS[option]):
        return None
    package = PLUGINS[option].rpartition(".")[2].replace("_", "-")
    kind = "sweeper" if "sweeper" in package else "launcher"
    return f"The {kind} {option} needs {package}, which is not installed: pip install {package}."


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that holds it is missing
        return False


def was_killed(error: BaseException) -> bool:
    """Return whether an exception is a launcher's, about a job that was killed."""
    return type(error).__name__ in _KILLED


def killed_sentence(error: BaseException) -> str:
    """Return one sentence for a sweep that lost a job.

    Args:
        error: An exception for which :func:`was_killed` is true.
    """
    first_line = str(error).strip().partition("\n")[0].rstrip(".:")
    return f"{_KILLED[type(error).__name__]} ({first_line}); the same command starts what is missing."


def launcher_overrides(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split overrides into those of the launcher and all others.

    Args:
        overrides: Such as ``hydra.launcher.partition=gpu`` and ``device=cuda``.
    """
    of_launcher = [override for override in overrides if override.startswith(("hydra.launcher.", "+hydra.launcher."))]
    return of_launcher, [override for override in overrides if override not in of_launcher]
