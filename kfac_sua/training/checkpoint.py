"""The state between two mini-batches, from which the same command goes on as if it had never stopped.

A file is eight bytes that name the format, the SHA-256 of what follows, and what ``torch.save`` writes: tensors,
numbers and strings in nested dicts. A new one is proven readable before it takes the place of the last, which stays
beside it.
"""

import dataclasses
import hashlib
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch

from kfac_sua.runs.atomic import written_beside

MAGIC = b"KFACSUA2"
FORMAT_VERSION = 2
LATER_FIELDS = ("diagnostics", "best")
"""What checkpoints of before these were kept lack."""

_DIGEST_SIZE = hashlib.sha256().digest_size


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one sentence naming the file and the cure."""


@dataclasses.dataclass
class Checkpoint:
    """Everything that changes during training.

    Attributes:
        fingerprint: Digest of the configuration it belongs to.
        seed: Seed of the run, which the fingerprint leaves out.
        data_digest: Digest of the images and labels it was trained and evaluated on.
        records_digest: Digest of the rows of metrics.csv up to it.
        epoch: Completed epochs.
        batch: Mini-batches of the epoch after these that have been taken.
        step: Completed optimisation steps.
        skipped_steps: Mini-batches that took no step, as something in them was not finite.
        model: ``state_dict`` of the network.
        optimizer: ``state_dict`` of the optimizer.
        preconditioner: ``state_dict`` of the preconditioner; None for the baseline.
        sums: Losses and errors of the ``batch`` mini-batches: ``ErrorCounter.state_dict``.
        diagnostics: Norms at some of these: ``Diagnostics.state_dict``; None in files of before these were measured.
        times: Seconds per phase so far.
        best: The weights with the lowest validation error so far: ``epoch``, ``val_error`` and ``model``; None before
            the first epoch's end, and in files of before they were kept.
    """

    fingerprint: str
    seed: int
    data_digest: str
    records_digest: str
    epoch: int
    batch: int
    step: int
    skipped_steps: int
    model: dict[str, Any]
    optimizer: dict[str, Any]
    preconditioner: dict[str, Any] | None
    sums: dict[str, Any]
    diagnostics: dict[str, Any] | None
    times: dict[str, float]
    best: dict[str, Any] | None = None


def previous_path(path: Path) -> Path:
    """Return where the checkpoint before the last lies: ``checkpoint.previous.state`` beside ``checkpoint.state``."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def adopt_old_name(path: Path) -> None:
    """Give files of before their present name: they were called ``.pt``, which promises what ``torch.load`` reads.

    Args:
        path: Where a checkpoint lies today.
    """
    for today in (previous_path(path), path):
        before = today.with_suffix(".pt")
        if before.exists() and not today.exists():
            before.replace(today)


