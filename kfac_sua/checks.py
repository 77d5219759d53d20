"""Checks of configuration values: ranges of single keys, and keys that contradict each other.

Everything here needs neither data nor a device, so that a sweep is checked as a whole before its first run starts.
"""

from collections.abc import Callable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

from kfac_sua.config import (
    MODEL_TYPES,
    OPTIMIZER_TYPES,
    Config,
    ConfigError,
    DatasetName,
    KroneckerConfig,
    MuonConfig,
    PreconditionerName,
    ScheduleName,
    SGDConfig,
    StepScheduleConfig,
    shown,
)
from kfac_sua.data.sizes import SIZES
from kfac_sua.methods import BASELINE
from kfac_sua.preconditioner.settings import (
    LARGEST_FLOAT,
    LEAST_FLOAT,
    FisherType,
    Likelihood,
    LossReduction,
    Structure,
)

# An exact Fisher costs one backward pass per class. More classes than this need preconditioner.allow_exact_fisher.
MAX_EXACT_FISHER_CLASSES = 10


def _at_least_one(value: int) -> bool:
    return value >= 1


def _one_or_null(value: int | None) -> bool:
    return value is None or value >= 1


def _positive(value: float) -> bool:
    return LEAST_FLOAT <= value <= LARGEST_FLOAT


def _positive_or_null(value: float | None) -> bool:
    return value is None or _positive(value)


def _betas(values: list[float]) -> bool:
    return len(values) == 2 and all(0 <= beta < 1 for beta in values)


FLOAT_ABOVE_0 = "a number > 0 within the range of float32"
TWO_BETAS = "two numbers in [0, 1) such as [0.9,0.99]"

# Key -> (what must hold, the same in words). Keys that the chosen options do not have are skipped. The preconditioner's
# own settings check themselves.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda seed: 0 <= seed < 2**32, "between 0 and 4294967295"),
    "epochs": (lambda epochs: 1 <= epochs <= 10**6, "≥ 1 and at most 1000000"),
    "batch_size": (_at_least_one, "≥ 1"),
    "evaluation_batch_size": (_at_least_one, "≥ 1"),
    "checkpoint_interval_s": (
        lambda seconds: seconds is None or 0 < seconds <= LARGEST_FLOAT,
        "seconds > 0, or null (at the end of epochs only)",
    ),
    "log_interval": (_one_or_null, "≥ 1 step, or null (never)"),
    "num_threads": (
        lambda number: number is None or 1 <= number <= 1024,
        "between 1 and 1024, or null (PyTorch's choice)",
    ),
    "capture": (lambda capture: capture in (True, False, "auto"), "auto, true or false"),
    "start_from": (
        lambda path: path is None or Path(path, "run.json").is_file(),
        "null or the directory of a run, which has a run.json",
    ),
    "output_dir": (bool, "the path of a directory"),
    "model.width": (lambda width: 0 < width <= 64, "> 0 and at most 64"),
    "dataset.validation_size": (_at_least_one, "≥ 1"),
    "dataset.train_size": (_one_or_null, "≥ 1 or null (all images)"),
    "dataset.train_eval_size": (_one_or_null, "≥ 1 or null (all images)"),
    "dataset.split_seed": (lambda seed: 0 <= seed < 2**32, "between 0 and 4294967295"),
    "preconditioner.damping_final": (_positive_or_null, "null (it stays as it is) or " + FLOAT_ABOVE_0),
    "preconditioner.adaptive_damping": (_one_or_null, "≥ 1 mini-batch or null (never)"),
    "optimizer.lr": (_positive, FLOAT_ABOVE_0),
    "optimizer.weight_decay": (lambda decay: 0 <= decay <= LARGEST_FLOAT, "a number ≥ 0 within the range of float32"),
    "optimizer.momentum": (lambda momentum: 0 <= momentum < 1, "in [0, 1)"),
    "optimizer.betas": (_betas, TWO_BETAS),
    "optimizer.eps": (_positive, FLOAT_ABOVE_0),
    "optimizer.ns_steps": (lambda steps: 1 <= steps < 100, "between 1 and 99"),
    "optimizer.adamw_lr_ratio": (_positive, FLOAT_ABOVE_0),
    "optimizer.adamw_betas": (_betas, TWO_BETAS),
    "optimizer.adamw_eps": (_positive, FLOAT_ABOVE_0),
}


def check(config: Config) -> None:
    """Refuse values out of range and combinations that cannot mean what they say.

    Args:
        config: A configuration of the right types.

    Raises:
        ConfigError: Naming the first key at fault, its value, and what it may be.
    """
    for key, (holds, expected) in RANGES.items():
        parent, _, leaf = key.rpartition(".")
        node = attrgetter(parent)(config) if parent else config
        if not hasattr(node, leaf):
            continue
        value = getattr(node, leaf)
        if not holds(value):
            raise ConfigError(f"{key} must be {expected}, got {shown(value)}.")
    for problem in _contradictions(config):
        raise ConfigError(problem)


def check_environment(variables: Mapping[str, str]) -> None:
    """Refuse environment variables that libraries would ignore with a warning: a run would be timed with other threads.

    Args:
        variables: The process's environment.

    Raises:
        ConfigError: Naming the variable, its value, and what it may be.
    """
    text = variables.get("OMP_NUM_THREADS", "1")
    numbers = [part.strip() for part in text.split(",")]  # one per level of nesting
    if not all(number.isascii() and number.isdecimal() and int(number) >= 1 for number in numbers):
        raise ConfigError(f"The environment variable OMP_NUM_THREADS must be a whole number ≥ 1, got '{text}'.")


