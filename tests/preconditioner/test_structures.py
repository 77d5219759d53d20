"""Structures computed from rows against dense matrices, and what follows from their declarations."""

import warnings

import pytest
import torch
from captured_training import Case
from graph_emulator import EmulatedGraph
from identical import assert_identical
from layer_cases import LAYERS, mean_loss
from oracles import locations_of, output_locations_of
from plugin.diagonal_structure import Diagonal
from test_captured_equality import check as check_captured
from thread_processes import run_ranks
from torch import Tensor, nn

from kfac_sua.preconditioner import (
    AdaptiveDamping,
    CapturedStep,
    KroneckerPreconditioner,
    KroneckerSettings,
    LayerRows,
    Structure,
    register_structure,
    structure_names,
)
from kfac_sua.preconditioner.layer import PreconditionedLayer
from kfac_sua.preconditioner.registry import BUILT_IN, structure_class
from kfac_sua.preconditioner.structures.kronecker import KroneckerStructure

BY_ROWS = [name for name in BUILT_IN if not issubclass(structure_class(name), KroneckerStructure)]
DAMPING = 0.05


def rows_by_autograd(module: nn.Module, inputs: Tensor) -> LayerRows:
    """Return the rows of a mini-batch under :func:`mean_loss`, from patches read pixel by pixel."""
    output = module(inputs)
    (grads,) = torch.autograd.grad(mean_loss(output) * len(inputs), output)
    groups = getattr(module, "groups", 1)
    read = locations_of(module, inputs)  # [n, s, taps, channels]
    read = read.unflatten(-1, (groups, -1)).permute(3, 0, 1, 2, 4).flatten(3)  # [g, n, s, taps · in]
    if module.bias is not None:
        read = torch.cat([read, torch.ones_like(read[..., :1])], dim=-1)
    sent = output_locations_of(module, grads).unflatten(-1, (groups, -1))  # [n, s, g, out]
    sent = sent.permute(2, 0, 1, 3)[:, None]  # [g, 1, n, s, out]
    return LayerRows(read, sent, read.shape[1] * read.shape[2])


