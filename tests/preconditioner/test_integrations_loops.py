"""Training loops of others: mixed precision, accumulation, clipping, optimizers, schedules, closures, torch.func."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from kfac_sua.preconditioner import KroneckerPreconditioner

DTYPE = torch.float64
SETTINGS = [
    {"structure": "kfac"},
    {"structure": "sua", "group_size": 8},
    {"structure": "sua", "application": "auto"},
    {"structure": "kfac", "ema_decay": 0.9, "weight_sharing": "reduce"},
    {"structure": "kfac", "damping_rule": "exact"},
]


def make_net(dtype: torch.dtype = DTYPE) -> nn.Module:
    """Return a small net without batch statistics; some of its parameters are not preconditioned."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 20, 3, bias=False),
        nn.GroupNorm(4, 20),
        nn.ReLU(inplace=True),
        nn.Conv2d(20, 24, 3, bias=False),
        nn.Flatten(),
        nn.Linear(24, 3),
    ]
    return nn.Sequential(*layers).to(dtype)


def batch(index: int, dtype: torch.dtype = DTYPE) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mini-batch ``index``, of six examples."""
    generator = torch.Generator().manual_seed(index)
    inputs = torch.randn(6, 3, 5, 5, dtype=DTYPE, generator=generator).to(dtype)
    return inputs, torch.randint(0, 3, (6,), generator=generator)


def start(net, **options) -> KroneckerPreconditioner:
    """Return a preconditioner that refreshes at every third mini-batch."""
    return KroneckerPreconditioner(net, inverse_period=3, damping=0.1, **options)


def loss_of(net, index: int) -> torch.Tensor:
    """Return the mean loss over mini-batch ``index``."""
    inputs, labels = batch(index, net[0].weight.dtype)
    return nn.functional.cross_entropy(net(inputs), labels)


def preconditioned_grads(net, preconditioner, index: int) -> list[torch.Tensor]:
    """Take one backward pass and one step, and return all gradients."""
    net.zero_grad()
    loss_of(net, index).backward()
    preconditioner.step()
    return [parameter.grad.clone() for parameter in net.parameters()]


def assert_same(first, second, rtol=1e-9, atol=1e-12):
    """Compare two models, or two lists of tensors."""
    pair = [values.parameters() if isinstance(values, nn.Module) else values for values in (first, second)]
    for got, want in zip(*pair, strict=True):
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


# --- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_autocast_with_and_without_a_scaler_stays_close_to_float32(settings, dtype, scaled):
    """Eight steps over three refreshes: losses within the type's rounding, factors and inverses in float32."""
    losses = []
    for is_mixed in (False, True):
        net = make_net(torch.float32)
        preconditioner = start(net, **settings)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=is_mixed and scaled)
        losses.append([])
        for index in range(8):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=is_mixed):
                loss = loss_of(net, index % 2)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            assert preconditioner.step(loss_scale=scaler.get_scale() if scaler.is_enabled() else None)
            scaler.step(optimizer)
            scaler.update()
            losses[-1].append(loss.item())
        layers = preconditioner._layers.values()
        assert {layer.inverse.reference_tensor.dtype for layer in layers} == {torch.float32}
        assert {layer.average.value.gradient.values.dtype for layer in layers if layer.average.value} <= {torch.float32}
    assert losses[0][-1] < 0.7 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], abs=0.03 if dtype is torch.bfloat16 else 0.005)


