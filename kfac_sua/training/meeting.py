"""Where the processes of a run meet first, before they train on anything: are they all there for the same run?

They write to a store of PyTorch's at the address that torchrun or srun gives them, which needs neither a backend nor a
device. Every process reads what all have written and comes to the same conclusion.
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
from kfac_sua.training.contact import PATIENCE, interruptible, named_losses
from kfac_sua.training.launch import Launch

_LEAVING_PATIENCE = timedelta(seconds=10)
"""How long the store stays for others that have still to read why they all leave."""

_MOST_SHOWN = 3  # differences in a sentence


class Meeting:
    """This process among those of a run, before they are a group.

    Args:
        launch: This process's place.
        store: Where they leave each other messages; ``None`` for a process alone.
    """

    def __init__(self, launch: Launch, store: dist.Store | None) -> None:
        self.store = store
        self._launch = launch

    def require_one_size(self) -> None:
        """Refuse processes that were told different numbers of processes, before one waits for others that never come.

        Raises:
            ConfigError: On all that come, with both numbers.
        """
        if self.store is None:
            return
        store, rank, size = self.store, self._launch.rank, self._launch.size
        if rank == 0:
            store.set("size", str(size))
        store.wait(["size"], PATIENCE)
        first = int(store.get("size"))
        if size != first:
            store.set("other size", json.dumps([rank, size]))
        elif store.add("size/alike", 1) == size:
            store.set("other size", json.dumps(None))
        store.wait(["other size"], PATIENCE)
        other = json.loads(store.get("other size"))
        self._stay("other size", range(size if other is None else max(first, other[1])))
        if other is not None:
            raise ConfigError(
                f"The processes of a run must be told one number of processes: it is {first} in process 0 and "
                f"{other[1]} in process {other[0]}; give all the same WORLD_SIZE."
            )

    def require_one_run(self, config: Config) -> None:
        """Refuse processes that differ in what decides a run's numbers or its calls to others, or in their code.

        Args:
            config: This process's configuration.

        Raises:
            ConfigError: On all of them, with what differs and between whom, or if ``start_from`` cannot be read.
        """
        if self.store is None:
            return
        all_values = self._each("values", lambda: flat(deciding_values(config)) | _calls(config) | _code())
        differences = [
            f"{key} is {shown(all_values[0].get(key))} in process 0 and {shown(values.get(key))} in process {rank}"
            for rank, values in enumerate(all_values)
            for key in sorted({*values, *all_values[0]})
            if values.get(key) != all_values[0].get(key)
        ]
        if differences:
            more = f", and {len(differences) - _MOST_SHOWN} more differences" if len(differences) > _MOST_SHOWN else ""
            raise ConfigError(
                f"The {self._launch.size} processes of a run must carry out the same one: "
                f"{'; '.join(differences[:_MOST_SHOWN])}{more}."
            )

    def choose_alike(self, choose: Callable[[], torch.device]) -> torch.device:
        """Return the device of this process, where all find one of the same kind.

        Args:
            choose: Finds it, by this process alone.

        Raises:
            ConfigError: On all of them, if it fails on one, or kinds differ.
        """
        if self.store is None:
            return choose()
        choose_once = functools.cache(choose)
        kinds = self._each("device", lambda: choose_once().type)
        for rank, kind in enumerate(kinds):
            if kind != kinds[self._launch.rank]:
                raise ConfigError(
                    f"The processes of a run must train on devices of one kind: {kinds[self._launch.rank]} in process "
                    f"{self._launch.rank} and {kind} in process {rank}; give device=cpu, or GPUs to all."
                )
        return choose_once()

    def _each(self, subject: str, find: Callable[[], Any]) -> list[Any]:
        """Return what each process finds by itself, by rank; where it fails on one of them, all leave."""
        try:
            own = find()
        except ConfigError as error:
            self._gather(subject, json.dumps({"failure": failure_reason(error)}))
            raise
        others = [json.loads(text) for text in self._gather(subject, json.dumps({"found": own}))]
        for rank, other in enumerate(others):
            if "failure" in other:
                raise ConfigError(f"process {rank} of {self._launch.size} cannot take part: {other['failure']}")
        return [other["found"] for other in others]

    def _gather(self, subject: str, text: str) -> list[str]:
        """Return what each process writes about a subject, by rank; the store stays until all have read it."""
        store, rank, ranks = self.store, self._launch.rank, range(self._launch.size)
        assert store is not None
        if store.add(f"{subject}/{rank}/claims", 1) > 1:
            raise ConfigError(
                f"Two processes say that they are number {rank} of {self._launch.size} at {self._launch.address}:"
                f"{self._launch.port}; give each its own RANK, and each run its own MASTER_PORT."
            )
        store.set(f"{subject}/{rank}", text)
        store.wait([f"{subject}/{other}" for other in ranks], PATIENCE)
        texts = [store.get(f"{subject}/{other}").decode() for other in ranks]
        self._stay(subject, ranks)
        return texts

    def _stay(self, subject: str, ranks: range) -> None:
        """Keep the store until all have read about a subject."""
        store, rank = self.store, self._launch.rank
        assert store is not None
        store.set(f"{subject}/{rank}/read", "")
        if rank == 0:  # which keeps the store, unless torchrun does
            with contextlib.suppress(dist.DistStoreError):
                store.wait([f"{subject}/{other}/read" for other in ranks], _LEAVING_PATIENCE)


@contextlib.contextmanager
def open_meeting(launch: Launch) -> Iterator[Meeting]:
    """Go where the processes of a run meet, and wait for the one that keeps the store.

    Args:
        launch: This process's place.

    Yields:
        The meeting, which for a process alone asks nothing.

    Raises:
        ConfigError: If another program uses the port, or processes were told different numbers of processes.
        LostContactError: If another process does not come, or goes.
    """
    if launch.size == 1:
        yield Meeting(launch, None)
        return
    with named_losses(launch.rank, launch.size), interruptible():
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps one store for all attempts
        meeting = Meeting(launch, dist.PrefixStore(f"kfac_sua/{attempt}", _open_store(launch)))
        meeting.require_one_size()
    with named_losses(launch.rank, launch.size):
        yield meeting


def _open_store(launch: Launch) -> dist.Store:
    """Open the store where processes meet, as ``env://`` of PyTorch does, but without waiting for all to come."""
    is_kept_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            launch.address,
            launch.port,
            is_master=launch.rank == 0 and not is_kept_by_torchrun,
            timeout=PATIENCE,
            wait_for_workers=False,  # whose number they may not agree on
            multi_tenant=True,
        )
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"Port {launch.port} of this machine, at which the processes would meet, is in use by another program; "
            "give a free one as MASTER_PORT, or torchrun --master_port."
        ) from error


def _calls(config: Config) -> dict[str, Any]:
    """Return what decides no numbers, but which calls a process makes that all have to make: sums of step losses."""
    return {"log_interval": config.log_interval}


def _code() -> dict[str, str]:
    return {"the version of PyTorch": str(torch.__version__), "the source of kfac_sua": source_digest()[:12]}
