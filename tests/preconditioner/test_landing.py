"""Which passes count: those whose weight gradient is in ``.grad`` when the step is taken, and no others."""

import copy
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from thinned import diagonal
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from kfac_sua.preconditioner import KroneckerPreconditioner

DTYPE = torch.float64
LABELS = torch.arange(8) % 3
SETTINGS = [
    {"structure": "kfac"},
    {"structure": "sua"},
    {"structure": "kfac", "group_size": 3},
    {"structure": "sua", "group_size": 3, "weight_sharing": "reduce"},
    {"structure": "kfac", "ema_decay": 0.9, "application": "auto"},
    {"structure": "sua", "damping_rule": "exact"},
    {"structure": "kfac", "fisher_type": "exact"},
    {"structure": "sua", "fisher_type": "mc", "application": "auto"},
]


def make_net() -> nn.Module:
    """Return a net of convolutions and linear layers with a bias."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Conv2d(6, 5, 2, bias=False), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(5 * 4, 7), nn.Tanh(), nn.Linear(7, 3)).to(DTYPE)


def images(seed: int = 0, size: int = 8) -> Tensor:
    """Return a mini-batch."""
    return torch.randn(size, 3, 5, 5, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def train_pass(net, preconditioner, inputs: Tensor, labels: Tensor = LABELS, scale: float = 1.0) -> None:
    """Take the training step's forward and backward pass."""
    outputs = net(inputs)
    preconditioner.fisher_backward(outputs)
    (F.cross_entropy(outputs, labels) * scale).backward()


