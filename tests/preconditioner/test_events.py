"""Numerical faults: what is not finite or cannot be inverted changes nothing that was good."""

import copy
import itertools
import logging

import pytest
import torch
from thinned import diagonal
from torch import nn

from kfac_sua.preconditioner import FisherType, KroneckerPreconditioner, KroneckerSettings, Likelihood
from kfac_sua.preconditioner.factors import LayerFactors
from kfac_sua.preconditioner.fisher import fisher_cotangents
from kfac_sua.preconditioner.forms import DenseFactor, Factor, PatchFactor, RowsFactor
from kfac_sua.preconditioner.forms.dense import gram
from kfac_sua.preconditioner.forms.patch_rows import PatchRows
from kfac_sua.preconditioner.forms.unfold import to_locations
from kfac_sua.preconditioner.invert import invert_factors
from kfac_sua.preconditioner.model.module_geometry import geometry_of

LAYERS = ("0", "2", "4")


def make_net() -> nn.Module:
    """Return a small float32 net with biases on some layers."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(5, 6, 2), nn.Flatten(), nn.Linear(54, 3)
    )


def batch(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(4, 2, 4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator)


def backward(net, preconditioner, inputs, labels):
    """Run the passes of one mini-batch in two micro-batches."""
    net.zero_grad()
    for part, part_labels in zip(inputs.chunk(2), labels.chunk(2), strict=True):
        outputs = net(part)
        preconditioner.fisher_backward(outputs)
        (nn.functional.cross_entropy(outputs, part_labels) / 2).backward()


def good_step(net, preconditioner, index=0):
    """Take a step on a mini-batch without faults."""
    backward(net, preconditioner, *batch(index))
    preconditioner.step()


def layer_state(preconditioner, name):
    """Return a copy of a layer's running average, inverse and flags."""
    return copy.deepcopy(preconditioner.state_dict()["layers"][name])


