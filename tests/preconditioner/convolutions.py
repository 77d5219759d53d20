"""Convolutions of any supported geometry, drawn by hypothesis."""

import torch
from hypothesis import strategies as st
from torch import nn

from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.model.module_geometry import geometry_of
from kfac_sua.preconditioner.settings import Structure


@st.composite
def convolutions(draw):
    """Draw a convolution of any supported geometry and an input that it accepts."""
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 3)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dilation = (draw(st.integers(1, 3)), draw(st.integers(1, 2)))
    groups = draw(st.sampled_from([1, 2]))
    channels = groups * draw(st.integers(1, 3))
    padding = (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    if stride == (1, 1) and draw(st.booleans()):
        padding = "same"
    mode = draw(st.sampled_from(["zeros", "zeros", "replicate"]))
    height = dilation[0] * (kernel[0] - 1) + 1 + draw(st.integers(0, 4))
    width = dilation[1] * (kernel[1] - 1) + 1 + draw(st.integers(0, 4))
    torch.manual_seed(draw(st.integers(0, 99)))
    module = nn.Conv2d(
        channels, 2 * groups, kernel, stride, padding, dilation, groups, bias=False, padding_mode=mode
    ).double()
    return module, torch.randn(2, channels, height, width, dtype=torch.float64) + 0.5


def layout_of(module: nn.Module, structure: str, group_size: int | None = None) -> BlockLayout:
    """Return the block layout of a module."""
    return BlockLayout.of(geometry_of(module), Structure(structure), group_size)