class Boom(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        """Return the same numbers."""
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        """Run out of memory."""
        raise torch.OutOfMemoryError("out of memory (stand-in)")


# Each is something that training loops do before the training step's pass, which must not be seen in the step.


def adversarial(net, preconditioner):
    """Gradients with respect to inputs, three times."""
    x = images(5)
    for _ in range(3):
        x.requires_grad_()
        (grad,) = torch.autograd.grad(F.cross_entropy(net(x), LABELS), x)
        x = (x + 0.1 * grad.sign()).detach()


def adversarial_by_backward(net, preconditioner):
    """The same by ``backward(inputs=...)``."""
    x = images(5).requires_grad_()
    F.cross_entropy(net(x), LABELS).backward(inputs=[x])


def ascent_zeroed(net, preconditioner):
    """A first pass whose gradients are dropped, as sharpness-aware minimisation makes it."""
    train_pass(net, preconditioner, images(5))
    net.zero_grad()


def ascent_zeroed_in_place(net, preconditioner):
    """The same with gradients zeroed in place."""
    train_pass(net, preconditioner, images(5))
    net.zero_grad(set_to_none=False)


def generator_step(net, preconditioner):
    """A pass through the net that another network's step needs, with other numbers of examples."""
    z = nn.Parameter(images(5, size=3))
    F.cross_entropy(net(z), LABELS[:3]).backward()
    net.zero_grad()


def logged_norm(net, preconditioner):
    """Gradients with respect to the weights, for a log."""
    torch.autograd.grad(F.cross_entropy(net(images(5)), LABELS), list(net.parameters()))


def saliency(net, preconditioner):
    """The gradient with respect to a hidden output."""
    hidden = net[:3](images(5))
    torch.autograd.grad(net[3:](hidden).sum(), hidden)


def evaluation(net, preconditioner):
    """A forward pass with gradients enabled and no backward."""
    net(images(5, size=2))


def skipped_loss(net, preconditioner):
    """A loss that is NaN, after which the loop goes on with the next mini-batch."""
    outputs = net(images(5) * float("nan"))
    preconditioner.fisher_backward(outputs)
    assert F.cross_entropy(outputs, LABELS).isnan()


def failed_backward(net, preconditioner):
    """A backward pass that fails half way."""
    hidden = net[:4](images(5))
    with pytest.raises(RuntimeError):
        F.cross_entropy(net[4:](Boom.apply(hidden)), LABELS).backward()
    net.zero_grad()


def hessian(net, preconditioner):
    """Second derivatives with respect to inputs."""
    torch.autograd.functional.hessian(lambda x: net(x).square().sum(), images(5, size=1))


def batched_jacobian(net, preconditioner):
    """A Jacobian by a batch of backward passes through a graph that is kept."""
    x = images(5, size=1).requires_grad_()
    torch.autograd.grad(net(x)[0], x, torch.eye(3, dtype=DTYPE), is_grads_batched=True)


FOREIGN = [
    adversarial,
    adversarial_by_backward,
    ascent_zeroed,
    ascent_zeroed_in_place,
    generator_step,
    logged_norm,
    saliency,
    evaluation,
    skipped_loss,
    failed_backward,
    hessian,
    batched_jacobian,
]


@pytest.mark.parametrize(
    ("foreign", "settings"), diagonal(FOREIGN, SETTINGS), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_foreign_passes_leave_no_trace(foreign, settings):
    """Before, and between, the micro-batches of steps with statistics and without, they change no bit of training."""
    results = []
    for is_disturbed in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net, inverse_period=2, **settings)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for index in range(3):
            optimizer.zero_grad()
            if is_disturbed:
                foreign(net, preconditioner)
            train_pass(net, preconditioner, images(index))
            if is_disturbed and foreign in (adversarial, logged_norm, saliency, evaluation, hessian):
                foreign(net, preconditioner)
            preconditioner.step()
            optimizer.step()
        results.append([parameter.detach() for parameter in net.parameters()])
        assert not preconditioner.events
    # Sampled labels are drawn per pass: where a foreign one draws too, later draws are others.
    draws = settings.get("fisher_type") == "mc" and foreign in (ascent_zeroed, ascent_zeroed_in_place, skipped_loss)
    for disturbed, clean in zip(*reversed(results), strict=True):
        torch.testing.assert_close(disturbed, clean, rtol=1 if draws else 1e-12, atol=1 if draws else 1e-14)


def zeroed_before_step(net, preconditioner):
    """The gradients are gone."""
    train_pass(net, preconditioner, images())
    net.zero_grad()


def optimizer_in_backward(net, preconditioner):
    """The optimizer uses gradients up where they arrive."""
    for parameter in net.parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)

        def step(used: Tensor, optimizer=optimizer) -> None:
            optimizer.step()
            used.grad = None

        parameter.register_post_accumulate_grad_hook(step)
    train_pass(net, preconditioner, images())


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
@pytest.mark.parametrize("loop", [zeroed_before_step, optimizer_in_backward], ids=lambda loop: loop.__name__)
def test_gradients_that_are_gone_at_the_step_are_an_error(loop, settings):
    """Nothing would ever be preconditioned: the first step says so, with the cure."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, **settings)
    loop(net, preconditioner)
    with pytest.raises(RuntimeError, match=r"whose gradients are there.*optimizer that steps in the backward pass"):
        preconditioner.step()


def test_gradients_that_are_gone_at_a_plain_step_are_an_event(caplog):
    """So is a step with sampled labels whose training loss never came."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=5)
    train_pass(net, preconditioner, images())
    preconditioner.step()
    zeroed_before_step(net, preconditioner)
    preconditioner.step()
    assert preconditioner.events == {"no_gradient:(model)": 1}
    assert "call step() after loss.backward() and before the gradients are used or zeroed" in caplog.text
    sampled = KroneckerPreconditioner(make_net(), fisher_type="mc")
    sampled.fisher_backward(sampled.model(images()))
    sampled.step()
    assert sampled.events == {"no_gradient:(model)": 1}