def assert_bit_equal(first, second):
    """Compare nested dicts of tensors and numbers."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_bit_equal(first[key], second[key])
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    else:
        assert first == second


def all_finite(state) -> bool:
    """Say whether every tensor in nested dicts is finite."""
    if isinstance(state, dict):
        return all(all_finite(value) for value in state.values())
    return not isinstance(state, torch.Tensor) or bool(state.isfinite().all())


# --- blocks that cannot be inverted -----------------------------------------------------------------------------------


def factor_of(form: str, rows: torch.Tensor) -> Factor:
    """Return one block of rows ``[rows, 8]`` as the form keeps it; as patches, of 2 channels and a 2×2 kernel."""
    if form == "dense":
        return DenseFactor(gram(rows[None]))
    if form == "rows":
        return RowsFactor(rows[None])
    geometry = geometry_of(nn.Conv2d(2, 3, 2, stride=2, bias=False))
    pixels = rows.unflatten(1, (2, 2, 2)).permute(0, 3, 1, 2)  # an image per row: one patch
    return PatchFactor(PatchRows.read(to_locations(pixels, geometry), geometry))


@pytest.mark.parametrize("form", ["rows", "patches"])
@pytest.mark.parametrize(("lost", "times"), [(0.2, 10), (0.02, 100), (0.002, 1000)])
def test_a_damping_that_woodbury_cannot_resolve_is_raised(form, lost, times):
    """The inverse is that of the block with the raised damping; the good factor is bit by bit as beside a sound one."""
    torch.manual_seed(0)
    bad, good = factor_of(form, torch.randn(5, 8) * 1e3), factor_of(form, torch.randn(5, 8))
    damping = lost * torch.finfo(torch.float32).eps * bad.traces()
    first, second = invert_factors([bad, good], [damping, torch.full((1,), 0.3)])
    assert (first.num_failed, first.num_raised, first.raised_by) == (0, 1, times)
    assert (second.num_failed, second.num_raised, second.raised_by) == (0, 0, 1)
    torch.testing.assert_close(first.inverse.scale.flatten(), 1 / (damping * times))
    values = torch.randn(1, 3, 8)
    # In a batch of the same shape: in one of another shape a processor may add up in another order.
    sound, other = invert_factors([bad, good], [damping * times, torch.full((1,), 0.3)])
    assert (sound.num_failed, sound.num_raised) == (0, 0)
    assert torch.equal(second.inverse.right(values), other.inverse.right(values))
    dense = bad.dense()[0].double() + float(damping) * times * torch.eye(8)
    error = first.inverse.right(values)[0].double() - values[0].double() @ dense.inverse()
    assert error.abs().max() * float(damping) * times < 1.0  # the rounding of I − VᵀV, at worst


def test_the_damping_of_exactly_the_failing_blocks_is_raised():
    """Of three dense blocks the indefinite one gets 10 times its damping; the others keep theirs, bit for bit."""
    torch.manual_seed(0)
    blocks = gram(torch.randn(3, 7, 4, dtype=torch.float64))
    good = blocks.clone()
    blocks[1] -= (0.5 + torch.linalg.eigvalsh(blocks[1])[0]) * torch.eye(4)
    damping = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    result = invert_factors([DenseFactor(blocks)], [damping])[0]
    assert (result.num_failed, result.num_raised, result.raised_by) == (0, 1, 10)
    expected = torch.linalg.inv(blocks[1] + 2.0 * torch.eye(4))
    torch.testing.assert_close(result.inverse.blocks[1], expected, rtol=1e-10, atol=1e-12)
    without = invert_factors([DenseFactor(good)], [damping])[0].inverse.blocks
    assert torch.equal(result.inverse.blocks[[0, 2]], without[[0, 2]])
    assert damping.tolist() == [0.1, 0.2, 0.3]


def test_of_a_factor_kept_as_rows_only_the_failing_block_gets_more_damping():
    """The other block of the same factor gives what it gives beside a sound one, bit for bit."""
    torch.manual_seed(0)
    good, sound = torch.randn(2, 1, 3, 8)
    bad = sound * 3e3
    damping = torch.tensor([0.1, 0.1])
    result = invert_factors([RowsFactor(torch.cat([good, bad]))], [damping])[0]
    assert (result.num_failed, result.num_raised, result.raised_by) == (0, 1, 1000)
    without = invert_factors([RowsFactor(torch.cat([good, sound]))], [damping])[0]
    assert (without.num_failed, without.num_raised) == (0, 0)
    assert torch.equal(result.inverse.root[0], without.inverse.root[0])
    assert torch.equal(result.inverse.scale[0], without.inverse.scale[0])
    torch.testing.assert_close(result.inverse.scale[1], without.inverse.scale[1] / 1000)


@pytest.mark.parametrize("value", [-125.0, float("nan")], ids=str)
def test_a_block_that_no_damping_cures_is_reported_and_harms_no_other(value):
    """A NaN, or a pivot that even 1000 times the damping leaves at zero (from which cholesky_inverse would raise)."""
    blocks = torch.stack([torch.eye(3), value * torch.eye(3)])
    result = invert_factors([DenseFactor(blocks)], [torch.full((2,), 0.125)])[0]
    assert (result.num_failed, result.num_raised) == (1, 0)
    torch.testing.assert_close(result.inverse.blocks[0], torch.eye(3) / 1.125)


@pytest.mark.parametrize("form", ["rows", "patches"])
def test_rows_with_nan_are_reported_in_the_woodbury_forms(form):
    """Neither form raises on NaN, nor takes it for cured."""
    rows = torch.randn(5, 8)
    rows[1, 2] = float("nan")
    result = invert_factors([factor_of(form, rows)], [torch.full((1,), 0.1)])[0]
    assert (result.num_failed, result.num_raised) == (1, 0)


def test_one_look_at_the_device_where_all_is_well(monkeypatch):
    """However many factors, a refresh reads one flag; each factor is factorised once."""
    reads = []
    original = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda tensor: reads.append(1) or original(tensor))
    factors = [DenseFactor(gram(torch.randn(2, 9, width))) for width in (3, 4, 4, 5)]
    factors += [RowsFactor(torch.randn(1, 2, 9)), factor_of("patches", torch.randn(5, 8))]
    invert_factors(factors, [torch.full((len(factor.traces()),), 0.5) for factor in factors])
    assert len(reads) == 1


def measure_indefinite(preconditioner, name, eigenvalue):
    """Replace a layer's measured activation factor by an indefinite one."""
    layer = preconditioner._layers[name]
    value = layer.average.value
    blocks = value.activation.dense()
    indefinite = DenseFactor(eigenvalue * torch.eye(blocks.shape[-1]).expand_as(blocks).clone())
    layer.average.value = LayerFactors(indefinite, value.gradient, value.scale)


