"""Activation and gradient factors: patches, exact SUA, channel groups."""

import pytest
import torch
from convolutions import convolutions, layout_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import group_mask, locations_of, patches_by_loop
from torch import nn

from kfac_sua.preconditioner.forms.dense import gram
from kfac_sua.preconditioner.forms.moments import (
    activation_rows,
    exact_sua_rows,
    gradient_rows,
    num_activation_rows,
    reduced_activation_rows,
    sampled_activation_rows,
)
from kfac_sua.preconditioner.forms.unfold import read_counts, to_locations
from kfac_sua.preconditioner.geometry import ChannelGroups
from kfac_sua.preconditioner.model.module_geometry import geometry_of


def activation_moment(module, inputs, structure, group_size=None):
    """Return the un-normalised activation blocks of a module."""
    geometry, layout = geometry_of(module), layout_of(module, structure, group_size)
    return sum(gram(rows) for rows in activation_rows(to_locations(inputs, geometry), geometry, layout))


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_sua_factor_is_the_sum_of_the_diagonal_tap_blocks(case):
    """For every stride, padding and dilation, Σ w_p x_p x_pᵀ equals the sum of the T diagonal blocks over patches."""
    module, inputs = case
    if module.kernel_size == (1, 1):
        return
    got = activation_moment(module, inputs, "sua")
    patches = patches_by_loop(module, inputs).flatten(0, 1)  # [rows, taps, channels]
    for part, want in zip(got, patches.chunk(module.groups, -1), strict=True):
        expected = sum(want[:, t].T @ want[:, t] for t in range(want.shape[1]))
        torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_kfac_factor_is_the_moment_of_looped_patches(case):
    """The patches read by strided views are those a Python loop over locations reads, tap-major."""
    module, inputs = case
    got = activation_moment(module, inputs, "kfac")
    patches = patches_by_loop(module, inputs).flatten(0, 1)
    for part, want in zip(got, patches.chunk(module.groups, -1), strict=True):
        rows = want.flatten(1)
        torch.testing.assert_close(part, rows.T @ rows, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(convolutions())
def test_reduced_rows_are_patches_summed_over_locations(case):
    """Under reduce, a row is the sum of an example's patches (a row per tap under SUA)."""
    module, inputs = case
    geometry = geometry_of(module)
    summed = patches_by_loop(module, inputs).sum(1)  # [n, taps, channels]
    for structure in ("kfac", "sua"):
        layout = layout_of(module, structure)
        got = reduced_activation_rows(to_locations(inputs, geometry), geometry, layout)
        for part, want in zip(got, summed.chunk(module.groups, -1), strict=True):
            expected = want.flatten(1) if layout.taps_in_features else want.flatten(0, 1)
            torch.testing.assert_close(part, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(num_channels=st.integers(1, 9), group_size=st.integers(1, 10), structure=st.sampled_from(["kfac", "sua"]))
def test_group_blocks_are_the_masked_factor(num_channels, group_size, structure):
    """Blocks of channel groups are the diagonal blocks of the full factor; the ragged rest is zero."""
    torch.manual_seed(num_channels)
    module = nn.Conv2d(num_channels, 2, (2, 3), padding=1, bias=False).double()
    inputs = torch.randn(3, num_channels, 4, 4, dtype=torch.float64)
    layout = layout_of(module, structure, group_size)
    blocks = activation_moment(module, inputs, structure, group_size)
    full = activation_moment(module, inputs, structure)[0]
    taps = layout.feature_taps
    full = full.view(taps, num_channels, taps, num_channels)
    size = layout.activation.size
    for q, block in enumerate(blocks):
        channels = range(q * size, min((q + 1) * size, num_channels))
        width = len(channels)
        want = full[:, channels.start : channels.stop, :, channels.start : channels.stop]
        got = block.view(taps, size, taps, size)
        torch.testing.assert_close(got[:, :width, :, :width], want, rtol=1e-9, atol=1e-9)
        assert got[:, width:].abs().sum() == 0
        assert got[:, :, :, width:].abs().sum() == 0


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 12),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 3),
)
def test_read_counts_are_fold_of_ones(size, kernel, stride, dilation):
    """The separable counts equal torch's fold of ones."""
    if size < dilation * (kernel - 1) + 1:
        return
    unfold = {"kernel_size": (kernel, 1), "stride": (stride, 1), "dilation": (dilation, 1)}
    ones = nn.functional.unfold(torch.ones(1, 1, size, 1), **unfold)
    expected = nn.functional.fold(ones, (size, 1), **unfold).flatten()
    assert read_counts(size, kernel, stride, dilation).tolist() == expected.long().tolist()