def as_matrix(layer: PreconditionedLayer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return a gradient as ``[g, p, d]``, by plain permutations."""
    groups = getattr(layer.module, "groups", 1)
    flat = weight.permute(0, 2, 3, 1).flatten(1) if weight.dim() == 4 else weight  # [out, taps · in]
    if bias is not None:
        flat = torch.cat([flat, bias[:, None]], dim=1)
    return flat.unflatten(0, (groups, -1))  # [g, p, d]


def solved(matrices: Tensor, vector: Tensor, damping: float) -> Tensor:
    """Return (K + ε I)⁻¹ v for ``[g, p · d, p · d]`` and ``[g, p, d]``."""
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
    return torch.linalg.solve(matrices + damping * identity, vector.flatten(1)).view(vector.shape)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    """Compare relative to the largest entry."""
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("structure", BY_ROWS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_geometry_equals_the_dense_definition(name, structure):
    """Step, product and quadratic form of every layer are those of the dense matrix that defines the structure."""
    module, inputs = LAYERS[name].build(num_examples=6)
    rows = rows_by_autograd(module, inputs)
    preconditioner = KroneckerPreconditioner(module, structure=structure, damping=DAMPING)
    (layer,) = preconditioner.layers
    layer.keeps_factors = True
    mean_loss(module(inputs)).backward()
    bias = module.bias
    plain = as_matrix(layer, module.weight.grad.clone(), None if bias is None else bias.grad.clone())
    matrices = layer.structure.dense(rows)
    preconditioner.step()
    actual = as_matrix(layer, module.weight.grad, None if bias is None else bias.grad)
    assert_near(actual, solved(matrices, plain, DAMPING))

    product = layer.structure.multiply(module.weight.grad, None if bias is None else bias.grad, layer.factors)
    expected = torch.einsum("gij,gj->gi", matrices, actual.flatten(1))
    assert_near(as_matrix(layer, *product).flatten(1), expected)
    spectrum = layer.structure.spectrum(layer.factors.tensors)
    rotated = spectrum.rotate(torch.stack([actual, expected.view(actual.shape)]))  # [2, g, p, d]
    assert_near(rotated[1], spectrum.values * rotated[0])
    assert_near(rotated.square().sum(), actual.square().sum() + expected.square().sum())
    form = layer.structure.quadratic_form(module.weight.grad, None if bias is None else bias.grad, layer.factors)
    assert_near(form, (expected * actual.flatten(1)).sum())


@pytest.mark.parametrize("name", ["linear_bias", "linear_sequence", "conv_groups", "conv_dilated"])
def test_rows_give_the_gradients_of_single_examples(name):
    """What a structure receives adds up, example by example, to what autograd computes for that example alone."""
    module, inputs = LAYERS[name].build(num_examples=4)
    seen: list[LayerRows] = []

    class Recording(structure_class("activation_only")):
        needs_output_grads = True

        def measure(self, rows: LayerRows) -> dict[str, Tensor]:
            seen.append(rows)
            return super().measure(rows)

    register_structure(f"recording_{name}", Recording)
    preconditioner = KroneckerPreconditioner(module, structure=f"recording_{name}", damping=DAMPING)
    (layer,) = preconditioner.layers
    mean_loss(module(inputs)).backward()
    preconditioner.step()
    (grads,) = list(seen[0].example_grads())  # [g, n, p, d]
    output = module(inputs)
    (sent,) = torch.autograd.grad(mean_loss(output) * len(inputs), output)
    for index in range(len(inputs)):
        parameters = [one for one in (module.weight, module.bias) if one is not None]
        own = torch.autograd.grad(module(inputs[index : index + 1]), parameters, sent[index : index + 1])
        assert_near(grads[:, index], as_matrix(layer, *own, *([None] * (2 - len(own)))))


def test_the_activation_factor_alone_is_that_of_kfac_times_the_identity():
    """FOOF's factor is K-FAC's activation factor, summed over locations instead of averaged."""
    module, inputs = LAYERS["conv_bias"].build()
    measured = []
    for structure in ("kfac", "activation_only"):
        preconditioner = KroneckerPreconditioner(module, structure=structure, damping=DAMPING)
        mean_loss(module(inputs)).backward()
        preconditioner.update_factors()
        measured.append(preconditioner.layers[0].average.corrected())
        preconditioner.remove_hooks()
    kfac, alone = measured
    assert_near(alone.tensors["factor"], kfac.scale * kfac.activation.dense())


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
def test_products_of_the_eigenvalue_corrected_block_equal_curvlinops(fisher_type):
    """EKFAC of every layer of a small net, with the sharing of a convolution, as curvlinops computes it."""
    curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is a development dependency")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.Flatten(),
        nn.Linear(27, 3),
    ).double()
    inputs, labels = torch.randn(40, 2, 8, 8, dtype=torch.float64), torch.arange(40) % 3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operator = curvlinops.EKFACLinearOperator(
            net,
            nn.CrossEntropyLoss(),
            list(net.parameters()),
            [(inputs, labels)],
            fisher_type={"empirical": "empirical", "exact": "type-2"}[fisher_type],
            kfac_approx="expand",
            separate_weight_and_bias=False,
            check_deterministic=False,
        )
        vectors = [torch.randn_like(parameter) for parameter in net.parameters()]
        expected = operator @ vectors
    preconditioner = KroneckerPreconditioner(net, structure="eigenvalue_corrected", fisher_type=fisher_type)
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    preconditioner.update_factors()
    named = {name: vector for (name, _), vector in zip(net.named_parameters(), vectors, strict=True)}
    wanted = {name: vector for (name, _), vector in zip(net.named_parameters(), expected, strict=True)}
    for layer in preconditioner.layers:
        bias = named.get(f"{layer.name}.bias")
        product, bias_product = layer.structure.multiply(named[f"{layer.name}.weight"], bias, layer.average.corrected())
        assert_near(product, wanted[f"{layer.name}.weight"], 1e-8)
        if bias is not None:
            assert_near(bias_product, wanted[f"{layer.name}.bias"], 1e-8)


@pytest.mark.parametrize(
    ("structure", "fisher_type"),
    [("activation_only", "empirical"), ("eigenvalue_corrected", "empirical"), ("eigenvalue_corrected", "exact")],
)
def test_micro_batches_are_one_mini_batch(structure, fisher_type):
    """Accumulated gradients give the block of all examples, for true labels and for all of them."""
    torch.manual_seed(0)
    inputs, labels = torch.randn(6, 3, 5, 5, dtype=torch.float64), torch.arange(6) % 4
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 4)).double()
    blocks = []
    for parts in ([slice(0, 6)], [slice(0, 2), slice(2, 6)]):
        preconditioner = KroneckerPreconditioner(net, structure=structure, fisher_type=fisher_type)
        for part in parts:
            outputs = net(inputs[part])
            preconditioner.fisher_backward(outputs)
            (nn.functional.cross_entropy(outputs, labels[part], reduction="sum") / 6).backward()
        preconditioner.update_factors()
        vector = torch.ones(4, 3, 3, 3, dtype=torch.float64).cumsum(0), torch.ones(4, dtype=torch.float64)
        layer = preconditioner.layers[0]
        blocks.append(layer.structure.multiply(*vector, layer.average.corrected()))
        preconditioner.remove_hooks()
        net.zero_grad()
    for one, other in zip(*blocks, strict=True):
        assert_near(one, other, 1e-8)


@pytest.mark.parametrize("structure", BY_ROWS)
def test_calls_with_other_numbers_of_locations_share_the_weight(structure):
    """A layer called twice in one forward pass has the per-example gradients of both calls together."""
    torch.manual_seed(0)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, images: Tensor) -> Tensor:
            return self.conv(nn.functional.max_pool2d(self.conv(images), 2)).flatten(1).sum(1)

    net, images = Twice().double(), torch.randn(5, 2, 4, 4, dtype=torch.float64)
    preconditioner = KroneckerPreconditioner(net, structure=structure, damping=DAMPING)
    (layer,) = preconditioner.layers
    losses = net(images).square()
    own = [torch.autograd.grad(loss, list(net.parameters()), retain_graph=True) for loss in losses]
    grads = torch.stack([as_matrix(layer, *one).flatten() for one in own])  # [n, p · d]
    losses.mean().backward()
    preconditioner.update_factors()
    measured = layer.average.corrected()
    if structure == "eigenvalue_corrected":
        basis = torch.kron(measured.tensors["gradient_basis"][0], measured.tensors["activation_basis"][0])
        moments = (grads @ basis).square().mean(0)
        assert_near(measured.tensors["moments"].flatten(), moments)
    else:
        hidden = nn.functional.max_pool2d(net.conv(images), 2).detach()
        rows = torch.cat([nn.functional.unfold(one, 3, padding=1) for one in (images, hidden)], dim=2)  # [n, in · 9, s]
        rows = rows.unflatten(1, (2, 9)).transpose(1, 2).flatten(1, 2).mT.flatten(0, 1)  # [n · s, 9 · in]
        rows = nn.functional.pad(rows, (0, 1), value=1.0)
        assert_near(measured.tensors["factor"][0], rows.mT @ rows / 5)
    assert measured.scale == 16 + 4


@pytest.mark.parametrize("structure", BY_ROWS)
def test_passes_with_images_of_other_sizes_are_filled_up(structure):
    """Two micro-batches with 16 and with 4 locations have the mean of both blocks, weighted by their examples."""
    torch.manual_seed(0)
    net = nn.Conv2d(2, 3, 3, padding=1).double()
    parts = [torch.randn(n, 2, size, size, dtype=torch.float64) for n, size in ((5, 4), (2, 2))]

    def measured(images: list[Tensor]):
        preconditioner = KroneckerPreconditioner(net, structure=structure, loss_reduction="sum")
        for part in images:
            net(part).square().sum().backward()
        preconditioner.update_factors()
        preconditioner.remove_hooks()
        net.zero_grad()
        return preconditioner.layers[0].average.corrected()

    both, first, second = measured(parts), measured(parts[:1]), measured(parts[1:])
    if structure == "activation_only":
        expected = (5 * first.tensors["factor"] + 2 * second.tensors["factor"]) / 7
        assert_near(both.tensors["factor"], expected)
    else:  # the moments add up to the trace in every basis
        traces = [one.tensors["moments"].sum() for one in (both, first, second)]
        assert_near(traces[0], (5 * traces[1] + 2 * traces[2]) / 7)
    assert both.num_rows == 5 * 16 + 2 * 4


def test_what_a_structure_returns_is_compared_with_what_it_declares():
    """A wrong name, shape, dtype or a result of another shape is an error at once, not at the next checkpoint."""
    wrong = {
        "names": {"measure": lambda self, rows: {"other": torch.zeros(1, 3, 5)}},
        "shapes": {"invert": lambda self, measured, damping: {"inverse": measured["squares"].sum(1)}},
        "dtypes": {"invert": lambda self, measured, damping: {"inverse": measured["squares"].long()}},
        "turned": {"precondition": lambda self, gradient, kept: gradient.mT},
    }
    told = {
        "names": r"measure\(\) returned 'squares' as nothing, but its class declares \[1, 3, 5\] in torch.float32",
        "shapes": r"invert\(\) returned 'inverse' as \[1, 5\] in torch.float32 on cpu, but its class declares \[1, 3",
        "dtypes": r"invert\(\) returned 'inverse' as \[1, 3, 5\] in torch.int64",
        "turned": r"precondition\(\) made \[1, 5, 3\] of \[1, 3, 5\]",
    }
    for name, methods in wrong.items():
        register_structure(f"wrong_{name}", type(f"Wrong{name}", (Diagonal,), methods))
        net = nn.Linear(4, 3)
        preconditioner = KroneckerPreconditioner(net, structure=f"wrong_{name}")
        net(torch.randn(5, 4)).square().sum(1).mean().backward()
        with pytest.raises(TypeError, match=rf"structure=wrong_{name}: {told[name]}"):
            preconditioner.step()


@pytest.mark.parametrize("fails", ["raises", "nan"])
def test_an_inverse_that_fails_is_made_with_more_damping(fails):
    """Up to a thousand times the damping; beyond that the last inverse stays, and a first one is an error."""

    def invert(self, measured, damping):
        if damping > self.least:
            return Diagonal.invert(self, measured, damping)
        if fails == "raises":
            raise torch.linalg.LinAlgError("no")
        return {"inverse": measured["squares"] * float("nan")}

    torch.manual_seed(0)
    structure = type("Fragile", (Diagonal,), {"invert": invert, "least": 0.5})
    register_structure(f"fragile_{fails}", structure)
    net = nn.Linear(4, 3)
    preconditioner = KroneckerPreconditioner(net, structure=f"fragile_{fails}", damping=0.1, inverse_period=1)

    def step() -> None:
        net.zero_grad()
        net(torch.randn(5, 4)).square().sum(1).mean().backward()
        preconditioner.step()

    step()
    assert preconditioner.events == {"raised_damping:": 1}
    assert bool(net.weight.grad.isfinite().all())
    structure.least = float("inf")
    step()
    assert preconditioner.events == {"raised_damping:": 1, "failed_inverse:": 1}
    assert bool(net.weight.grad.isfinite().all())
    preconditioner.remove_hooks()
    preconditioner = KroneckerPreconditioner(net, structure=f"fragile_{fails}", damping=0.1)
    with pytest.raises(RuntimeError, match=r"cannot be inverted, also with 1000 times the damping 0\.1"):
        step()


def test_an_iteration_may_start_from_what_was_kept():
    """What the last refresh made is there at the next measurement, and after a checkpoint too."""
    seen = []

    def measure(self, rows):
        seen.append(None if rows.kept is None else rows.kept["inverse"].clone())
        return Diagonal.measure(self, rows)

    register_structure("warm", type("Warm", (Diagonal,), {"measure": measure}))
    net = nn.Linear(4, 3)

    def made() -> KroneckerPreconditioner:
        return KroneckerPreconditioner(net, structure="warm", damping=0.1, inverse_period=1)

    def step(preconditioner: KroneckerPreconditioner) -> None:
        net.zero_grad()
        net(torch.randn(5, 4)).square().sum(1).mean().backward()
        preconditioner.step()

    preconditioner = made()
    step(preconditioner)
    state = preconditioner.state_dict()
    kept = state["layers"][""]["inverse"]["inverse"].clone()
    preconditioner.remove_hooks()
    resumed = made()
    resumed.load_state_dict(state)
    step(resumed)
    assert seen[0] is None
    assert torch.equal(seen[1], kept)


def test_a_subclass_that_cannot_be_averaged_is_not():
    """Although its parent can."""
    register_structure("alone", type("Alone", (Diagonal,), {"can_be_averaged": False}))
    with pytest.raises(ValueError, match=r"ema_decay=0\.9 is not read by structure=alone"):
        KroneckerSettings(structure="alone", ema_decay=0.9)
    assert not structure_class("alone").can_be_shared


def test_the_activation_factor_takes_no_output_gradients():
    """Neither a copy of them, nor a Fisher that only differs in them."""
    with pytest.raises(ValueError, match="fisher_type=mc is not read by structure=activation_only"):
        KroneckerSettings(structure="activation_only", fisher_type="mc")
    KroneckerSettings(structure="activation_only", kl_clip=1e-3, application="auto")  # never in the backward pass


@pytest.mark.parametrize("structure", BY_ROWS)
def test_captured_steps_have_the_bits_of_eager_ones(structure):
    """The inverse is a buffer that refreshes write in place."""
    check_captured(Case({"structure": structure}))


@pytest.mark.parametrize("structure", BY_ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_checkpoint_continues_bit_by_bit(structure, dtype):
    """Also between a measurement and the refresh that inverts it."""
    torch.manual_seed(0)
    batches = [(torch.randn(6, 3, 5, 5, dtype=dtype), torch.randint(4, (6,))) for _ in range(8)]

    def train(net: nn.Module, preconditioner: KroneckerPreconditioner, part: slice) -> None:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        for images, labels in batches[part]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            preconditioner.step()
            optimizer.step()

    def made() -> tuple[nn.Module, KroneckerPreconditioner]:
        torch.manual_seed(1)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 4)).to(dtype)
        return net, KroneckerPreconditioner(net, structure=structure, inverse_period=3, damping=0.1)

    whole, first, second = made(), made(), made()
    train(*whole, slice(0, 8))
    train(*first, slice(0, 5))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    train(*second, slice(5, 8))
    assert_identical(second[0].state_dict(), whole[0].state_dict())
    assert_identical(second[1].state_dict(), whole[1].state_dict())

    nn.functional.cross_entropy(first[0](batches[0][0]), batches[0][1]).backward()
    with first[1].capture():
        nn.functional.cross_entropy(first[0](batches[0][0]), batches[0][1]).backward()
    first[1].update_factors()
    state = first[1].state_dict()
    second[1].load_state_dict(state)
    assert_identical(second[1].state_dict(), state)
    name = next(iter(state["layers"]["0"]["average"].keys() - {"weight", "scale"}))
    broken = {**state["layers"]["0"]["average"], name: torch.zeros(1)}
    layers = {**state["layers"], "0": {**state["layers"]["0"], "average": broken}}
    with pytest.raises(ValueError, match=rf"average\.{name} of layer '0'"):
        second[1].load_state_dict({**state, "layers": layers})


def test_measurements_that_are_means_are_averaged_over_time_and_processes():
    """FOOF's factor: two processes measure what one does, and a running average is corrected for its start."""
    module, inputs = LAYERS["conv_bias"].build(num_examples=7)

    def measured(part: Tensor, **settings: object):
        preconditioner = KroneckerPreconditioner(module, structure="activation_only", distributed=False, **settings)
        mean_loss(module(part)).backward()
        preconditioner.update_factors()
        preconditioner.remove_hooks()
        return preconditioner.layers[0]

    whole = measured(inputs)
    parts = [measured(inputs[:2]), measured(inputs[2:])]

    def work(processes):
        layer = parts[processes.rank]
        own = [layer.average.corrected()]
        return type(layer.structure).average_over_processes([layer.structure], own, [layer.weight.detach()], processes)

    for (joined,) in run_ranks(2, work):
        assert_near(joined.tensors["factor"], whole.average.corrected().tensors["factor"])
        assert (joined.scale, joined.num_rows) == (16, 7 * 16)
    average = measured(inputs, ema_decay=0.9).average
    assert_near(average.corrected().tensors["factor"], whole.average.corrected().tensors["factor"])


def test_adaptive_damping_multiplies_by_any_structure():
    """The predicted change of the loss is g·s + ½ sᵀKs, with the dense K of the refresh."""
    torch.manual_seed(0)
    net, inputs = nn.Linear(6, 3).double(), torch.randn(8, 6, dtype=torch.float64)
    preconditioner = KroneckerPreconditioner(net, structure="eigenvalue_corrected", damping=0.1, inverse_period=4)
    adaptive = AdaptiveDamping(preconditioner, period=4)
    (layer,) = preconditioner.layers
    matrix = layer.structure.dense(rows_by_autograd(net, inputs))[0]
    loss = mean_loss(net(inputs))
    loss.backward()
    before = as_matrix(layer, net.weight.detach().clone(), net.bias.detach().clone()).flatten()
    gradient = as_matrix(layer, net.weight.grad.clone(), net.bias.grad.clone()).flatten()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    preconditioner.step()
    optimizer.step()
    step = as_matrix(layer, net.weight.detach(), net.bias.detach()).flatten() - before
    predicted = gradient @ step + step @ matrix @ step / 2
    after = mean_loss(net(inputs)).detach()
    adaptive.update(loss.detach(), after)
    assert adaptive.reduction_ratio == pytest.approx(float((after - loss.detach()) / predicted))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "eigenvalue_corrected", "group_size": 4}, "group_size=4 is not read by structure=eigenvalue"),
        ({"structure": "activation_only", "weight_sharing": "reduce"}, "weight_sharing=reduce is not read by"),
        ({"structure": "eigenvalue_corrected", "ema_decay": 0.9}, r"ema_decay=0\.9 is not read by"),
        ({"structure": "activation_only", "damping_rule": "exact"}, "damping_rule=exact is not read by"),
        ({"structure": "ekfac"}, "structure must be one of kfac, sua, activation_only, eigenvalue_corrected"),
        ({"structure": 3}, "structure must be one of"),
    ],
)
def test_what_a_structure_ignores_is_refused(options, message):
    """A setting that would have no effect is an error that names both."""
    with pytest.raises(ValueError, match=message):
        KroneckerSettings(**options)


