"""Tensors of other kinds than the ordinary dense one: made ordinary, or refused by name."""

from typing import Any

import torch
from torch import Tensor, nn


def ordinary(values: Any, layer_name: str) -> Tensor:
    """Return a layer's input or output gradient as an ordinary dense tensor.

    Sparse ones are made dense; subclasses that only carry something along lose it.

    Args:
        values: What the layer, or autograd, has been given.
        layer_name: The layer, for the message.

    Raises:
        RuntimeError: If it is nested, or of a class with products of its own.
    """
    if type(values) is Tensor and values.layout == torch.strided and not values.is_nested:
        return values
    is_tensor = isinstance(values, Tensor) and type(values).__torch_dispatch__ is Tensor.__torch_dispatch__
    if not is_tensor or values.is_nested:
        kind = "a nested tensor" if is_tensor else f"a {type(values).__name__}"
        raise RuntimeError(
            f"Layer {layer_name!r} was called with {kind}, from which statistics are not measured: give it an ordinary "
            f"tensor (such as nested.to_padded_tensor(0.0)), or list the layer in skip."
        )
    if type(values) not in (Tensor, nn.Parameter):
        with torch._C.DisableTorchFunctionSubclass():
            values = values.detach().as_subclass(Tensor)
    result: Tensor = values.detach() if values.layout == torch.strided else values.detach().to_dense()
    return result
