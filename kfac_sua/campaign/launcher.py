"""The launcher of a campaign: its settings from ``configs/hydra/launcher`` and the command line, checked."""

import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from kfac_sua.compose import composed_hydra
from kfac_sua.config import ConfigError

SLURM, SUBMITIT_LOCAL, JOBLIB = "slurm", "submitit_local", "joblib"
LAUNCHERS = (SLURM, JOBLIB, SUBMITIT_LOCAL)

# The key that limits the runs at the same time, of launchers that have one.
_JOBS_KEYS = {SLURM: "array_parallelism", JOBLIB: "n_jobs"}
_GPU_KEYS = ("gpus_per_node", "gpus_per_task", "gres")
# Keys that have no part in the resources of a run.
_NOT_SHOWN = ("submitit_folder", "name", "stderr_to_stdout", "nodes", "tasks_per_node")


@dataclass(frozen=True)
class Launcher:
    """A launcher of Hydra's with its settings.

    Attributes:
        name: One of ``LAUNCHERS``, an option of Hydra's group ``hydra/launcher``.
        overrides: Overrides of Hydra that select and set it.
        settings: Its node of the composed configuration.
        jobs: Runs at the same time.
    """

    name: str
    overrides: tuple[str, ...]
    settings: dict[str, Any]
    jobs: int

    @property
    def has_machines_of_its_own(self) -> bool:
        """Whether its jobs run elsewhere, each with resources of its own."""
        return self.name == SLURM

    @property
    def num_threads(self) -> int | None:
        """CPU threads of a run with ``num_threads=null``; None if the launcher's settings do not say."""
        return self.settings.get("cpus_per_task")

    def describe(self) -> str:
        """Return a line on the resources of each run."""
        told = {key: value for key, value in self.settings.items() if key not in _NOT_SHOWN and key[0] != "_"}
        shown = {key: value for key, value in told.items() if value not in (None, {})}
        return f"{self.name} ({', '.join(f'{key}={value}' for key, value in sorted(shown.items()))})"


def load_launcher(name: str, overrides: Sequence[str], jobs: int | None, default_jobs: int = 1) -> Launcher:
    """Return a launcher with its settings.

    Args:
        name: One of ``LAUNCHERS``.
        overrides: Settings of it, such as ``hydra.launcher.partition=gpu``.
        jobs: Runs at the same time, if the user gives them.
        default_jobs: Runs at the same time on this machine otherwise.

    Raises:
        ConfigError: If its plugin is missing, or a setting does not exist or has no such value.
    """
    key = _JOBS_KEYS.get(name)
    if jobs is None and name != SLURM:
        jobs = default_jobs
    chosen = [f"hydra/launcher={name}", *([f"hydra.launcher.{key}={jobs}"] if key and jobs else []), *overrides]
    settings = _settings(chosen)
    launcher = Launcher(name, tuple(chosen), settings, settings[key] if key else jobs or default_jobs)
    _check(launcher)
    return launcher


def with_device(launcher: Launcher, overrides: Sequence[str]) -> tuple[Launcher, list[str]]:
    """Decide on which device runs train, where they train on machines that this one does not see.

    The device is part of a run's directory and cannot be left to ``device=auto`` there. It is ``cuda`` if the launcher
    gives each run a GPU. With ``device=cpu`` the launcher gives none.

    Args:
        launcher: The launcher.
        overrides: Overrides of every run.

    Returns:
        The launcher, and the overrides with the device.

    Raises:
        ConfigError: If runs are to train on GPUs that the launcher does not ask for.
    """
    if launcher.name == JOBLIB:
        return launcher, list(overrides)
    has_gpus = any(launcher.settings.get(key) for key in _GPU_KEYS)
    device = {override.partition("=")[0]: override.partition("=")[2] for override in overrides}.get("device", "auto")
    if device == "cuda" and not has_gpus:
        raise ConfigError(f"device=cuda needs a GPU per run; give hydra.launcher.gpus_per_node=1 to {launcher.name}.")
    if device == "cpu" and launcher.settings.get("gpus_per_node"):
        without = [*launcher.overrides, "hydra.launcher.gpus_per_node=null"]
        launcher = Launcher(launcher.name, tuple(without), _settings(without), launcher.jobs)
    if device == "auto":
        others = [override for override in overrides if not override.startswith("device=")]
        return launcher, [*others, f"device={'cuda' if has_gpus else 'cpu'}"]
    return launcher, list(overrides)


def require_cluster(launcher: Launcher) -> None:
    """Check that jobs can be submitted from here, and that their ends can be seen.

    Raises:
        ConfigError: If there is no Slurm on this machine, or it keeps no account of jobs.
    """
    if launcher.name != SLURM:
        return
    for tool in ("sbatch", "srun", "sacct"):
        if shutil.which(tool) is None:
            raise ConfigError(
                f"The launcher slurm needs {tool}, which is not on this machine; start it on a login node."
            )
    answer = subprocess.run(["sacct", "--noheader", "--jobs", "1"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        said = " ".join(answer.stderr.split()).rstrip(".")
        raise ConfigError(f"sacct fails ({said}); without it no one would learn that a job was killed.")


def _settings(overrides: Sequence[str]) -> dict[str, Any]:
    with composed_hydra(overrides) as (raw, _):
        settings = OmegaConf.to_container(raw.hydra.launcher, resolve=False)
    assert isinstance(settings, dict)
    return {str(key): value for key, value in settings.items()}


def _check(launcher: Launcher) -> None:
    """Refuse settings under which a job would not be one run."""
    for key in ("nodes", "tasks_per_node"):
        if launcher.settings.get(key, 1) not in (1, None):
            raise ConfigError(f"hydra.launcher.{key} must be 1, as a run is one process, got {launcher.settings[key]}.")
    if launcher.name == JOBLIB and launcher.jobs in (0, 1):
        raise ConfigError("--launcher joblib needs --jobs of at least 2; one run at a time is --launcher local.")
    if launcher.jobs < 1 and not (launcher.name == JOBLIB and launcher.jobs == -1):
        raise ConfigError(f"hydra.launcher.{_JOBS_KEYS[launcher.name]} must be at least 1, got {launcher.jobs}.")
