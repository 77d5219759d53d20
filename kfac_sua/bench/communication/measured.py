"""What processes really hand to torch.distributed, keep, and spend CPU seconds on: gloo processes on this machine.

Bytes are counted at the calls of ``torch.distributed``, and in a communication hook of DistributedDataParallel: not
where the preconditioner counts its own.
"""

import json
import os
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.bench.arithmetic import Arithmetic
from kfac_sua.bench.communication.counted import kept_bytes, part_sizes
from kfac_sua.bench.contender import PHASES, Batch, Contender
from kfac_sua.bench.memory import peak_bytes
from kfac_sua.bench.settings import Setting
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.config import KroneckerConfig
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.training.timing import Stopwatch

_CPU = torch.device("cpu")
_FLOAT32 = Arithmetic("float32", _CPU)


@dataclass(frozen=True)
class Measurement:
    """Measured costs of one setting on N processes; each is the largest of any process.

    Args:
        setting: Name of the setting.
        num_processes: N.
        batch_size: Examples of all processes together.
        header_bytes: Handed to gathers of integers, per measurement of the statistics.
        rows_bytes: Handed to other gathers, per measurement.
        moments_bytes: Handed to sums, per measurement.
        inverse_bytes: Handed to either, per refresh.
        gradient_bytes: Handed to sums by DistributedDataParallel, per mini-batch.
        kept_bytes: Inverses and running averages between mini-batches.
        peak_bytes: Most bytes of tensors held at once by those that a mini-batch with a refresh allocates.
        refresh_s: CPU seconds of a mini-batch with statistics and inversion, by phase; the median of three.
        plain_s: CPU seconds of a mini-batch without, likewise.
    """

    setting: str
    num_processes: int
    batch_size: int
    header_bytes: int
    rows_bytes: int
    moments_bytes: int
    inverse_bytes: int
    gradient_bytes: int
    kept_bytes: int
    peak_bytes: int
    refresh_s: dict[str, float]
    plain_s: dict[str, float]


def measure(
    settings: Sequence[Setting], num_processes: int, batch_size: int, flops_per_byte: float, repeats: int = 3
) -> list[Measurement]:
    """Train a few mini-batches per setting on several processes.

    Args:
        settings: Networks and preconditioners, none of them plain SGD.
        num_processes: N.
        batch_size: Examples of all processes together.
        flops_per_byte: Machine balance that inverses are shared out by.
        repeats: Mini-batches of each kind.

    Raises:
        ConfigError: If there are too few examples for all processes.
        torch.multiprocessing.ProcessRaisedException: If a process fails.
    """
    part_sizes(batch_size, num_processes)
    with tempfile.TemporaryDirectory() as directory:
        arguments = (num_processes, _free_port(), directory, settings, batch_size, flops_per_byte, repeats)
        mp.spawn(_work, args=arguments, nprocs=num_processes)
        ranks = [json.loads((Path(directory) / f"{rank}.json").read_text("utf-8")) for rank in range(num_processes)]
    return [
        Measurement(
            setting.name,
            num_processes,
            batch_size,
            **{name: max(one["numbers"][name] for one in found) for name in found[0]["numbers"]},
            refresh_s=_most([one["refresh_s"] for one in found]),
            plain_s=_most([one["plain_s"] for one in found]),
        )
        for setting, *found in zip(settings, *ranks, strict=True)
    ]