def test_a_disabled_scaler_gives_a_scale_of_one():
    """The same loop runs with ``GradScaler(enabled=False)``."""
    net, twin = make_net(), make_net()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    preconditioner = start(net)
    loss_of(net, 0).backward()
    assert preconditioner.step(loss_scale=scaler.get_scale())
    assert_same([parameter.grad for parameter in net.parameters()], preconditioned_grads(twin, start(twin), 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_wholly_in_half_precision_keeps_float32_factors(dtype):
    """As ``model.bfloat16()`` makes it: gradients stay in its type, inverses are float32, and the loss falls."""
    net = make_net(dtype)
    preconditioner = start(net)
    losses = []
    for index in range(6):
        net.zero_grad()
        loss = loss_of(net, index % 2)
        loss.backward()
        preconditioner.step()
        with torch.no_grad():
            for parameter in net.parameters():
                assert parameter.grad.dtype == dtype
                parameter -= 0.03 * parameter.grad
        losses.append(loss.item())
    assert {layer.inverse.reference_tensor.dtype for layer in preconditioner._layers.values()} == {torch.float32}
    assert losses[-1] < losses[0]


# --- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_accumulated_gradients_train_as_the_big_batch(settings):
    """Three micro-batches of two, whose losses are divided by three, over six steps in float64."""
    nets = make_net(), make_net()
    for net, micro_batches in zip(nets, (1, 3), strict=True):
        preconditioner = start(net, **settings)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        for index in range(6):
            inputs, labels = batch(index)
            for part, part_labels in zip(inputs.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
                (nn.functional.cross_entropy(net(part), part_labels) / micro_batches).backward()
            preconditioner.step()
            optimizer.step()
            optimizer.zero_grad()
    assert_same(*nets)


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_clipping_after_step_bounds_the_preconditioned_gradient(application):
    """The place for clipping: what the optimizer gets has the norm asked for, and the unclipped direction."""
    net = make_net()
    preconditioner = start(net, structure="sua", application=application)
    preconditioned_grads(net, preconditioner, 0)
    unclipped = preconditioned_grads(net, preconditioner, 1)
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.01)
    total = nn.utils.get_total_norm([parameter.grad for parameter in net.parameters()])
    assert norm > 0.01
    assert total.item() == pytest.approx(0.01, rel=1e-3)
    assert_same([parameter.grad for parameter in net.parameters()], [grad * 0.01 / norm for grad in unclipped], 1e-3)


@pytest.mark.parametrize("refreshes", [True, False])
def test_clipping_before_step_scales_the_result_under_weight(refreshes):
    """The operator is linear, and statistics do not see the clipping: the preconditioned gradient shrinks alike."""
    net, twin = make_net(), make_net()
    grads = []
    for model, clips in ((net, False), (twin, True)):
        preconditioner = start(model)
        for index in range(1 if refreshes else 2):
            model.zero_grad()
            loss_of(model, index).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01) if clips else None
            preconditioner.step()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert_same(grads[1], [grad * 0.01 / (norm + 1e-6) for grad in grads[0]])


def test_weight_decay_of_the_optimizer_is_not_preconditioned():
    """Neither SGD's nor AdamW's: it acts beside the preconditioned gradient."""
    net = make_net()
    preconditioner = start(net)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.3)
    grads = preconditioned_grads(net, preconditioner, 0)
    optimizer.step()
    expected = [old - 0.1 * (grad + 0.3 * old) for old, grad in zip(before, grads, strict=True)]
    assert_same(net, expected)


# --- optimizers -------------------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda net: torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, nesterov=True),
    "adam": lambda net: torch.optim.Adam(net.parameters(), lr=0.01),
    "adamw": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.1),
    "rmsprop": lambda net: torch.optim.RMSprop(net.parameters(), lr=0.003),
    "adagrad": lambda net: torch.optim.Adagrad(net.parameters(), lr=0.03),
    "nadam": lambda net: torch.optim.NAdam(net.parameters(), lr=0.01),
    "groups": lambda net: torch.optim.SGD(
        [{"params": net[0].parameters(), "lr": 0.01}, {"params": [*net[1:].parameters()], "weight_decay": 0.1}], lr=0.1
    ),
    "foreach": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, foreach=True),
    "fused": lambda net: torch.optim.SGD(net.parameters(), lr=0.05, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_takes_the_preconditioned_gradients(name):
    """The parameters after five steps are those of the optimizer fed with these gradients by hand; the loss falls."""
    net = make_net()
    preconditioner = start(net)
    optimizer = OPTIMIZERS[name](net)
    twin = make_net()
    by_hand = OPTIMIZERS[name](twin)
    losses = []
    for index in range(5):
        optimizer.zero_grad()
        loss = loss_of(net, index % 2)
        loss.backward()
        preconditioner.step()
        for parameter, other in zip(net.parameters(), twin.parameters(), strict=True):
            other.grad = parameter.grad.clone()
        optimizer.step()
        by_hand.step()
        losses.append(loss.item())
    assert_same(net, twin, rtol=0, atol=0)
    assert losses[-1] < losses[0]


def test_muon_takes_matrices_and_another_optimizer_the_rest():
    """torch.optim.Muon accepts weights of linear layers alone; both act on preconditioned gradients."""
    net = make_net()
    preconditioner = start(net)
    matrices = [parameter for parameter in net.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in net.parameters() if parameter.dim() != 2]
    optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.SGD(others, lr=0.05, momentum=0.9)]
    losses = []
    for index in range(8):
        net.zero_grad()
        loss = loss_of(net, index % 2)
        loss.backward()
        preconditioner.step()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def closure_of(net, preconditioner, index):
    """Return a closure as optimizers take it, which preconditions inside."""

    def closure():
        net.zero_grad()
        loss = loss_of(net, index)
        loss.backward()
        preconditioner.step()
        return loss

    return closure


