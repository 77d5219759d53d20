"""What is measured through rows, against dense matrices in float64: blocks, directions, and all layers together."""

import dataclasses

import pytest
import torch
from oracles import dense_layers
from torch import Tensor, nn
from torch.nn import functional as F

from kfac_sua.introspect.approximations import approximate, layers_of
from kfac_sua.introspect.block import ExactBlock, Overlap
from kfac_sua.introspect.gradients import Batch, Passes, gradient_rows, record_passes
from kfac_sua.introspect.measure import DIAGONAL, EXACT, PLAIN, WHOLE, measure_network
from kfac_sua.introspect.record import BLOCKS, LAYER, NETWORK, OTHER, SAME, Row
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.settings import FisherType

METHODS = {
    "kfac": KroneckerSettings(structure="kfac"),
    "sua": KroneckerSettings(structure="sua"),
    "grouped": KroneckerSettings(structure="kfac", group_size=4),
    "sua_grouped": KroneckerSettings(structure="sua", group_size=4),
    "kfac_reduce": KroneckerSettings(structure="kfac", weight_sharing="reduce"),
    "sua_exact": KroneckerSettings(structure="sua", damping_rule="exact"),
}
DAMPINGS = (0.02, 0.3)
EXAMPLES, CLASSES = 7, 5


@pytest.fixture(autouse=True)
def in_float64():
    """Everything that is measured is in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def network() -> nn.Module:
    """Return convolutions of several geometries, with and without bias and groups, and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, stride=2, groups=2),
        nn.ReLU(inplace=True),  # on the output of a convolution itself
        nn.Conv2d(6, 6, (1, 2), dilation=(1, 2), padding=(0, 1), padding_mode="replicate"),
        nn.Flatten(),
        nn.Linear(54, CLASSES),
    ).eval()


def batch() -> Batch:
    """Return images, and labels of two kinds."""
    labels = torch.randint(CLASSES, (2, EXAMPLES))
    return Batch(torch.randn(EXAMPLES, 3, 8, 8), labels[0], labels[1])


def loop_rows(model: nn.Module, layer: nn.Module, images: Batch, fisher: FisherType) -> Tensor:
    """Return the rows of a layer, one backward pass per example and label."""
    rows = []
    for label in range(CLASSES) if fisher is FisherType.exact else [None]:
        for n in range(EXAMPLES):
            model.zero_grad()
            logits = model(images.inputs[n : n + 1])
            true = images.fisher_labels(fisher)[n : n + 1] if label is None else torch.tensor([label])
            F.cross_entropy(logits, true).backward()
            weight = 1.0 if label is None else logits.detach().softmax(-1)[0, label].sqrt()
            rows.append(weight * torch.cat([one.grad.flatten() for one in layer.parameters()]))
    model.zero_grad()
    return torch.stack(rows) / EXAMPLES**0.5


@pytest.mark.parametrize("fisher", list(FisherType))
def test_rows_are_per_example_gradients(fisher):
    """Also behind an activation that changes a convolution's output in place."""
    model, images = network(), batch()
    layers = dict(layers_of(model))
    passes = record_passes(model, layers, images, fisher)
    assert len(layers) == 4
    for name, layer in layers.items():
        torch.testing.assert_close(
            gradient_rows(layer, passes[name], EXAMPLES), loop_rows(model, layer, images, fisher)
        )
    assert all(one.grad is None for one in model.parameters())