def test_a_raised_damping_is_an_event_with_its_factor(caplog):
    """It is counted at every refresh and logged once, also at the first one; the inverse is taken."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_method="cholesky", inverse_period=1, damping=0.01)
    root = (0.01 / 16) ** 0.5  # 16 locations
    with caplog.at_level(logging.WARNING, logger="kfac_sua"):
        for index in range(3):
            backward(net, preconditioner, *batch(index))
            preconditioner.update_factors()
            measure_indefinite(preconditioner, "0", -3 * root)
            preconditioner.update_inverses()
    assert preconditioner.events == {"raised_damping:0": 3}
    assert [record.getMessage() for record in caplog.records] == [
        "0: raised damping; inverting 1 of its blocks took up to 10 times the damping."
    ]
    inverse = preconditioner._layers["0"].inverse.activation.blocks[0]
    torch.testing.assert_close(inverse, torch.eye(18) / (7 * root), rtol=1e-5, atol=1e-6)


def test_a_block_beyond_cure_leaves_the_last_good_inverse(caplog):
    """Where 1000 times the damping does not help, the layer's inverse is the old one and other layers are refreshed."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_method="cholesky", inverse_period=1, damping=0.01)
    good_step(net, preconditioner)
    before = {name: preconditioner._layers[name].inverse for name in LAYERS}
    backward(net, preconditioner, *batch(1))
    preconditioner.update_factors()
    measure_indefinite(preconditioner, "0", -1e6)
    preconditioner.update_inverses()
    changed = [name for name in LAYERS if preconditioner._layers[name].inverse is not before[name]]
    assert changed == ["2", "4"]
    assert preconditioner.events == {"failed_inverse:0": 1}


