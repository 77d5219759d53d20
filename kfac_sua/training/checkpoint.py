"""The state between two epochs, from which the same command goes on as if it had never stopped."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

FORMAT_VERSION = 1


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence naming the file and the cure."""


@dataclasses.dataclass
class Checkpoint:
    """Everything that changes during training.

    Attributes:
        fingerprint: Digest of the configuration it belongs to.
        seed: Seed of the run, which the fingerprint leaves out.
        epoch: Completed epochs.
        step: Completed optimisation steps.
        model: ``state_dict`` of the network.
        optimizer: ``state_dict`` of the optimizer.
        preconditioner: ``state_dict`` of the preconditioner; None for the baseline.
        times: Seconds per phase so far.
    """

    fingerprint: str
    seed: int
    epoch: int
    step: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    preconditioner: dict[str, Any] | None
    times: dict[str, float]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a crash at any moment leaves either the old file or the new one, complete.

    Args:
        path: The file, whose directory exists.
        checkpoint: What to write.
    """
    values = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        torch.save({"format_version": FORMAT_VERSION, **values}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: Path, *, fingerprint: str, seed: int, device: torch.device) -> Checkpoint:
    """Read a checkpoint of this very run.

    Args:
        path: The file.
        fingerprint: Digest of the configuration that asks for it.
        seed: Seed of the run that asks for it.
        device: Where its tensors go.

    Returns:
        The state.

    Raises:
        CheckpointError: If the file is damaged, of another version, or of another run.
    """
    cure = "move it away to start this run from the beginning"
    try:
        # weights_only: a checkpoint from elsewhere must not run code.
        values = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # whatever the bytes of a damaged file make torch.load raise
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({type(error).__name__}); {cure}.") from error
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version != FORMAT_VERSION or values.keys() != names:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT_VERSION}, got {version}; {cure}.")
    checkpoint = Checkpoint(**values)
    if (checkpoint.fingerprint, checkpoint.seed) != (fingerprint, seed):
        raise CheckpointError(
            f"{path} belongs to another run (configuration {checkpoint.fingerprint[:8]}, seed {checkpoint.seed}; this "
            f"is {fingerprint[:8]}, seed {seed}); {cure}."
        )
    return checkpoint