def test_a_layer_that_is_called_twice_has_one_gradient():
    """The sum of both calls'."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, CLASSES)).eval()
    model.insert(3, model[1])
    images = Batch(torch.randn(EXAMPLES, 6), torch.randint(CLASSES, (EXAMPLES,)), torch.zeros(EXAMPLES).long())
    passes = record_passes(model, {"1": model[1]}, images, FisherType.empirical)
    torch.testing.assert_close(
        gradient_rows(model[1], passes["1"], EXAMPLES), loop_rows(model, model[1], images, FisherType.empirical)
    )


def dense_block(module: nn.Module, passes: Passes, settings: KroneckerSettings) -> Tensor:
    """Return K from the oracle's loops, in the order of ``weight.flatten(), bias``."""
    (inputs,), ((grads,),) = passes.inputs, passes.output_grads
    oracle = dense_layers(module, inputs, grads, settings)
    out, channels, taps = module.weight.shape[0], module.weight.shape[1], module.weight[0, 0].numel()
    blocks, biases = [], []
    for part in oracle:
        whole = part.scale * torch.kron(part.gradient, part.activation)
        own = out // len(oracle)
        width = taps * channels + part.joint
        # from [out, taps, in (, bias)] to [out, in, taps] and then the biases
        order = torch.arange(own * width).view(own, width)
        weights = order[:, : taps * channels].view(own, taps, channels).transpose(1, 2).reshape(-1)
        blocks.append((whole, weights, order[:, -1] if part.joint else None))
        biases.append(part.scale * part.gradient if part.separate else None)
    size = sum(one.numel() for one in module.parameters())
    result = torch.zeros(size, size)
    own, num_weights = out // len(oracle), module.weight.numel()
    for index, ((whole, weights, joint), bias) in enumerate(zip(blocks, biases, strict=True)):
        place = torch.arange(len(weights)) + index * len(weights)
        if joint is not None:
            weights = torch.cat([weights, joint])
            place = torch.cat([place, num_weights + index * own + torch.arange(own)])
        result[place[:, None], place] = whole[weights[:, None], weights]
        if bias is not None:
            place = num_weights + index * own + torch.arange(own)
            result[place[:, None], place] = bias
    return result


@pytest.mark.parametrize("method", METHODS)
def test_blocks_are_the_oracles(method):
    """Eigenvalues and eigenbasis give K; their basis is orthonormal, padded channel groups or not."""
    model, images = network(), batch()
    layers = dict(layers_of(model))
    passes = record_passes(model, layers, images, FisherType.empirical)
    grads = {name: torch.randn(sum(one.numel() for one in layer.parameters())) for name, layer in layers.items()}
    found = approximate(model, METHODS[method], images, FisherType.empirical, grads, DAMPINGS)
    for name, layer in layers.items():
        block = found.blocks[name]()
        basis = block.coordinates(torch.eye(len(grads[name])))  # [P, coordinates]
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(basis)))
        got = basis @ torch.diag(block.eigenvalues) @ basis.mT
        torch.testing.assert_close(got, dense_block(layer, passes[name], METHODS[method]))


def closeness(fisher: Tensor, block: Tensor) -> dict[str, float]:
    """Return error, cosine and trace ratio of dense matrices."""
    return {
        "relative_error": float((fisher - block).norm() / fisher.norm()),
        "cosine": float((fisher * block).sum() / fisher.norm() / block.norm()),
        "trace_ratio": float(block.trace() / fisher.trace()),
    }


def judged(fisher: Tensor, gradient: Tensor, direction: Tensor, damping: float) -> dict[str, float]:
    """Return cosine and share of a direction in the damped quadratic model of a dense matrix."""
    damped = fisher + damping * torch.eye(len(fisher))
    exact = torch.linalg.solve(damped, gradient)
    decrease = (gradient @ direction) ** 2 / (direction @ damped @ direction) / 2
    return {
        "direction_cosine": float(direction @ exact / direction.norm() / exact.norm()),
        "share": float(decrease / (gradient @ exact / 2)),
    }