@pytest.mark.parametrize("is_finite", [False, True], ids=["non-finite", "raises"])
def test_eigenvectors_that_do_not_converge_leave_the_last_ones(monkeypatch, is_finite):
    """Under damping_rule=exact the layer keeps its eigenbasis; layers decomposed in the same call get new ones."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    preconditioner = KroneckerPreconditioner(net, damping_rule="exact", inverse_period=1)
    inputs, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    nn.functional.cross_entropy(net(inputs), labels).backward()
    preconditioner.step()
    before = {name: layer.inverse for name, layer in preconditioner._layers.items()}
    stubborn = gram(inputs[None])[0] / 6  # the activation factor of layer 0
    original = torch.linalg.eigh

    def eigh(batch):
        hit = torch.isclose(batch, stubborn.to(batch), rtol=1e-4).all((-1, -2))
        if hit.any() and is_finite:
            raise torch.linalg.LinAlgError("did not converge")
        values, vectors = original(batch)
        values[hit] = float("nan")
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    net.zero_grad()
    nn.functional.cross_entropy(net(inputs), labels).backward()
    preconditioner.step()
    assert preconditioner.events == {"failed_inverse:0": 1}
    assert preconditioner._layers["0"].inverse is before["0"]
    assert preconditioner._layers["2"].inverse is not before["2"]
    fresh = KroneckerPreconditioner(net, damping_rule="exact", inverse_period=1)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    with pytest.raises(RuntimeError, match=r"layer '0' have no eigendecomposition .* use damping_rule=factored"):
        fresh.step()


# --- statistics that are not finite -----------------------------------------------------------------------------------

STRUCTURES = [
    {"structure": "kfac", "inverse_method": "cholesky"},
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "kfac", "ema_decay": 0.9},
    {"structure": "kfac", "group_size": 3},
    {"structure": "sua", "group_size": 3, "ema_decay": 0.9},
    {"structure": "sua", "inverse_method": "low_rank"},
    {"structure": "sua", "damping_rule": "exact", "ema_decay": 0.9},
    {"structure": "kfac", "damping_rule": "factored_pi", "application": "auto"},
]
SETTINGS = [
    {**structure, "weight_sharing": sharing, "fisher_type": fisher}
    for structure, sharing, fisher in itertools.product(STRUCTURES, ["expand", "reduce"], ["empirical", "mc"])
]


def name_of(value: object) -> str:
    """Return how a parameter is called: settings by their values."""
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def poisoned_backward(net, preconditioner, place, value):
    """Run a mini-batch that is not finite in one example, of the second micro-batch, and say which layers that spoils.

    Args:
        net: The network.
        preconditioner: Its preconditioner.
        place: ``inputs``, or ``activations`` or ``output_grads`` between the first and the second convolution.
        value: NaN or infinity.
    """
    inputs, labels = batch(7)

    def spoil(values):
        values = values.clone()
        values[-1, 0] = value
        return values

    def on_forward(module, args, output):
        del module, args
        if place == "activations":
            return spoil(output)
        output.register_hook(spoil)
        return None

    if place == "inputs":
        backward(net, preconditioner, spoil(inputs), labels)
        return LAYERS
    parts = inputs.chunk(2), labels.chunk(2)
    net.zero_grad()
    for part, part_labels, is_bad in zip(*parts, (False, True), strict=True):
        handle = net[1].register_forward_hook(on_forward) if is_bad else None
        outputs = net(part)
        if handle is not None:
            handle.remove()
        preconditioner.fisher_backward(outputs)
        (nn.functional.cross_entropy(outputs, part_labels) / 2).backward()
    return LAYERS if place == "activations" else ("0",)


@pytest.mark.parametrize(
    ("settings", "place", "value"),
    diagonal(SETTINGS, ["inputs", "activations", "output_grads"], [float("nan"), float("inf")]),
    ids=name_of,
)
def test_a_mini_batch_that_is_not_finite_leaves_no_trace_in_factors_and_inverses(settings, place, value):
    """Average and inverse of the layers that it spoils stay bit for bit; the next good mini-batch is taken in."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, settings=KroneckerSettings(inverse_period=1, **settings))
    good_step(net, preconditioner)
    assert preconditioner.events == {}
    before = {name: layer_state(preconditioner, name) for name in LAYERS}
    spoilt = poisoned_backward(net, preconditioner, place, value)
    preconditioner.step()
    assert preconditioner.events == {f"non_finite_statistics:{name}": 1 for name in spoilt}
    for name in spoilt:
        assert_bit_equal(layer_state(preconditioner, name), before[name])
    good_step(net, preconditioner, 1)
    assert sum(preconditioner.events.values()) == len(spoilt)
    for name in LAYERS:
        after = layer_state(preconditioner, name)
        assert all_finite(after)
        side, tensor = next(iter(after["inverse"]["activation"].items()))
        assert not torch.equal(tensor, before[name]["inverse"]["activation"][side])
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.9}, {"damping_rule": "exact"}], ids=str)
def test_a_first_mini_batch_that_is_not_finite_leaves_the_plain_gradient(settings, caplog):
    """The run goes on: the spoilt layer keeps the plain gradient until its first good refresh, the others do not."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=2, **settings)
    with caplog.at_level(logging.WARNING, logger="kfac_sua"):
        assert poisoned_backward(net, preconditioner, "output_grads", float("nan")) == ("0",)
        preconditioner.step()
    assert "0: non finite statistics; they are dropped and the layer goes on with the plain gradient, until" in (
        caplog.text
    )
    backward(net, preconditioner, *batch(1))
    plain = {name: net[int(name)].weight.grad.clone() for name in LAYERS}
    preconditioner.step()
    assert [name for name in LAYERS if torch.equal(net[int(name)].weight.grad, plain[name])] == ["0"]
    backward(net, preconditioner, *batch(2))
    plain_gradient = net[0].weight.grad.clone()
    preconditioner.step()
    assert net[0].weight.grad.isfinite().all()
    assert not torch.equal(net[0].weight.grad, plain_gradient)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_labels_are_drawn_as_multinomial_draws_them_and_logits_may_be_non_finite(value, dtype):
    """Finite examples get the labels of torch.multinomial, bit for bit; the others a cotangent that is not finite."""
    logits = torch.randn(200, 7, generator=torch.Generator().manual_seed(0)).to(dtype)

    def cotangents(logits):
        generator = torch.Generator().manual_seed(3)
        return next(fisher_cotangents(logits, FisherType.mc, Likelihood.categorical, generator))

    probabilities = logits.softmax(-1)
    labels = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(3))
    good = cotangents(logits)
    assert torch.equal(good, probabilities.scatter_add(1, labels, -torch.ones_like(probabilities)))
    spoilt = logits.clone()
    spoilt[5] = value
    bad = cotangents(spoilt)
    others = torch.arange(200) != 5
    assert torch.equal(bad[others], good[others])
    assert not bad[5].isfinite().any()


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_cotangents_of_outputs_that_are_not_finite_are_not_finite(fisher_type, likelihood):
    """Also where the formula does not read the outputs: their statistics must be seen to be spoilt."""
    for value in (float("nan"), float("inf")):
        outputs = torch.randn(3, 4)
        outputs[1, 2] = value
        generator = torch.Generator().manual_seed(0)
        for cotangent in fisher_cotangents(outputs, FisherType(fisher_type), Likelihood(likelihood), generator):
            assert not cotangent[1, 2].isfinite()
            assert cotangent[[0, 2]].isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_drawing_labels_waits_for_no_device():
    """On a CUDA device fisher_backward() synchronises nothing, whatever the logits."""
    net = make_net().cuda()
    preconditioner = KroneckerPreconditioner(net, fisher_type="mc")
    inputs, _ = batch(0)
    outputs = net(inputs.cuda() * float("nan"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        preconditioner.fisher_backward(outputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- layers that have died --------------------------------------------------------------------------------------------

FORMS = [
    {"structure": "kfac", "inverse_method": "cholesky"},
    {"structure": "kfac", "inverse_method": "low_rank"},
    {"structure": "sua", "inverse_method": "low_rank"},
    {"structure": "sua", "group_size": 3},
    {"structure": "kfac", "damping_rule": "factored_pi"},
    {"structure": "sua", "damping_rule": "factored_pi", "group_size": 3},
    {"structure": "kfac", "damping_rule": "factored_pi", "inverse_method": "low_rank"},
    {"structure": "kfac", "damping_rule": "exact"},
    {"structure": "sua", "damping_rule": "exact", "group_size": 3},
]


@pytest.mark.parametrize(
    ("settings", "sharing", "dead", "damping"),
    diagonal(FORMS, ["expand", "reduce"], ["inputs", "gradients", "both"], [1e-8, 0.1]),
    ids=name_of,
)
def test_dead_layers_have_a_finite_inverse_and_gradient(settings, sharing, dead, damping):
    """All-zero activations, output gradients or both, while the other layers live on; no damping is raised for it."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(
        net, settings=KroneckerSettings(damping=damping, weight_sharing=sharing, inverse_period=1, **settings)
    )
    for index in range(2):
        inputs, labels = batch(index)
        net.zero_grad()
        outputs = net(inputs * 0 if dead != "gradients" else inputs)
        (nn.functional.cross_entropy(outputs, labels) * (1 if dead == "inputs" else 0)).backward()
        preconditioner.step()
    assert {event.partition(":")[0] for event in preconditioner.events} <= (
        {"small_damping"} if damping < 0.1 else set()
    )
    assert all_finite(preconditioner.state_dict()["layers"])
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    good_step(net, preconditioner)
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())