def test_one_layers_gradient_that_is_gone_is_an_event(caplog):
    """Its statistics go with it, those of other layers stay."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    train_pass(net, preconditioner, images())
    net[5].weight.grad = None
    preconditioner.step()
    assert preconditioner.events == {"gradient_gone:5": 1}
    assert preconditioner._layers["5"].inverse is None
    assert preconditioner._layers["7"].inverse is not None
    assert "5: gradient gone; the gradient that belonged to its statistics was gone at step()" in caplog.text


# --- used-up gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_second_step_on_one_gradient_is_an_error(settings, num_steps):
    """After a step with statistics and after a plain one, for ``step()`` and ``precondition_()``; nothing changes."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=10, **settings)
    for index in range(num_steps):
        net.zero_grad()
        train_pass(net, preconditioner, images(index))
        preconditioner.step()
    before = [parameter.grad.clone() for parameter in net.parameters()]
    for again in (preconditioner.step, preconditioner.precondition_):
        with pytest.raises(RuntimeError, match="have been preconditioned already, by this or by another"):
            again()
    assert all(torch.equal(one.grad, other) for one, other in zip(net.parameters(), before, strict=True))
    assert preconditioner.num_steps == num_steps


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_two_preconditioners_of_one_model_do_not_both_apply(application):
    """Both may live, and may share out the layers; a gradient is preconditioned by one of them."""
    net = make_net()
    preconditioners = [KroneckerPreconditioner(net, application=application, inverse_period=2) for _ in range(2)]
    train_pass(net, preconditioners[0], images())
    preconditioners[0].step()
    with pytest.raises(RuntimeError, match="by another preconditioner of the model"):
        preconditioners[1].step()
    for one in preconditioners:
        one.remove_hooks()
    shared = KroneckerPreconditioner(net, skip=["0", "2"]), KroneckerPreconditioner(net, skip=["5", "7"])
    net.zero_grad()
    train_pass(net, shared[0], images())
    for one in shared:
        one.step()
        assert not one.events


def test_a_gradient_left_over_from_the_step_before_is_left_alone(caplog):
    """A branch that is not taken, in a loop that does not zero gradients."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, left: bool) -> Tensor:
            return self.head((self.left if left else self.right)(x))

    torch.manual_seed(0)
    net = Branches().to(DTYPE)
    preconditioner = KroneckerPreconditioner(net, inverse_period=5)
    x = torch.randn(8, 4, dtype=DTYPE)
    F.cross_entropy(net(x, left=True), LABELS).backward()
    preconditioner.step()
    before = net.left.weight.grad.clone()
    net.head.zero_grad()
    F.cross_entropy(net(x, left=False), LABELS).backward()
    preconditioner.step()
    assert torch.equal(net.left.weight.grad, before)
    assert preconditioner.events == {"not_reached:right": 1, "used_gradient:left": 1}
    assert "left: used gradient; its gradient is still that of the step before" in caplog.text


def test_gradients_added_to_preconditioned_ones_are_an_event(caplog):
    """A loop that never zeroes its gradients is told, at a plain step and at the next refresh."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=2)
    for index in range(3):
        train_pass(net, preconditioner, images(index))
        preconditioner.step()
    assert preconditioner.events == {f"used_gradient:{name}": 2 for name in ("0", "2", "5", "7")}
    assert "call optimizer.zero_grad() before loss.backward()" in caplog.text


def test_after_remove_hooks_nothing_goes_on():
    """Every verb ends with the cure; the state can still be taken."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=5)
    train_pass(net, preconditioner, images())
    preconditioner.step()
    preconditioner.remove_hooks()
    net.zero_grad()
    train_pass(net, KroneckerPreconditioner(net), images())
    plain = net[0].weight.grad.clone()
    verbs = (
        preconditioner.step,
        preconditioner.precondition_,
        preconditioner.update_factors,
        preconditioner.capture,
        lambda: preconditioner.fisher_backward(net(images())),
    )
    for verb in verbs:
        with pytest.raises(RuntimeError, match="hooks of this preconditioner were removed"):
            verb()
    assert torch.equal(net[0].weight.grad, plain)
    KroneckerPreconditioner(net, inverse_period=5).load_state_dict(preconditioner.state_dict())


# --- activation checkpointing -----------------------------------------------------------------------------------------


class Albert(nn.Module):
    """Calls one layer several times per forward pass, each or all of them inside checkpoints."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.enter, self.shared, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.where = where
        self.run = lambda function, h: function(h)

    def block(self, h: Tensor) -> Tensor:
        """Return one residual block."""
        return h + torch.tanh(self.shared(h))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.enter(x).tanh()
        if self.where == "each":
            h = self.run(self.block, self.run(self.block, h))
        elif self.where == "both":
            h = self.run(lambda h: self.block(self.block(h)), h)
        elif self.where == "mixed":
            h = self.block(self.run(self.block, self.block(h)))
        elif self.where == "all":
            h = self.block(self.block(h))
        elif self.where == "nested":
            h = self.run(lambda h: self.run(self.block, self.block(h)), h)
        return self.head(h)


