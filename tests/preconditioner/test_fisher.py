"""Where K-FAC is exact it equals the exact Fisher; sampled labels converge to it; batch norm moves once."""

import copy

import pytest
import torch
from torch import nn

from kfac_sua.preconditioner import FisherType, KroneckerPreconditioner, Likelihood
from kfac_sua.preconditioner.fisher import fisher_cotangents


def measured_factors(net, inputs, **options):
    """Return layer name to measured factors, after one mini-batch with ``fisher_backward``."""
    preconditioner = KroneckerPreconditioner(net, damping=0.1, **options)
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    outputs.square().sum().backward()
    preconditioner.update_factors()
    factors = {name: layer.average.corrected() for name, layer in preconditioner._layers.items()}
    preconditioner.remove_hooks()
    return factors


def kronecker_block(factors) -> torch.Tensor:
    """Return scale · Ḡ ⊗ Ā of an ungrouped layer."""
    return factors.scale * torch.kron(factors.gradient.dense()[0], factors.activation.dense()[0])


def exact_gauss_newton(net, weight, bias, inputs) -> torch.Tensor:
    """Return the mean over examples of JᵀJ, in ``[out, taps, in (, bias)]`` order (the Fisher of a unit Gaussian)."""
    total = 0
    for example in inputs:
        rows = []
        for output in net(example.unsqueeze(0)).flatten():
            grads = torch.autograd.grad(output, [weight] if bias is None else [weight, bias], retain_graph=True)
            flat = grads[0].flatten(2).transpose(1, 2).flatten(1) if weight.dim() == 4 else grads[0]
            if bias is not None:
                flat = torch.cat([flat, grads[1][:, None]], dim=1)
            rows.append(flat.flatten())
        jacobian = torch.stack(rows)
        total = total + jacobian.T @ jacobian
    return total / len(inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("geometry", [{"padding": 1}, {"stride": 2, "padding": 2, "dilation": 2}])
def test_expand_is_exact_for_a_per_location_squared_loss(bias, geometry):
    """Convolution + squared loss at every location: S · Ā ⊗ Ḡ *is* the Fisher block (expand setting)."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=bias, **geometry)).double()
    inputs = torch.randn(4, 2, 5, 4, dtype=torch.float64)
    factors = measured_factors(net, inputs, fisher_type="exact", likelihood="gaussian")["0"]
    exact = exact_gauss_newton(net, net[0].weight, net[0].bias, inputs)
    torch.testing.assert_close(kronecker_block(factors), exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("bias", [False, True])
def test_reduce_is_exact_for_an_average_pooled_squared_loss(bias):
    """Convolution + average pooling + squared loss: E[h̄h̄ᵀ] ⊗ E[δ̄δ̄ᵀ] is the Fisher block; expand is not."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, bias=bias), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    inputs = torch.randn(4, 2, 5, 4, dtype=torch.float64)
    exact = exact_gauss_newton(net, net[0].weight, net[0].bias, inputs)
    options = {"fisher_type": "exact", "likelihood": "gaussian"}
    reduced = measured_factors(net, inputs, weight_sharing="reduce", **options)["0"]
    torch.testing.assert_close(kronecker_block(reduced), exact, rtol=1e-9, atol=1e-12)
    expanded = measured_factors(net, inputs, weight_sharing="expand", **options)["0"]
    assert (kronecker_block(expanded) - exact).norm() > 0.1 * exact.norm()


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_deep_linear_net_with_squared_loss_is_exact(sharing):
    """A deep linear net's output Jacobians do not depend on the example, so both settings are exact in every layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).double()
    inputs = torch.randn(6, 4, dtype=torch.float64)
    factors = measured_factors(net, inputs, fisher_type="exact", likelihood="gaussian", weight_sharing=sharing)
    for name, layer in net.named_children():
        exact = exact_gauss_newton(net, layer.weight, layer.bias, inputs)
        torch.testing.assert_close(kronecker_block(factors[name]), exact, rtol=1e-9, atol=1e-12)


def test_one_datum_and_a_linear_layer_is_the_gradient_outer_product():
    """With one example the empirical Fisher of a Linear layer equals vec(∇)vec(∇)ᵀ, bias coordinate included."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    inputs, labels = torch.randn(1, 4, dtype=torch.float64), torch.tensor([1])
    preconditioner = KroneckerPreconditioner(net)
    nn.functional.cross_entropy(net(inputs), labels).backward()
    preconditioner.update_factors()
    for name, layer in preconditioner._layers.items():
        grad = torch.cat([layer.module.weight.grad, layer.module.bias.grad[:, None]], dim=1).flatten()
        block = kronecker_block(layer.average.corrected())
        torch.testing.assert_close(block, torch.outer(grad, grad), rtol=1e-9, atol=1e-14, msg=name)


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_exact_categorical_fisher_is_the_expectation_over_labels(sharing):
    """The exact Fisher's gradient factor is Σ_c p_c δ_c δ_cᵀ, from one backward per label with that label's loss."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3)).double()
    inputs = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    factors = measured_factors(net, inputs, fisher_type="exact", weight_sharing=sharing)
    probabilities = net(inputs).softmax(-1).detach()
    expected = 0
    for label in range(3):
        hidden = net[0](inputs)
        loss = nn.functional.cross_entropy(net[1:](hidden), torch.full((3,), label), reduction="sum")
        (delta,) = torch.autograd.grad(loss, hidden)
        delta = delta.flatten(2)  # [n, channels, locations]
        delta = delta.sum(-1, keepdim=True) if sharing == "reduce" else delta
        weighted = delta * probabilities[:, label, None, None]
        expected = expected + torch.einsum("nil,njl->ij", weighted, delta)
    count = 3 if sharing == "reduce" else 3 * 9
    torch.testing.assert_close(factors["0"].gradient.dense()[0], expected / count, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("likelihood", ["categorical", "gaussian"])
def test_sampled_cotangents_converge_to_the_exact_second_moment(likelihood):
    """Over 20,000 draws the second moment of sampled cotangents is within 4 % of the exact one (fixed seed)."""
    torch.manual_seed(0)
    outputs = torch.randn(2, 4, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    kind = Likelihood(likelihood)
    exact = sum(torch.einsum("ni,nj->nij", c, c) for c in fisher_cotangents(outputs, FisherType.exact, kind, generator))
    repeated = outputs.repeat(20_000, 1)
    (sample,) = fisher_cotangents(repeated, FisherType.mc, kind, generator)
    moment = torch.einsum("rni,rnj->nij", *(2 * [sample.view(20_000, 2, 4)])) / 20_000
    assert (moment - exact).norm() < 0.04 * exact.norm()


def test_sampled_factors_converge_to_the_exact_factors():
    """The running mean of the gradient factor over 300 sampled mini-batches approaches the exact Fisher's."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    inputs = torch.randn(8, 1, 3, 3, dtype=torch.float64)
    exact = measured_factors(net, inputs, fisher_type="exact")["0"].gradient.dense()
    preconditioner = KroneckerPreconditioner(net, fisher_type="mc", inverse_period=1)
    total = 0
    for _ in range(300):
        with preconditioner.capture():
            outputs = net(inputs)
            preconditioner.fisher_backward(outputs)
        preconditioner.update_factors()
        preconditioner.num_steps += 1  # a new draw
        total = total + preconditioner._layers["0"].average.corrected().gradient.dense()
    assert (total / 300 - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("fisher_type", ["empirical", "mc", "exact"])
def test_batch_norm_moves_once_and_gradients_are_untouched(fisher_type):
    """Sampling the Fisher runs no second forward pass and leaves every plain gradient bit-equal."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    plain = copy.deepcopy(net)
    inputs, labels = torch.randn(6, 2, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type)
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    nn.functional.cross_entropy(outputs, labels).backward()
    nn.functional.cross_entropy(plain(inputs), labels).backward()
    assert net[1].num_batches_tracked == 1
    assert torch.equal(net[1].running_mean, plain[1].running_mean)
    for got, want in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)
    preconditioner.step()
    assert not torch.equal(net[0].weight.grad, plain[0].weight.grad)
    assert torch.equal(net[1].weight.grad, plain[1].weight.grad)  # normalisation keeps the plain gradient


def test_sampled_labels_depend_on_the_seed_and_the_step_alone():
    """The same seed gives the same draw, another seed or step another one."""
    net = nn.Sequential(nn.Linear(3, 4)).double()
    inputs = torch.randn(5, 3, dtype=torch.float64)

    def draw(seed):
        factors = measured_factors(net, inputs, fisher_type="mc", seed=seed)
        return factors["0"].gradient.dense()

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
def test_logits_of_another_shape_are_refused(fisher_type):
    """A categorical likelihood needs [examples, classes]; the message says what to do."""
    net = nn.Sequential(nn.Linear(3, 4))
    preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type)
    with pytest.raises(ValueError, match=r"got \[2, 5, 4\]; .*likelihood=gaussian"):
        preconditioner.fisher_backward(net(torch.randn(2, 5, 3)))
