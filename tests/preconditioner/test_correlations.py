"""K-FAC's activation factor from correlations between image lines equals the moment of looped patches."""

import pytest
import torch
from convolutions import convolutions, layout_of
from hypothesis import assume, given, settings
from oracles import patches_by_loop
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_sua.preconditioner.forms.correlations import can_correlate, patch_moment
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.geometry import BlockLayout
from kfac_sua.preconditioner.model.module_geometry import geometry_of
from kfac_sua.preconditioner.settings import Structure
from kfac_sua.preconditioner.statistics import ModelPass
from kfac_sua.preconditioner.structures.factor_statistics import FactorStatistics


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_row_correlations_equal_the_moment_of_looped_patches(case):
    """For every kernel, padding, dilation, horizontal stride and convolution group, border rows included."""
    module, inputs = case
    geometry, layout = geometry_of(module), layout_of(module, "kfac")
    assume(can_correlate(geometry, layout))
    got = patch_moment(to_locations(inputs, geometry), geometry, layout)
    patches = patches_by_loop(module, inputs).flatten(0, 1)
    for part, want in zip(got, patches.chunk(module.groups, -1), strict=True):
        rows = want.flatten(1)
        torch.testing.assert_close(part, rows.T @ rows, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("group_size", [2, 3, 4])
def test_channel_groups_are_the_diagonal_blocks(group_size):
    """Blocks of channel groups, a ragged last one included, are those of the full factor."""
    torch.manual_seed(0)
    module = nn.Conv2d(5, 2, 3, padding=1, bias=False).double()
    geometry, inputs = geometry_of(module), torch.randn(3, 5, 4, 3, dtype=torch.float64)
    locations = to_locations(inputs, geometry)
    full = patch_moment(locations, geometry, layout_of(module, "kfac"))[0].view(9, 5, 9, 5)
    blocks = patch_moment(locations, geometry, layout_of(module, "kfac", group_size))
    for q, block in enumerate(blocks.view(len(blocks), 9, group_size, 9, group_size)):
        want = full[:, q * group_size : (q + 1) * group_size, :, q * group_size : (q + 1) * group_size]
        width = want.shape[1]
        torch.testing.assert_close(block[:, :width, :, :width], want, rtol=1e-12, atol=1e-12)
        assert block[:, width:].abs().sum() == block[..., width:].abs().sum() == 0


def test_a_three_by_three_kernel_needs_a_third_of_the_flops():
    """Counted by PyTorch: three products of width 3·channels stand against one of width 9·channels."""
    module = nn.Conv2d(8, 2, 3, padding=1, bias=False)
    geometry, layout = geometry_of(module), layout_of(module, "kfac")
    with FlopCounterMode(display=False) as counter:
        patch_moment(torch.randn(2, 16, 16, 8), geometry, layout)
    direct = 2 * (2 * 16 * 16) * (9 * 8) ** 2
    assert counter.get_total_flops() == direct * (16 + 15 + 14) // (9 * 16)


@pytest.mark.parametrize(
    ("module", "structure"),
    [
        (nn.Conv2d(2, 2, 3, stride=2, bias=False), "kfac"),
        (nn.Conv2d(2, 2, (1, 3), bias=False), "kfac"),
        (nn.Conv2d(2, 2, 3), "kfac"),
        (nn.Conv2d(2, 2, 3, bias=False), "sua"),
    ],
)
def test_what_cannot_be_correlated_is_not(module, structure):
    """Vertical strides, kernels of one line, the homogeneous coordinate of a bias and SUA take the other paths."""
    geometry = geometry_of(module)
    assert not can_correlate(geometry, BlockLayout.of(geometry, Structure(structure), None))


@pytest.mark.parametrize("channels", [2, 12])
def test_micro_batches_add_up_whether_inputs_or_moments_are_kept(channels):
    """Inputs wait for the end of the backward pass while they are smaller than the moment; the sum is the same."""
    torch.manual_seed(0)
    module = nn.Conv2d(channels, 4, 3, padding=1, bias=False).double()
    geometry, layout = geometry_of(module), layout_of(module, "kfac")
    statistics = FactorStatistics("conv", geometry, layout, reduce=False, max_activation_rows=0, max_gradient_rows=0)
    inputs = torch.randn(60, channels, 4, 5, dtype=torch.float64)
    grads = torch.randn(60, 4, 4, 5, dtype=torch.float64)
    for index, part in enumerate((slice(0, 10), slice(10, 60))):
        call = statistics.add_call(inputs[part], grads[part].shape, ModelPass(index))
        statistics.add_output_grads(grads[part], call)
        statistics.count([call])
    factors = statistics.factors(grads_of_mean_loss=False)
    rows = patches_by_loop(module, inputs).flatten(0, 1).flatten(1)
    torch.testing.assert_close(factors.activation.dense()[0], rows.T @ rows / len(rows), rtol=1e-9, atol=1e-9)
