"""Products with patches that are never formed equal products with the patches formed."""

import pytest
import torch
from convolutions import convolutions, layout_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import patches_by_loop
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.forms import DenseFactor, PatchFactor, PatchInverse, RowsFactor
from kfac_sua.preconditioner.forms.patch_rows import PatchRows, can_be_patch_rows, concatenated
from kfac_sua.preconditioner.forms.unfold import pixel_read_counts, to_locations
from kfac_sua.preconditioner.geometry import ChannelGroups
from kfac_sua.preconditioner.invert import invert_factors
from kfac_sua.preconditioner.model.module_geometry import geometry_of


def read(module: nn.Conv2d, inputs: torch.Tensor) -> PatchRows:
    """Return the patches of a module's inputs, unformed."""
    geometry = geometry_of(module)
    return PatchRows.read(to_locations(inputs, geometry), geometry)


@settings(max_examples=150, deadline=None)
@given(convolutions())
def test_every_product_equals_the_one_with_looped_patches(case):
    """U Uᵀ, V Uᵀ, Z U and tr(UᵀU), for every kernel, stride, dilation and zero padding."""
    module, inputs = case
    assume(can_be_patch_rows(geometry_of(module), layout_of(module, "kfac")))
    patches = read(module, inputs)
    formed = patches_by_loop(module, inputs).transpose(0, 1).flatten(0, 1).flatten(1)  # rows in the order (y, x, n)
    assert patches.num_rows == len(formed)
    values = torch.randn(3, formed.shape[1], dtype=torch.float64)
    coefficients = torch.randn(3, len(formed), dtype=torch.float64)
    torch.testing.assert_close(patches.rows(), formed, rtol=0, atol=0)
    torch.testing.assert_close(patches.core(), formed @ formed.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches.inner_products(values), values @ formed.T, rtol=1e-10, atol=1e-10)
    difference = patches.subtract_combination_(values.clone(), coefficients)
    torch.testing.assert_close(difference, values - coefficients @ formed, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(patches.trace(), formed.square().sum(), rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(convolutions(), st.integers(1, 3))
def test_products_with_other_patches_and_with_matrices(case, group_size):
    """U Wᵀ with another mini-batch's patches, and U M in channel groups, a ragged last one included."""
    module, inputs = case
    assume(can_be_patch_rows(geometry_of(module), layout_of(module, "kfac")))
    patches, other = read(module, inputs), read(module, torch.randn_like(inputs[:1]))
    torch.testing.assert_close(patches.cross(other), patches.rows() @ other.rows().T, rtol=1e-10, atol=1e-10)
    groups = ChannelGroups.of(module.in_channels, group_size)
    blocks = patches.blocks(groups)
    matrices = torch.randn(len(blocks), blocks.shape[-1], 4, dtype=torch.float64)
    torch.testing.assert_close(patches.multiply(matrices, groups), blocks @ matrices, rtol=1e-10, atol=1e-10)
    counts = pixel_read_counts(geometry_of(module), *inputs.shape[2:])
    num_locations = patches.num_rows // len(inputs)
    assert patches.read_share == pytest.approx(int(counts.sum()) / (num_locations * patches.geometry.num_taps))


def test_strides_that_leave_few_patches_do_not_multiply_all_pixels():
    """With an 8×8 kernel at stride 8, four patches stand for 256 pixels: products are of the patches."""
    module = nn.Conv2d(4, 2, 8, stride=8, bias=False)
    patches = read(module, torch.randn(1, 4, 16, 16))
    with FlopCounterMode(display=False) as counter:
        patches.core()
    assert counter.get_total_flops() == 2 * patches.num_rows**2 * 4 * 64


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("inverse", ["dense", "rows", "patches", "patches_of_another_size"])
def test_every_inverse_multiplies_patches_as_it_does_rows(size, inverse):
    """Where most taps read padding and where few do, and whatever images the inverse was made from."""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1, bias=False).double()
    patches = read(module, torch.randn(2, 3, size, size, dtype=torch.float64))
    measured = read(module, torch.randn(2, 3, 3 if inverse.endswith("size") else size, size, dtype=torch.float64))
    factor = {
        "dense": DenseFactor(measured.rows().T[None] @ measured.rows()[None]),
        "rows": RowsFactor(measured.rows()[None]),
    }.get(inverse, PatchFactor(measured))
    result = invert_factors([factor], [torch.tensor([0.3], dtype=torch.float64)])[0].inverse
    groups = ChannelGroups.of(3, None)
    want = result.right(patches.rows()[None])
    torch.testing.assert_close(result.right_of_patches(patches, groups), want, rtol=1e-10, atol=1e-10)


def test_a_factor_of_patches_behaves_as_one_of_rows():
    """Traces, dense blocks, inverse from either side and float64 retry agree with the rows formed."""
    torch.manual_seed(0)
    module = nn.Conv2d(3, 2, 3, padding=1, bias=False).double()
    patches = read(module, torch.randn(2, 3, 2, 2, dtype=torch.float64))
    factors = [PatchFactor(patches), RowsFactor(patches.rows()[None])]
    damping = torch.tensor([0.3], dtype=torch.float64)
    results = invert_factors(factors, [damping, damping])
    assert isinstance(results[0].inverse, PatchInverse)
    torch.testing.assert_close(factors[0].dense(), factors[1].dense(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(factors[0].traces(), factors[1].traces(), rtol=1e-10, atol=1e-10)
    values = torch.randn(1, 4, 27, dtype=torch.float64)
    got, want = (result.inverse for result in results)
    torch.testing.assert_close(got.right(values), want.right(values), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.left(values.mT), want.left(values.mT), rtol=1e-10, atol=1e-10)


def test_a_damping_lost_in_rounding_is_raised():
    """A core that fails in float32 is factorised in float64, with as much damping as the Woodbury form can resolve."""
    torch.manual_seed(0)
    module = nn.Conv2d(2, 2, 3, padding=1, bias=False)
    image = torch.randint(-3, 4, (1, 2, 3, 3)).float()
    image[..., :2, :2] = torch.tensor([[[4, -4], [4, 0]], [[0, 4], [0, 0]]])  # read by the first patch, of norm 8
    patches = read(module, torch.cat([image] * 8))  # every patch eight times: U Uᵀ is singular
    damping = torch.tensor([1e-6])
    core = patches.core() + damping * torch.eye(patches.num_rows)
    # Of integers the products are exact on every processor: the damping is lost on 64, the second pivot is 64 − 8 · 8.
    assert torch.linalg.cholesky_ex(core).info == 2
    result = invert_factors([PatchFactor(patches)], [damping])[0]
    assert (result.num_failed, result.num_raised, result.raised_by) == (0, 1, 1000)
    triangle = result.inverse.triangle[0].double()
    raised = patches.double().core() + 1e-3 * torch.eye(patches.num_rows)
    torch.testing.assert_close(triangle @ triangle.T, raised, rtol=1e-6, atol=1e-5)
    values = torch.randn(1, 4, 18)
    dense = patches.double().rows().T @ patches.double().rows() + 1e-3 * torch.eye(18)
    torch.testing.assert_close(
        result.inverse.right(values).double(), values.double() @ dense.inverse(), rtol=1e-4, atol=0.02
    )


def test_joined_patches_are_those_of_the_joined_batch():
    """Micro-batches add examples."""
    module = nn.Conv2d(2, 2, 3, stride=2, padding=1, bias=False).double()
    inputs = torch.randn(5, 2, 4, 4, dtype=torch.float64)
    whole, parts = read(module, inputs), concatenated([read(module, inputs[:2]), read(module, inputs[2:])])
    torch.testing.assert_close(parts.pixels, whole.pixels, rtol=0, atol=0)


def test_patches_are_copied_not_viewed():
    """A layer's input may be overwritten in place after the forward pass."""
    module = nn.Conv2d(2, 2, 3, bias=False)
    inputs = torch.ones(1, 2, 3, 3).contiguous(memory_format=torch.channels_last)
    patches = read(module, inputs)
    inputs.zero_()
    assert patches.pixels.min() == 1


def test_a_checkpoint_keeps_the_inverse_of_patches():
    """The state holds pixels and triangle, and a preconditioner loaded from it applies the same inverse."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1, bias=False), nn.Flatten()).double()
    inputs = torch.randn(2, 4, 2, 2, dtype=torch.float64)
    settings_ = KroneckerSettings(inverse_method="low_rank", inverse_period=10)
    first = KroneckerPreconditioner(net, settings=settings_)
    net(inputs).square().sum(1).mean().backward()
    first.step()
    state = first.state_dict()
    assert set(state["layers"]["0"]["inverse"]["activation"]) == {"pixels", "triangle", "scale"}
    grads = []
    second = KroneckerPreconditioner(net, settings=settings_)
    second.load_state_dict(state)
    for preconditioner in (first, second):
        net.zero_grad()
        net(inputs).square().sum(1).mean().backward()
        preconditioner.step()
        grads.append(net[0].weight.grad.clone())
    assert torch.equal(grads[0], grads[1])
