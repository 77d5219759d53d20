"""TensorBoard's HPARAMS tab: a row per run with its settings and its last metrics.

The tab takes its columns from one of the runs that it shows. So every run names the columns of all runs, also the keys
of preconditioners and optimizers that it does not have itself.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from kfac_sua.config import AutoFloat, Config

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams.api_pb2 import HParamInfo

METRICS = ("val/error", "train/eval_loss", "time/train")
"""Tags whose last values the tab shows beside the settings."""

FIRST = ("preconditioner", "preconditioner.damping", "optimizer.lr", "model", "dataset")
"""Settings that usually differ. They are five, as the tab shows five settings by default; it sorts them by name."""

BOOKKEEPING = {
    *("output_dir", "progress", "checkpoint_interval_s", "log_interval", "num_threads", "capture", "device_rates"),
    *("evaluation_batch_size", "dataset.data_dir", "dataset.download", "objective", "verbose"),
}
"""Keys that say where and how a run is carried out, not what it computes; the tab leaves them out."""

Value = int | float | str | bool


def hyper_parameters(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """Return the settings of a resolved configuration by dotted key; the name of a group's choice by the group's name.

    Args:
        config: Plain values; null values are left out, as the tab has none.
        prefix: Prefix of all keys, with its dot.
    """
    values: dict[str, Value] = {}
    for name, value in config.items():
        key = _key(prefix, name)
        if isinstance(value, dict):
            values |= hyper_parameters(value, f"{key}.")
        elif value is not None and key not in BOOKKEEPING:
            # Event files cannot hold undecodable bytes, as in the name of a directory: these become escapes.
            text = str(value).encode(errors="backslashreplace").decode()
            values[key] = value if isinstance(value, int | float) else text
    return values


def hyper_parameter_summaries(values: Mapping[str, Value], started_unix_s: float) -> "list[Summary]":
    """Return what the tab reads from a run: the columns, and the run's row.

    Args:
        values: The settings.
        started_unix_s: Start of the run, seconds since 1970.
    """
    # Imported here because it takes seconds, and collecting and plotting do not need it.
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.hparams import metadata
    from tensorboard.plugins.hparams.api_pb2 import Experiment, MetricInfo, MetricName
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo

    kinds = dict(_kinds(Config)) | {key: type(value) for key, value in values.items() if key not in KEYS}
    experiment = Experiment(
        hparam_infos=[_column(key, kind) for key, kind in kinds.items()],
        metric_infos=[MetricInfo(name=MetricName(tag=tag)) for tag in METRICS],
    )
    row = SessionStartInfo(start_time_secs=started_unix_s)
    for key, value in values.items():
        field = {bool: "bool_value", str: "string_value"}.get(type(value), "number_value")
        setattr(row.hparams[key], field, value)
    contents = {
        metadata.EXPERIMENT_TAG: HParamsPluginData(experiment=experiment),
        metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=row),
    }
    return [
        Summary(
            value=[
                Summary.Value(tag=tag, metadata=metadata.create_summary_metadata(content), tensor=metadata.NULL_TENSOR)
            ]
        )
        for tag, content in contents.items()
    ]


def _kinds(node: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key that a node of the configuration can have, under any choice, with its type."""
    for option in (node, *node.__subclasses__()):
        for name, hint in get_type_hints(option).items():
            key = _key(prefix, name)
            if dataclasses.is_dataclass(hint):
                assert isinstance(hint, type)
                yield from _kinds(hint, f"{key}.")
            elif key not in BOOKKEEPING:
                yield key, hint


def _key(prefix: str, name: str) -> str:
    """Return the key as the command line has it: ``model``, not ``model.name``, for a group's choice."""
    return prefix.removesuffix(".") if prefix and name == "name" else f"{prefix}{name}"


def _column(key: str, hint: Any) -> "HParamInfo":
    """Return the column of a setting; the tab can filter runs by the choices listed in it."""
    from tensorboard.plugins.hparams.api_pb2 import DATA_TYPE_BOOL, DATA_TYPE_FLOAT64, DATA_TYPE_STRING, HParamInfo

    kind = next(part for part in get_args(hint) if part is not NoneType) if isinstance(hint, UnionType) else hint
    if kind is bool:
        return HParamInfo(name=key, type=DATA_TYPE_BOOL, domain_discrete=[False, True])
    if kind in (int, float, AutoFloat):
        return HParamInfo(name=key, type=DATA_TYPE_FLOAT64, differs=key in FIRST)
    info = HParamInfo(name=key, type=DATA_TYPE_STRING, differs=key in FIRST)
    if get_origin(kind) is None and issubclass(kind, Enum):
        info.domain_discrete.extend([member.value for member in kind])
    return info


KEYS = {key for key, _ in _kinds(Config)}
"""All settings that a run can have."""
