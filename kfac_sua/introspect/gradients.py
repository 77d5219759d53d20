"""Per-example weight gradients of one layer at a time, from which its exact Fisher block is measured.

A layer's block is F = Σ_r g_r g_rᵀ over rows g_r: one per example for the empirical and the sampled Fisher, one per
example and class for the exact one, scaled so that F is the mean over examples. F itself, as wide as the layer has
parameters, is never formed.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.preconditioner.fisher import fisher_cotangents
from kfac_sua.preconditioner.model.module_geometry import geometry_of
from kfac_sua.preconditioner.settings import FisherType, Likelihood

PATCH_BYTES = 64 * 2**20
"""Bytes of unfolded patches at a time; larger chunks were no faster on a CPU."""


@dataclasses.dataclass(frozen=True)
class Batch:
    """Images that a Fisher is taken over.

    Args:
        inputs: ``[examples, channels, height, width]``, in the network's dtype.
        labels: True classes, ``[examples]``.
        sampled: Classes drawn from the network's own distribution, ``[examples]``; read under ``mc`` only.
    """

    inputs: Tensor
    labels: Tensor
    sampled: Tensor

    def fisher_labels(self, fisher: FisherType) -> Tensor:
        """Return the labels whose gradients make the Fisher, ``[examples]``; not for ``exact``, which takes all."""
        return self.sampled if fisher is FisherType.mc else self.labels


@dataclasses.dataclass
class Passes:
    """What one layer saw in one forward and some backward passes of a batch.

    Attributes:
        inputs: Its input in each call of the forward pass, ``[examples, ...]``.
        output_grads: Per call, its output gradient in each backward pass, ``[examples, ...]``.
    """

    inputs: list[Tensor] = dataclasses.field(default_factory=list)
    output_grads: list[list[Tensor]] = dataclasses.field(default_factory=list)


@contextmanager
def _recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Passes]]:
    """Record the passes inside. Hooks on outputs also see the gradient of an output that is changed in place later."""
    passes = {name: Passes() for name in modules}

    def hook_of(own: Passes) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            del module
            grads: list[Tensor] = []
            own.inputs.append(arguments[0].detach())
            own.output_grads.append(grads)
            output.register_hook(lambda grad: grads.append(grad.detach()))

        return hook

    handles = [module.register_forward_hook(hook_of(passes[name])) for name, module in modules.items()]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def record_passes(
    model: nn.Module, modules: Mapping[str, nn.Module], batch: Batch, fisher: FisherType
) -> dict[str, Passes]:
    """Send the Fisher's output gradients backward through the network.

    Args:
        model: The network, in evaluation mode: through the statistics of a mini-batch, examples have no gradients of
            their own.
        modules: Its layers by name.
        batch: The images.
        fisher: Which labels define the output gradients.

    Returns:
        What each layer saw. Every ``.grad`` is as it was.
    """
    with _recorded(modules) as passes:
        logits = model(batch.inputs)
        cotangents = list(_cotangents(logits, batch, fisher))
        for position, cotangent in enumerate(cotangents):
            is_last = position == len(cotangents) - 1
            # With respect to the parameters, as PyTorch computes only what leads to what is asked for.
            parameters = [one for one in model.parameters() if one.requires_grad]
            torch.autograd.grad(logits, parameters, cotangent, retain_graph=not is_last, allow_unused=True)
    return passes


def _cotangents(logits: Tensor, batch: Batch, fisher: FisherType) -> Iterator[Tensor]:
    """Yield gradients of un-averaged losses with respect to the logits, ``[examples, classes]`` each."""
    if fisher is FisherType.exact:
        yield from fisher_cotangents(logits, fisher, Likelihood.categorical, torch.Generator(logits.device))
        return
    detached = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(detached, batch.fisher_labels(fisher), reduction="sum")
        yield from torch.autograd.grad(loss, detached)


@torch.no_grad()
def gradient_rows(module: nn.Linear | nn.Conv2d, passes: Passes, num_examples: int) -> Tensor:
    """Return the rows g_r of a layer with F = Σ_r g_r g_rᵀ.

    Args:
        module: ``nn.Linear`` or ``nn.Conv2d``.
        passes: What it saw.
        num_examples: N; rows are divided by √N.

    Returns:
        ``[backward passes · N, parameters]``, each row a weight gradient ``[out, in, kh, kw]`` or ``[out, in]``, one
        number after the other, and after it the bias's, if that is trained.

    Raises:
        ValueError: If the layer was not reached, or its inputs have another first dimension than examples.
    """
    if not passes.inputs or not all(passes.output_grads):
        raise ValueError("was not part of the network's pass")
    if any(len(inputs) != num_examples for inputs in passes.inputs):
        raise ValueError(f"has inputs of first dimension {len(passes.inputs[0])} for {num_examples} examples")
    calls = zip(passes.inputs, passes.output_grads, strict=True)
    rows: Tensor | None = None
    for inputs, grads in calls:  # a layer that is called several times has the sum of their gradients
        of_call = _rows_of_call(module, inputs, grads)
        rows = of_call if rows is None else rows.add_(of_call)
    assert rows is not None
    return rows.div_(num_examples**0.5)


def _rows_of_call(module: nn.Linear | nn.Conv2d, inputs: Tensor, output_grads: Sequence[Tensor]) -> Tensor:
    """Return the gradients of one call, ``[backward passes · N, parameters]``."""
    geometry = geometry_of(module)
    groups, num_examples, num_weights = geometry.conv_groups, len(inputs), module.weight.numel()
    rows = inputs.new_empty(len(output_grads), num_examples, num_weights + geometry.has_bias * len(module.weight))
    per_example = _reads(module, inputs[:1]).numel() * inputs.element_size()
    for chunk in torch.arange(num_examples).split(max(1, PATCH_BYTES // per_example)):
        part = slice(int(chunk[0]), int(chunk[-1]) + 1)
        reads = _reads(module, inputs[part])  # [n, features, locations]
        reads = reads.unflatten(1, (groups, -1))  # [n, g, features / g, locations]
        for number, whole in enumerate(output_grads):
            grads = _by_location(module, whole[part])  # [n, out, locations]
            split = grads.unflatten(1, (groups, -1))  # [n, g, out / g, locations]
            rows[number, part, :num_weights] = torch.matmul(split, reads.mT).flatten(1)  # [n, out · features / g]
            if geometry.has_bias:
                rows[number, part, num_weights:] = grads.sum(-1)  # [n, out]
    return rows.flatten(0, 1)  # [backward passes · N, parameters]


def _reads(module: nn.Linear | nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return what each output location reads, ``[n, in · kh · kw, locations]``."""
    if not isinstance(module, nn.Conv2d):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1]).mT  # [n, in, locations]
    geometry = geometry_of(module)
    mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
    padded = F.pad(inputs, geometry.padding, mode=mode)
    return F.unfold(
        padded, geometry.kernel_size, geometry.dilation, stride=geometry.stride
    )  # [n, in · taps, locations]


def _by_location(module: nn.Module, output_grads: Tensor) -> Tensor:
    """Return output gradients as ``[n, out, locations]``."""
    if isinstance(module, nn.Conv2d):
        return output_grads.flatten(2)  # [n, out, locations]
    return output_grads.reshape(len(output_grads), -1, output_grads.shape[-1]).mT  # [n, out, locations]
