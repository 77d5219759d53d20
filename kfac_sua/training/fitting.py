"""Whether a checkpoint can have been written by this run; all of it is checked before any of it is used.

The digest shows that a file is intact, and the fingerprint to which configuration it belongs, but neither shows who
wrote it. A state that the run cannot reach (too many steps, negative seconds, another weight decay, tensors of other
shapes) is refused; then the previous checkpoint is used.
"""

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from kfac_sua.config import KroneckerConfig, NonFinite
from kfac_sua.optimizers import MuonWithAdamW
from kfac_sua.preconditioner.checkpoint.checks import outlined
from kfac_sua.training.checkpoint import Checkpoint
from kfac_sua.training.diagnostics import check_diagnostics
from kfac_sua.training.evaluate import checked_sums
from kfac_sua.training.state import IMPLEMENTATION_KEYS, Training
from kfac_sua.training.timing import PHASES

LATER_PHASES = {"data", "other", "evaluation", "writing", "captured"}
"""Phases that older checkpoints lack."""

# Settings of parameter groups that not every release of PyTorch saves; loading a state sets them to their defaults.
_LATER_KEYS = {"nesterov", "maximize", "differentiable", "capturable", "amsgrad", "decoupled_weight_decay"}
_ROUNDING = 1e-6  # relative error of a learning rate, which fused optimizers keep in float32