@pytest.mark.parametrize(
    ("where", "kind", "fisher_type", "sharing"),
    diagonal(
        ["each", "both", "mixed", "nested", "all"],
        ["reentrant", "early stop", "no early stop"],
        ["empirical", "mc"],
        ["expand", "reduce"],
    ),
)
def test_a_shared_layer_in_checkpoints_has_the_factors_without(where, kind, fisher_type, sharing):
    """Two forward passes of different sizes before one backward pass, and a second backward pass."""
    if fisher_type == "mc" and kind == "reentrant":
        pytest.skip("PyTorch's reentrant checkpoints do not allow torch.autograd.grad")
    grads = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        net = Albert(where).to(DTYPE)
        preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type, weight_sharing=sharing)
        run = lambda function, h: checkpoint(function, h, use_reentrant=kind == "reentrant")  # noqa: E731
        if is_checkpointed:
            net.run = run
        parts = [torch.randn(size, 5, dtype=DTYPE).requires_grad_() for size in (3, 4, 5)]
        labels = [torch.arange(len(part)) % 3 for part in parts]
        waiting = []
        with nullcontext() if kind != "no early stop" else set_checkpoint_early_stop(False):
            for part, part_labels in zip(parts, labels, strict=True):
                outputs = run(net, part) if is_checkpointed and where == "all" else net(part)
                preconditioner.fisher_backward(outputs)
                waiting.append(F.cross_entropy(outputs, part_labels, reduction="sum") / 12)
                if len(waiting) == 2 or part is parts[-1]:
                    sum(waiting).backward()
                    waiting.clear()
        preconditioner.step()
        grads.append([parameter.grad for parameter in net.parameters()])
        assert not preconditioner.events
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


class InPlace(nn.Module):
    """Changes the output of linear layers over sequences in place."""

    def __init__(self, is_in_place: bool, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5, bias=bias), nn.Linear(5, 3, bias=bias)
        self.is_in_place = is_in_place

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        h = self.first(x)
        h = h.relu_() if self.is_in_place else h.relu()
        out = self.second(h)
        if self.is_in_place:
            out += 1.0
        else:
            out = out + 1.0
        return out.mean(1)


@pytest.mark.parametrize("fisher_type", ["empirical", "exact"])
@pytest.mark.parametrize("bias", [True, False])
def test_sequences_changed_in_place_are_recorded(bias, fisher_type):
    """For such inputs ``nn.Linear`` returns a view, whose node an in-place operation takes out of the graph."""
    grads = []
    for is_in_place in (False, True):
        torch.manual_seed(0)
        net = InPlace(is_in_place, bias).to(DTYPE)
        preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type)
        train_pass(net, preconditioner, torch.randn(8, 6, 4, dtype=DTYPE))
        preconditioner.step()
        grads.append([parameter.grad for parameter in net.parameters()])
        assert not preconditioner.events
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


# --- gradients that do not add up -------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Uses the weight of a layer beside calling it, if it is told to."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        hidden = self.body(x).tanh()
        return self.head(hidden) + self.share * F.linear(hidden, self.head.weight)