# --- abandoned mini-batches -------------------------------------------------------------------------------------------


def make_wide_net() -> nn.Module:
    """Return a net whose convolution is preconditioned inside its backward pass."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(6, 40, 3, bias=False), nn.Flatten(), nn.Linear(360, 3)).double()


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
def test_an_abandoned_mini_batch_leaves_nothing_behind(fisher_type):
    """discard() forgets the statistics, the draws and the sides that the thrown-away gradient carried."""
    results = []
    for abandons in (False, True):
        net = make_wide_net()
        preconditioner = KroneckerPreconditioner(
            net, structure="sua", application="auto", inverse_period=2, fisher_type=fisher_type
        )
        generator = torch.Generator().manual_seed(0)
        grads = []
        for index in range(4):
            inputs = torch.randn(2, 6, 5, 5, generator=generator, dtype=torch.float64)
            for is_kept in (False, True) if abandons else (True,):
                net.zero_grad()
                # A larger mini-batch takes other sides, so that a mixture would be refused.
                outputs = net(inputs if is_kept else inputs.repeat(200, 1, 1, 1))
                preconditioner.fisher_backward(outputs)
                outputs.square().sum(1).mean().backward()
                if not is_kept:
                    preconditioner.discard()
            preconditioner.step()
            grads.append([parameter.grad.clone() for parameter in net.parameters()])
            assert preconditioner.num_steps == index + 1
        results.append(grads)
    for with_one, without in zip(results[1], results[0], strict=True):
        assert all(torch.equal(got, want) for got, want in zip(with_one, without, strict=True))


def test_measuring_between_refreshes_keeps_the_sides_that_the_gradient_carries():
    """update_factors() forgets the passes, not that the backward pass has applied the inverse."""
    grads = []
    for application in ("weight", "auto"):
        net = make_wide_net()
        preconditioner = KroneckerPreconditioner(net, structure="sua", application=application, inverse_period=10)
        inputs = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        net(inputs).square().sum(1).mean().backward()
        preconditioner.step()
        net.zero_grad()
        with preconditioner.capture():
            net(inputs).square().sum(1).mean().backward()
        preconditioner.update_factors()
        preconditioner.precondition_()
        grads.append(net[0].weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