def damped_solve(block: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Return (B + εI)⁻¹v."""
    return torch.linalg.solve(block + damping * torch.eye(len(block)), gradient)


@pytest.mark.parametrize("fisher", list(FisherType))
def test_every_row_is_that_of_dense_matrices(fisher):
    """Layer by layer, with exact blocks on the diagonal, and over all layers at once; both kinds of statistics."""
    model, batches = network(), {SAME: batch(), OTHER: batch()}
    layers = dict(layers_of(model))
    methods = {name: METHODS[name] for name in ("kfac", "sua_grouped", "sua_exact")}
    measured, loss = measure_network(model, layers, batches, methods, fisher, DAMPINGS)
    rows = {(one.statistics, one.scope, one.layer, one.method, one.damping): one for one in measured}
    assert len(rows) == len(measured)

    F.cross_entropy(model(batches[SAME].inputs), batches[SAME].labels).backward()
    grads = {name: torch.cat([one.grad.flatten() for one in layer.parameters()]) for name, layer in layers.items()}
    model.zero_grad(set_to_none=True)
    gradient = torch.cat([*grads.values()])
    of_layers = {
        statistics: {name: loop_rows(model, layer, images, fisher) for name, layer in layers.items()}
        for statistics, images in batches.items()
    }
    whole = {
        statistics: (all_rows := torch.cat([*own.values()], dim=1)).mT @ all_rows
        for statistics, own in of_layers.items()
    }
    exact = {statistics: {name: own[name].mT @ own[name] for name in layers} for statistics, own in of_layers.items()}
    diagonal = torch.block_diag(*exact[SAME].values())
    for statistics, images in batches.items():
        blocks: dict[str, dict[str, Tensor]] = {
            EXACT: exact[statistics],
            DIAGONAL: {name: own.diagonal().diag() for name, own in exact[statistics].items()},
            PLAIN: {name: own.diagonal().mean() * torch.eye(len(own)) for name, own in exact[statistics].items()},
        }
        for damping in DAMPINGS:
            directions = {
                name: {layer: damped_solve(block, grads[layer], damping) for layer, block in own.items()}
                for name, own in blocks.items()
            }
            directions[PLAIN] = grads  # over all layers, too
            for method, settings in methods.items():
                found = approximate(model, settings, images, fisher, grads, [damping])
                directions[method] = found.directions[damping]
                blocks[method] = {}
                for layer in layers:
                    block = found.blocks[layer]()
                    basis = block.coordinates(torch.eye(len(grads[layer])))
                    blocks[method][layer] = basis @ torch.diag(block.eigenvalues) @ basis.mT
            for method, own in directions.items():
                for layer in layers:
                    row = rows[statistics, LAYER, layer, method, damping]
                    of_block = exact[SAME][layer]
                    check(row, closeness(of_block, blocks[method][layer]))
                    check(row, judged(of_block, grads[layer], own[layer], damping))
                both = torch.block_diag(*blocks[method].values()), torch.cat([*own.values()])
                for scope, of_all in ((BLOCKS, diagonal), (NETWORK, whole[SAME])):
                    row = rows[statistics, scope, "", method, damping]
                    check(row, closeness(of_all, both[0]))
                    check(row, judged(of_all, gradient, both[1], damping))
            row = rows[statistics, NETWORK, "", WHOLE, damping]
            check(row, closeness(whole[SAME], whole[statistics]))
            check(row, judged(whole[SAME], gradient, damped_solve(whole[statistics], gradient, damping), damping))
    assert loss == pytest.approx(F.cross_entropy(model(batches[SAME].inputs), batches[SAME].labels).item())


def check(row: Row, want: dict[str, float]) -> None:
    """Compare a row's numbers with dense ones, in all digits that are printed."""
    for name, value in want.items():
        # Squares cancel where an error is zero: what is left of 1e-16 has a root of 1e-8.
        assert getattr(row, name) == pytest.approx(value, rel=1e-7, abs=1e-7), (name, row)


def test_error_is_split_by_the_nearest_block_in_the_eigenbasis():
    """No other eigenvalues in K's basis come nearer to F, and the squares of both parts add up."""
    rows, factor = torch.randn(6, 9), torch.randn(9, 9)
    fisher, block = rows.mT @ rows, factor @ factor.mT
    values, basis = torch.linalg.eigh(block)
    found = Overlap.of((rows @ basis).square().sum(0), values).closeness(float(fisher.norm()), float(fisher.trace()))
    nearest = basis @ torch.diag((basis.mT @ fisher @ basis).diagonal()) @ basis.mT
    assert found.basis_error == pytest.approx(float((fisher - nearest).norm() / fisher.norm()))
    assert found.eigenvalue_error == pytest.approx(float((nearest - block).norm() / fisher.norm()))
    assert found.basis_error**2 + found.eigenvalue_error**2 == pytest.approx(found.relative_error**2)
    for _ in range(5):
        other = nearest + basis @ torch.diag(0.1 * torch.randn(9)) @ basis.mT
        assert (fisher - other).norm() > (fisher - nearest).norm()


@pytest.mark.parametrize(("structure", "group_size"), [("kfac", None), ("sua", 16), ("eigenvalue_corrected", None)])
def test_a_block_of_1152_parameters(structure, group_size):
    """A convolution 16 to 8 with 3×3 taps on 30 images: everything in the table to seven digits, ε from 1e-3 to 1."""
    model = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))
    images = {
        name: Batch(torch.randn(30, 16, 8, 8), torch.randint(10, (30,)), torch.randint(10, (30,)))
        for name in (SAME, OTHER)
    }
    settings = KroneckerSettings(structure=structure, group_size=group_size)
    dampings = (1e-3, 0.1, 1.0)
    for fisher in FisherType:
        measured, _ = measure_network(model.eval(), {"0": model[0]}, images, {"own": settings}, fisher, dampings)
        F.cross_entropy(model(images[SAME].inputs), images[SAME].labels).backward()
        gradient = model[0].weight.grad.flatten()
        model.zero_grad(set_to_none=True)
        passes = record_passes(model, {"0": model[0]}, images[SAME], fisher)["0"]
        rows = gradient_rows(model[0], passes, 30)
        exact = rows.mT @ rows
        assert exact.shape == (1152, 1152)
        found = approximate(model, settings, images[SAME], fisher, {"0": gradient}, dampings)
        block = found.blocks["0"]()
        basis = block.coordinates(torch.eye(1152))
        dense = basis @ torch.diag(block.eigenvalues) @ basis.mT
        for row in measured:
            if (row.statistics, row.scope, row.method) == (SAME, LAYER, "own"):
                check(row, closeness(exact, dense))
                check(row, judged(exact, gradient, found.directions[row.damping]["0"], row.damping))


