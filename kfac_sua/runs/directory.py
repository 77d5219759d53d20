"""Where a run lives: a directory fixed by its configuration, so that the same command finds it again."""

import copy
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kfac_sua.config import Config, ConfigError, GroupSizeScaling, KroneckerConfig, scaled_group_size, to_plain
from kfac_sua.device import choose_precision
from kfac_sua.runs.run_info import RecordError, read_run_info

# Keys that do not change a run's numbers.
_NOT_IN_FINGERPRINT = (
    *("output_dir", "progress", "num_threads", "checkpoint_interval_s"),
    *("capture", "objective", "verbose", "log_interval"),
)
_DATASET_NOT_IN_FINGERPRINT = ("data_dir", "download")  # only say where images come from

# Keys added after the first runs: node, key, and the value with which a run computes what it did before the key. That
# value is left out of fingerprints, so that older runs keep theirs.
ADDED_LATER = (
    ("", "non_finite", "stop"),
    ("", "sync_batch_norm", True),
    ("", "precision", "float32"),
    ("", "deterministic", False),
    ("", "device_rates", None),
    ("", "start_from", None),
    ("model", "initialisation", "he_fan_out"),
    ("preconditioner", "activation_rows", None),
    ("preconditioner", "kl_clip", None),
    ("preconditioner", "damping_final", None),
    ("preconditioner", "adaptive_damping", None),
    ("preconditioner", "products", "auto"),
    ("preconditioner", "group_size_scaling", "none"),
)


@dataclass(frozen=True)
class RunDirectory:
    """The paths of one run; nothing is created by making this object."""

    path: Path
    fingerprint: str
    seed: int

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def info(self) -> Path:
        """What the run was and how it ended."""
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        """One row per epoch."""
        return self.path / "metrics.csv"

    @property
    def log(self) -> Path:
        """The run's messages, with their time."""
        return self.path / "train.log"

    @property
    def checkpoint(self) -> Path:
        """The last saved state, in a format of this project (``training/checkpoint.py``)."""
        return self.path / "checkpoint.state"

    @property
    def weights(self) -> dict[str, Path]:
        """The network's parameters and buffers, ``best`` and ``last``; written at the end of the run."""
        return {name: self.path / f"{name}.pt" for name in ("best", "last")}


def run_directory(config: Config, device: str, num_processes: int = 1) -> RunDirectory:
    """Return ``<output_dir>/<dataset>-<model>-<preconditioner>/<cell>-<8 digits of fingerprint>/seed=<n>``.

    Args:
        config: The checked configuration.
        device: ``cpu`` or ``cuda``, with ``device=auto`` resolved.
        num_processes: Processes that carry it out together.

    Returns:
        The directory's paths and the whole fingerprint.
    """
    digest = fingerprint(config, device, num_processes)
    setting = f"{config.dataset.name}-{config.model.name}-{config.preconditioner.name}"
    parts = {"lr": config.optimizer.lr}  # the values that a grid usually varies
    if isinstance(config.preconditioner, KroneckerConfig):
        parts["damping"] = config.preconditioner.damping
    cell = f"{','.join(f'{name}={value:g}' for name, value in parts.items())}-{digest[:8]}"
    return RunDirectory(Path(config.output_dir) / setting / cell / f"seed={config.seed}", digest, config.seed)


def fingerprint(config: Config, device: str, num_processes: int = 1, source: str | None = None) -> str:
    """Return the SHA-256 of everything that a run's numbers depend on, except its seed.

    Args:
        config: The checked configuration.
        device: ``cpu`` or ``cuda``; numbers differ between the two.
        num_processes: Processes that carry the run out together; included if they do not train exactly as one does.
        source: As in :func:`deciding_values`.

    Returns:
        64 hexadecimal digits.
    """
    values = deciding_values(config, source) | {
        "device": device,
        "precision": choose_precision(config.precision, device).value,
    }
    if device == "cuda":  # older runs with precision=float32 had TF32 in convolutions, so they must not match
        values["precision"] += " in convolutions and products"
    samples = isinstance(config.preconditioner, KroneckerConfig) and config.preconditioner.activation_rows is not None
    if num_processes > 1 and (samples or not config.sync_batch_norm):  # several processes train differently from one
        values["num_processes"] = num_processes
    del values["seed"]
    for node, key, default in ADDED_LATER:
        part = values[node] if node else values
        if part.get(key) == default:
            part.pop(key, None)
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def deciding_values(config: Config, source: str | None = None) -> dict[str, Any]:
    """Return the part of a configuration that a run's numbers depend on, its seed included.

    Args:
        config: The checked configuration.
        source: What :func:`end_of` returned for ``start_from`` when the run began; ``None`` reads it again.

    Raises:
        ConfigError: If ``start_from`` is not the directory of a run.
    """
    values = with_channels_per_group(to_plain(config))  # however they came to be so many
    for key in _NOT_IN_FINGERPRINT:
        del values[key]
    for key in _DATASET_NOT_IN_FINGERPRINT:
        del values["dataset"][key]
    if config.start_from is not None:
        values["start_from"] = source or end_of(config.start_from)
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by dotted key.

    Args:
        values: The dictionaries.
        prefix: Prefix of all keys.
    """
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def with_later_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration in which keys that came after the run have the value that says what it did.

    Args:
        values: As in config.yaml and run.json; it is not changed.
    """
    completed = copy.deepcopy(dict(values))
    for node, key, value in ADDED_LATER:
        part = completed.get(node) if node else completed
        if isinstance(part, dict) and part.get("name") != "baseline":
            part.setdefault(key, value)
    return completed


def with_channels_per_group(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration in which ``group_size`` is what the preconditioner got, scaled with the width.

    Args:
        values: As in config.yaml and run.json; it is not changed.
    """
    completed = with_later_keys(values)
    own = completed.get("preconditioner", {})
    if own.get("group_size") is not None and own["group_size_scaling"] == GroupSizeScaling.width:
        own["group_size"] = scaled_group_size(own["group_size"], completed["model"]["width"])
    if "group_size_scaling" in own:
        own["group_size_scaling"] = GroupSizeScaling.none.value
    return completed


def end_of(path: str) -> str:
    """Return the text that identifies a run's final state (``RunInfo.end``).

    Args:
        path: The run's directory.

    Raises:
        ConfigError: If it is not the directory of a run.
    """
    try:
        return read_run_info(Path(path) / "run.json").end
    except RecordError as error:
        raise ConfigError(f"start_from={path} is not the directory of a run: {error}") from error


def resolved(config: Config, device: str) -> dict[str, Any]:
    """Return the configuration as plain values, with ``auto`` replaced in ``device`` and ``precision``.

    Args:
        config: The checked configuration.
        device: ``cpu`` or ``cuda``.

    Returns:
        What run.json and config.yaml hold.

    Raises:
        ConfigError: If the device does not support the precision.
    """
    values: dict[str, Any] = to_plain(config)
    return values | {"device": device, "precision": choose_precision(config.precision, device).value}
