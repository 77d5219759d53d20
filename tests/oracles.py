"""Slow, obvious versions of the preconditioner's mathematics: Python loops and dense Kronecker matrices."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kfac_sua.preconditioner import KroneckerSettings


def patches_by_loop(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Return ``[n, locations, taps, channels]``, read pixel by pixel from the explicitly padded input."""
    kh, kw = module.kernel_size
    (sh, sw), (dh, dw) = module.stride, module.dilation
    padded = pad_by_module(module, inputs)
    out_h = (padded.shape[2] - dh * (kh - 1) - 1) // sh + 1
    out_w = (padded.shape[3] - dw * (kw - 1) - 1) // sw + 1
    locations = []
    for row in range(out_h):
        for column in range(out_w):
            taps = [padded[:, :, row * sh + i * dh, column * sw + j * dw] for i in range(kh) for j in range(kw)]
            locations.append(torch.stack(taps, dim=1))  # [n, taps, channels]
    return torch.stack(locations, dim=1)


def pad_by_module(module: nn.Conv2d, inputs: Tensor) -> Tensor:
    """Pad the input as ``nn.Conv2d`` documents it."""
    if module.padding == "same":
        pads = []
        for size, dilation in zip(reversed(module.kernel_size), reversed(module.dilation), strict=True):
            total = dilation * (size - 1)
            pads += [total // 2, total - total // 2]
    elif module.padding == "valid":
        pads = [0, 0, 0, 0]
    else:
        pads = [module.padding[1], module.padding[1], module.padding[0], module.padding[0]]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(inputs, pads, mode=mode)


def locations_of(module: nn.Module, inputs: Tensor) -> Tensor:
    """Return what one weight application reads, ``[n, locations, taps, channels]``."""
    if isinstance(module, nn.Conv2d):
        return patches_by_loop(module, inputs)
    return inputs.reshape(inputs.shape[0], -1, 1, inputs.shape[-1])


def output_locations_of(module: nn.Module, output_grads: Tensor) -> Tensor:
    """Return output gradients as ``[n, locations, channels]``."""
    if isinstance(module, nn.Conv2d):
        return output_grads.flatten(2).transpose(1, 2)
    return output_grads.reshape(output_grads.shape[0], -1, output_grads.shape[-1])


def group_mask(num_channels: int, group_size: int | None) -> Tensor:
    """Return the 0/1 matrix of channel pairs within one group."""
    if group_size is None:
        return torch.ones(num_channels, num_channels, dtype=torch.float64)
    index = torch.arange(num_channels) // group_size
    return (index[:, None] == index[None, :]).double()


class DenseLayer:
    """The dense Fisher approximation of one convolution group of one layer, in ``[out, taps, in (, bias)]`` order."""

    def __init__(self, reads: Tensor, grads: Tensor, has_bias: bool, settings: KroneckerSettings) -> None:
        """Take reads ``[n, s, taps, channels]`` and un-averaged output gradients ``[n, s, out]``."""
        self.settings = settings
        n, s, taps, channels = reads.shape
        reduce = settings.weight_sharing == "reduce"
        one_group = settings.group_size is None or settings.group_size >= channels
        sua = settings.structure == "sua" and taps > 1
        self.joint = has_bias and one_group and not sua
        self.separate = has_bias and not self.joint
        self.scale = 1.0 if reduce else float(s)
        features = reads.flatten(2)  # [n, s, taps · channels]
        if self.joint:
            features = torch.cat([features, torch.ones(n, s, 1, dtype=features.dtype)], dim=-1)
        rows = features.mean(1) if reduce else features.flatten(0, 1)
        grad_rows = grads.sum(1) if reduce else grads.flatten(0, 1)
        self.activation = sum(torch.outer(row, row) for row in rows) / len(rows)
        self.gradient = sum(torch.outer(row, row) for row in grad_rows) / len(grad_rows)
        if sua:
            blocks = self.activation.reshape(taps, channels, taps, channels)
            mean = sum(blocks[t, :, t, :] for t in range(taps)) / taps
            self.activation = torch.kron(torch.eye(taps, dtype=torch.float64), mean)
        mask = group_mask(channels, settings.group_size).repeat(taps, taps)
        if self.joint:
            mask = F.pad(mask, (0, 1, 0, 1), value=1.0)
        self.activation = self.activation * mask
        self.gradient = self.gradient * group_mask(grads.shape[-1], settings.group_size)

    def damped(self, activation: Tensor) -> Tensor:
        """Return the damped block for a given activation factor (the layer's, or the 1×1 one of a separate bias)."""
        eps, rule = self.settings.damping, self.settings.damping_rule
        if rule == "exact":
            block = self.scale * torch.kron(self.gradient, activation)
            return block + eps * torch.eye(len(block), dtype=torch.float64)
        pi = 1.0
        if rule == "factored_pi":
            mean_a = self.activation.trace() / len(self.activation)
            mean_g = self.gradient.trace() / len(self.gradient)
            if mean_a > 0 and mean_g > 0:
                pi = math.sqrt(mean_a / mean_g)
        root = math.sqrt(eps / self.scale)
        damped_a = activation + root * pi * torch.eye(len(activation), dtype=torch.float64)
        damped_g = self.gradient + root / pi * torch.eye(len(self.gradient), dtype=torch.float64)
        return self.scale * torch.kron(damped_g, damped_a)

    def solve(self, weight_grad: Tensor, bias_grad: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Precondition ``[out, taps · channels]`` and ``[out]`` by dense solves."""
        out = weight_grad.shape[0]
        vector = weight_grad if not self.joint else torch.cat([weight_grad, bias_grad[:, None]], dim=1)
        solved = torch.linalg.solve(self.damped(self.activation), vector.flatten()).view(out, -1)
        if self.joint:
            return solved[:, :-1], solved[:, -1]
        if self.separate:
            one = torch.ones(1, 1, dtype=torch.float64)
            return solved, torch.linalg.solve(self.damped(one), bias_grad)
        return solved, None


def dense_layers(
    module: nn.Module, inputs: Tensor, output_grads: Tensor, settings: KroneckerSettings
) -> list[DenseLayer]:
    """Return the dense approximation of every convolution group (one, unless ``groups > 1``)."""
    groups = getattr(module, "groups", 1)
    reads, grads = locations_of(module, inputs), output_locations_of(module, output_grads)
    has_bias = module.bias is not None
    return [
        DenseLayer(part, grad, has_bias, settings)
        for part, grad in zip(reads.chunk(groups, -1), grads.chunk(groups, -1), strict=True)
    ]


def dense_precondition(
    module: nn.Module,
    inputs: Tensor,
    output_grads: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor | None,
    settings: KroneckerSettings,
) -> tuple[Tensor, Tensor | None]:
    """Precondition a layer's gradients by dense solves with the damped Kronecker matrices.

    Args:
        module: ``nn.Conv2d`` or ``nn.Linear``.
        inputs: Its inputs, float64.
        output_grads: Gradients of the un-averaged loss at its outputs.
        weight_grad: Gradient of the weight.
        bias_grad: Gradient of the bias.
        settings: What to build.
    """
    layers = dense_layers(module, inputs, output_grads, settings)
    weights, biases = [], []
    for index, layer in enumerate(layers):
        weight = weight_grad.chunk(len(layers), 0)[index]
        flat = weight.flatten(2).transpose(1, 2).flatten(1) if weight.dim() == 4 else weight  # [out, taps · in]
        bias = None if bias_grad is None else bias_grad.chunk(len(layers), 0)[index]
        solved, solved_bias = layer.solve(flat, bias)
        if weight.dim() == 4:
            solved = solved.view(weight.shape[0], -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights.append(solved)
        biases.append(solved_bias)
    return torch.cat(weights), None if bias_grad is None else torch.cat(biases)
