"""The model inside wrappers, whose layer names are used everywhere, as in checkpoints."""

import sys

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

WRAPPER_ATTRIBUTES = {"_orig_mod", "_checkpoint_wrapped_module"}
"""Names under which torch.compile and activation checkpointing hold the module that they wrap."""


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside ``DistributedDataParallel`` and ``torch.compile``, however nested.

    Args:
        model: Any module.

    Raises:
        TypeError: If it is no module.
        ValueError: If a ``nn.DataParallel`` is among the wrappers.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while (inside := _inside(model)) is not None:
        model = inside
    if isinstance(model, DataParallel):
        raise ValueError(
            "model is a nn.DataParallel, whose copies on other devices cannot be recorded; use "
            "DistributedDataParallel, with one process per device."
        )
    return model


def bare_name(name: str) -> str:
    """Return a dotted module name without the parts that wrappers inside the model add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_ATTRIBUTES)


def inside_of_compiled(model: nn.Module) -> nn.Module | None:
    """Return the module that ``torch.compile(module)`` wraps; ``None`` if the model is no such wrapper."""
    # torch.compile has loaded this module where a model is compiled; to import it here would take a second.
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return model._orig_mod if dynamo is not None and isinstance(model, dynamo.OptimizedModule) else None


def _inside(model: nn.Module) -> nn.Module | None:
    return model.module if isinstance(model, DistributedDataParallel) else inside_of_compiled(model)
