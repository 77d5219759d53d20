"""Batch normalisation over the whole mini-batch where several processes have a part of it each."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx


class _AddUp(torch.autograd.Function):
    """The sum of a tensor over all processes, differentiable: every process's loss depends on every summand."""

    @staticmethod
    def forward(ctx: FunctionCtx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class CPUSyncBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the examples of all processes, for the CPU, which ``nn.SyncBatchNorm`` refuses.

    Mean and variance travel one after the other: the variance as mean of squares minus squared mean would lose digits.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the normalised input, ``[batch, channels, height, width]``; parts may differ in size."""
        if not self.training:
            return super().forward(input)
        values = input.to(self.weight.dtype)  # under autocast the input may have half of the digits
        count = input.numel() // input.shape[1]
        sums = _AddUp.apply(torch.cat([values.sum((0, 2, 3)), values.new_tensor([count])]))  # [channels + 1]
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = values - mean[:, None, None]  # of [channels, 1, 1]
        variance = _AddUp.apply(centred.square().sum((0, 2, 3))) / total
        self._track(mean.detach(), variance.detach() * (total / (total - 1)))
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Return a model whose batch normalisation sees the whole mini-batch, with the parameters it had.

    Args:
        model: Changed in place.
        device: Where it is trained; on CUDA ``nn.SyncBatchNorm`` does it.
    """
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, module in list(model.named_modules()):
        if type(module) is nn.BatchNorm2d:
            synchronised = CPUSyncBatchNorm2d(module.num_features, module.eps, module.momentum).to(module.weight)
            synchronised.load_state_dict(module.state_dict())
            model.set_submodule(name, synchronised)
    return model
