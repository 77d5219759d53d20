"""Muon for the weights of hidden layers, convolutions included, and AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.config import MuonConfig


class MuonWithAdamW(torch.optim.Optimizer):
    """Two of PyTorch's optimizers behind the interface of one.

    ``torch.optim.Muon`` takes matrices only, so it is given two-dimensional views that share the convolution weights'
    memory. The group of AdamW's parameters has the key ``lr_ratio``: whoever sets learning rates multiplies by it.

    Args:
        model: The network, already on its device and in its memory layout: the views do not follow it elsewhere.
        config: Settings of both optimizers.

    Raises:
        ValueError: If the network has no hidden layer.

    Reference: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks".
    """

    def __init__(self, model: nn.Module, config: MuonConfig) -> None:
        hidden, others = split_parameters(model)
        lr, ratio = config.lr, config.adamw_lr_ratio
        super().__init__(
            [{"params": hidden, "lr": lr, "lr_ratio": 1.0}, {"params": others, "lr": lr * ratio, "lr_ratio": ratio}],
            defaults={},
        )
        self._parameters, self._weights, self._adamw_lr_ratio = [*hidden, *others], hidden, ratio
        self._matrices = [as_matrix(weight.detach(), like=weight) for weight in hidden]
        assert all(
            matrix.data_ptr() == weight.data_ptr() for matrix, weight in zip(self._matrices, hidden, strict=True)
        )
        self._muon = torch.optim.Muon(
            self._matrices,
            lr=lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            nesterov=config.nesterov,
            ns_steps=config.ns_steps,
        )
        self._adamw = torch.optim.AdamW(
            others,
            lr=lr * ratio,
            betas=(config.adamw_betas[0], config.adamw_betas[1]),
            eps=config.adamw_eps,
            weight_decay=config.weight_decay,
            fused=others[0].is_cuda,  # as in build.py
        )
        self._share_groups()

    def _share_groups(self) -> None:
        """Have the groups of the inner optimizers as own ones, so that a learning rate that is set here is theirs."""
        muon, adamw = self._muon.param_groups[0], self._adamw.param_groups[0]
        muon["lr_ratio"], adamw["lr_ratio"] = 1.0, self._adamw_lr_ratio
        self.param_groups = [muon, adamw]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop, or set to zero, the gradients of all parameters; Muon's group holds matrices in place of weights."""
        for parameter in self._parameters:
            if parameter.grad is not None:
                if set_to_none:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step of both optimizers; a closure that evaluates the loss again is not supported."""
        for matrix, weight in zip(self._matrices, self._weights, strict=True):
            matrix.grad = None if weight.grad is None else as_matrix(weight.grad, like=weight)
        self._muon.step()
        self._adamw.step()
        for matrix in self._matrices:
            matrix.grad = None  # or it would outlive zero_grad()

    @property
    def parts(self) -> dict[str, torch.optim.Optimizer]:
        """The two optimizers, by their names in a state."""
        return {"muon": self._muon, "adamw": self._adamw}

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both optimizers."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the state that :meth:`state_dict` returned for the same network and settings.

        Raises:
            ValueError: If it is not of both optimizers, or of other parameters; both are then as they were.
        """
        if not isinstance(state_dict, dict) or set(state_dict) != set(self.parts):
            got = ", ".join(map(str, state_dict)) if isinstance(state_dict, dict) else type(state_dict).__name__
            raise ValueError(
                f"The state of MuonWithAdamW must be a dict of {', '.join(self.parts)}, got {got or 'nothing'}; give "
                f"what its state_dict() returned, or start without a state."
            )
        before = self.state_dict()
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state_dict[name])
        except Exception:
            for name, part in self.parts.items():
                part.load_state_dict(before[name])
            raise
        finally:
            self._share_groups()  # loading has replaced them


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return what Muon trains and what AdamW does.

    The author of Muon advises to train all convolution weights but the first with it, and with AdamW everything else:
    the first layer, the last one, biases and the parameters of normalisation layers.

    Args:
        model: A network whose layers are registered in the order of its forward pass.

    Returns:
        The weights of all convolutions and linear layers but the first and the last; all other parameters.

    Raises:
        ValueError: If there are fewer than three layers.

    Reference: README of https://github.com/KellerJordan/Muon.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hidden = {id(layer.weight) for layer in layers[1:-1]}
    if not hidden:
        raise ValueError(f"Muon trains the weights of hidden layers, but the network has {len(layers)} layers in all.")
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) in hidden], [p for p in parameters if id(p) not in hidden]


def as_matrix(tensor: Tensor, like: Tensor) -> Tensor:
    """Flatten all dimensions but the first, in the order in which they lie in memory.

    A channels-last weight has its columns in another order than a contiguous one. Orthogonalisation commutes with
    permutations of columns, so this order changes nothing and makes a view possible in either layout.

    Args:
        tensor: ``[out, ...]``.
        like: Of the same shape; its memory layout decides the order of the columns.

    Returns:
        ``[out, columns]``; a view of ``tensor`` where its layout is that of ``like``, otherwise a copy.
    """
    order = sorted(range(1, like.ndim), key=like.stride, reverse=True)
    return tensor.permute(0, *order).flatten(1)