def check_fits(training: Training, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint that the run cannot have written.

    Args:
        training: The state before the first step; it is not changed.
        checkpoint: A checkpoint with the fingerprint and seed of the run.

    Raises:
        ValueError: Naming the first entry that is out of range, and what was expected.
    """
    _check_counts(training, checkpoint)
    _check_times(checkpoint.times)
    _check_sums(training, checkpoint)
    if checkpoint.diagnostics is not None:
        check_diagnostics(checkpoint.diagnostics, checkpoint.batch)
    is_between_epochs = checkpoint.batch == 0  # then an evaluation has just given a finite loss
    _check_model(training.model.state_dict(), checkpoint.model, is_finite=is_between_epochs)
    last = training.config.epochs - 1
    rates = [training.lr(min(max(epoch, 0), last)) for epoch in (checkpoint.epoch, checkpoint.epoch - 1)]
    for name, optimizer, state in _optimizers(training.optimizer, checkpoint.optimizer):
        _check_groups(name, optimizer, state, rates)
        _check_moments(name, optimizer, state, checkpoint.step, is_finite=is_between_epochs)
    _check_preconditioner(training, checkpoint)
    _check_best(training, checkpoint)


def _check_best(training: Training, checkpoint: Checkpoint) -> None:
    if checkpoint.best is None:
        return
    if set(checkpoint.best) != {"epoch", "val_error", "model"}:
        _refuse("best", f"of {', '.join(map(str, checkpoint.best)) or 'nothing'}", "epoch, val_error and model")
    epoch, error = checkpoint.best["epoch"], checkpoint.best["val_error"]
    if type(epoch) is not int or not 1 <= epoch <= checkpoint.epoch:
        _refuse("best.epoch", epoch, f"an epoch of 1 to {checkpoint.epoch}")
    if not _is_real(error) or not 0 <= error <= 1:
        _refuse("best.val_error", error, "a fraction in [0, 1]")
    if not isinstance(checkpoint.best["model"], Mapping):
        _refuse("best.model", outlined(checkpoint.best["model"]), "a state of the network")
    own = {name: value.cpu() for name, value in training.model.state_dict().items()}
    _check_model(own, checkpoint.best["model"], is_finite=True)


def _check_counts(training: Training, checkpoint: Checkpoint) -> None:
    epochs, num_batches = training.config.epochs, len(training.loader)
    if checkpoint.epoch > epochs:
        _refuse("epoch", checkpoint.epoch, f"at most {epochs}, the run's epochs")
    most_batches = num_batches if checkpoint.epoch < epochs else 0
    if checkpoint.batch > most_batches:
        _refuse("batch", checkpoint.batch, f"at most {most_batches} mini-batches after epoch {checkpoint.epoch}")
    taken = checkpoint.epoch * num_batches + checkpoint.batch
    most_skipped = taken if training.config.non_finite is NonFinite.skip else 0
    if checkpoint.skipped_steps > most_skipped:
        _refuse("skipped_steps", checkpoint.skipped_steps, f"at most {most_skipped}")
    if checkpoint.step != taken - checkpoint.skipped_steps:
        steps = f"{taken - checkpoint.skipped_steps}, the mini-batches taken less those skipped"
        _refuse("step", checkpoint.step, steps)


def _check_times(times: Mapping[str, Any]) -> None:
    lacking = set(PHASES) - LATER_PHASES - set(times)
    if lacking or not set(times) <= set(PHASES):
        _refuse("times", f"of {', '.join(map(str, times)) or 'nothing'}", f"seconds of {', '.join(PHASES)}")
    for phase, seconds in times.items():
        if not _is_real(seconds) or not 0 <= seconds < math.inf:
            _refuse(f"times.{phase}", seconds, "a number of seconds ≥ 0")


def _check_sums(training: Training, checkpoint: Checkpoint) -> None:
    _, num_errors, num_images = checked_sums(checkpoint.sums)
    most = checkpoint.batch * training.config.batch_size
    may_lack = training.config.non_finite is NonFinite.skip
    if num_images > most or (num_images < most and not may_lack):
        _refuse("sums.num_images", int(num_images), f"{'at most ' if may_lack else ''}{most}")
    if num_errors > num_images:
        _refuse("sums.num_errors", int(num_errors), f"at most {int(num_images)}")


def _check_model(own: Mapping[str, Tensor], saved: Mapping[str, Any], *, is_finite: bool) -> None:
    if saved.keys() != own.keys():
        names = ", ".join(sorted(map(str, saved.keys() ^ own.keys())))
        raise ValueError(f"model belongs to another network; entries that differ: {names[:200]}")
    for name, like in own.items():
        _check_tensor(f"model.{name}", saved[name], like, is_finite=is_finite)
        if name.endswith("running_var") and bool((saved[name] < 0).any()):
            _refuse(f"model.{name}", "negative somewhere", "variances ≥ 0")


def _check_preconditioner(training: Training, checkpoint: Checkpoint) -> None:
    preconditioner, state = training.preconditioner, checkpoint.preconditioner
    if preconditioner is None or state is None:
        if preconditioner is not state:
            _refuse("preconditioner", "none" if state is None else "there", "the other")
        return
    preconditioner.check_state_dict(state)
    if state["num_steps"] != checkpoint.step:
        _refuse("preconditioner.num_steps", state["num_steps"], f"{checkpoint.step}, as many as the run's")
    if state["seed"] != training.config.seed:
        _refuse("preconditioner.seed", state["seed"], f"{training.config.seed}, the run's")
    config = training.config.preconditioner
    assert isinstance(config, KroneckerConfig)
    least = largest = config.damping
    if config.damping_final is not None:
        least, largest = sorted((config.damping, config.damping_final))
    if training.adaptive_damping is not None:
        least, largest = training.adaptive_damping.bounds
    damping = state.get("damping", config.damping)
    if not least * (1 - _ROUNDING) <= damping <= largest * (1 + _ROUNDING):
        expected = f"{least:g}" if least == largest else f"in [{least:g}, {largest:g}]"
        _refuse("preconditioner.damping", damping, f"{expected}, as the run has it")


# --- optimizers -------------------------------------------------------------------------------------------------------


def _optimizers(optimizer: torch.optim.Optimizer, state: Any) -> list[tuple[str, torch.optim.Optimizer, Any]]:
    """Return PyTorch's optimizers inside the optimizer, each with its name and its state."""
    if isinstance(optimizer, MuonWithAdamW):
        found = [(f"optimizer.{name}", part, state.get(name)) for name, part in optimizer.parts.items()]
    else:
        found = [("optimizer", optimizer, state)]
    for name, _, part_state in found:
        if not isinstance(part_state, Mapping) or not {"state", "param_groups"} <= set(part_state):
            _refuse(name, outlined(part_state), "a mapping of state and param_groups")
        groups = part_state["param_groups"]
        if not isinstance(part_state["state"], Mapping) or not isinstance(groups, list):
            _refuse(name, "without them", "a mapping and a list of parameter groups")
    return found


def _check_groups(name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], rates: list[float]) -> None:
    own = optimizer.state_dict()["param_groups"]
    if len(state["param_groups"]) != len(own):
        _refuse(f"{name}.param_groups", f"{len(state['param_groups'])} groups", f"{len(own)}")
    for number, (group, wanted) in enumerate(zip(state["param_groups"], own, strict=True)):
        where = f"{name}.param_groups.{number}"
        if not isinstance(group, Mapping) or not set(wanted) - IMPLEMENTATION_KEYS - _LATER_KEYS <= set(group):
            _refuse(where, outlined(group), f"a mapping of {', '.join(wanted)}")
        for key in (set(wanted) & set(group)) - IMPLEMENTATION_KEYS - {"lr", "capturable"}:
            if not _agree(group[key], wanted[key]):
                _refuse(f"{where}.{key}", outlined(group[key]), f"{outlined(wanted[key])}, as the run has it")
        ratio, lr = wanted.get("lr_ratio", 1.0), group["lr"]
        if not _is_real(lr) or not any(math.isclose(lr, rate * ratio, rel_tol=_ROUNDING) for rate in rates):
            _refuse(f"{where}.lr", outlined(lr), f"{rates[0] * ratio:g}, as the run has it")


