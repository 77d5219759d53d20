"""How long a step of each curve takes here, from a few steps of each in a process that ends before the first run."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.contender import Batch, Contender
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.build import build_splits
from kfac_sua.campaign.cell import Cell, Stage
from kfac_sua.campaign.plan import CurveKey
from kfac_sua.campaign.starting import start
from kfac_sua.config import Config, ConfigError
from kfac_sua.data import DataError
from kfac_sua.device import choose_device, choose_precision, device_type
from kfac_sua.runs.directory import resolved
from kfac_sua.runs.run_info import failure_reason

# A stage and one of its curves.
StageKey = tuple[Stage, CurveKey]

# Steps of each kind. The fastest counts, as the first ones fill caches.
REPETITIONS = 2


@dataclasses.dataclass(frozen=True)
class FirstSteps:
    """Seconds of the first steps of a curve, alone on the device.

    Attributes:
        step_s: Mean seconds of a step over a refresh period; None if no step could be taken.
        setup_s: Seconds before the first step of a run: images, network, warm-up.
        start_s: Seconds that the first run of a process takes on top: its start, and what is loaded once.
        problem: Why no step could be taken, in one sentence; the run itself will say the same.
    """

    step_s: float | None
    setup_s: float = 0.0
    start_s: float = 0.0
    problem: str = ""


def take_first_steps(
    cells: Sequence[Cell], num_threads: Mapping[Stage, int | None], environment: Mapping[str, str]
) -> dict[StageKey, FirstSteps]:
    """Take a few steps of each run, one run after the other. Runs of the same cost are measured once.

    Args:
        cells: The runs, one per stage and curve.
        num_threads: By stage, CPU threads of PyTorch for runs with ``num_threads=null``; None leaves PyTorch's choice.
        environment: Variables of the process's own, such as which GPU it sees.

    Returns:
        Their seconds, by stage and curve.
    """
    if not cells:
        return {}
    requests: dict[str, tuple[Config, int | None]] = {}
    works: dict[StageKey, str] = {}
    for cell in cells:
        threads = cell.config.num_threads or num_threads[cell.stage]
        works[cell.stage, cell.curve] = work = _work(cell.config, threads)
        requests.setdefault(work, (cell.config, threads))
    start(Connection.close, environment)[0].join()  # makes the process that is copied, which is no part of a start
    asked_at = time.monotonic()
    process, connection = start(_answer, environment)
    try:
        connection.send((list(requests.values()), asked_at))
        taken: Sequence[FirstSteps] = connection.recv()
    except (EOFError, ConnectionResetError):
        process.join()
        lost = FirstSteps(None, problem=f"the process of the first steps left with {process.exitcode}.")
        taken = [lost] * len(requests)
    finally:
        connection.close()
        process.terminate()
        process.join()
    by_work = dict(zip(requests, taken, strict=True))
    return {key: by_work[work] for key, work in works.items()}


def _work(config: Config, num_threads: int | None) -> str:
    """Return the settings that decide how long a step takes: all but images, schedule and what a grid varies."""
    values: dict[str, Any] = resolved(config, device_type(config.device))
    for key in ("seed", "epochs", "output_dir", "progress", "schedule", "dataset"):
        del values[key]
    for node, key in (("optimizer", "lr"), ("preconditioner", "damping")):
        values[node].pop(key, None)
    return json.dumps(values | {"num_threads": num_threads}, sort_keys=True)


def _answer(connection: Connection) -> None:
    """Take first steps of the runs that the connection asks for, and send their seconds."""
    requests, asked_at = connection.recv()
    start_s = time.monotonic() - asked_at
    default = torch.get_num_threads()
    cold, *taken = [_try(config, threads or default) for config, threads in [requests[0], *requests]]
    start_s += max(0.0, cold.setup_s - taken[0].setup_s)
    connection.send([dataclasses.replace(steps, start_s=start_s) for steps in taken])


def _try(config: Config, num_threads: int) -> FirstSteps:
    """Take first steps of one run, or say why that cannot be done."""
    torch.set_num_threads(num_threads)
    try:
        return _taken(config)
    except (ConfigError, RuntimeError, MemoryError, OSError) as error:
        return FirstSteps(None, problem=failure_reason(error))


def _taken(config: Config) -> FirstSteps:
    """Take first steps of one run, on random images."""
    started = time.perf_counter()
    device = choose_device(config.device)
    config = dataclasses.replace(config, precision=choose_precision(config.precision, device.type))
    arithmetic = Arithmetic(config.precision, device)
    with arithmetic.computing(config):
        with contextlib.suppress(DataError):  # what is missing will be fetched, or asked for, before the first run
            build_splits(dataclasses.replace(config.dataset, download=False))
        contender = Contender(config, arithmetic, Batch.random(config.batch_size, arithmetic))
        contender.warm_up()
        setup_s = time.perf_counter() - started
        counts = contender.steps_per_period
        seconds = {kind: min(_step_s(contender, kind) for _ in range(REPETITIONS)) for kind in counts}
    step_s = sum(seconds[kind] * count for kind, count in counts.items()) / sum(counts.values())
    return FirstSteps(step_s, setup_s)


def _step_s(contender: Contender, kind: StepKind) -> float:
    """Return the wall seconds of a step, which on a CPU are fewer than those of its threads together."""
    contender.make_due(kind)
    started = time.perf_counter()
    contender.timed_step()
    return time.perf_counter() - started