def present_name(path: Path) -> Path:
    """Return where a checkpoint lies that may have the name of before, and is not this process's to rename.

    Args:
        path: Where it lies today.
    """
    before = path.with_suffix(".pt")
    return before if before.exists() and not path.exists() else path


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a crash at any moment leaves a complete one: this, or the one before.

    Args:
        path: The file, whose directory exists.
        checkpoint: What to write.

    Raises:
        CheckpointError: If what is on disk is not what was written.
        OSError: If it cannot be written; the last checkpoint is then untouched.
    """
    values = {field.name: getattr(checkpoint, field.name) for field in dataclasses.fields(checkpoint)}
    buffer = io.BytesIO()
    torch.save({"format_version": FORMAT_VERSION, **values}, buffer)
    payload = buffer.getbuffer()
    digest = hashlib.sha256(payload).digest()
    with written_beside(path, MAGIC, digest, payload) as temporary:
        if _payload(temporary) != payload:
            raise CheckpointError(f"{temporary} does not hold what was written to it; check the disk.")
        if path.exists():
            path.replace(previous_path(path))
        temporary.replace(path)
    _sync_directory(path.parent)


def load_checkpoint(
    path: Path,
    *,
    fingerprint: str,
    seed: int,
    device: torch.device,
    data_digest: str | None = None,
    check: Callable[[Checkpoint], None] | None = None,
    is_own: bool = True,
) -> Checkpoint | None:
    """Read the last sound checkpoint of this very run.

    Args:
        path: The file; the one before it is taken if this one is missing or cannot be used, with a line on stderr.
        fingerprint: Digest of the configuration that asks for it.
        seed: Seed of the run that asks for it.
        device: Where its tensors go.
        data_digest: Digest of the images and labels at hand; None does not compare.
        check: Raises ``ValueError`` for what the run cannot have come to; None takes all that has the right types.
        is_own: Whether the run is this process's to go on with, so that a damaged file may be put aside.

    Returns:
        The state, or None if there is no checkpoint.

    Raises:
        CheckpointError: If there are files but none is a sound checkpoint of this run.
    """
    first_error = None
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        if not candidate.is_file():  # what is to be replaced later must be a file
            raise CheckpointError(f"{candidate} is not a file; {_CURE}.")
        try:
            checkpoint = _read(candidate, device)
            _check_run(checkpoint, candidate, fingerprint, seed)
            _check_data(checkpoint, candidate, data_digest)
            _check_content(checkpoint, candidate, check)
        except CheckpointError as error:
            first_error = first_error or error
            continue
        if candidate != path:
            if is_own and path.exists():  # or the next checkpoint would put it in the place of the sound one
                path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
            reason = first_error or f"{path} is missing."
            print(f"{reason} Going on from {candidate.name}.", file=sys.stderr, flush=True)
        return checkpoint
    if first_error is not None:
        raise first_error
    return None


def _read(path: Path, device: torch.device) -> Checkpoint:
    """Return the content of one file, whoever's it is."""
    try:
        # weights_only: a checkpoint from elsewhere must not run code.
        values = torch.load(io.BytesIO(_payload(path)), map_location=device, weights_only=True)
    except (CheckpointError, OSError, MemoryError, torch.OutOfMemoryError):
        raise  # the last three say nothing against the file
    except Exception as error:  # whatever bytes that match their digest may still make torch.load raise
        raise CheckpointError(f"{path} is not a checkpoint ({type(error).__name__}); {_CURE}.") from error
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version == FORMAT_VERSION:
        values = dict.fromkeys(LATER_FIELDS) | values
    if version != FORMAT_VERSION or values.keys() != names:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT_VERSION}, got {version!r}; {_CURE}.")
    checkpoint = Checkpoint(**values)
    _check_types(checkpoint, path)
    return checkpoint


def _check_types(checkpoint: Checkpoint, path: Path) -> None:
    for name, hint in get_type_hints(Checkpoint).items():
        value = getattr(checkpoint, name)
        kinds = tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
        if not isinstance(value, kinds) or isinstance(value, bool) or (hint is int and value < 0):
            raise CheckpointError(f"{path} is not a checkpoint ({name} is {type(value).__name__}); {_CURE}.")


def _payload(path: Path) -> bytes:
    """Return what follows the digest, if it matches."""
    content = path.read_bytes()
    digest, payload = content[len(MAGIC) :][:_DIGEST_SIZE], content[len(MAGIC) + _DIGEST_SIZE :]
    if not content.startswith(MAGIC) or hashlib.sha256(payload).digest() != digest:
        raise CheckpointError(f"{path} is damaged or not a checkpoint of format {FORMAT_VERSION}; {_CURE}.")
    return payload


def _check_run(checkpoint: Checkpoint, path: Path, fingerprint: str, seed: int) -> None:
    if (checkpoint.fingerprint, checkpoint.seed) != (fingerprint, seed):
        raise CheckpointError(
            f"{path} belongs to another run (configuration {str(checkpoint.fingerprint)[:8]}, seed {checkpoint.seed}; "
            f"this is {fingerprint[:8]}, seed {seed}); {_CURE}."
        )


def _check_data(checkpoint: Checkpoint, path: Path, data_digest: str | None) -> None:
    if data_digest is not None and checkpoint.data_digest != data_digest:
        raise CheckpointError(
            f"{path} was trained on other images than dataset.data_dir holds now; restore the data set, or {_CURE}."
        )


def _check_content(checkpoint: Checkpoint, path: Path, check: Callable[[Checkpoint], None] | None) -> None:
    try:
        if check is not None:
            check(checkpoint)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit ({str(error).removesuffix('.')}); {_CURE}.") from error


def _sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_CURE = "move it away to start this run from the beginning"