@settings(max_examples=60, deadline=None)
@given(convolutions())
def test_the_exact_sua_factor_is_the_mean_of_the_diagonal_tap_blocks(case):
    """Gram / (T S N) is the Frobenius projection of K-FAC's factor on I ⊗ C, for every geometry and padding mode."""
    module, inputs = case
    geometry, layout = geometry_of(module), layout_of(module, "sua")
    assume(not layout.taps_in_features)
    patches = patches_by_loop(module, inputs)  # [n, locations, taps, channels]
    num_examples, num_locations, num_taps, _ = patches.shape
    count = num_taps * num_locations * num_examples
    got = gram(exact_sua_rows(to_locations(inputs, geometry), geometry, layout)) / count
    for part, want in zip(got, patches.chunk(module.groups, -1), strict=True):
        taps = [want[:, :, tap].flatten(0, 1) for tap in range(num_taps)]  # [n · locations, channels]
        blocks = [rows.T @ rows / (num_locations * num_examples) for rows in taps]
        torch.testing.assert_close(part, torch.stack(blocks).mean(0), rtol=1e-9, atol=1e-9)


def test_sua_is_kfac_on_one_by_one_kernels():
    """1×1 kernels have one tap, so both structures give the same blocks, at any stride."""
    for stride in (1, 2, 3):
        module = nn.Conv2d(4, 3, 1, stride=stride).double()
        inputs = torch.randn(2, 4, 5, 5, dtype=torch.float64)
        sua, kfac = (activation_moment(module, inputs, name) for name in ("sua", "kfac"))
        torch.testing.assert_close(sua, kfac, rtol=0, atol=0)
        assert sua.shape[-1] == 5  # four channels and the homogeneous coordinate


@pytest.mark.parametrize("reduce", [False, True])
def test_gradient_rows_keep_convolution_and_channel_groups_apart(reduce):
    """The gradient factor's blocks are the masked moments of the output gradients."""
    module = nn.Conv2d(4, 10, 3, groups=2).double()
    grads = torch.randn(3, 10, 4, 2, dtype=torch.float64)
    layout = layout_of(module, "kfac", group_size=2)
    rows = gradient_rows(to_locations(grads, geometry_of(module)), layout, reduce=reduce)
    assert rows.shape == (6, 3 if reduce else 24, 2)
    flat = grads.flatten(2).transpose(1, 2)
    flat = flat.sum(1) if reduce else flat.flatten(0, 1)
    for index, part in enumerate(flat.chunk(2, -1)):
        masked = (part.T @ part) * group_mask(5, 2)
        blocks = gram(rows[3 * index : 3 * index + 3])
        assembled = torch.block_diag(*blocks)[:5, :5]
        torch.testing.assert_close(assembled, masked, rtol=1e-9, atol=1e-9)