def test_a_closure_that_is_called_once_is_an_ordinary_step():
    """With the preconditioner's step inside it, SGD's parameters are those without a closure."""
    net, twin = make_net(), make_net()
    preconditioner, other = start(net), start(twin)
    optimizer, plain = (torch.optim.SGD(model.parameters(), lr=0.05) for model in (net, twin))
    for index in range(5):
        optimizer.step(closure_of(net, preconditioner, index))
        preconditioned_grads(twin, other, index)
        plain.step()
    assert_same(net, twin, rtol=0, atol=0)


def test_lbfgs_counts_every_evaluation_as_a_step():
    """LBFGS evaluates its closure several times; periods count evaluations, and the loss falls."""
    net = make_net()
    preconditioner = start(net)
    optimizer = torch.optim.LBFGS(net.parameters(), lr=0.02, max_iter=4)
    first = optimizer.step(closure_of(net, preconditioner, 0)).item()
    assert preconditioner.num_steps == 4
    assert loss_of(net, 0).item() < first


def test_passes_whose_gradient_is_zeroed_do_not_count_beside_a_closure():
    """The loss evaluated once more for a printed value, several evaluations, and the step outside the closure."""
    net = make_net()
    preconditioner = start(net)
    loss_of(net, 0)

    def closure():
        net.zero_grad()
        loss = loss_of(net, 0)
        loss.backward()
        return loss

    torch.optim.LBFGS(net.parameters(), max_iter=2).step(closure)
    preconditioner.step()
    assert {layer.num_examples for layer in preconditioner.layers} == {6}
    assert not preconditioner.events