def test_several_processes_are_refused_by_a_structure_that_cannot_be_averaged(monkeypatch):
    """The eigenvalues of several processes belong to several bases."""
    monkeypatch.setattr("kfac_sua.preconditioner.kfac.default_processes", lambda: type("Two", (), {"size": 2})())
    with pytest.raises(ValueError, match="structure=eigenvalue_corrected measures each process's examples"):
        KroneckerPreconditioner(nn.Linear(2, 2), structure="eigenvalue_corrected")


def test_statistics_that_are_not_finite_leave_the_layer_as_it_was():
    """Like the Kronecker structures: one event, and the last inverse goes on."""
    torch.manual_seed(0)
    net, inputs = nn.Linear(4, 2), torch.randn(5, 4)
    for structure in BY_ROWS:
        preconditioner = KroneckerPreconditioner(net, structure=structure, damping=0.1, inverse_period=1)
        net(inputs).square().sum(1).mean().backward()
        preconditioner.step()
        before = preconditioner.state_dict()["layers"][""]["inverse"]
        before = {name: tensor.clone() for name, tensor in before.items()}
        net.zero_grad()
        net(inputs * float("inf")).square().sum(1).mean().backward()
        preconditioner.step()
        assert preconditioner.events == {"non_finite_statistics:": 1}
        assert_identical(preconditioner.state_dict()["layers"][""]["inverse"], before)
        preconditioner.remove_hooks()
        net.zero_grad()