def test_chunks_of_examples_give_the_same_moment(monkeypatch):
    """Large batches are taken in chunks without changing the sum."""
    module = nn.Conv2d(3, 2, 3, padding=1, bias=False).double()
    inputs = torch.randn(7, 3, 5, 5, dtype=torch.float64)
    whole = activation_moment(module, inputs, "kfac")
    monkeypatch.setattr("kfac_sua.preconditioner.forms.moments.MAX_PATCH_ELEMENTS", 2 * 5 * 5 * 27)
    geometry, layout = geometry_of(module), layout_of(module, "kfac")
    chunks = list(activation_rows(to_locations(inputs, geometry), geometry, layout))
    assert [chunk.shape[1] for chunk in chunks] == [50, 50, 50, 25]
    torch.testing.assert_close(sum(gram(chunk) for chunk in chunks), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("structure", ["kfac", "sua"])
@pytest.mark.parametrize("bias", [True, False])
def test_sampled_rows_are_rows_of_the_mini_batch_spread_over_it(structure, bias):
    """The sample is scaled to the same expected moment; as many rows as there are give the factor itself."""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1, bias=bias).double()
    inputs = torch.randn(40, 3, 4, 4, dtype=torch.float64)
    geometry, layout = geometry_of(module), layout_of(module, structure)
    locations = to_locations(inputs, geometry)
    all_rows = torch.cat(list(activation_rows(locations, geometry, layout)), dim=1)
    assert num_activation_rows(locations, geometry, layout) == all_rows.shape[1] == 640
    (everything,) = sampled_activation_rows(locations, geometry, layout, 640)
    torch.testing.assert_close(everything, all_rows, rtol=0, atol=0)
    (sample,) = sampled_activation_rows(locations, geometry, layout, 80)
    assert sample.shape[1] == 80
    unscaled = sample[0] / 8**0.5
    distances = torch.cdist(unscaled, all_rows[0])
    assert distances.min(1).values.max() < 1e-6
    chosen = distances.argmin(1)
    assert len(chosen.unique()) == 80
    assert chosen.div(16, rounding_mode="floor").unique().numel() == 40  # every example
    assert (chosen % 16).unique().numel() == 16  # every location
    trace, whole = (gram(rows)[0].trace() for rows in (sample, all_rows))
    torch.testing.assert_close(trace, whole, rtol=0.2, atol=0)  # an estimate at the same scale


@pytest.mark.parametrize(("total", "most"), [(1600, 1599), (1600, 1200), (87, 83), (5, 5), (7, 1)])
def test_no_row_is_sampled_twice(total, most):
    """As many distinct rows as were asked for, also where that is nearly all of them."""
    module = nn.Conv2d(1, 1, 1, bias=False).double()
    inputs = torch.arange(1.0, total + 1, dtype=torch.float64).view(1, 1, 1, total)
    geometry, layout = geometry_of(module), layout_of(module, "kfac")
    (sample,) = sampled_activation_rows(to_locations(inputs, geometry), geometry, layout, most)
    values = sample.flatten() / (total / most) ** 0.5
    assert len(values.round().unique()) == most


@given(width=st.sampled_from([255, 256, 511, 513]), num_blocks=st.integers(1, 2))
@settings(max_examples=8, deadline=None)
def test_gram_matrices_of_wide_rows_are_symmetric_and_right(width, num_blocks):
    """One triangle is computed and mirrored, odd widths included."""
    rows = torch.randn(num_blocks, 5, width, dtype=torch.float64)
    got = gram(rows)
    torch.testing.assert_close(got, rows.mT @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got, got.mT, rtol=1e-12, atol=1e-12)  # the smallest squares are computed whole


def test_sequences_are_locations():
    """Extra dimensions of a Linear layer's input count as locations."""
    module = nn.Linear(3, 2)
    inputs = torch.randn(4, 5, 6, 3)
    assert to_locations(inputs, geometry_of(module)).shape == (4, 30, 1, 3)
    assert locations_of(module, inputs).shape == (4, 30, 1, 3)


@settings(deadline=None)
@given(num_channels=st.integers(1, 20), group_size=st.integers(1, 25))
def test_split_and_merge_are_inverse(num_channels, group_size):
    """Splitting pads the last group with zeros, merging drops exactly that."""
    groups = ChannelGroups.of(num_channels, group_size)
    values = torch.arange(2.0 * num_channels).view(2, num_channels) + 1
    split = groups.split(values)
    assert split.shape == (2, groups.count, groups.size)
    assert split.count_nonzero() == values.numel()
    assert torch.equal(groups.merge(split), values)