@pytest.mark.parametrize("settings", [*SETTINGS[:2], SETTINGS[6]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_weight_that_is_used_beside_its_calls_is_named(settings, dtype, caplog):
    """The layer is named whose gradient is not the sum over its recorded calls, and no other."""
    torch.manual_seed(0)
    net = Tied(0.5).to(dtype)
    preconditioner = KroneckerPreconditioner(net, inverse_period=1, **settings)
    train_pass(net, preconditioner, torch.randn(8, 4, dtype=dtype))
    preconditioner.step()
    assert preconditioner.events == {"gradient_not_explained:head": 1}
    assert "head: gradient not explained; part of its weight gradient does not come from the calls" in caplog.text


def scaled_by_hooks(net, loss):
    """Hooks on weights scale their gradients."""
    for parameter in net.parameters():
        parameter.register_hook(lambda grad: grad * 3)
    loss.backward()


def decayed(net, loss):
    """Decay, clipping and noise on ``.grad``."""
    loss.backward()
    for parameter in net.parameters():
        parameter.grad.add_(parameter.detach(), alpha=10.0).mul_(0.01).add_(torch.randn_like(parameter))


def penalised(net, loss):
    """A penalty on the squares of the weights in the loss, far larger than the loss."""
    (loss + 10 * sum(parameter.square().sum() for parameter in net.parameters())).backward()


def void(result: object) -> None:
    """Drop a result, as hooks must not return any."""
    del result


def by_post_hooks(net, loss):
    """Hooks after the accumulation."""
    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(lambda changed: void(changed.grad.neg_()))
    loss.backward()


def masked(net, loss):
    """Gradients of most channels are zeroed, those compared among them."""
    loss.backward()
    for parameter in net.parameters():
        parameter.grad[:-1] = 0
        if len(parameter) == 1:
            parameter.grad.mul_(0.5)


def paused_term(net, loss, preconditioner=None):
    """A term that is left out of the statistics on purpose."""
    with preconditioner.paused():
        term = net(images(7, size=5).to(net[0].weight.dtype)).square().mean()
    (loss + term).backward()


CHANGES = [scaled_by_hooks, decayed, penalised, by_post_hooks, masked, paused_term]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[6]], ids=str)
def test_what_changes_gradients_on_purpose_is_no_alarm(change, settings, dtype):
    """Hooks, decay, clipping, noise, penalties on squares and paused terms."""
    net = make_net().to(dtype)
    preconditioner = KroneckerPreconditioner(net, inverse_period=1, **settings)
    outputs = net(images().to(dtype))
    preconditioner.fisher_backward(outputs)
    options = {"preconditioner": preconditioner} if change is paused_term else {}
    change(net, F.cross_entropy(outputs.float(), LABELS), **options)
    preconditioner.step()
    assert not preconditioner.events


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("mode", ["zeros", "circular"])
@pytest.mark.parametrize("loss_scale", [1.0, 2.0**16])
def test_a_gradient_that_adds_up_is_no_alarm_for_any_convolution(groups, mode, loss_scale):
    """Strides, dilation, padding of every kind, groups, unbatched calls under a loss scale, in float32."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=(2, 1), padding_mode=mode, groups=groups),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, (1, 3), dilation=2, padding="same", padding_mode=mode, groups=groups, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(-3),
        nn.Linear(8, 3),
    )
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    x = torch.randn(8, 4, 9, 8)
    for inputs, labels in ((x, LABELS), (x[0], LABELS[0])):
        net.zero_grad()
        (F.cross_entropy(net(inputs), labels) * loss_scale).backward()
        preconditioner.step(loss_scale=loss_scale)
    assert not preconditioner.events


def test_an_adjoint_of_the_output_that_a_hook_changes_is_what_is_recorded():
    """A hook on the layer's output, as for a reversed gradient, changes the weight's gradient and the statistics."""
    grads = []
    for is_hooked in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net)
        if is_hooked:
            net[2].register_forward_hook(lambda module, args, output: void(output.register_hook(lambda g: -g)))
        train_pass(net, preconditioner, images())
        preconditioner.step()
        assert not preconditioner.events
        grads.append(net[2].weight.grad)
    torch.testing.assert_close(grads[1], -grads[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fisher_type", ["mc", "exact"])
@pytest.mark.parametrize("application", ["weight", "auto"])
def test_two_losses_of_one_pass_count_once_where_labels_are_sampled(fisher_type, application):
    """The training loss only shows which pass counts: as one loss or as two, by one graph."""
    grads = []
    for is_split in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net, fisher_type=fisher_type, application=application)
        outputs = net(images())
        preconditioner.fisher_backward(outputs)
        losses = F.cross_entropy(outputs, LABELS), outputs.square().mean()
        if is_split:
            losses[0].backward(retain_graph=True)
            losses[1].backward()
        else:
            sum(losses).backward()
        preconditioner.step()
        grads.append([parameter.grad for parameter in net.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("settings", SETTINGS[:6], ids=str)
def test_a_forward_pass_before_the_step_counts_in_the_next(settings):
    """Loops that prefetch their outputs, with statistics in every step, train as those that do not."""
    results = []
    for is_ahead in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net, inverse_period=1, **settings)
        outputs = net(images(0)) if is_ahead else None
        for index in range(3):
            net.zero_grad()
            outputs = outputs if is_ahead else net(images(index))
            ahead = net(images(index + 1)) if is_ahead else None
            F.cross_entropy(outputs, LABELS).backward()
            outputs = ahead
            preconditioner.step()  # without an update, which would be in the way of the prefetched pass
            results.append([parameter.grad.clone() for parameter in net.parameters()])
        assert not preconditioner.events
    for step in range(3):
        for got, want in zip(results[3 + step], results[step], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_pass_of_a_step_before_does_not_count_again():
    """Its graph is kept, and differentiated once more after step(), discard() and load_state_dict()."""
    for end in ("step", "discard", "load"):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net, inverse_period=1)
        loss = F.cross_entropy(net(images(3)), LABELS)
        loss.backward(retain_graph=True)
        state = copy.deepcopy(preconditioner.state_dict())
        {"step": preconditioner.step, "discard": preconditioner.discard}.get(
            end, lambda state=state, one=preconditioner: one.load_state_dict(state)
        )()
        net.zero_grad()
        F.cross_entropy(net(images()), LABELS).backward()
        loss.backward()
        preconditioner.step()
        assert {layer.num_examples for layer in preconditioner.layers} == {8}
        assert preconditioner.events == {f"gradient_not_explained:{name}": 1 for name in ("0", "2", "5", "7")}


def test_clipping_does_not_make_a_used_gradient_fresh():
    """After step() gradients are clipped: a second step(), another preconditioner and added gradients are noticed."""
    net = make_net()
    preconditioners = [KroneckerPreconditioner(net, inverse_period=2) for _ in range(2)]
    for index in range(3):
        train_pass(net, preconditioners[0], images(index))
        preconditioners[0].step()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        for again in (preconditioners[0].step, preconditioners[1].step):
            with pytest.raises(RuntimeError, match="have been preconditioned already"):
                again()
    assert preconditioners[0].events == {f"used_gradient:{name}": 1 for name in ("0", "2", "5", "7")}
    net.zero_grad(set_to_none=False)
    train_pass(net, preconditioners[0], images(4))
    preconditioners[0].step()
    assert len(preconditioners[0].events) == 4  # zeroed gradients are fresh


def test_a_forgotten_zero_grad_is_an_event_at_the_next_step():
    """Where nothing happens between two steps, a plain step tells too."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=50)
    for index in range(2):
        train_pass(net, preconditioner, images(index))
        preconditioner.step()
    assert preconditioner.events == {f"used_gradient:{name}": 1 for name in ("0", "2", "5", "7")}


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_preconditioner_made_anew_takes_gradients_as_fresh(set_to_none):
    """After remove_hooks(), or once the old one is gone, with plain steps in between, and with weights exchanged."""
    net = make_net()
    weights = [net[5].weight, nn.Parameter(net[5].weight.detach().clone())]
    preconditioner, state = None, None
    for index in range(6):
        if index % 2 == 0:
            if preconditioner is not None:
                state = preconditioner.state_dict()
                preconditioner.remove_hooks()
            preconditioner = KroneckerPreconditioner(net, inverse_period=2)
            if state is not None:
                preconditioner.load_state_dict(state)
        net.zero_grad(set_to_none=set_to_none)
        train_pass(net, preconditioner, images(index))
        preconditioner.step()
        net[5].weight = weights[(index + 1) % 2]
        net.zero_grad(set_to_none=set_to_none)
        F.cross_entropy(net(images(9)), LABELS).backward()  # a plain step of another optimizer
    del preconditioner
    assert not any(parameter._post_accumulate_grad_hooks for parameter in net.parameters())