def _most(splits: list[dict[str, float]]) -> dict[str, float]:
    return {phase: max(split[phase] for split in splits) for phase in PHASES}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _work(
    rank: int,
    num_processes: int,
    port: int,
    directory: str,
    settings: Sequence[Setting],
    batch_size: int,
    flops_per_byte: float,
    repeats: int,
) -> None:
    """Act as one of the processes, and write its measurements to a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=num_processes, timeout=timedelta(minutes=10))
    try:
        batch = Batch.random(batch_size, _FLOAT32)
        own = Batch(batch.inputs.tensor_split(num_processes)[rank], batch.labels.tensor_split(num_processes)[rank])
        found = [_Rank(setting, own, flops_per_byte).measure(repeats) for setting in settings]
    finally:
        dist.destroy_process_group()
    (Path(directory) / f"{rank}.json").write_text(json.dumps(found), "utf-8")


class _Rank:
    """This process's part of the training."""

    def __init__(self, setting: Setting, batch: Batch, flops_per_byte: float) -> None:
        config = setting.config.preconditioner
        assert isinstance(config, KroneckerConfig)
        self.sent: Counter[str] = Counter()
        self._contender = contender = Contender(setting.config, _FLOAT32, batch)
        if contender.preconditioner is not None:
            contender.preconditioner.remove_hooks()  # it may know of no processes
        net = contender.model
        self._preconditioner = contender.preconditioner = KroneckerPreconditioner(
            net, settings=config.settings(setting.config.model.width), flops_per_byte=flops_per_byte
        )
        if dist.get_world_size() > 1:
            contender.model = self._in_parallel(net)

    def _in_parallel(self, net: nn.Module) -> DistributedDataParallel:
        model, group = DistributedDataParallel(net), dist.group.WORLD
        assert group is not None

        def hook(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            buffer = bucket.buffer()
            self.sent["gradient"] += buffer.numel() * buffer.itemsize
            return allreduce_hook(group, bucket)

        model.register_comm_hook(None, hook)
        return model

    def measure(self, repeats: int) -> dict[str, Any]:
        """Train a first mini-batch and count its bytes, and then some of each kind and time them."""
        with self._counted_collectives():
            self._step(StepKind.refresh)
        sent = {f"{name}_bytes": self.sent[name] for name in ("header", "rows", "moments", "inverse", "gradient")}
        self._step(StepKind.plain)  # a warm-up
        splits = {kind: [self._step(kind) for _ in range(repeats)] for kind in (StepKind.refresh, StepKind.plain)}
        peak = peak_bytes(lambda: self._step(StepKind.refresh), _CPU)
        return {
            "numbers": {**sent, "kept_bytes": kept_bytes(self._preconditioner), "peak_bytes": peak},
            **{
                f"{kind}_s": {phase: statistics.median(split[phase] for split in of_kind) for phase in PHASES}
                for kind, of_kind in splits.items()
            },
        }

    def _step(self, kind: StepKind) -> dict[str, float]:
        """Take a mini-batch of this kind and return the CPU seconds of its phases."""
        self._contender.make_due(kind)
        self._watch = _Watch(_CPU, time.process_time)
        self._contender.step(self._watch)
        totals = self._watch.totals()
        return {phase: totals[phase] for phase in PHASES}

    @contextmanager
    def _counted_collectives(self) -> Iterator[None]:
        """Count the bytes that the preconditioner's phases hand to torch.distributed."""
        gather, add_up = dist.all_gather, dist.all_reduce

        def counting_gather(received: list[Tensor], values: Tensor, **options: Any) -> Any:
            self._count(values, "rows" if values.is_floating_point() else "header")
            return gather(received, values, **options)

        def counting_sum(values: Tensor, **options: Any) -> Any:
            self._count(values, "moments")
            return add_up(values, **options)

        dist.all_gather, dist.all_reduce = counting_gather, counting_sum  # type: ignore[assignment]
        try:
            yield
        finally:
            dist.all_gather, dist.all_reduce = gather, add_up

    def _count(self, values: Tensor, of_statistics: str) -> None:
        if self._watch.current == "forward_backward":  # DistributedDataParallel's, counted in its hook
            return
        is_inverse = self._watch.current == "inversion"
        self.sent["inverse" if is_inverse else of_statistics] += values.numel() * values.itemsize


class _Watch(Stopwatch):
    """A stopwatch that knows its phase."""

    @property
    def current(self) -> str | None:
        """The phase that time is attributed to."""
        return self._open[-1] if self._open else None
