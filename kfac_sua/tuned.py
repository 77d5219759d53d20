"""What ``optimizer.lr=auto`` and ``preconditioner.damping=auto`` stand for: one table of settings that were tried.

No single learning rate is good for every structure, network and width, as the curvature to which the damping is added
changes with them. The table is a start, not an optimum. With it each structure trains stably from the first epoch, and
in every epoch its training loss is below that of the baseline with the baseline's default.
``sweep=lr_damping`` and ``make reproduce-fig1`` search further.
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig

from kfac_sua.config import (
    AUTO,
    Config,
    ConfigError,
    KroneckerConfig,
    ModelName,
    OptimizerName,
    PlainNetConfig,
    PreconditionerName,
    shown,
)


@dataclasses.dataclass(frozen=True)
class Tuned:
    """What ``auto`` stands for.

    Attributes:
        lr: Learning rate.
        damping: Tikhonov ε; None for the baseline, which has none.
        evidence: Where it was tried, in words; ``provisional`` if it was not tried in this project.
    """

    lr: float
    damping: float | None
    evidence: str


@dataclasses.dataclass(frozen=True)
class Row:
    """One network at one width, trained by SGD with momentum 0.9.

    Attributes:
        model: The network.
        width: Its width.
        evidence: Where the settings were tried, in words.
        settings: Learning rate and damping by structure; the baseline has no damping.
    """

    model: ModelName
    width: float
    evidence: str
    settings: Mapping[PreconditionerName, tuple[float, float | None]]


def _settings(
    baseline_lr: float, lr: float, damping: float, **apart: tuple[float, float]
) -> dict[PreconditionerName, tuple[float, float | None]]:
    """Return one pair for all structures, except for those named apart, and a learning rate for the baseline."""
    pairs: dict[PreconditionerName, tuple[float, float | None]] = dict.fromkeys(PreconditionerName, (lr, damping))
    pairs[PreconditionerName.baseline] = (baseline_lr, None)
    return pairs | {PreconditionerName(name): pair for name, pair in apart.items()}


TABLE = (
    Row(
        ModelName.vgg11,
        1.0,
        "provisional but for SUA, which was tried on CIFAR-10",
        _settings(0.03, lr=0.1, damping=1.0, sua_grouped=(0.03, 0.1)),
    ),
    Row(
        ModelName.vgg11,
        0.25,
        "tried on CIFAR-10, CIFAR-100 and digits",
        _settings(0.03, lr=0.1, damping=1.0),
    ),
    Row(
        ModelName.preact_resnet50,
        0.125,
        "tried on 10,000 images of CIFAR-10",
        _settings(0.03, lr=0.1, damping=1.0),
    ),
    Row(
        ModelName.transformer,
        1.0,
        "provisional: not tried",
        _settings(0.03, lr=0.03, damping=0.1),
    ),
    Row(
        ModelName.tiny,
        1.0,
        "tried on digits",
        _settings(0.1, lr=0.03, damping=0.1),
    ),
)
# Keys that may hold auto: node and key.
_KEYS = (("optimizer", "lr"), ("preconditioner", "damping"))
# Learning rates for the plain gradient and any network: the defaults of PyTorch and of Muon's author.
_COMPARATORS = {OptimizerName.adamw: 0.001, OptimizerName.muon: 0.02}


def tuned(preconditioner: str, model: ModelName, width: float, optimizer: OptimizerName = OptimizerName.sgd) -> Tuned:
    """Return what ``auto`` stands for: the row of the network with the nearest width.

    Args:
        preconditioner: Its name; one that the table does not have takes the values of K-FAC.
        model: The network.
        width: Its width.
        optimizer: The optimizer; all but ``sgd`` are comparators on the plain gradient.

    Raises:
        ConfigError: If the table has no row for the network, or no learning rate for the optimizer.
    """
    rows = [row for row in TABLE if row.model is model]
    if not rows or optimizer not in (OptimizerName.sgd, *_COMPARATORS):
        what = f"model={model}" if not rows else f"optimizer={optimizer}"
        raise ConfigError(
            f"{AUTO} has no value for {what} yet; give optimizer.lr, and preconditioner.damping, as numbers."
        )
    row = min(rows, key=lambda row: abs(row.width - width))
    is_known = preconditioner in row.settings
    lr, damping = row.settings[PreconditionerName(preconditioner) if is_known else PreconditionerName.kfac]
    if optimizer in _COMPARATORS:
        return Tuned(_COMPARATORS[optimizer], damping, "provisional: its authors' default, not tuned here")
    elsewhere = "" if row.width == width else f"provisional at this width: tried at {row.width:g}; "
    evidence = row.evidence if is_known else f"provisional: those of K-FAC, not tried with {preconditioner}"
    return Tuned(lr, damping, elsewhere + evidence)


def auto_keys(raw: DictConfig) -> tuple[str, ...]:
    """Return the keys of a composed configuration that hold ``auto``.

    Args:
        raw: What Hydra composed, before :func:`resolve_auto`.
    """
    return tuple(f"{node}.{key}" for node, key in _KEYS if raw[node].get(key) == AUTO)


def resolve_auto(raw: DictConfig) -> None:
    """Put numbers for ``auto`` into a composed configuration, in place.

    Args:
        raw: What Hydra composed, without its own ``hydra`` node.

    Raises:
        ConfigError: If a learning rate or a damping is neither a number nor ``auto``.
    """
    for node, key in _KEYS:
        if key in raw[node]:
            if raw[node][key] == AUTO:
                best = tuned(raw.preconditioner.name, raw.model.name, raw.model.width, raw.optimizer.name)
                raw[node][key] = getattr(best, key)
            else:
                raw[node][key] = _number(f"{node}.{key}", raw[node][key])


def opening_line(config: Config, auto: Sequence[str]) -> str:
    """Return the numbers of a run that matter most, in words, and where the values for ``auto`` were tried.

    Args:
        config: The configuration, with numbers.
        auto: The keys that held ``auto`` (:func:`auto_keys`).
    """
    values = f"lr {config.optimizer.lr:g}"
    if isinstance(config.preconditioner, KroneckerConfig):
        values += f", damping {config.preconditioner.damping:g}"
        if (size := config.preconditioner.channels_per_group(config.model.width)) is not None:
            values += f", groups of {size}"
    if not auto:
        return values
    best = tuned(config.preconditioner.name, config.model.name, config.model.width, config.optimizer.name)
    named = " and ".join(key.partition(".")[2] for key in auto)
    has_no_norm = isinstance(config.model, PlainNetConfig) and not config.model.batch_norm
    return f"{values} (auto {named}: {best.evidence}{', with batch normalisation' if has_no_norm else ''})"


def _number(key: str, value: object) -> float:
    with contextlib.suppress(ValueError):  # a text that is no number
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            return float(value)
    raise ConfigError(f"{key} must be a number or {AUTO}, got {shown(value)}.")