def test_weights_can_be_swapped_after_steps():
    """Nothing refers weakly to weights or gradients, which conversions that swap tensors forbid."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=2)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        for index in range(4):
            net.zero_grad()
            train_pass(net, preconditioner, images(index))
            preconditioner.step()
            net.load_state_dict(copy.deepcopy(net.state_dict()))
        preconditioner.remove_hooks()
        net.float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


def test_a_gradient_written_in_place_is_preconditioned():
    """Of one layer, beside others that autograd adds to; of all of them it cannot be told from one used twice."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, inverse_period=5)
    train_pass(net, preconditioner, images())
    preconditioner.step()
    for index in range(2):
        net.zero_grad(set_to_none=False)
        net[:7](images(index)).square().mean().backward()
        own = torch.randn_like(net[7].weight)
        net[7].weight.grad.copy_(own)
        preconditioner.step()
        assert not torch.equal(net[7].weight.grad, own)
    for parameter in net.parameters():
        parameter.grad.copy_(torch.randn_like(parameter))
    with pytest.raises(RuntimeError, match=r"is to be assigned to \.grad, not written into it"):
        preconditioner.step()


def test_single_entries_are_not_judged_by_rounding():
    """Depthwise and one-channel layers, with accumulated and clipped gradients."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 1, 1), nn.Flatten()]
    net = nn.Sequential(*layers, nn.Linear(4, 3))
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    for seed in range(20):
        net.zero_grad()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(2):
            F.cross_entropy(net(torch.randn(8, 4, 4, 4, generator=generator)), LABELS).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        preconditioner.step()
    assert not preconditioner.events


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_outside_of_the_models_forward_count_once(use_reentrant):
    """A loop that checkpoints layers without calling the model, over several steps."""
    counts, results = [], []
    for is_checkpointed in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net, inverse_period=1)
        for index in range(3):
            net.zero_grad()
            x = images(index).requires_grad_()
            hidden = checkpoint(net[:5], x, use_reentrant=use_reentrant) if is_checkpointed else net[:5](x)
            F.cross_entropy(net[5:](hidden), LABELS).backward()
            preconditioner.step()
            counts.append({layer.num_examples for layer in preconditioner.layers})
        results.append([parameter.grad for parameter in net.parameters()])
        assert not preconditioner.events
    assert all(count == {8} for count in counts)
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def data_zeroed(net, preconditioner):
    """Throw a pass away without a trace in the version of its gradient."""
    train_pass(net, preconditioner, images(5))
    for parameter in net.parameters():
        parameter.grad.data.zero_()
    train_pass(net, preconditioner, images())


def undone(net, preconditioner):
    """Take a second pass back."""
    train_pass(net, preconditioner, images())
    saved = [parameter.grad.clone() for parameter in net.parameters()]
    train_pass(net, preconditioner, images(5))
    for parameter, grad in zip(net.parameters(), saved, strict=True):
        parameter.grad.copy_(grad)


def restored(net, preconditioner):
    """Keep a gradient apart, take another pass, and put the first one back."""
    train_pass(net, preconditioner, images())
    saved = [parameter.grad for parameter in net.parameters()]
    net.zero_grad()
    train_pass(net, preconditioner, images(5))
    for parameter, grad in zip(net.parameters(), saved, strict=True):
        parameter.grad = grad


def zeroed_in_place(net, preconditioner):
    """Zero gradients before they are used."""
    train_pass(net, preconditioner, images())
    net.zero_grad(set_to_none=False)


def added_by_hand(net, preconditioner):
    """Add gradients up apart, zeroing them between the micro-batches."""
    sums = [torch.zeros_like(parameter) for parameter in net.parameters()]
    for seed in range(3):
        net.zero_grad()
        train_pass(net, preconditioner, images(seed))
        for total, parameter in zip(sums, net.parameters(), strict=True):
            total += parameter.grad
    for total, parameter in zip(sums, net.parameters(), strict=True):
        parameter.grad = total


REPLACING = [data_zeroed, undone, restored, zeroed_in_place, added_by_hand]


@pytest.mark.parametrize("settings", [SETTINGS[0], SETTINGS[3], SETTINGS[4]], ids=str)
@pytest.mark.parametrize("loop", REPLACING, ids=lambda loop: loop.__name__)
def test_gradients_replaced_behind_the_back_are_named(loop, settings, caplog):
    """The statistics are of passes that are not in ``.grad``: each layer is named."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net, **settings)
    loop(net, preconditioner)
    preconditioner.step()
    assert preconditioner.events == {f"gradient_replaced:{name}": 1 for name in ("0", "2", "5", "7")}
    assert "its gradient at step() is zero, or not that of the passes that its statistics" in caplog.text


