"""The geometry of ``nn.Linear`` and ``nn.Conv2d`` modules."""

from torch import nn

from kfac_sua.preconditioner.geometry import LayerGeometry


def geometry_of(module: nn.Linear | nn.Conv2d) -> LayerGeometry:
    """Return the geometry of a module, with the channels of its weight; a frozen bias counts as none."""
    has_bias = module.bias is not None and module.bias.requires_grad
    out_channels, in_channels = module.weight.shape[:2]
    if isinstance(module, nn.Linear):
        return LayerGeometry(in_channels, out_channels, has_bias=has_bias, is_convolution=False)
    return LayerGeometry(
        in_channels=in_channels,
        out_channels=out_channels // module.groups,
        conv_groups=module.groups,
        kernel_size=_pair(module.kernel_size),
        stride=_pair(module.stride),
        dilation=_pair(module.dilation),
        padding=_padding(module),
        padding_mode=module.padding_mode,
        has_bias=has_bias,
    )


def unfit_weight(module: nn.Linear | nn.Conv2d) -> str:
    """Return why the shape of a module's weight does not fit the module's geometry; empty if it does."""
    kernel = [] if isinstance(module, nn.Linear) else list(module.kernel_size)
    shape, groups = list(module.weight.shape), 1 if isinstance(module, nn.Linear) else module.groups
    if len(shape) == 2 + len(kernel) and shape[2:] == kernel and shape[0] % groups == 0:
        return ""
    expected = "[out, in]" if not kernel else f"[{groups} * out, in, {kernel[0]}, {kernel[1]}]"
    return f"its weight has the shape {shape}, where {type(module).__name__} needs {expected}"


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Return the pixels added left, right, top and bottom."""
    if isinstance(module.padding, str) and module.padding == "valid":
        return (0, 0, 0, 0)
    if isinstance(module.padding, str):  # "same": PyTorch puts the odd pixel on the right and at the bottom
        total_h, total_w = (d * (k - 1) for d, k in zip(_pair(module.dilation), _pair(module.kernel_size), strict=True))
        return (total_w // 2, total_w - total_w // 2, total_h // 2, total_h - total_h // 2)
    height, width = module.padding
    return (int(width), int(width), int(height), int(height))


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    height, width = value
    return height, width
