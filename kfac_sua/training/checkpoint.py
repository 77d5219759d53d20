"""Checkpoints: the state between two mini-batches, from which the same command resumes bit for bit.

A file consists of eight bytes that name the format, the SHA-256 of what follows, and the output of ``torch.save``:
tensors, numbers and strings in nested dicts. A new file is read back before it replaces the last one, which is kept
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

from kfac_sua.files.atomic import written_beside

MAGIC = b"KFACSUA2"
FORMAT_VERSION = 2
LATER_FIELDS = ("diagnostics", "best")
"""Fields that older checkpoints lack."""

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
        skipped_steps: Mini-batches whose step was skipped, because their loss or gradient was not finite.
        model: ``state_dict`` of the network.
        optimizer: ``state_dict`` of the optimizer.
        preconditioner: ``state_dict`` of the preconditioner; None for the baseline.
        sums: Losses and errors of the ``batch`` mini-batches: ``ErrorCounter.state_dict``.
        diagnostics: Norms at some of these mini-batches: ``Diagnostics.state_dict``; None in older files.
        times: Seconds per phase so far.
        best: The weights with the lowest validation error so far: ``epoch``, ``val_error`` and ``model``; None before
            the end of the first epoch, and in older files.
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
    """Rename checkpoints of older versions, which ended in ``.pt`` although ``torch.load`` cannot read them.

    Args:
        path: The checkpoint's present path.
    """
    for today in (previous_path(path), path):
        before = today.with_suffix(".pt")
        if before.exists() and not today.exists():
            before.replace(today)


def present_name(path: Path) -> Path:
    """Return the path of a checkpoint of another run, which may still have its old name and must not be renamed.

    Args:
        path: The checkpoint's present path.
    """
    before = path.with_suffix(".pt")
    return before if before.exists() and not path.exists() else path


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that a crash at any moment leaves a complete one, new or previous.

    Args:
        path: The file, whose directory exists.
        checkpoint: What to write.

    Raises:
        CheckpointError: If the file does not read back as it was written.
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
    # So that the renames survive a power cut.
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    """Read the last valid checkpoint of a run.

    Args:
        path: The file. If it is missing or not valid, the previous checkpoint is read, with a line on stderr.
        fingerprint: Digest of the configuration that asks for it.
        seed: Seed of the run that asks for it.
        device: Where its tensors go.
        data_digest: Digest of the present images and labels; None skips the comparison.
        check: Raises ``ValueError`` for a state that the run cannot have reached; None only checks types.
        is_own: Whether this process resumes the run, and may move a damaged file aside.

    Returns:
        The state, or None if there is no checkpoint.

    Raises:
        CheckpointError: If there are files, but none is a valid checkpoint of this run.
    """
    first_error = None
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        if not candidate.is_file():  # the next checkpoint could not replace it
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
            if is_own and path.exists():  # or the next save would overwrite the valid one with it
                path.replace(path.with_name(f"{path.stem}.damaged{path.suffix}"))
            reason = first_error or f"{path} is missing."
            print(f"{reason} Going on from {candidate.name}.", file=sys.stderr, flush=True)
        return checkpoint
    if first_error is not None:
        raise first_error
    return None


def _read(path: Path, device: torch.device) -> Checkpoint:
    """Return the content of one file, of whatever run."""
    try:
        # weights_only: a checkpoint from elsewhere must not run code.
        values = torch.load(io.BytesIO(_payload(path)), map_location=device, weights_only=True)
    except (CheckpointError, OSError, MemoryError, torch.OutOfMemoryError):
        raise  # the last two do not mean that the file is damaged
    except Exception as error:  # torch.load may raise anything, even if the bytes match their digest
        raise CheckpointError(f"{path} is not a checkpoint ({type(error).__name__}); {_CURE}.") from error
    names = {field.name for field in dataclasses.fields(Checkpoint)}
    version = values.pop("format_version", None) if isinstance(values, dict) else None
    if version == FORMAT_VERSION:
        values = dict.fromkeys(LATER_FIELDS) | values
    if version != FORMAT_VERSION or values.keys() != names:
        raise CheckpointError(f"{path} is not a checkpoint of format {FORMAT_VERSION}, got {version!r}; {_CURE}.")
    checkpoint = Checkpoint(**values)
    for name, hint in get_type_hints(Checkpoint).items():
        value = getattr(checkpoint, name)
        kinds = tuple(get_origin(kind) or kind for kind in (get_args(hint) if isinstance(hint, UnionType) else (hint,)))
        if not isinstance(value, kinds) or isinstance(value, bool) or (hint is int and value < 0):
            raise CheckpointError(f"{path} is not a checkpoint ({name} is {type(value).__name__}); {_CURE}.")
    return checkpoint


def _payload(path: Path) -> bytes:
    """Return the bytes after the digest, if they match it."""
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


_CURE = "move it away to start this run from the beginning"