def _check_moments(
    name: str, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], num_steps: int, *, is_finite: bool
) -> None:
    """Check what an optimizer keeps per parameter; after the first step nothing may be missing."""
    parameters = [(one, _kept_names(optimizer, group)) for group in optimizer.param_groups for one in group["params"]]
    kept = state["state"]
    if not set(kept) <= set(range(len(parameters))):
        _refuse(f"{name}.state", f"of parameters {outlined(list(kept))}", f"of 0 to {len(parameters) - 1}")
    for number, (parameter, names) in enumerate(parameters):
        where, values = f"{name}.state.{number}", kept.get(number, {})
        if not isinstance(values, Mapping):
            _refuse(where, outlined(values), "a mapping")
        there = {key for key, value in values.items() if value is not None}
        if there != names and (there or num_steps):
            _refuse(where, f"of {', '.join(map(str, there)) or 'nothing'}", ", ".join(sorted(names)) or "nothing")
        for key in there:
            if key == "step":
                _check_step(f"{where}.step", values[key], num_steps)
                continue
            # A square may overflow without harm to the parameter.
            is_square = key == "exp_avg_sq"
            _check_tensor(f"{where}.{key}", values[key], parameter, is_finite=is_finite and not is_square)
            if is_square and not bool((values[key] >= 0).all()) and is_finite:
                _refuse(f"{where}.{key}", "negative or no number somewhere", "squares ≥ 0")


def _kept_names(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> set[str]:
    if isinstance(optimizer, torch.optim.AdamW):
        return {"step", "exp_avg", "exp_avg_sq"}
    return {"momentum_buffer"} if group["momentum"] or not isinstance(optimizer, torch.optim.SGD) else set()


def _check_step(where: str, value: Any, num_steps: int) -> None:
    is_number = (isinstance(value, Tensor) and value.ndim == 0 and value.dtype == torch.float32) or _is_real(value)
    if not is_number or not 1 <= float(value) <= num_steps or float(value) != int(value):
        _refuse(where, float(value) if is_number else outlined(value), f"a whole number in [1, {num_steps}]")


# --- values -----------------------------------------------------------------------------------------------------------


def _check_tensor(where: str, value: Any, like: Tensor, *, is_finite: bool) -> None:
    if not isinstance(value, Tensor) or value.shape != like.shape:
        _refuse(where, outlined(value), f"a tensor of shape {list(like.shape)}")
    if value.dtype != like.dtype or value.layout is not torch.strided or value.is_meta:
        _refuse(where, f"in {value.dtype} ({value.layout}, {value.device})", f"in {like.dtype}")
    if is_finite and not bool(value.isfinite().all()):
        _refuse(where, "not finite everywhere", "finite numbers")


def _is_real(value: object) -> bool:
    return isinstance(value, float) or (type(value) is int and value.bit_length() < 64)


def _agree(got: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple | list):
        is_list = isinstance(got, tuple | list) and len(got) == len(wanted)
        return is_list and all(_agree(*pair) for pair in zip(got, wanted, strict=True))
    is_plain = got is None or isinstance(got, str | int | float)
    return is_plain and isinstance(got, bool) == isinstance(wanted, bool) and bool(got == wanted)


def _refuse(entry: str, got: object, expected: str) -> NoReturn:
    raise ValueError(f"{entry} is {got if isinstance(got, str) else outlined(got)}, expected {expected}")
