"""A trained run, loaded to be used: its network with weights, its configuration and its rows."""

import dataclasses
import io
import os
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from kfac_sua.build import build_model
from kfac_sua.compose.saved import config_of
from kfac_sua.config import Config
from kfac_sua.data.sizes import SIZES
from kfac_sua.files.openers import read_regular
from kfac_sua.runs.directory import RunDirectory
from kfac_sua.runs.metrics import EpochRecord, best_epoch, read_ended_records
from kfac_sua.runs.run_info import RecordError, RunInfo, read_run_info
from kfac_sua.training.checkpoint import load_checkpoint, present_name

Weights = Literal["best", "last"]


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A trained run, as :func:`load_run` returns it.

    Attributes:
        network: The network with the weights, in evaluation mode. It takes images ``[batch, 3, 32, 32]`` in float32,
            normalised per channel with the mean and deviation of the training images (``build_splits(config.dataset)``
            has both as ``mean`` and ``std``), and returns logits ``[batch, classes]``.
        config: The run's configuration. Its ``preconditioner`` is the name alone where that is a structure of a package
            which is not installed here; ``info.config`` has all of it.
        records: A row of metrics.csv per epoch; the first row is the untrained network.
        info: What run.json holds: status, test error, versions, machines.
        epoch: The epoch after which the weights were taken.
        batch: Mini-batches of the next epoch that the weights have seen too, if the run has not ended.
    """

    network: nn.Module
    config: Config
    records: list[EpochRecord]
    info: RunInfo
    epoch: int
    batch: int


def load_run(
    directory: str | os.PathLike[str], weights: Weights = "best", device: str | torch.device = "cpu"
) -> LoadedRun:
    """Load a trained run.

    Args:
        directory: The run's directory, which has its run.json.
        weights: ``best``, of the epoch with the lowest validation error (the first of equals), or ``last``. While a run
            has not ended, those of its last checkpoint.
        device: The device that the network is moved to.

    Returns:
        Network, configuration and rows.

    Raises:
        ValueError: If ``weights`` is neither.
        RecordError: If the directory is not that of a run, its files are damaged, or it has no such weights: a run
            without a complete epoch has none, and a diverged run has no last ones.
        CheckpointError: If the weights must come from a checkpoint and that is damaged.
    """
    if weights not in ("best", "last"):
        raise ValueError(f"weights must be 'best' or 'last', got {weights!r}.")
    path = Path(directory)
    info = read_run_info(path / "run.json")
    place = RunDirectory(path, info.fingerprint, info.seed)
    records = read_ended_records(place.metrics, info)
    config = config_of(info.config, place.info)
    config = dataclasses.replace(config, start_from=info.config.get("start_from"))
    state, epoch, batch = _state(place, info, weights, records)
    network = build_model(config, SIZES[config.dataset.name].classes, torch.device("cpu"))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise RecordError(f"The weights in {path} are not those of its network; restore them.") from error
    return LoadedRun(network.to(device).eval(), config, records, info, epoch, batch)


def _state(
    place: RunDirectory, info: RunInfo, weights: Weights, records: list[EpochRecord]
) -> tuple[dict[str, Tensor], int, int]:
    """Return parameters and buffers, the epoch after which they were taken, and the mini-batches since then."""
    path = place.weights[weights]
    if path.exists() and info.status in ("finished", "diverged"):
        try:
            state = torch.load(io.BytesIO(read_regular(path)), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever a damaged file makes torch.load raise
            raise RecordError(f"{path} is damaged ({type(error).__name__}); restore it.") from error
        return state, best_epoch(records) if weights == "best" else records[-1].epoch, 0
    checkpoint = load_checkpoint(
        present_name(place.checkpoint),
        fingerprint=info.fingerprint,
        seed=info.seed,
        device=torch.device("cpu"),
        is_own=False,
    )
    if checkpoint is not None and weights == "last" and info.status != "diverged":
        return checkpoint.model, checkpoint.epoch, checkpoint.batch
    if checkpoint is not None and weights == "best" and checkpoint.best is not None:
        best = checkpoint.best
        if best["epoch"] == best_epoch(records[: checkpoint.epoch + 1]):
            return best["model"], best["epoch"], 0
    epochs = max(len(records) - 1, 0)
    raise RecordError(
        f"{place.path} has no {weights} weights (it is {info.status}, with {epochs} epochs in its records)."
    )
