"""How a run was launched: this process's rank, from the environment of torchrun or srun, and the command line."""

import dataclasses
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from kfac_sua.config import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Range of the port of process 0 under srun, which sets none: the job's number selects it. The range lies below the
ports that systems assign by themselves."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process among those that carry out a run together; the default is a single process.

    Attributes:
        rank: Number of the process, from 0.
        world_size: Number of processes.
        local_rank: Number of the process among those of its machine that see the same GPUs, from 0.
        master_address: Host name of process 0.
        master_port: Port of process 0.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    master_address: str = ""
    master_port: int = 0


@dataclass(frozen=True)
class Invocation:
    """What the command line says about a run beside its configuration; by default it says nothing.

    Attributes:
        label: Beginning of the run's opening line in a sweep, such as ``"#3 of 10 "``.
        auto_keys: Keys that were ``auto`` before numbers took their place.
        overrides: The overrides of this run, as ``key=value``.
    """

    label: str = ""
    auto_keys: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


def read_launch(variables: Mapping[str, str]) -> Launch:
    """Read what torchrun, or srun with several tasks, sets in the environment of a process.

    A batch script that starts one process within a larger Slurm job is a single process: only srun sets the variables
    of a step.

    Args:
        variables: The process's environment.

    Returns:
        The launch; that of a single process if neither has set anything.

    Raises:
        ConfigError: If variables are missing, or are not numbers in range.
    """
    given = [name for name in _TORCHRUN[:2] if name in variables]
    if given:
        missing = [name for name in _TORCHRUN if name not in variables]
        if missing:
            raise ConfigError(
                f"The environment has {given[0]} but not {', '.join(missing)}; start several processes by torchrun, "
                f"or unset {given[0]}."
            )
        return _checked(_launch(variables, _TORCHRUN[:3], variables["MASTER_ADDR"], _number(variables, "MASTER_PORT")))
    if variables.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        port = FIRST_PORT + (7 * _number(variables, "SLURM_JOB_ID") + _number(variables, "SLURM_STEP_ID")) % NUM_PORTS
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        launch = _launch(variables, names, _first_host(variables), port)
        if "SLURM_GPUS_PER_TASK" in variables:  # then each process sees only its own GPUs
            launch = dataclasses.replace(launch, local_rank=0)
        return _checked(launch)
    return Launch()


def _launch(variables: Mapping[str, str], names: tuple[str, ...], address: str, port: int) -> Launch:
    rank, size, local_rank = (_number(variables, name) for name in names)
    return Launch(rank, size, local_rank, address, port)


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.world_size:
        raise ConfigError(
            f"The environment places this process as number {launch.rank} of {launch.world_size}; start several "
            "processes by torchrun or srun."
        )
    return launch


def _number(variables: Mapping[str, str], name: str) -> int:
    text = variables.get(name, "")
    if not (text.isascii() and text.isdecimal()):
        raise ConfigError(
            f"The environment variable {name} must be a whole number, got '{text}'; start several processes by "
            f"torchrun or srun."
        )
    return int(text)


def _first_host(variables: Mapping[str, str]) -> str:
    """Return the first host of a Slurm step; scontrol expands an abbreviated list of hosts."""
    hosts = variables.get("SLURM_STEP_NODELIST", "")
    if not any(mark in hosts for mark in "[,"):
        return hosts or "127.0.0.1"
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"scontrol does not tell the first host of '{hosts}' ({error}); start the processes by torchrun."
        ) from error
    return said.stdout.split()[0]