def _contradictions(config: Config) -> Iterator[str]:
    """Yield a sentence for every pair of keys that contradict each other."""
    if type(config.model) is not MODEL_TYPES[config.model.name]:
        yield _only_renamed("model", config.model.name)
    yield from _optimizer_problems(config)
    if isinstance(config.schedule, StepScheduleConfig):
        yield from _step_schedule_problems(config.schedule)
    if isinstance(config.preconditioner, KroneckerConfig):
        yield from _kronecker_problems(config.preconditioner, config.dataset.name)
        yield from _damping_problems(config.preconditioner, config.epochs)
    elif config.preconditioner.name != BASELINE:
        yield _only_renamed("preconditioner", config.preconditioner.name)
    if isinstance(config.schedule, StepScheduleConfig) != (config.schedule.name is ScheduleName.step):
        yield _only_renamed("schedule", config.schedule.name)


def _optimizer_problems(config: Config) -> Iterator[str]:
    optimizer, preconditioner = config.optimizer, config.preconditioner
    if type(optimizer) is not OPTIMIZER_TYPES[optimizer.name]:
        yield _only_renamed("optimizer", optimizer.name)
    if isinstance(optimizer, SGDConfig | MuonConfig) and optimizer.nesterov and optimizer.momentum == 0:
        yield "optimizer.nesterov=true needs optimizer.momentum > 0, got 0.0."
    if isinstance(optimizer, MuonConfig) and not hasattr(torch.optim, "Muon"):
        yield f"optimizer=muon needs torch.optim.Muon, which PyTorch {torch.__version__} lacks; install torch>=2.9."
    # Both rescale the gradient (AdamW each entry, Muon each singular value), which undoes a preconditioner.
    if not isinstance(optimizer, SGDConfig) and isinstance(preconditioner, KroneckerConfig):
        yield (
            f"optimizer={optimizer.name} scales the gradient by itself and cannot be combined with "
            f"preconditioner={preconditioner.name}; give preconditioner=baseline, or optimizer=sgd."
        )


def _step_schedule_problems(schedule: StepScheduleConfig) -> Iterator[str]:
    milestones = schedule.milestones
    if milestones != sorted(set(milestones)) or not all(0 < fraction < 1 for fraction in milestones):
        got = ",".join(f"{fraction:g}" for fraction in milestones)
        yield (
            "schedule.milestones must be increasing fractions of the run between 0 and 1, such as [0.5,0.8], "
            f"got [{got}]."
        )
    if not 0 < schedule.gamma <= 1:
        yield f"schedule.gamma must be in (0, 1], got {schedule.gamma}."


def _kronecker_problems(preconditioner: KroneckerConfig, dataset: DatasetName) -> Iterator[str]:
    expected = _name_of(preconditioner.structure, preconditioner.group_size)
    if preconditioner.name != expected:
        yield (
            f"preconditioner.structure={preconditioner.structure} with preconditioner.group_size="
            f"{shown(preconditioner.group_size)} is called {expected} in records and figures, not "
            f"{preconditioner.name}; give preconditioner={expected}."
        )
    # The training loop minimises the mean cross-entropy. These two keys are there for users of the package.
    if preconditioner.likelihood is not Likelihood.categorical:
        yield f"preconditioner.likelihood must be categorical for classification, got {preconditioner.likelihood}."
    if preconditioner.loss_reduction is not LossReduction.mean:
        yield (
            f"preconditioner.loss_reduction must be mean, as the training loss is, got {preconditioner.loss_reduction}."
        )
    num_classes = SIZES[dataset].classes
    is_expensive = preconditioner.fisher_type is FisherType.exact and num_classes > MAX_EXACT_FISHER_CLASSES
    if is_expensive and not preconditioner.allow_exact_fisher:
        yield (
            f"preconditioner.fisher_type=exact takes {num_classes} backward passes per measurement on "
            f"dataset={dataset}; use empirical or mc, or set preconditioner.allow_exact_fisher=true."
        )


def _damping_problems(preconditioner: KroneckerConfig, epochs: int) -> Iterator[str]:
    final, period = preconditioner.damping_final, preconditioner.adaptive_damping
    if final is not None and period is not None:
        yield (
            f"preconditioner.damping_final={final:g} and preconditioner.adaptive_damping={period} would both set the "
            "damping; give one of them, the other null."
        )
    if final is not None and epochs == 1:
        yield (
            f"preconditioner.damping_final={final:g} is that of the last epoch, which with epochs=1 is the first; give "
            "epochs ≥ 2, or preconditioner.damping."
        )


def _only_renamed(group: str, name: str) -> str:
    return f"{group}.name={name} changes the name but not the other keys of {group}; give {group}={name}."


def _name_of(structure: str, group_size: int | None) -> str:
    """Return the one name under which a structure is recorded and drawn."""
    grouped = {Structure.kfac: PreconditionerName.grouped, Structure.sua: PreconditionerName.sua_grouped}
    return structure if group_size is None else grouped[Structure(structure)]