@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
            optimizer, max_lr=0.1, total_steps=8, cycle_momentum=False
        ),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6),
    ],
    ids=["lambda", "one_cycle", "cosine"],
)
def test_learning_rate_schedules_scale_the_update(make_scheduler):
    """Every update of plain SGD is the preconditioned gradient times the rate of the moment."""
    net = make_net()
    preconditioner = start(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = make_scheduler(optimizer)
    rates = []
    for index in range(5):
        before = [parameter.detach().clone() for parameter in net.parameters()]
        grads = preconditioned_grads(net, preconditioner, index)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        assert_same(net, [old - rates[-1] * grad for old, grad in zip(before, grads, strict=True)])
    assert len(set(rates)) == 5


# --- passes that are not the training step's --------------------------------------------------------------------------


@pytest.mark.parametrize("application", ["weight", "auto"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_evaluation_between_steps_changes_nothing(application, mode):
    """On mini-batches with statistics and without, in evaluation mode and in training mode."""
    nets = make_net(), make_net()
    for net, evaluates in zip(nets, (False, True), strict=True):
        preconditioner = start(net, application=application)
        for index in range(5):
            net.zero_grad()
            loss = loss_of(net, index)
            if evaluates:
                with mode():
                    loss_of(net.eval(), 9)
                    loss_of(net.train(), 8)
            loss.backward()
            if evaluates:
                with mode():
                    loss_of(net, 7)
            preconditioner.step()
            with torch.no_grad():
                for parameter in net.parameters():
                    parameter -= 0.05 * parameter.grad
    assert_same(*nets, rtol=0, atol=0)


def test_evaluation_with_gradients_enabled_leaves_no_trace():
    """On a mini-batch with statistics, such a pass has no gradient that reaches ``.grad``."""
    nets = make_net(), make_net()
    for net, evaluates in zip(nets, (False, True), strict=True):
        preconditioner = start(net)
        if evaluates:
            loss_of(net.eval(), 5)
        loss_of(net.train(), 0).backward()
        preconditioner.step()
        assert not preconditioner.events
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_two_losses_of_one_forward_pass_are_to_be_added_up():
    """Two backward passes are refused with that cure; one over their sum is not."""
    net, twin = make_net(), make_net()
    refusing = start(net)
    outputs = net(batch(0)[0])
    outputs.square().sum(1).mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="add losses up for one backward pass"):
        nn.functional.cross_entropy(outputs, batch(0)[1]).backward()
    accepting = start(twin)
    outputs = twin(batch(0)[0])
    (outputs.square().sum(1).mean() + nn.functional.cross_entropy(outputs, batch(0)[1])).backward()
    assert accepting.step()
    assert not refusing.num_steps


def example_loss(net):
    """Return the loss of one example as a function of parameters."""

    def loss(parameters, example, label):
        return nn.functional.cross_entropy(functional_call(net, parameters, (example[None],)), label[None])

    return loss


@pytest.mark.parametrize("application", ["weight", "auto"])
@pytest.mark.parametrize("index", [0, 1], ids=["with_statistics", "without"])
def test_passes_of_torch_func_are_plain_and_leave_no_trace(application, index):
    """Per-example gradients by vmap(grad), Jacobian products and lent parameters, in the midst of a mini-batch."""
    nets = make_net(), make_net()
    for net, transforms in zip(nets, (False, True), strict=True):
        preconditioner = start(net, structure="sua", application=application)
        for step in range(index):
            preconditioned_grads(net, preconditioner, step)
        net.zero_grad()
        loss = loss_of(net, index)
        if transforms:
            check_functional_passes(net)
        loss.backward()
        preconditioner.step()
    assert_same(*([parameter.grad for parameter in net.parameters()] for net in nets), rtol=0, atol=0)


def check_functional_passes(net):
    """Compare gradients by torch.func with those of a net that has no preconditioner."""
    plain = copy.deepcopy(net)
    plain.zero_grad()
    inputs, labels = batch(4)
    nn.functional.cross_entropy(plain(inputs), labels).backward()
    expected = [parameter.grad for parameter in plain.parameters()]
    own = {name: parameter.detach() for name, parameter in net.named_parameters()}
    each = vmap(grad(example_loss(net)), in_dims=(None, 0, 0))(own, inputs, labels)
    assert_same([values.mean(0) for values in each.values()], expected)
    assert_same([vmap(net)(inputs[:, None])[:, 0].detach()], [plain(inputs).detach()])  # with gradients enabled
    leaf = inputs.clone().requires_grad_()
    by_inputs = torch.autograd.grad(plain(leaf).square().sum(), leaf)
    assert_same([grad(lambda values: net(values).square().sum())(inputs)], by_inputs)
    lent = {name: parameter.detach().clone().requires_grad_() for name, parameter in net.named_parameters()}
    lent = {name: parameter * 1 for name, parameter in lent.items()}
    loss = nn.functional.cross_entropy(functional_call(net, lent, (inputs,)), labels)
    assert_same(torch.autograd.grad(loss, list(lent.values())), expected)
    _, tangent = torch.func.jvp(lambda values: functional_call(net, own, (values,)), (inputs,), (inputs,))
    assert tangent.isfinite().all()


def test_calls_of_the_models_own_parameters_through_functional_call_are_the_training_steps():
    """With its own parameters functional_call is an ordinary pass."""
    net, twin = make_net(), make_net()
    preconditioner, other = start(net), start(twin)
    inputs, labels = batch(0)
    nn.functional.cross_entropy(functional_call(net, dict(net.named_parameters()), (inputs,)), labels).backward()
    preconditioner.step()
    assert_same([parameter.grad for parameter in net.parameters()], preconditioned_grads(twin, other, 0))


def test_a_training_loss_under_vmap_is_an_error():
    """Nothing of it can be recorded, and it is not passed over."""
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).to(DTYPE)
    preconditioner = start(net)
    vmap(net)(torch.randn(6, 4, dtype=DTYPE)).square().sum(1).mean().backward()
    with pytest.raises(RuntimeError, match="no backward pass through the model was recorded"):
        preconditioner.step()
