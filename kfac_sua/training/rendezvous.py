"""The rendezvous of a run's processes before they form a group: do all of them carry out the same run?

They exchange text in a PyTorch store at the address that torchrun or srun gives them; a store needs neither a backend
nor a device. Every process reads what all have written, so all come to the same conclusion.
"""

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from kfac_sua.config import Config, ConfigError, shown
from kfac_sua.runs.directory import deciding_values, flat
from kfac_sua.runs.environment import source_digest
from kfac_sua.runs.run_info import failure_reason
from kfac_sua.training.connection import TIMEOUT, connection_errors, interruptible
from kfac_sua.training.launch import Launch

_READ_TIMEOUT = timedelta(seconds=10)
"""How long process 0, which hosts the store, waits for the others to read an error before it leaves."""

_MAX_SHOWN = 3  # differences in a sentence


class Rendezvous:
    """This process at the rendezvous.

    Args:
        launch: Rank of this process, and number of processes.
        store: Holds their messages; ``None`` for one process.
    """

    def __init__(self, launch: Launch, store: dist.Store | None) -> None:
        self.store = store
        self._launch = launch

    def require_one_world_size(self) -> None:
        """Check that all processes have the same WORLD_SIZE, before one waits for others that never come.

        Raises:
            ConfigError: On all processes that join, with both numbers.
        """
        if self.store is None:
            return
        store, rank, size = self.store, self._launch.rank, self._launch.world_size
        if rank == 0:
            store.set("size", str(size))
        store.wait(["size"], TIMEOUT)
        first = int(store.get("size"))
        if size != first:
            store.set("other size", json.dumps([rank, size]))
        elif store.add("size/alike", 1) == size:
            store.set("other size", json.dumps(None))
        store.wait(["other size"], TIMEOUT)
        other = json.loads(store.get("other size"))
        self._wait_until_read("other size", range(size if other is None else max(first, other[1])))
        if other is not None:
            raise ConfigError(
                f"The processes of a run must be told one number of processes: it is {first} in process 0 and "
                f"{other[1]} in process {other[0]}; give all the same WORLD_SIZE."
            )

    def require_one_run(self, config: Config) -> None:
        """Check that all processes have the same code, and the same values of keys that change numbers or collectives.

        Args:
            config: This process's configuration.

        Raises:
            ConfigError: On all of them, with what differs between which processes, or if ``start_from`` cannot be read.
        """
        if self.store is None:
            return
        all_values = self._call_on_all("values", lambda: _compared(config))
        differences = [
            f"{key} is {shown(all_values[0].get(key))} in process 0 and {shown(values.get(key))} in process {rank}"
            for rank, values in enumerate(all_values)
            for key in sorted({*values, *all_values[0]})
            if values.get(key) != all_values[0].get(key)
        ]
        if differences:
            more = f", and {len(differences) - _MAX_SHOWN} more differences" if len(differences) > _MAX_SHOWN else ""
            raise ConfigError(
                f"The {self._launch.world_size} processes of a run must carry out the same one: "
                f"{'; '.join(differences[:_MAX_SHOWN])}{more}."
            )

    def choose_device(self, choose: Callable[[], torch.device]) -> torch.device:
        """Return the device of this process, after a check that all processes use the same type of device.

        Args:
            choose: Returns this process's device.

        Raises:
            ConfigError: On all of them, if it fails on one, or the types differ.
        """
        if self.store is None:
            return choose()
        choose_once = functools.cache(choose)
        kinds = self._call_on_all("device", lambda: choose_once().type)
        for rank, kind in enumerate(kinds):
            if kind != kinds[self._launch.rank]:
                raise ConfigError(
                    f"The processes of a run must train on devices of one kind: {kinds[self._launch.rank]} in process "
                    f"{self._launch.rank} and {kind} in process {rank}; give device=cpu, or GPUs to all."
                )
        return choose_once()

    def _call_on_all(self, subject: str, find: Callable[[], Any]) -> list[Any]:
        """Call a function on every process and return all results, by rank; if it fails on one, raise on all."""
        try:
            own = find()
        except ConfigError as error:
            self._all_gather(subject, json.dumps({"failure": failure_reason(error)}))
            raise
        others = [json.loads(text) for text in self._all_gather(subject, json.dumps({"found": own}))]
        for rank, other in enumerate(others):
            if "failure" in other:
                raise ConfigError(f"process {rank} of {self._launch.world_size} cannot take part: {other['failure']}")
        return [other["found"] for other in others]

    def _all_gather(self, subject: str, text: str) -> list[str]:
        """Return the texts of all processes about a subject, by rank."""
        store, rank, ranks = self.store, self._launch.rank, range(self._launch.world_size)
        assert store is not None
        if store.add(f"{subject}/{rank}/claims", 1) > 1:
            raise ConfigError(
                f"Two processes say that they are number {rank} of {self._launch.world_size} at "
                f"{self._launch.master_address}:{self._launch.master_port}; give each its own RANK, and each run its "
                "own MASTER_PORT."
            )
        store.set(f"{subject}/{rank}", text)
        store.wait([f"{subject}/{other}" for other in ranks], TIMEOUT)
        texts = [store.get(f"{subject}/{other}").decode() for other in ranks]
        self._wait_until_read(subject, ranks)
        return texts

    def _wait_until_read(self, subject: str, ranks: range) -> None:
        """Keep the store open until all processes have read about a subject."""
        store, rank = self.store, self._launch.rank
        assert store is not None
        store.set(f"{subject}/{rank}/read", "")
        if rank == 0:  # it hosts the store, unless torchrun does
            with contextlib.suppress(dist.DistStoreError):
                store.wait([f"{subject}/{other}/read" for other in ranks], _READ_TIMEOUT)


@contextlib.contextmanager
def open_rendezvous(launch: Launch) -> Iterator[Rendezvous]:
    """Connect to the store of the rendezvous, and check that all processes have the same WORLD_SIZE.

    Args:
        launch: Rank of this process, number of processes, and address of process 0.

    Yields:
        The rendezvous; with one process its checks do nothing.

    Raises:
        ConfigError: If another program uses the port, or processes were told different numbers of processes.
        ConnectionLostError: If another process does not join, or ends.
    """
    if launch.world_size == 1:
        yield Rendezvous(launch, None)
        return
    with connection_errors(launch.rank, launch.world_size), interruptible():
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun uses one store for all restarts
        rendezvous = Rendezvous(launch, dist.PrefixStore(f"kfac_sua/{attempt}", _open_store(launch)))
        rendezvous.require_one_world_size()
    with connection_errors(launch.rank, launch.world_size):
        yield rendezvous


def _open_store(launch: Launch) -> dist.Store:
    """Open the store as PyTorch's ``env://`` does, but without waiting for all processes."""
    is_hosted_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            launch.master_address,
            launch.master_port,
            is_master=launch.rank == 0 and not is_hosted_by_torchrun,
            timeout=TIMEOUT,
            wait_for_workers=False,  # they may have different WORLD_SIZEs
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"Port {launch.master_port} of this machine, at which the processes would meet, is in use by another "
            "program; give a free one as MASTER_PORT, or torchrun --master_port."
        ) from error


def _compared(config: Config) -> dict[str, Any]:
    """Return what must be equal on all processes, by the name that an error gives it."""
    return (
        flat(deciding_values(config))
        | {
            "log_interval": config.log_interval,  # changes no numbers, but when losses of steps are all-reduced
            "the version of PyTorch": str(torch.__version__),
            "the source of kfac_sua": source_digest()[:12],
        }
    )
