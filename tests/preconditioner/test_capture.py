"""Hooks: what they record, when they are idle, in-place operations, reused modules, gradient accumulation."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kfac_sua.preconditioner import KroneckerPreconditioner

LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


class Residual(nn.Module):
    """A pre-activation block, with in-place or out-of-place operations."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.inplace = inplace
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(3, 4, 1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block and a linear head."""
        out = self.first(x)
        out = out.relu_() if self.inplace else out.relu()
        out = self.second(out)
        if self.inplace:
            out += self.shortcut(x)
            out.mul_(2).relu_()
        else:
            out = ((out + self.shortcut(x)) * 2).relu()
        return self.head(out.mean((2, 3)))


def factors_after(net, inputs, labels=LABELS, *, micro_batches=1, **options):
    """Return layer name to (scale, activation blocks, gradient blocks) measured over the micro-batches."""
    preconditioner = KroneckerPreconditioner(net, **options)
    for part, part_labels in zip(inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        outputs = net(part)
        preconditioner.fisher_backward(outputs)
        (nn.functional.cross_entropy(outputs, part_labels) * len(part) / len(inputs)).backward()
    preconditioner.update_factors()
    result = {}
    for name, layer in preconditioner._layers.items():
        factors = layer.average.corrected()
        result[name] = (torch.tensor(factors.scale), factors.activation.dense(), factors.gradient.dense())
    preconditioner.remove_hooks()
    return result


def assert_same(first, second):
    """Compare two results of :func:`factors_after`."""
    assert first.keys() == second.keys()
    for name in first:
        for got, want in zip(first[name], second[name], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("fisher_type", ["empirical", "exact", "mc"])
def test_in_place_sums_and_activations_do_not_change_the_statistics(fisher_type):
    """``relu_``, ``out += shortcut`` and ``mul_`` after a layer give the factors of their out-of-place twins."""
    torch.manual_seed(0)
    net = Residual(inplace=True).double()
    twin = Residual(inplace=False).double()
    twin.load_state_dict(net.state_dict())
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    assert_same(
        factors_after(net, inputs, fisher_type=fisher_type), factors_after(twin, inputs, fisher_type=fisher_type)
    )


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("method", ["cholesky", "low_rank"])
def test_gradient_accumulation_measures_the_whole_batch(sharing, fisher_type, method):
    """Three micro-batches give the factors of the one batch they make up."""
    torch.manual_seed(0)
    net = Residual(inplace=True).double()
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    options = {"weight_sharing": sharing, "fisher_type": fisher_type, "inverse_method": method}
    assert_same(factors_after(net, inputs, **options), factors_after(net, inputs, micro_batches=3, **options))


class Reused(nn.Module):
    """Calls one convolution on the top and the bottom half of its input, or one twin after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Sum both halves."""
        top, bottom = x.chunk(2, dim=2)
        hidden = torch.cat([self.conv(top).flatten(2), self.conv(bottom).flatten(2).mul(2)], dim=2)
        return self.head(hidden.tanh().mean(2))


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_module_reused_in_one_forward_joins_its_locations(sharing, micro_batches):
    """The factors of a layer called twice are those over the locations of both calls, by autograd and a loop."""
    torch.manual_seed(0)
    net = Reused().double()
    inputs = torch.randn(6, 2, 8, 3, dtype=torch.float64)
    scale, activation, gradient = factors_after(net, inputs, weight_sharing=sharing, micro_batches=micro_batches)[
        "conv"
    ]
    hidden = [net.conv(half) for half in inputs.chunk(2, dim=2)]
    joined = torch.cat([hidden[0].flatten(2), hidden[1].flatten(2).mul(2)], dim=2)
    loss = nn.functional.cross_entropy(net.head(joined.tanh().mean(2)), LABELS, reduction="sum")
    delta = torch.cat([grad.flatten(2) for grad in torch.autograd.grad(loss, hidden)], dim=2)  # [n, out, 4]
    reads = torch.cat([nn.functional.unfold(half, 3) for half in inputs.chunk(2, dim=2)], dim=2)  # [n, in · taps, 4]
    reads = reads.unflatten(1, (2, 9)).transpose(1, 2).flatten(1, 2)  # tap-major
    reads = torch.cat([reads, torch.ones(6, 1, 4, dtype=torch.float64)], dim=1)
    if sharing == "reduce":
        expected_activation = torch.einsum("ni,nj->ij", reads.mean(2), reads.mean(2)) / 6
        expected_gradient = torch.einsum("ni,nj->ij", delta.sum(2), delta.sum(2)) / 6
    else:
        expected_activation = torch.einsum("nis,njs->ij", reads, reads) / 24
        expected_gradient = torch.einsum("nis,njs->ij", delta, delta) / 24
    assert float(scale) == (1 if sharing == "reduce" else 4)
    torch.testing.assert_close(activation[0], expected_activation, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient[0], expected_gradient, rtol=1e-10, atol=1e-14)


def test_hooks_are_idle_between_statistics():
    """On steps without statistics nothing is recorded and no tensor hook is registered."""
    torch.manual_seed(0)
    net = Residual(inplace=False)
    preconditioner = KroneckerPreconditioner(net, inverse_period=3)
    inputs = torch.randn(6, 3, 4, 4)
    recorded = []
    for _ in range(7):
        nn.functional.cross_entropy(net(inputs), LABELS).backward()
        recorded.append(sum(layer.statistics.num_counted for layer in preconditioner._layers.values()))
        preconditioner.step()
        net.zero_grad()
    assert recorded == [4, 0, 0, 4, 0, 0, 4]


def test_evaluation_passes_are_not_recorded():
    """A forward pass without gradients between training passes leaves the statistics alone."""
    torch.manual_seed(0)
    net = Residual(inplace=False).double()
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    clean = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    with torch.no_grad():
        net(inputs * 5)
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    with torch.no_grad():
        net(inputs * 7)
    preconditioner.update_factors()
    factors = preconditioner._layers["first"].average.corrected()
    torch.testing.assert_close(factors.activation.dense(), clean["first"][1], rtol=0, atol=0)


def test_a_call_that_no_loss_follows_leaves_no_trace():
    """A layer called for nothing, before, between and after, has the factors of the calls that reach ``.grad``."""
    torch.manual_seed(0)
    net = Reused().double()
    inputs = torch.randn(6, 2, 8, 3, dtype=torch.float64)
    clean = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    net(inputs[:2] * 9)  # an evaluation that forgot torch.no_grad()
    net.conv(inputs)
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    net.conv(inputs)
    preconditioner.update_factors()
    factors = preconditioner._layers["conv"].average.corrected()
    assert factors.scale == clean["conv"][0]
    torch.testing.assert_close(factors.activation.dense(), clean["conv"][1], rtol=1e-12, atol=0)
    torch.testing.assert_close(factors.gradient.dense(), clean["conv"][2], rtol=1e-12, atol=0)
    assert not preconditioner.events


class Uneven(Reused):
    """Calls its convolution with all examples, and with the first two of them where it is told to."""

    uneven = True

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return super().forward(x) + (self.conv(x[:2, :, :4]).mean() if self.uneven else 0)


def test_a_refused_mini_batch_does_not_spoil_the_next():
    """After an error at step(), the statistics start anew."""
    torch.manual_seed(0)
    net = Uneven().double()
    inputs = torch.randn(6, 2, 8, 3, dtype=torch.float64)
    net.uneven = False
    clean = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    net.uneven = True
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"'conv' was called with 2 and with 6 examples"):
        preconditioner.step()
    net.uneven = False
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    preconditioner.update_factors()
    factors = preconditioner._layers["conv"].average.corrected()
    torch.testing.assert_close(factors.gradient.dense(), clean["conv"][2], rtol=1e-12, atol=0)


def test_a_second_backward_through_one_forward_is_an_error():
    """Two backward passes over one forward cannot be told from wrong sums; the cure is named."""
    net = Reused()
    preconditioner = KroneckerPreconditioner(net)
    loss = nn.functional.cross_entropy(net(torch.randn(6, 2, 8, 3)), LABELS)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"second backward pass reached one forward .*paused\(\)"):
        loss.backward()
    del preconditioner


def test_paused_and_discarded_passes_leave_no_trace():
    """Adversarial, logging and abandoned passes can be kept out of the statistics."""
    torch.manual_seed(0)
    net = Residual(inplace=False).double()
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    clean = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    nn.functional.cross_entropy(net(inputs * 3), LABELS).backward()  # abandoned
    preconditioner.discard()
    with preconditioner.paused():
        nn.functional.cross_entropy(net(inputs * 5), LABELS).backward()
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    preconditioner.update_factors()
    for name, layer in preconditioner._layers.items():
        factors = layer.average.corrected()
        torch.testing.assert_close(factors.activation.dense(), clean[name][1], rtol=1e-12, atol=0)
        torch.testing.assert_close(factors.gradient.dense(), clean[name][2], rtol=1e-12, atol=0)


def test_buffers_may_be_reused_after_the_forward_pass():
    """Kept rows are copies: overwriting a static input buffer before step() changes nothing."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 3, bias=False)).double()
    buffer = torch.randn(6, 40, dtype=torch.float64)
    clean = factors_after(net, buffer.clone(), inverse_method="low_rank")
    preconditioner = KroneckerPreconditioner(net, inverse_method="low_rank")
    nn.functional.cross_entropy(net(buffer), LABELS).backward()
    buffer.zero_()
    preconditioner.update_factors()
    factors = preconditioner._layers["0"].average.corrected()
    torch.testing.assert_close(factors.activation.dense(), clean["0"][1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_is_recorded_once(use_reentrant):
    """Recomputed forward passes do not count twice, in either mode of torch.utils.checkpoint."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 5, 2), nn.Flatten(), nn.Linear(5, 3)).double()
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    clean = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    hidden = checkpoint(net[:3], inputs.clone().requires_grad_(), use_reentrant=use_reentrant)
    nn.functional.cross_entropy(net[4](net[3](hidden)), LABELS).backward()
    preconditioner.update_factors()
    for name, layer in preconditioner._layers.items():
        factors = layer.average.corrected()
        torch.testing.assert_close(factors.activation.dense(), clean[name][1], rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(factors.gradient.dense(), clean[name][2], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_copies_of_the_model_have_no_preconditioner(application):
    """A deep copy or a pickled copy neither feeds the original's statistics nor applies its inverses."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.Flatten(), nn.Linear(80, 3)).double()
    plain = copy.deepcopy(net)
    inputs = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    preconditioner = KroneckerPreconditioner(net, structure="sua", application=application, inverse_period=2)
    nn.functional.cross_entropy(net(inputs), LABELS).backward()
    preconditioner.step()
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    nn.functional.cross_entropy(plain(inputs), LABELS).backward()
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        twin.zero_grad()
        nn.functional.cross_entropy(twin(inputs), LABELS).backward()
        torch.testing.assert_close(twin[0].weight.grad, plain[0].weight.grad, rtol=1e-12, atol=1e-14)
    assert not preconditioner._layers["0"].statistics.open_calls
    assert not preconditioner._layers["0"].statistics.num_counted


def test_a_deleted_preconditioner_takes_its_hooks_along():
    """Without the preconditioner nothing is left on the model."""
    net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.Flatten(), nn.Linear(80, 3))
    preconditioner = KroneckerPreconditioner(net, application="auto")
    del preconditioner
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in net.modules())
    assert "forward" not in net[0].__dict__


def test_submodules_called_without_the_model_accumulate_correctly():
    """A loop that calls submodules itself never enters the model; a backward pass then ends a pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(3 * 4, 3)).double()
    inputs = torch.randn(6, 2, 4, 4, dtype=torch.float64)
    whole = factors_after(net, inputs)
    preconditioner = KroneckerPreconditioner(net)
    for part, labels in zip(inputs.chunk(2), LABELS.chunk(2), strict=True):
        outputs = net[2](net[1](net[0](part)))
        (nn.functional.cross_entropy(outputs, labels) / 2).backward()
    preconditioner.update_factors()
    for name, layer in preconditioner._layers.items():
        factors = layer.average.corrected()
        torch.testing.assert_close(factors.activation.dense(), whole[name][1], rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(factors.gradient.dense(), whole[name][2], rtol=1e-10, atol=1e-14)


def test_autocast_statistics_are_formed_in_float32():
    """With forward, backward and step under bfloat16 autocast the factors are float32 and close to full precision."""
    torch.manual_seed(0)
    net = Residual(inplace=False)
    inputs = torch.randn(6, 3, 4, 4)
    exact = factors_after(copy.deepcopy(net), inputs)
    preconditioner = KroneckerPreconditioner(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nn.functional.cross_entropy(net(inputs), LABELS).backward()
        preconditioner.update_factors()
    factors = preconditioner._layers["second"].average.corrected()
    assert factors.activation.dense().dtype == factors.gradient.dense().dtype == torch.float32
    torch.testing.assert_close(factors.activation.dense(), exact["second"][1], rtol=0.05, atol=0.02)
