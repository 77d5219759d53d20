"""Why a step cannot be captured, as a clause for the warning, from an inspected eager step or a capture that failed."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from kfac_sua.preconditioner.captured.host_state import HostState
from kfac_sua.preconditioner.captured.inspection import StepInspection
from kfac_sua.preconditioner.captured.optimizers import StepOptimizers
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner
from kfac_sua.preconditioner.model.compiled import compiled_modules
from kfac_sua.preconditioner.model.hooks import num_captures_on

_CURE = "as where a variable is replaced in every step; write into one tensor instead, with copy_()"


def of_model(model: nn.Module, preconditioner: KroneckerPreconditioner | None) -> str:
    """Return why no step of a model can be captured; empty if that depends on the step.

    Args:
        model: The model, wrapped or not.
        preconditioner: Its preconditioner, if it has one.
    """
    if isinstance(model, DistributedDataParallel) or (preconditioner is not None and preconditioner.processes):
        return "several processes share its mini-batch, and their communication is not captured"
    if preconditioner is not None and (told := preconditioner.why_not_captured):
        return told
    if any(True for _ in compiled_modules(model)):
        return 'the model is compiled; torch.compile(mode="reduce-overhead") makes graphs of its own'
    return ""


def of_step(
    inspection: StepInspection,
    before: HostState,
    model: nn.Module,
    optimizers: StepOptimizers,
    preconditioner: KroneckerPreconditioner | None,
) -> str:
    """Return why a step cannot be captured; empty if it can.

    Args:
        inspection: The inspection of the step.
        before: The host's state before it.
        model: The bare model.
        optimizers: The optimizers given to the captured step.
        preconditioner: The preconditioner given to it.
    """
    if inspection.refusals:
        return inspection.refusals[0]
    if strangers := inspection.strangers(optimizers.all):
        return f"it takes a step of an optimizer that was not given ({type(strangers[0]).__name__})"
    if num_captures_on(model) != (preconditioner is not None):
        return "the model has a preconditioner that was not given; give it, or remove_hooks() of it"
    if freed := inspection.freed():
        return f"it reads a tensor that is freed by its end ({freed[0]}), {_CURE}"
    if preconditioner is not None and before.num_steps_since != 1:
        return f"it took {before.num_steps_since} steps of the preconditioner instead of one"
    return ""


def of_step_after(inspection: StepInspection, step_before: StepInspection, kept: Iterable[Tensor]) -> str:
    """Return why a step cannot be replayed because it reads what the step before has made; empty if it can.

    Args:
        inspection: The inspection of the step.
        step_before: The inspection of the step before it.
        kept: Tensors that steps make once and then write in place: momentum, and gradients that are added to.
    """
    carried = inspection.carried_from(step_before, kept)
    return f"it reads a tensor that the step before has made ({carried[0]}), {_CURE}" if carried else ""


def of_failure(error: RuntimeError) -> str:
    """Return why a capture has failed, from the error that it raised; never empty.

    If an error breaks off a capture, CUDA raises another one when the capture ends; the first is its context.

    Args:
        error: The error raised.

    Raises:
        BaseException: The cause, if it is no ``Exception``, such as Ctrl-C.
    """
    cause = error.__context__
    if cause is not None and not isinstance(cause, Exception):
        raise cause from None
    if isinstance(error, torch.OutOfMemoryError) or isinstance(cause, torch.OutOfMemoryError):
        return "the device's memory does not hold it"
    told = error if cause is None else cause
    return (str(told).strip().splitlines() or [type(told).__name__])[0]