def test_a_structure_of_ones_own_is_registered_by_hand():
    """It is known from then on, under its name only, and described by its sizes."""
    register_structure("diagonal_by_hand", Diagonal)
    register_structure("diagonal_by_hand", Diagonal)  # again, as when a module is imported twice
    assert "diagonal_by_hand" in structure_names()
    module, inputs = LAYERS["conv_groups"].build()
    preconditioner = KroneckerPreconditioner(module, structure="diagonal_by_hand", damping=DAMPING)
    (layer,) = preconditioner.layers
    rows = rows_by_autograd(module, inputs)
    mean_loss(module(inputs)).backward()
    plain = as_matrix(layer, module.weight.grad.clone(), module.bias.grad.clone())
    preconditioner.step()
    expected = solved(layer.structure.dense(rows), plain, DAMPING)
    assert_near(as_matrix(layer, module.weight.grad, module.bias.grad), expected)
    (row,) = preconditioner.describe().rows
    assert (row.structure, row.memory_bytes, row.forms) == ("diagonal by hand", 448, ("diagonal", "diagonal"))
    with pytest.raises(ValueError, match=r"is .*Diagonal already"):
        register_structure("diagonal_by_hand", type("Other", (Diagonal,), {}))
    with pytest.raises(ValueError, match="Python identifier"):
        register_structure("not a name", Diagonal)
    with pytest.raises(TypeError, match="subclass of FisherStructure"):
        register_structure("linear", nn.Linear)


def test_a_structure_that_does_not_declare_it_is_not_captured():
    """Its steps stay eager, with a reason that names it."""
    register_structure("eager", type("Eager", (Diagonal,), {"can_be_captured": False}))
    net = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    preconditioner = KroneckerPreconditioner(net, structure="eager")
    step = CapturedStep(lambda inputs: inputs, net, optimizer, preconditioner, graph=EmulatedGraph())
    assert step.why_eager == "structure=eager does not say that its application can be captured"


def test_the_own_structures_are_listed_with_their_meaning():
    """The names of the registry are those of the documentation of the setting."""
    assert list(BUILT_IN) == [member.value for member in Structure]
