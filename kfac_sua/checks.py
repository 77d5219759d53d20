"""Checks of configuration values: ranges of single keys, and keys that contradict each other.

Everything here needs neither data nor a device, so that a sweep is checked as a whole before its first run starts.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import Any

from kfac_sua.config import (
    Config,
    ConfigError,
    DatasetName,
    KroneckerConfig,
    PreconditionerName,
    ScheduleName,
    StepScheduleConfig,
)
from kfac_sua.explain import shown
from kfac_sua.preconditioner.settings import FisherType, Likelihood, LossReduction, Structure

# An exact Fisher costs one backward pass per class; this many are taken without being asked twice.
MAX_EXACT_FISHER_CLASSES = 10

# Training is in float32: beyond its range a number is 0 or infinite there.
LEAST_FLOAT, LARGEST_FLOAT = 1e-37, 1e37

NUM_CLASSES = {DatasetName.cifar10: 10, DatasetName.cifar100: 100, DatasetName.digits: 10}


def _at_least_one(value: int) -> bool:
    return value >= 1


def _one_or_null(value: int | None) -> bool:
    return value is None or value >= 1


def _positive(value: float) -> bool:
    return LEAST_FLOAT <= value <= LARGEST_FLOAT


# Key -> (what must hold, the same in words). The preconditioner's own settings check themselves.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda seed: 0 <= seed < 2**32, "between 0 and 4294967295"),
    "epochs": (_at_least_one, "≥ 1"),
    "batch_size": (_at_least_one, "≥ 1"),
    "evaluation_batch_size": (_at_least_one, "≥ 1"),
    "num_threads": (
        lambda number: number is None or 1 <= number <= 1024,
        "between 1 and 1024, or null (PyTorch's choice)",
    ),
    "output_dir": (bool, "the path of a directory"),
    "model.width": (lambda width: 0 < width <= 64, "> 0 and at most 64"),
    "dataset.validation_size": (_at_least_one, "≥ 1"),
    "dataset.train_size": (_one_or_null, "≥ 1 or null (all images)"),
    "dataset.train_eval_size": (_one_or_null, "≥ 1 or null (all images)"),
    "dataset.split_seed": (lambda seed: 0 <= seed < 2**32, "between 0 and 4294967295"),
    "optimizer.lr": (_positive, "a number > 0 within the range of float32"),
    "optimizer.momentum": (lambda momentum: 0 <= momentum < 1, "in [0, 1)"),
    "optimizer.weight_decay": (lambda decay: 0 <= decay <= LARGEST_FLOAT, "a number ≥ 0 within the range of float32"),
}


def check(config: Config) -> None:
    """Refuse values out of range and combinations that cannot mean what they say.

    Args:
        config: A configuration of the right types.

    Raises:
        ConfigError: Naming the first key at fault, its value, and what it may be.
    """
    for key, (holds, expected) in RANGES.items():
        value = attrgetter(key)(config)
        if not holds(value):
            raise ConfigError(f"{key} must be {expected}, got {shown(value)}.")
    for problem in _contradictions(config):
        raise ConfigError(problem)


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a sentence for every pair of keys that contradict each other."""
    if config.optimizer.nesterov and config.optimizer.momentum == 0:
        yield "optimizer.nesterov=true needs optimizer.momentum > 0, got 0.0."
    if isinstance(config.schedule, StepScheduleConfig):
        yield from _step_schedule_problems(config.schedule, config.epochs)
    if isinstance(config.preconditioner, KroneckerConfig):
        yield from _kronecker_problems(config.preconditioner, config.dataset.name)
    elif config.preconditioner.name is not PreconditionerName.baseline:
        yield _only_renamed("preconditioner", config.preconditioner.name)
    if isinstance(config.schedule, StepScheduleConfig) != (config.schedule.name is ScheduleName.step):
        yield _only_renamed("schedule", config.schedule.name)


def _step_schedule_problems(schedule: StepScheduleConfig, epochs: int) -> Iterator[str]:
    milestones = schedule.milestones
    if milestones != sorted(set(milestones)) or not all(1 <= epoch < epochs for epoch in milestones):
        yield (
            f"schedule.milestones must be increasing epochs between 1 and epochs - 1 = {epochs - 1}, got {milestones}."
        )
    if not 0 < schedule.gamma <= 1:
        yield f"schedule.gamma must be in (0, 1], got {schedule.gamma}."


def _kronecker_problems(preconditioner: KroneckerConfig, dataset: DatasetName) -> Iterator[str]:
    expected = _name_of(preconditioner.structure, preconditioner.group_size)
    if preconditioner.name is not expected:
        yield (
            f"preconditioner.structure={preconditioner.structure} with preconditioner.group_size="
            f"{shown(preconditioner.group_size)} is called {expected} in records and figures, not "
            f"{preconditioner.name}; give preconditioner={expected}."
        )
    # The loss of the training loop is the mean cross-entropy; these two keys serve users of the package.
    if preconditioner.likelihood is not Likelihood.categorical:
        yield f"preconditioner.likelihood must be categorical for classification, got {preconditioner.likelihood}."
    if preconditioner.loss_reduction is not LossReduction.mean:
        yield (
            f"preconditioner.loss_reduction must be mean, as the training loss is, got {preconditioner.loss_reduction}."
        )
    num_classes = NUM_CLASSES[dataset]
    is_expensive = preconditioner.fisher_type is FisherType.exact and num_classes > MAX_EXACT_FISHER_CLASSES
    if is_expensive and not preconditioner.allow_exact_fisher:
        yield (
            f"preconditioner.fisher_type=exact takes {num_classes} backward passes per measurement on "
            f"dataset={dataset}; use empirical or mc, or set preconditioner.allow_exact_fisher=true."
        )


def _only_renamed(group: str, name: str) -> str:
    return f"{group}.name={name} changes the name but not the other keys of {group}; give {group}={name}."


def _name_of(structure: Structure, group_size: int | None) -> PreconditionerName:
    """Return the one name under which a structure is recorded and drawn."""
    if structure is Structure.sua:
        return PreconditionerName.sua if group_size is None else PreconditionerName.sua_grouped
    return PreconditionerName.kfac if group_size is None else PreconditionerName.grouped