def test_a_use_of_the_weight_in_a_backward_pass_of_its_own_is_named():
    """As in one with the calls; a pass inside paused() that adds nothing does not hide it."""
    for is_paused in (False, True):
        net = make_net()
        preconditioner = KroneckerPreconditioner(net)
        if is_paused:
            with preconditioner.paused():
                adversarial(net, preconditioner)
        train_pass(net, preconditioner, images())
        net[5].weight.abs().sum().backward()
        preconditioner.step()
        assert preconditioner.events == {"gradient_not_explained:5": 1}


def test_a_state_loaded_before_the_step_keeps_what_the_gradient_carries():
    """Under ``auto`` the sides that a plain step's gradient carries are not applied once more."""
    grads = []
    for application in ("weight", "auto"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.Flatten(), nn.Linear(80, 3)).to(DTYPE)
        preconditioner = KroneckerPreconditioner(net, application=application, inverse_period=5)
        for index in range(2):
            net.zero_grad()
            x = torch.randn(8, 3, 4, 4, dtype=DTYPE, generator=torch.Generator().manual_seed(index))
            F.cross_entropy(net(x), LABELS).backward()
            if index:
                preconditioner.load_state_dict(copy.deepcopy(preconditioner.state_dict()))
            preconditioner.step()
        grads.append(net[0].weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-14)


def test_passes_that_never_land_take_no_memory():
    """Forward passes without a backward pass, and backward passes that leave ``.grad`` alone, are let go of."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net)
    for index in range(3):
        evaluation(net, preconditioner)
        adversarial(net, preconditioner)
        outputs = net(images(index))
        del outputs
    assert not any(layer.statistics.open_calls for layer in preconditioner.layers)
    train_pass(net, preconditioner, images())
    preconditioner.step()
    assert {layer.num_examples for layer in preconditioner.layers} == {8}


def test_a_copy_of_the_model_in_a_library_less_place_is_no_concern_of_the_original():
    """A deep copy's passes neither land nor count."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net)
    twin = copy.deepcopy(net)
    F.cross_entropy(twin(images()), LABELS).backward()
    assert all(not layer.statistics.num_counted for layer in preconditioner.layers)
