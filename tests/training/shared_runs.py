"""Runs that several processes of this machine carry out together, in float64, as tests compare them with one's."""

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from process_group import free_ports, run_processes
from tiny_runs import TINY, TINY_PERIOD

from kfac_sua.compose import compose_config
from kfac_sua.config import Config
from kfac_sua.training import writer
from kfac_sua.training.launch import Launch
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted

# 22 steps of mini-batches that neither two nor three processes divide, seven refreshes.
SHARED = (
    "dataset=cifar10",
    "dataset.validation_size=100",
    "batch_size=35",
    "epochs=2",
    "evaluation_batch_size=97",
    "dataset.train_eval_size=100",
)
SMALL_GROUPS = "preconditioner.group_size=8"
SETTINGS = {
    "kfac": ("preconditioner=kfac",),
    "kfac-mc": ("preconditioner=kfac", "preconditioner.fisher_type=mc"),
    "kfac-reduce-pi": (
        "preconditioner=kfac",
        "preconditioner.weight_sharing=reduce",
        "preconditioner.damping_rule=factored_pi",
    ),
    "kfac-low_rank": (  # reduced to a row per example, as the Woodbury form of every location would take minutes
        "preconditioner=kfac",
        "preconditioner.inverse_method=low_rank",
        "preconditioner.weight_sharing=reduce",
    ),
    "sua": ("preconditioner=sua", "dataset.augmentation=flip_crop", "schedule=cosine"),
    "sua-exact-fisher": ("preconditioner=sua", "preconditioner.fisher_type=exact", "non_finite=skip"),
    "grouped": ("preconditioner=grouped", SMALL_GROUPS),
    "grouped-average": (
        "preconditioner=grouped",
        SMALL_GROUPS,
        "preconditioner.ema_decay=0.5",
        "preconditioner.factor_period=1",
    ),
    "sua_grouped": ("preconditioner=sua_grouped", SMALL_GROUPS, "preconditioner.application=weight"),
    "sua_grouped-exact-damping": ("preconditioner=sua_grouped", SMALL_GROUPS, "preconditioner.damping_rule=exact"),
    "kfac-without-batch-norm": ("preconditioner=kfac", "model.batch_norm=false"),
}
# Those that `make test` runs, by number of processes: both ways of batch normalisation; the run that is handed on has a
# running average and sampled labels.
QUICK = {2: ("kfac-own-statistics",), 3: ("kfac",)}
BASELINES = {
    "baseline": ("preconditioner=baseline",),
    "adamw": ("preconditioner=baseline", "optimizer=adamw"),
}
OWN_STATISTICS = {
    name: (*SETTINGS[name], "sync_batch_norm=false") for name in ("kfac", "kfac-mc", "sua", "grouped-average")
}


def shared_config(output_dir: Path, setting: tuple[str, ...]) -> Config:
    """Return the configuration of a run that processes share."""
    data_dir = images_below(output_dir)
    period = () if "preconditioner=baseline" in setting else (TINY_PERIOD,)
    base = [one for one in TINY if one != "dataset=digits"]
    return compose_config(
        [*base, *SHARED, *period, f"dataset.data_dir={data_dir}", f"output_dir={output_dir}", *setting]
    )


def images_below(directory: Path) -> Path:
    """Return a directory with noisy images of ten classes, the same for all runs.

    Digits have a constant background, whose ties in max-pooling a difference of 1e-16 breaks one way or the other, and
    three equal channels, where it grows with the inverse of a small damping.
    """
    path = directory / "data" / "cifar10.npz"
    if not path.exists():
        path.parent.mkdir(parents=True)
        generator = np.random.default_rng(0)
        means = generator.integers(64, 192, (10, 32, 32, 3))
        arrays: dict[str, Any] = {"classes": np.array([f"class {label}" for label in range(10)])}
        for split, per_class in (("train", 60), ("test", 20)):
            labels = np.tile(np.arange(10, dtype=np.uint8), per_class)
            noise = generator.integers(-64, 64, (len(labels), 32, 32, 3))
            arrays |= {f"{split}_labels": labels, f"{split}_images": (means[labels] + noise).astype(np.uint8)}
        np.savez(path, **arrays)
    return path.parent


def all_settings() -> dict[str, tuple[str, ...]]:
    """Return every setting by its name."""
    return {**SETTINGS, **BASELINES, **{f"{name}-own-statistics": one for name, one in OWN_STATISTICS.items()}}


def stopping_setting() -> tuple[str, ...]:
    """Return the setting of the run that is stopped and resumed by other numbers of processes."""
    return (*SETTINGS["grouped-average"], "preconditioner.fisher_type=mc")


def in_float64(config: Config, launch: Launch | None = None) -> None:
    """Carry out a run in float64, as far as it comes."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with contextlib.suppress(Interrupted):
            run(config, launch)
    finally:
        torch.set_default_dtype(before)


def carry_out(root: Path, size: int, names: Sequence[str]) -> None:
    """Carry out settings by so many processes below ``root / str(size)``, and a part of the run to be resumed."""
    ports = free_ports(len(names) + 1)
    for name in (*(f"{size}/{name}" for name in names), "resumed"):
        images_below(root / name)
    run_processes(_work, size, size, str(root), list(names), ports)


def _work(rank: int, size: int, root: str, names: list[str], ports: list[int]) -> None:
    torch.set_num_threads(1)
    for port, name in zip(ports, names, strict=False):
        config = shared_config(Path(root) / str(size) / name, all_settings()[name])
        in_float64(config, Launch(rank, size, rank, "127.0.0.1", port))
    _ask_to_stop(rank, step=4 * size)
    in_float64(
        shared_config(Path(root) / "resumed", stopping_setting()), Launch(rank, size, rank, "127.0.0.1", ports[-1])
    )


def _ask_to_stop(rank: int, step: int) -> None:
    """Let one process, not the first, be asked to stop after a step."""
    request = writer.RunWriter._request

    def asked(run_writer: writer.RunWriter) -> int:
        if rank == 1 and run_writer.training.step == step:
            run_writer._stop.signal_number = signal.SIGTERM
        return request(run_writer)

    writer.RunWriter._request = asked