@pytest.mark.parametrize("structure", ["activation_only", "eigenvalue_corrected"])
@pytest.mark.parametrize("fisher", [FisherType.empirical, FisherType.exact])
def test_structures_give_the_block_that_they_invert(structure, fisher):
    """Eigenvalues and basis make a matrix, and the directions solve it with ε on its diagonal."""
    model, images = network(), batch()
    layers = dict(layers_of(model))
    grads = {name: torch.randn(sum(one.numel() for one in layer.parameters())) for name, layer in layers.items()}
    found = approximate(model, KroneckerSettings(structure=structure), images, fisher, grads, DAMPINGS)
    for name, grad in grads.items():
        block = found.blocks[name]()
        basis = block.coordinates(torch.eye(len(grad)))
        torch.testing.assert_close(basis @ basis.mT, torch.eye(len(grad)))
        dense = basis @ torch.diag(block.eigenvalues) @ basis.mT
        for damping in DAMPINGS:
            expected = torch.linalg.solve(dense + damping * torch.eye(len(grad)), grad)
            torch.testing.assert_close(found.directions[damping][name], expected)


def test_corrected_eigenvalues_leave_the_error_of_the_basis():
    """EKFAC is the nearest to F that K-FAC's basis has: the same basis error, and none of the eigenvalues."""
    model = network()
    images = {name: batch() for name in (SAME, OTHER)}
    methods = {name: KroneckerSettings(structure=name) for name in ("kfac", "eigenvalue_corrected")}
    measured, _ = measure_network(model, dict(layers_of(model)), images, methods, FisherType.exact, [0.1])
    rows = {(row.method, row.layer): row for row in measured if (row.statistics, row.scope) == (SAME, LAYER)}
    for name, _ in layers_of(model):
        kfac, corrected = rows["kfac", name], rows["eigenvalue_corrected", name]
        assert corrected.eigenvalue_error == pytest.approx(0, abs=1e-6)
        assert corrected.relative_error == pytest.approx(corrected.basis_error)
        assert corrected.basis_error == pytest.approx(kfac.basis_error)
        assert corrected.trace_ratio == pytest.approx(1)
        assert kfac.relative_error > corrected.relative_error


def test_rounding_makes_no_number_impossible():
    """The exact block judged by itself: an error of zero, a share and a cosine of one."""
    rows, gradient = torch.randn(5, 40), torch.randn(40)
    block = ExactBlock(rows @ rows.mT, rows @ gradient, float(gradient @ gradient))
    for damping in (1e-6, 1.0):
        fit = block.fit(block.direction_by(block, block.gram, damping), damping)
        assert fit.share == pytest.approx(1, abs=1e-9)
        assert fit.cosine == pytest.approx(1, abs=1e-9)
    near = block.overlap(block, block.gram).closeness(block.norm, block.trace)
    assert dataclasses.astuple(near) == pytest.approx((0, 1, 1, 0, 0), abs=1e-7)


def test_the_model_is_left_as_it_was():
    """No hook and no gradient stays, so that training can go on."""
    model, images = network(), {SAME: batch(), OTHER: batch()}
    measure_network(model, dict(layers_of(model)), images, {"sua": METHODS["sua"]}, FisherType.exact, [0.1])
    assert all(one.grad is None for one in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    KroneckerPreconditioner(model)  # which refuses a model that another one watches
