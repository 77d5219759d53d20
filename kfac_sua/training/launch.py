"""Whether this process is one of several that carry out a run together, as torchrun and srun say in the environment."""

import dataclasses
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from kfac_sua.config import ConfigError

FIRST_PORT, NUM_PORTS = 20_000, 12_000
"""Where processes started by srun meet: a port fixed by the job's number, since srun names none; below those that
systems give out by themselves."""

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """This process's place among those of a run, and the run's among those of a sweep.

    Args:
        rank: Number of the process, from 0.
        size: Number of processes.
        local_rank: Number of the process among those of its machine that see the same GPUs, from 0.
        address: Host name of process 0.
        port: Port at which the processes meet there.
        place: Beginning of the run's opening line, such as ``#3 of 10`` and a blank.
        auto: Keys whose numbers the run was not given, but ``auto`` stood for.
        overrides: What the command line says of this run.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    place: str = ""
    auto: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()


ALONE = Launch()
"""One process that carries out a run by itself."""


def read_launch(variables: Mapping[str, str]) -> Launch:
    """Read what torchrun, or srun with several tasks, tells a process.

    A batch script that starts one process within a larger Slurm job is one process: only srun sets the variables of a
    step.

    Args:
        variables: The process's environment.

    Returns:
        Its place; a process that nobody placed is alone.

    Raises:
        ConfigError: If variables are missing, or hold no such numbers.
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
        if "SLURM_GPUS_PER_TASK" in variables:  # then each process sees GPUs of its own
            launch = dataclasses.replace(launch, local_rank=0)
        return _checked(launch)
    return Launch()


def _launch(variables: Mapping[str, str], names: tuple[str, ...], address: str, port: int) -> Launch:
    rank, size, local_rank = (_number(variables, name) for name in names)
    return Launch(rank, size, local_rank, address, port)


def _checked(launch: Launch) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise ConfigError(
            f"The environment places this process as number {launch.rank} of {launch.size}; start several processes "
            f"by torchrun or srun."
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
    """Return the first host of a Slurm step, whose list of hosts may be abbreviated."""
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
