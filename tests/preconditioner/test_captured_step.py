"""What a captured step does beside replaying: counts, captures anew what has changed, refuses what it cannot hold."""

import copy
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.utils.prune as prune
from captured_training import LR, PERIOD, Case, Training, batches, make_net, muon, num_plain, rebind, sgd, with_dropout
from graph_emulator import DanglingError, EmulatedGraph
from identical import assert_identical
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from kfac_sua.preconditioner import AdaptiveDamping, CapturedStep, KroneckerPreconditioner
from kfac_sua.preconditioner.captured.inspection import StepInspection
from kfac_sua.preconditioner.captured.step import MOST_FUTILE_CAPTURES, MOST_LEFTOVERS, WARM_UP_STEPS

SUA = {"structure": "sua"}
SHORT = {"structure": "sua", "inverse_period": 10}
FIRST_REPLAY = 1 + WARM_UP_STEPS  # the refresh and the steps before the capture


def both(case: Case, function: Callable[..., Tensor] | None = None) -> tuple[Training, Training]:
    """Return the same training, eager and captured; with a function of it and a mini-batch in place of its own."""
    eager, captured = Training(case, is_captured=False), Training(case, is_captured=True)
    if function is not None:
        eager._step = partial(function, eager)
        captured.captured._function = partial(function, captured)
    return eager, captured


def assert_alike(eager: Training, captured: Training) -> None:
    """Check that two trainings are at the same point, bit for bit."""
    assert_identical(captured.state(), eager.state())


def take(trainings: tuple[Training, ...], num: int, start: int = 0, size: int = 4) -> None:
    """Take the same steps in all trainings, with the same losses."""
    losses = [training.take(num, start, size) for training in trainings]
    assert all(one == losses[0] for one in losses)


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [None, SUA, {"ema_decay": 0.5, "factor_period": 5}])
def test_every_step_is_counted_and_most_are_replays(settings):
    """Only refreshes, measurements and the two steps before the capture are eager."""
    training = Training(case := Case(settings), is_captured=True)
    calls = []
    function = training.captured._function
    training.captured._function = lambda *inputs: calls.append(inputs) or function(*inputs)
    training.take(45)
    expected = num_plain(case, 45) - WARM_UP_STEPS
    assert (training.captured.num_captures, training.captured.num_replays) == (1, expected)
    assert len(calls) == 45 - expected + 1  # the capture calls it too
    if settings is not None:
        assert training.preconditioner.num_steps == 45


def test_after_a_replay_results_are_the_graphs():
    """Loss, gradients and the clip's scale are the same tensors after every replay, with other numbers."""
    training = Training(Case({"kl_clip": 1e-3}), is_captured=True)
    training.take(FIRST_REPLAY)

    def results() -> list[Tensor]:
        loss = training.captured(*next(batches(1, start=training.preconditioner.num_steps)))
        return [loss, *(parameter.grad for parameter in training.net.parameters()), training.preconditioner.kl_scale]

    first = results()
    numbers = [tensor.clone() for tensor in first]
    second = results()
    assert all(one is other for one, other in zip(first, second, strict=True))
    assert not any(torch.equal(one, number) for one, number in zip(second, numbers, strict=True))


def test_events_of_a_step_are_counted_at_each_replay():
    """A layer frozen since is reported as often as by eager steps."""
    trainings = both(Case(SUA))
    take(trainings, 5)
    for training in trainings:
        training.net[4].weight.requires_grad_(False)
    take(trainings, 12, start=5)
    assert trainings[1].preconditioner.events["frozen:4"] == 12
    assert trainings[1].captured.num_captures == 2
    assert_alike(*trainings)


def test_observers_are_shown_their_steps():
    """Adaptive damping looks at every fifth step, which is eager, and ends where it does without captures."""
    trainings = both(Case({"structure": "kfac", "inverse_period": 10}))
    observers = [AdaptiveDamping(training.preconditioner, period=5) for training in trainings]
    for images, labels in batches(40):
        for training, adaptive in zip(trainings, observers, strict=True):
            loss = training._step(images, labels).clone()
            if adaptive.is_due:
                with adaptive.measuring():
                    after = nn.functional.cross_entropy(training.net(images), labels)
                adaptive.update(loss, after)
    assert observers[0].state_dict() == observers[1].state_dict()
    assert trainings[0].preconditioner.damping == trainings[1].preconditioner.damping != 0.1
    assert_alike(*trainings)
    assert 15 < trainings[1].captured.num_replays < 40 - 8


@pytest.mark.parametrize("settings", [None, SUA])
def test_on_a_cpu_it_calls_the_function(settings):
    """Without a graph nothing is captured, and the reason says so."""
    eager, captured = both(Case(settings))
    captured.captured._given_graph = None
    take((eager, captured), 5)
    assert captured.captured.why_eager == "the model is on cpu, and steps are captured on CUDA devices"
    assert captured.captured.num_captures == captured.captured.num_replays == 0
    assert_alike(eager, captured)


# --- what captures anew -----------------------------------------------------------------------------------------------


def set_lr(training: Training, value: float = LR / 3) -> None:
    """Change the learning rate of all groups."""
    for optimizer in training.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def set_group(key: str, value: Any):
    """Return what changes a number in the optimizer's groups."""
    return lambda training: training.optimizers[0].param_groups[0].update({key: value})


def load(training: Training) -> None:
    """Load the training's own states of some steps before."""
    training.net.load_state_dict(training.saved["net"])
    training.optimizers[0].load_state_dict(copy.deepcopy(training.saved["optimizer"]))
    if training.preconditioner is not None:
        training.preconditioner.load_state_dict(training.saved["preconditioner"])


def new_data(training: Training) -> None:
    """Put a parameter's numbers elsewhere."""
    training.net[0].weight.data = training.net[0].weight.data.clone()


def new_buffer(training: Training) -> None:
    """Replace a running mean."""
    training.net[1].running_mean = training.net[1].running_mean.clone() * 1.5


def new_state(training: Training) -> None:
    """Replace a momentum."""
    state = training.optimizers[0].state[training.net[0].weight]
    state["momentum_buffer"] = state["momentum_buffer"].clone() * 1.5


def new_inverse(training: Training) -> None:
    """Replace an inverse."""
    layer = training.preconditioner.layers[1]
    layer.inverse = copy.deepcopy(layer.inverse)
    training.preconditioner.go_to_step(training.preconditioner.num_steps)


def add_hook(training: Training) -> None:
    """Change a layer's output from now on."""
    training.hook = training.net[4].register_forward_hook(lambda module, args, output: output * 1.5)


def replace_hook(training: Training) -> None:
    """Put another hook in place of one that was there from the start."""
    training.hook.remove()
    training.net[0].weight.register_hook(lambda grad: grad * 1.5)


def change_attribute(training: Training) -> None:
    """Change a number that a module reads in its forward pass."""
    training.net[1].momentum = 0.5


def replace_groups(training: Training) -> None:
    """Add a group to the optimizer, of a parameter that the first one has had."""
    group = training.optimizers[0].param_groups[0]
    training.optimizers[0].add_param_group({"params": [group["params"].pop()], "lr": LR / 5})


def freeze(training: Training) -> None:
    """Freeze a layer."""
    training.net[4].weight.requires_grad_(False)


def to_evaluation(training: Training) -> None:
    """Let a normalisation layer use its running statistics."""
    training.net[1].eval()


def replace_activation(training: Training) -> None:
    """Replace a module without parameters."""
    training.net[6] = nn.Tanh()


def reduced_precision(training: Training) -> None:
    """Change the precision of products of the whole process."""
    del training
    torch.backends.mkldnn.matmul.fp32_precision = "ieee"


def deterministic(training: Training) -> None:
    """Ask the whole process for deterministic operations."""
    del training
    torch.use_deterministic_algorithms(True)


def drop_gradients(training: Training) -> None:
    """Drop the gradients of the last step outside of the function."""
    training.net.zero_grad(set_to_none=True)


CHANGES = {
    "lr": set_lr,
    "momentum": set_group("momentum", 0.5),
    "weight_decay": set_group("weight_decay", 0.1),
    "states": load,
    "parameter": new_data,
    "buffer": new_buffer,
    "momentum_buffer": new_state,
    "inverse": new_inverse,
    "hook": add_hook,
    "other hook": replace_hook,
    "attribute": change_attribute,
    "group": replace_groups,
    "freeze": freeze,
    "eval": to_evaluation,
    "module": replace_activation,
    "precision": reduced_precision,
    "determinism": deterministic,
    "grads": drop_gradients,
    "layout": lambda training: training.net.to(memory_format=torch.channels_last),
    "double": lambda training: training.net.double(),
}


@pytest.fixture
def switches():
    """Restore the switches of the process."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.mkldnn.matmul.fp32_precision = before


# With inverses that are applied in the backward pass, and without any, what may matter there in particular.
AUTO = {"structure": "kfac", "application": "auto"}
CHANGED = [
    *((SUA, name) for name in CHANGES),
    *(
        (AUTO, name)
        for name in ("states", "inverse", "other hook", "freeze", "module", "precision", "layout", "double")
    ),
    *((None, name) for name in ("lr", "states", "momentum_buffer", "hook", "group", "eval", "grads", "double")),
]
# Each change once in the fast tests.
FAST = dict.fromkeys(CHANGES, SUA) | {"inverse": AUTO, "other hook": AUTO, "module": AUTO, "layout": AUTO}
FAST |= {"momentum_buffer": None, "hook": None, "group": None, "eval": None}


@pytest.mark.usefixtures("switches")
@pytest.mark.parametrize(
    ("settings", "name"),
    [pytest.param(*one, marks=() if FAST[one[1]] is one[0] else pytest.mark.slow) for one in CHANGED],
    ids=str,
)
def test_what_a_call_would_notice_captures_anew(settings, name):
    """After each change training goes on bit for bit as eagerly; the second capture is the last."""
    trainings = both(Case(settings))
    for training in trainings:
        training.hook = training.net[0].weight.register_hook(lambda grad: grad * 0.5)
    take(trainings, 6)
    for training in trainings:
        training.saved = copy.deepcopy(
            {
                "net": training.net.state_dict(),
                "optimizer": training.optimizers[0].state_dict(),
                "preconditioner": training.preconditioner and training.preconditioner.state_dict(),
            }
        )
    take(trainings, 3, start=6)
    for training in trainings:
        CHANGES[name](training)
    losses = []
    for training in trainings:
        dtype = next(training.net.parameters()).dtype
        losses.append([float(training._step(images.to(dtype), labels)) for images, labels in batches(30, start=9)])
    assert losses[0] == losses[1]
    assert_alike(*trainings)
    assert trainings[1].captured.why_eager == ""
    # Gradients that the function drops unread may be missing.
    assert trainings[1].captured.num_captures == (1 if name == "grads" else 2)
    assert trainings[1].captured.num_replays > 20


def wrap_classifier(net: nn.Sequential) -> None:
    """Put the classifier inside of another module."""
    net[-1] = nn.Sequential(net[-1], nn.Linear(10, 10))


def prune_classifier(net: nn.Sequential) -> None:
    """Mask the classifier's weight."""
    prune.l1_unstructured(net[-1], "weight", 0.5)


def drop_bias(net: nn.Sequential) -> None:
    """Take the classifier's bias away."""
    net[-1].bias = None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (wrap_classifier, "was removed, and is"),
        (prune_classifier, "its weight is computed"),
        (drop_bias, "lost its bias"),
    ],
)
def test_a_layer_that_changes_between_replays_is_refused(change, sentence):
    """The step falls back to the function, whose preconditioner sees what is not the layer that it was made for."""
    training = Training(Case(SUA), is_captured=True)
    training.take(FIRST_REPLAY + 2)
    assert training.captured.num_replays > 0
    before = training.preconditioner.num_steps
    change(training.net)
    with pytest.raises(RuntimeError, match=f"{sentence}.*make the preconditioner anew"):
        training.take(1, start=before)
    assert training.preconditioner.num_steps == before


def of_flatten(module: nn.Module, *grads: Any) -> tuple[Tensor] | None:
    """Change the gradient in one module, as a backward hook of all of them."""
    return (grads[0][0] * 0.5,) if isinstance(module, nn.Flatten) else None


def with_activations_of_their_own() -> nn.Sequential:
    """Return the net without operations in place, which backward hooks of all modules do not allow."""
    net = make_net()
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # the mini-batch requires no gradient
@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_pre_hook,
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ],
)
def test_a_hook_of_all_modules_captures_anew(register):
    """One that is registered between two replays changes what comes after, as it does in eager steps."""
    trainings = both(Case(SUA, make=with_activations_of_their_own))
    take(trainings, 8)
    handle = register(of_flatten)
    try:
        take(trainings, 8, start=8)
    finally:
        handle.remove()
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 2


@pytest.mark.parametrize("options", [{"fused": True}, {"fused": True, "nesterov": True}])
def test_learning_rate_of_a_fused_optimizer_is_read_from_the_device(options):
    """A schedule captures nothing anew, and the groups hold numbers outside of the step."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, **options)))
    for epoch in range(5):
        for training in trainings:
            set_lr(training, LR * 0.5**epoch)
        take(trainings, 9, start=9 * epoch)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 1
    assert trainings[1].optimizers[0].param_groups[0]["lr"] == LR * 0.5**4


def test_learning_rate_of_groups_that_a_loaded_state_brings():
    """They are new groups: the step is captured once more, and no schedule after that does it again."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, fused=True)))
    take(trainings, 8)
    for training in trainings:
        training.optimizers[0].load_state_dict(copy.deepcopy(training.optimizers[0].state_dict()))
    for step in range(20):
        for training in trainings:
            set_lr(training, LR / (1 + step))
        take(trainings, 1, start=8 + step)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 2


def test_learning_rate_of_groups_that_are_loaded_between_the_steps_before_a_capture():
    """The first of the two that are compared puts it on the device, where it is there to stay: no reason to refuse."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, fused=True)))
    take(trainings, WARM_UP_STEPS - 1)
    for training in trainings:
        training.optimizers[0].load_state_dict(copy.deepcopy(training.optimizers[0].state_dict()))
    take(trainings, 12, start=WARM_UP_STEPS - 1)
    assert trainings[1].captured.why_eager == ""
    assert trainings[1].captured.num_captures == 1
    assert_alike(*trainings)


def test_learning_rate_that_changes_just_before_the_capture():
    """To write it is no part of the graph: later ones are not overwritten by it."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, fused=True)))
    for step in range(12):
        for training in trainings:
            set_lr(training, LR / (1 + step))
        take(trainings, 1, start=step)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 1


def test_learning_rate_that_is_a_tensor_is_the_callers():
    """It is read where it lies; another tensor captures the step anew."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, fused=True, lr=torch.tensor(LR))))
    take(trainings, 8)
    for training in trainings:
        training.optimizers[0].param_groups[0]["lr"].mul_(0.5)
    take(trainings, 8, start=8)
    assert trainings[1].captured.num_captures == 1
    for training in trainings:
        training.optimizers[0].param_groups[0]["lr"] = torch.tensor(LR / 7)
    take(trainings, 8, start=16)
    assert trainings[1].captured.num_captures == 2
    assert_alike(*trainings)


@pytest.mark.parametrize("cycles_momentum", [False, True])
def test_one_cycle(cycles_momentum):
    """A learning rate that changes in every step is read from the device; a momentum that does too is refused."""
    trainings = both(Case(SUA, optimizer=lambda net: sgd(net, fused=True)))
    schedules = [
        torch.optim.lr_scheduler.OneCycleLR(one.optimizers[0], LR, total_steps=60, cycle_momentum=cycles_momentum)
        for one in trainings
    ]
    for step in range(45):
        take(trainings, 1, start=step)
        for schedule in schedules:
            schedule.step()
    assert_alike(*trainings)
    expected = "as this keeps changing: momentum of group 0" if cycles_momentum else ""
    assert trainings[1].captured.why_eager.endswith(expected)
    assert cycles_momentum or trainings[1].captured.num_captures == 1


def test_schedulers_of_pytorch_work_outside():
    """``StepLR`` moves the learning rate of Muon, which is part of the graph, and of SGD."""
    trainings = both(Case(SUA, optimizer=muon))
    schedules = [[torch.optim.lr_scheduler.StepLR(one, 1) for one in training.optimizers] for training in trainings]
    for epoch in range(3):
        take(trainings, 9, start=9 * epoch)
        for schedule in (one for both_of_one in schedules for one in both_of_one):
            schedule.step()
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 3


def test_damping_enters_with_the_next_refresh():
    """A damping that is set has no influence on replays, and captures nothing anew."""
    trainings = both(Case({"structure": "kfac", "damping_rule": "exact"}))
    take(trainings, 10)
    for training in trainings:
        training.preconditioner.damping = 3.0
    take(trainings, 3 * PERIOD, start=10)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 1


def test_a_refresh_of_other_shapes_gets_new_buffers():
    """Where the Woodbury form has fewer rows, the inverses lie elsewhere and the step is captured anew."""
    trainings = both(Case({"structure": "kfac", "inverse_method": "low_rank"}))
    take(trainings, PERIOD)
    take(trainings, 1, start=PERIOD, size=5)
    take(trainings, PERIOD + 6, start=PERIOD + 1)
    assert trainings[1].captured.num_captures == 3
    assert_alike(*trainings)


def test_a_refresh_of_other_shapes_between_the_steps_before_a_capture():
    """Inverses that it made are there to stay: that the next step reads them is no reason to refuse."""
    trainings = both(Case({"structure": "kfac", "inverse_method": "low_rank", "inverse_period": 4, "kl_clip": 1e-3}))
    take(trainings, 1)
    take(trainings, 2, start=1)
    take(trainings, 1, start=3, size=3)
    take(trainings, 1, start=4, size=5)
    take(trainings, 3, start=5)
    take(trainings, 1, start=8, size=5)
    take(trainings, 20, start=9)
    assert trainings[1].captured.why_eager == ""
    assert trainings[1].captured.num_replays > 8
    assert_alike(*trainings)


def test_a_short_mini_batch_is_taken_eagerly():
    """The last one of an epoch, of another shape, interrupts nothing."""
    trainings = both(Case(SUA))
    for epoch in range(3):
        take(trainings, 9, start=10 * epoch)
        take(trainings, 1, start=10 * epoch + 9, size=3)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 1
    # Without two refreshes, three short mini-batches, and the steps before the capture.
    assert trainings[1].captured.num_replays == 30 - 2 - 3 - WARM_UP_STEPS


def test_mini_batches_that_stay_of_another_shape_are_captured():
    """The first is taken eagerly, and from the second on the new shape is the usual one."""
    trainings = both(Case({"structure": "sua", "inverse_method": "cholesky"}))
    take(trainings, 10)
    take(trainings, 9, start=10, size=5)
    assert trainings[1].captured.num_captures == 2
    take(trainings, 30, start=19, size=5)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 2


@pytest.mark.parametrize("where", ["before", "after"])
@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_may_be_zeroed_anywhere(where, to_none):
    """Inside the function, at its beginning or its end, by dropping them or by writing zeros."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        (optimizer,) = training.optimizers
        if where == "before":
            optimizer.zero_grad(set_to_none=to_none)
        loss = nn.functional.cross_entropy(training.net(images), labels)
        loss.backward()
        training.preconditioner.step()
        optimizer.step()
        if where == "after":
            optimizer.zero_grad(set_to_none=to_none)
        return loss.detach()

    trainings = both(Case(SHORT), function)
    take(trainings, 25)
    assert (trainings[1].captured.why_eager, trainings[1].captured.num_captures) == ("", 1)
    assert_alike(*trainings)


@pytest.mark.parametrize("outside", [True, False])
def test_gradients_that_are_never_zeroed_add_up(outside):
    """They do in eager steps; a captured one that finds gradients is not replayed where there are none."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(training.net(images), labels)
        loss.backward()
        training.optimizers[0].step()
        return loss.detach()

    trainings = both(Case(None, optimizer=lambda net: sgd(net, lr=LR / 10)), function)
    for number in range(25):
        if outside and number % 12 == 0:
            for training in trainings:
                training.optimizers[0].zero_grad()
        take(trainings, 1, start=number)
    assert trainings[1].captured.why_eager == ""
    assert_alike(*trainings)
    assert trainings[1].captured.num_replays > 10


# --- what is captured with the step -----------------------------------------------------------------------------------


def test_dropout_draws_as_in_eager_steps_also_after_a_resume():
    """The generator's state that a resume sets is where the next replay goes on."""
    case = Case(SUA, make=with_dropout)
    eager, captured = both(case)
    losses = []
    for training in (eager, captured):
        torch.manual_seed(1)
        losses.append(training.take(15))
        generator = torch.get_rng_state()
        losses[-1] += training.take(5, start=15)
        torch.set_rng_state(generator)
        losses[-1] += training.take(15, start=20)
    assert losses[0] == losses[1]
    assert captured.captured.num_captures == 1
    assert_alike(eager, captured)


def assert_captured_once(function: Callable[[Training, Tensor, Tensor], Tensor]) -> None:
    """Over 25 steps and three refreshes a function is captured once, and trains as it does eagerly."""
    trainings = both(Case(SHORT), function)
    take(trainings, 25)
    assert (trainings[1].captured.num_captures, trainings[1].captured.num_replays) == (1, 25 - 3 - WARM_UP_STEPS)
    assert_alike(*trainings)


def test_micro_batches_are_accumulated_inside():
    """One call that runs several backward passes before its step is captured as one."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        (optimizer,) = training.optimizers
        optimizer.zero_grad()
        for part in range(2):
            loss = nn.functional.cross_entropy(training.net(images[part::2]), labels[part::2]) / 2
            loss.backward()
        training.preconditioner.step()
        optimizer.step()
        return loss.detach()

    assert_captured_once(function)


def test_checkpointed_activations():
    """Activation checkpointing, which runs parts of the forward pass again, needs no random numbers kept."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        (optimizer,) = training.optimizers
        optimizer.zero_grad()
        middle = checkpoint(training.net[:4], images, use_reentrant=False, preserve_rng_state=False)
        loss = nn.functional.cross_entropy(training.net[4:](middle), labels)
        loss.backward()
        training.preconditioner.step()
        optimizer.step()
        return loss.detach()

    assert_captured_once(function)


def test_a_region_of_autocast_around_the_step():
    """Casts that such a region keeps are not part of the graph; without the region the step is captured anew."""
    trainings = both(Case(SUA))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert len({tuple(training.take(3)) for training in trainings}) == 1
    for start in (3, 11):
        for training in trainings:
            for images, labels in batches(8, start=start):
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    training._step(images, labels)
    take(trainings, 8, start=19)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 2


def test_a_function_without_arguments_reads_what_stays_in_place():
    """Static tensors of the caller, written with ``copy_``, do as well."""
    eager, captured = both(Case(SUA))
    images, labels = next(batches(1))
    images, labels = images.clone(), labels.clone()
    step = CapturedStep(
        lambda: captured.function(images, labels), captured.net, captured.optimizers, captured.preconditioner,
        graph=captured.graph,
    )  # fmt: skip
    for more, others in batches(25):
        images.copy_(more)
        labels.copy_(others)
        eager.function(images, labels)
        step()
    assert_alike(eager, captured)
    assert step.num_replays == 25 - 2 - WARM_UP_STEPS


@pytest.mark.parametrize("settings", [None, SHORT, SHORT | {"kl_clip": 1e-3}])
def test_a_function_without_arguments_reads_its_mini_batch_by_a_position(settings):
    """It gathers rows by a tensor that it advances in place: replays, refreshes and the capture alike."""
    num_rows = 15
    images, labels = (torch.stack(tensors) for tensors in zip(*batches(num_rows), strict=True))
    losses: list[list[float]] = []
    positions: list[Tensor] = []
    trainings = both(Case(settings))
    for training in trainings:
        position = torch.zeros(1, dtype=torch.int64)

        def function(training=training, position=position) -> Tensor:
            rows = (values.index_select(0, position).squeeze(0) for values in (images, labels))
            loss = training.function(*rows)
            position.add_(1).remainder_(num_rows)
            return loss

        training.captured._function = function
        step = training.captured if training is trainings[1] else function
        losses.append([float(step()) for _ in range(40)])
        positions.append(position)
    assert losses[0] == losses[1]
    assert positions[0] == positions[1] == 40 % num_rows
    assert_alike(*trainings)
    captured = trainings[1].captured
    num_refreshes = 0 if settings is None else 4
    assert (captured.why_eager, captured.num_captures) == ("", 1)
    assert captured.num_replays == 40 - num_refreshes - WARM_UP_STEPS


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(caplog, change, settings: dict[str, Any] | None = None, case: Case | None = None) -> str:
    """Return why a training whose function does something more is not captured; it must go on as eagerly."""

    def changed(training: Training, *inputs: Tensor) -> Tensor:
        loss = training.function(*inputs)
        change(training, loss)
        return loss

    trainings = both(case or Case(SUA if settings is None else settings), changed)
    with caplog.at_level(logging.INFO, "kfac_sua.preconditioner.captured"):
        take(trainings, 25)
    assert_alike(*trainings)
    reason = trainings[1].captured.why_eager
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == [f"The training step is not captured: {reason}."]
    return reason


READS = "it reads a value back to the host (aten."
HOST = {
    "item": (lambda training, loss: loss.item(), READS),
    "text": (lambda training, loss: f"{loss:.3f}", READS),
    "decision": (lambda training, loss: loss > 1e9 and None, READS),
    "constant": (lambda training, loss: loss * torch.tensor(2.0), "it makes a tensor of Python numbers, which would"),
    "nonzero": (lambda training, loss: loss[None].nonzero(), "it makes a tensor whose size depends on values (aten.n"),
    "mask": (
        lambda training, loss: loss[None][loss[None] > 0],
        "it makes a tensor whose size depends on values (aten.",
    ),
    "generator": (
        lambda training, loss: torch.rand(2, generator=torch.Generator()),
        "it draws from a torch.Generator of its own; use the default one (aten.rand.generator, test_captured_step.py:",
    ),
}


@pytest.mark.parametrize("name", HOST)
def test_what_a_graph_cannot_hold_is_refused_with_its_line(caplog, name):
    """The warning names the operation and the caller's line, and training goes on eagerly."""
    change, clause = HOST[name]
    reason = refused(caplog, change)
    assert reason.startswith(clause)
    assert "test_captured_step.py:" in reason


def test_a_variable_that_is_replaced_in_every_step_is_refused(caplog):
    """A replay would go on from the first value for ever."""
    averages: dict[int, Tensor] = {}

    def change(training: Training, loss: Tensor) -> None:
        averages[id(training)] = averages.get(id(training), torch.zeros(())) * 0.9 + loss

    assert "it reads a tensor that is freed by its end (torch.float32 [])" in refused(caplog, change)
    assert len(set(map(float, averages.values()))) == 1


def test_a_variable_that_is_replaced_and_kept_elsewhere_is_refused(caplog):
    """Kept by somebody it is not freed, but the step before has made it."""
    averages: dict[int, list[Tensor]] = {}

    def change(training: Training, loss: Tensor) -> None:
        kept = averages.setdefault(id(training), [torch.zeros(())])
        kept.append(kept[-1] * 0.9 + loss)

    assert "it reads a tensor that the step before has made (torch.float32 [])" in refused(caplog, change)
    ours, theirs = averages.values()
    assert ours == theirs


def test_gradients_that_are_replaced_and_kept_elsewhere_are_refused():
    """An average of gradients that is made anew in each step would go on from one of them."""
    kept: list[Any] = []

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        parameters = list(training.net.parameters())
        before = [parameter.grad for parameter in parameters]
        kept.append(before)
        loss = nn.functional.cross_entropy(training.net(images), labels)
        for parameter, old, new in zip(parameters, before, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = new if old is None else 0.5 * old + new
        training.optimizers[0].step()
        return loss.detach()

    trainings = both(Case(None), function)
    take(trainings, 15)
    assert "it reads a tensor that the step before has made" in trainings[1].captured.why_eager
    assert_alike(*trainings)


def count_in_a_module(training: Training, loss: Tensor) -> None:
    """Count in an attribute."""
    training.net[5].count = getattr(training.net[5], "count", 0) + 1
    training.total += training.net[5].count


def count_in_a_group(training: Training, loss: Tensor) -> None:
    """Count as some optimizers do."""
    group = training.optimizers[0].param_groups[0]
    group["k"] = group.get("k", 0) + 1
    training.total += group["k"]


def count_in_an_optimizer(training: Training, loss: Tensor) -> None:
    """Count as others do."""
    optimizer = training.optimizers[0]
    optimizer.count = getattr(optimizer, "count", 0) + 1
    training.total += optimizer.count


COUNTERS = {
    "module": (count_in_a_module, "module 5"),
    "group": (count_in_a_group, "k of group 0"),
    "optimizer": (count_in_an_optimizer, "count of SGD"),
}


@pytest.mark.parametrize("name", COUNTERS)
def test_a_step_that_counts_in_python_is_refused(caplog, name):
    """A replay would not count; captures that were tried have not counted either."""
    change, what = COUNTERS[name]
    assert refused(caplog, change).endswith(f"as this keeps changing: {what}")


@pytest.mark.parametrize("draw", [random.random, np.random.rand], ids=["random", "numpy"])
def test_random_numbers_of_the_host_are_refused(caplog, draw):
    """A replay would go on with the capture's."""
    reason = refused(caplog, lambda training, loss: draw())
    assert reason == "it draws random numbers of Python's or NumPy's, which a replay would not"


def test_a_preconditioner_that_was_not_given_is_refused(caplog):
    """Its refreshes would not be seen."""
    eager, captured = both(Case(SUA))
    step = CapturedStep(captured.function, captured.net, captured.optimizers, graph=EmulatedGraph())
    captured._step = step
    take((eager, captured), 25)
    assert step.why_eager == "the model has a preconditioner that was not given; give it, or remove_hooks() of it"
    assert_alike(eager, captured)


def test_a_preconditioner_made_anew_is_noticed():
    """The step that was captured is that of the one that is gone."""
    trainings = both(Case(SUA))
    take(trainings, 10)
    for training in trainings:
        training.preconditioner.remove_hooks()
        training.preconditioner = KroneckerPreconditioner(training.net, damping=1.0, inverse_period=PERIOD)
    take(trainings, 10, start=10)
    assert trainings[1].captured.why_eager == "it took 0 steps of the preconditioner instead of one"
    assert_alike(*trainings)


def test_an_optimizer_that_was_not_given_is_refused():
    """Its learning rate would not be seen."""
    trainings = both(Case(SUA, optimizer=muon))
    captured = trainings[1]
    captured._step = CapturedStep(
        captured.function, captured.net, captured.optimizers[0], captured.preconditioner, graph=EmulatedGraph()
    )
    take(trainings, 10)
    assert captured._step.why_eager == "it takes a step of an optimizer that was not given (SGD)"
    assert_alike(*trainings)


def test_arguments_that_require_gradients_are_refused():
    """Their gradients would be left in the graph's inputs."""
    eager, captured = both(Case(SUA))
    for images, labels in batches(15):
        grads = []
        for training in (eager, captured):
            images = images.detach().requires_grad_()
            training._step(images, labels)
            grads.append(images.grad)
        assert torch.equal(*grads)
    assert captured.captured.why_eager == "an argument requires a gradient, which a replay would not leave in it"
    assert_alike(eager, captured)


def test_arguments_that_are_written_to_are_refused():
    """The caller's tensor would stay as it is."""
    trainings = both(Case(SUA), lambda training, images, labels: training.function(images.mul_(0.5), labels))
    take(trainings, 10)
    assert trainings[1].captured.why_eager == "it writes into its arguments"
    assert_alike(*trainings)


def test_numbers_of_python_among_the_results_are_refused():
    """A replay would return those of the capture."""
    training = Training(Case(SUA), is_captured=True)
    function = training.function
    training.captured._function = lambda *inputs: {
        "loss": function(*inputs),
        "step": training.preconditioner.num_steps,
    }
    results = [training.captured(*batch)["step"] for batch in batches(10)]
    assert results == list(range(1, 11))
    assert training.captured.why_eager == "it returns a Python number that changes from step to step"


def test_tensors_on_other_devices_are_refused():
    """A graph holds what lies on its own device; here one device stands in for another."""
    for function, clause in (
        (lambda: torch.ones(2) + 1, "it reads a tensor that is not on meta"),
        (lambda: torch.ones(2), "it makes a tensor that is not on meta"),
    ):
        with StepInspection(torch.device("meta")) as inspection:
            function()
        assert any(refusal.startswith(clause) for refusal in inspection.refusals)


def test_a_model_inside_another_module():
    """What the function calls besides the preconditioned model is watched if it lies in the module that is given."""
    results = []
    for is_captured in (False, True):
        net, teacher = make_net(), make_net()
        optimizer, preconditioner = sgd(net), KroneckerPreconditioner(net, inverse_period=10, **SUA)

        def function(images, labels, net=net, teacher=teacher, optimizer=optimizer, preconditioner=preconditioner):
            optimizer.zero_grad()
            with torch.no_grad():
                target = teacher(images).softmax(1)
            nn.functional.cross_entropy(net(images), target).backward()
            preconditioner.step()
            optimizer.step()

        modules = nn.ModuleList([net, teacher])
        step = CapturedStep(function, modules, optimizer, preconditioner, graph=EmulatedGraph())
        for number, (images, labels) in enumerate(batches(25)):
            if number == 12:
                teacher.eval()
            (step if is_captured else function)(images, labels)
        results.append(modules.state_dict())
    assert (step.why_eager, step.num_captures) == ("", 2)
    assert_identical(results[1], results[0])


def test_two_steps_of_the_preconditioner_in_one_are_refused(caplog):
    """The counts of both would be wrong."""

    def step_again(training: Training, loss: Tensor) -> None:
        for parameter in training.net.parameters():
            parameter.grad = parameter.grad * 2  # or the gradients would be used up
        training.preconditioner.step()

    reason = refused(caplog, step_again)
    assert reason == "it took 2 steps of the preconditioner instead of one"


def test_micro_batches_in_calls_of_their_own_are_refused():
    """A call without a step of the preconditioner is no training step."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(training.net(images), labels) / 2
        loss.backward()
        return loss.detach()

    trainings = both(Case(SHORT), function)
    for number in range(30):
        take(trainings, 1, start=number)
        for training in trainings if number % 2 else ():
            training.preconditioner.step()
            training.optimizers[0].step()
            training.optimizers[0].zero_grad()
    assert trainings[1].captured.why_eager == "it took 0 steps of the preconditioner instead of one"
    assert_alike(*trainings)


def test_several_processes_are_refused(monkeypatch):
    """Their communication belongs to no graph; the wrapper says that there are, or the preconditioner."""
    net = make_net()
    preconditioner = KroneckerPreconditioner(net)
    wrapped = DistributedDataParallel.__new__(DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = net
    reason = "several processes share its mini-batch, and their communication is not captured"
    assert CapturedStep(lambda: None, wrapped, sgd(net), preconditioner, graph=EmulatedGraph()).why_eager == reason
    assert CapturedStep(lambda: None, net, sgd(net), preconditioner, graph=EmulatedGraph()).why_eager == ""
    monkeypatch.setattr(preconditioner, "_processes", object())
    assert CapturedStep(lambda: None, net, sgd(net), preconditioner, graph=EmulatedGraph()).why_eager == reason


def test_a_mini_batch_that_is_freed_is_noticed():
    """A variable of the caller that is replaced instead of written to is never read stale."""
    eager, captured = both(Case(SUA))
    batch: list[Tensor] = []
    step = CapturedStep(
        lambda: captured.function(*batch), captured.net, captured.optimizers, captured.preconditioner,
        graph=captured.graph,
    )  # fmt: skip
    for images, labels in batches(30):
        batch[:] = images, labels
        step()
        eager.function(images, labels)
    assert_alike(eager, captured)
    assert "as this keeps changing: a tensor that the function found and that has been freed" in step.why_eager


def test_a_loss_scaler_is_refused():
    """Whether the step is taken is decided on the host."""

    def function(training: Training, images: Tensor, labels: Tensor) -> Tensor:
        (optimizer,), scaler = training.optimizers, training.scaler
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(training.net(images), labels)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        training.preconditioner.step(loss_scale=scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        return loss.detach()

    trainings = both(Case(SHORT), function)
    for training in trainings:
        training.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    take(trainings, 15)
    assert "it reads a value back to the host" in trainings[1].captured.why_eager
    assert_alike(*trainings)


def test_an_optimizer_that_counts_on_the_host_is_refused():
    """AdamW's bias correction would stay that of the captured step."""
    trainings = both(Case(SUA, optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=LR / 10)))
    take(trainings, 15)
    assert "it reads a value back to the host" in trainings[1].captured.why_eager
    assert_alike(*trainings)


def test_a_compiled_model_is_refused():
    """It has graphs of its own."""
    net = make_net()
    net.compile(backend="eager")
    step = CapturedStep(lambda: None, net, sgd(net), graph=EmulatedGraph())
    assert step.why_eager.startswith("the model is compiled; ")


def test_the_preconditioner_of_another_model_is_refused():
    """Its counts would not be those of the steps."""
    preconditioner = KroneckerPreconditioner(make_net())
    net = make_net()
    with pytest.raises(ValueError, match="made for another model"):
        CapturedStep(lambda: None, net, sgd(net), preconditioner)


def test_inputs_that_are_no_tensors_are_refused():
    """A replay could not see another number."""
    training = Training(Case(SUA), is_captured=True)
    with pytest.raises(TypeError, match="takes tensors, got int"):
        training.captured(torch.zeros(1), 3)


def test_a_scheduler_inside_the_function_is_an_error():
    """No replay would call it."""
    training = Training(Case(SUA, optimizer=lambda net: sgd(net, fused=True)), is_captured=True)
    schedule = torch.optim.lr_scheduler.StepLR(training.optimizers[0], 1)
    function = training.captured._function
    training.captured._function = lambda *inputs: (function(*inputs), schedule.step())
    with pytest.raises(RuntimeError, match="changes the learning rate, which no replay would do; call the scheduler"):
        training.captured(*next(batches(1)))


# --- captures that fail -----------------------------------------------------------------------------------------------


class FailingGraph(EmulatedGraph):
    """A graph whose captures fail at their end."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self._error = error

    def capture(self, function):
        """Carry the function out as far as a capture does, and fail."""
        super().capture(function)
        self.release()
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "the device's memory does not hold it"),
        (RuntimeError("operation not permitted\nwhen stream is capturing"), "operation not permitted"),
    ],
)
@pytest.mark.parametrize("settings", [None, {"structure": "kfac", "application": "auto"}])
def test_a_capture_that_fails_leaves_no_trace(caplog, error, reason, settings):
    """Training goes on eagerly, bit for bit, and the warning says why."""
    eager, captured = both(Case(settings))
    captured.captured._given_graph = FailingGraph(error)
    take((eager, captured), 25)
    assert captured.captured.why_eager == reason
    assert f"The training step is not captured: {reason}." in caplog.messages
    assert_alike(eager, captured)


@pytest.mark.parametrize("where", ["end", "end in place", "nowhere"])
def test_gradients_are_put_back_where_a_capture_fails(where):
    """Also those of parameters that only the optimizer has, and of a layer frozen since, whose events do not count."""
    results = []
    for is_captured in (False, True):
        net, scale = make_net(), nn.Parameter(torch.ones(()))
        optimizer = torch.optim.SGD([*net.parameters(), scale], lr=LR / 1000, momentum=0.9)
        preconditioner = KroneckerPreconditioner(net, inverse_period=10, **SUA)
        net[4].weight.requires_grad_(False)

        def function(images, labels, net=net, scale=scale, optimizer=optimizer, preconditioner=preconditioner):
            nn.functional.cross_entropy(net(images) * scale, labels).backward()
            preconditioner.step()
            optimizer.step()
            if where != "nowhere":
                optimizer.zero_grad(set_to_none=where == "end")

        graph = FailingGraph(torch.OutOfMemoryError("CUDA out of memory"))
        step = CapturedStep(function, net, optimizer, preconditioner, graph=graph)
        for images, labels in batches(15):
            (step if is_captured else function)(images, labels)
        results.append([net.state_dict(), scale.detach(), preconditioner.state_dict()])
    assert step.why_eager == "the device's memory does not hold it"
    assert_identical(results[1], results[0])
    assert results[1][2]["events"]["frozen:4"] == 15


def test_buffers_that_a_capture_replaced_are_put_back():
    """A module that makes its buffer anew in each step is not left with memory of the graph."""
    kept: list[Tensor] = []

    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(20))

        def forward(self, values: Tensor) -> Tensor:
            kept.append(self.mean)
            self.mean = 0.9 * self.mean + 0.1 * values.detach().mean(0)
            return values - self.mean

    def make() -> nn.Sequential:
        net = make_net()
        net.insert(len(net) - 1, Average())
        return net

    trainings = both(Case(SUA, make=make))
    take(trainings, 15)
    assert trainings[1].captured.why_eager
    assert trainings[1].captured.num_replays == 0
    assert_alike(*trainings)


class PoisonedGraph(FailingGraph):
    """A graph whose captures fail, and leave behind what was never computed, as on a device."""

    def capture(self, function):
        """Fill all that the function made with NaN, and fail."""
        EmulatedGraph.capture(self, function)
        self._poison(set())
        raise self._error


def test_casts_of_a_capture_that_fails_are_not_used():
    """A region of autocast around the step keeps casts of weights, which that capture never made."""
    eager, captured = both(Case(SUA))
    captured.captured._given_graph = PoisonedGraph(torch.OutOfMemoryError("CUDA out of memory"))
    for images, labels in batches(15):
        for training in (eager, captured):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                training._step(images, labels)
    assert captured.captured.why_eager == "the device's memory does not hold it"
    assert_alike(eager, captured)


class Listed(torch.optim.SGD):
    """Keeps its momentum in a list of tensors, and counts in a list."""

    def step(self, closure=None):
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                momenta = self.state[parameter].setdefault("list", [torch.zeros_like(parameter)])
                momenta[0].mul_(0.9).add_(parameter.grad)
                with torch.no_grad():
                    parameter.sub_(momenta[0], alpha=group["lr"])


def test_state_in_lists_is_watched():
    """Lists of tensors in an optimizer's state are compared by where these lie, and a list that is changed is seen."""
    trainings = both(Case(SUA, optimizer=lambda net: Listed(net.parameters(), lr=LR)))
    for training in trainings:
        training.optimizers[0].param_groups[0]["numbers"] = [1, 2]
    take(trainings, 10)
    for training in trainings:
        state = training.optimizers[0].state[training.net[0].weight]["list"]
        state[0] = state[0].clone() * 0.5
    take(trainings, 10, start=10)
    for training in trainings:
        training.optimizers[0].param_groups[0]["numbers"][0] = 5
    take(trainings, 10, start=20)
    assert trainings[1].captured.num_captures == 3
    assert [one.net.state_dict()["0.weight"].tolist() for one in trainings[:1]] == [
        one.net.state_dict()["0.weight"].tolist() for one in trainings[1:]
    ]


def test_numbers_of_short_mini_batches_are_not_compared():
    """A function that returns how many examples there were may be given fewer between two usual mini-batches."""
    training = Training(Case(SUA), is_captured=True)
    function = training.function
    training.captured._function = lambda images, labels: (function(images, labels), len(images))
    sizes = [4, 4, 4, 3, 4, 4, 4, 4]
    results = [training.captured(*next(batches(1, start, size)))[1] for start, size in enumerate(sizes)]
    assert results == sizes
    assert (training.captured.why_eager, training.captured.num_captures) == ("", 1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError(), "NotImplementedError"),
        (RuntimeError(" \n"), "RuntimeError"),
        (RuntimeError("\n  operation not permitted\nwhen stream is capturing"), "operation not permitted"),
    ],
)
def test_an_error_without_words_is_named(error, reason):
    """Its type stands in for them; an empty line before them is passed over."""
    eager, captured = both(Case(SUA))
    captured.captured._given_graph = FailingGraph(error)
    take((eager, captured), 10)
    assert captured.captured.why_eager == reason
    assert_alike(eager, captured)


def test_ctrl_c_that_breaks_a_capture_off_is_ctrl_c():
    """The error that the end of such a capture raises does not take its place."""

    class Broken(EmulatedGraph):
        def capture(self, function):
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise RuntimeError("the capture was invalidated")  # noqa: B904

    training = Training(Case(SUA), is_captured=True)
    training.captured._given_graph = Broken()
    training.take(FIRST_REPLAY)
    with pytest.raises(KeyboardInterrupt):
        training.take(1)
    assert training.captured.why_eager == ""


def test_ctrl_c_during_a_capture_leaves_no_trace():
    """The step was not taken, and the next call takes it."""
    eager, captured = both(Case(SUA))
    captured.captured._given_graph = FailingGraph(KeyboardInterrupt())
    eager.take(25)
    captured.take(FIRST_REPLAY)
    with pytest.raises(KeyboardInterrupt):
        captured.take(1, start=FIRST_REPLAY)
    captured.captured._graph = EmulatedGraph()
    captured.take(25 - FIRST_REPLAY, start=FIRST_REPLAY)
    assert_alike(eager, captured)
    assert captured.captured.num_captures == 1


def test_state_made_during_a_capture_is_not_kept():
    """Where a parameter gets its first gradient just then, its momentum would begin anew at each replay."""
    trainings = both(Case(SUA))

    def thaw(training: Training) -> None:
        training.net[1].weight.requires_grad_(True)

    for training in trainings:
        training.net[1].weight.requires_grad_(False)
    take(trainings, FIRST_REPLAY)
    for training in trainings:
        thaw(training)
    take(trainings, 20, start=FIRST_REPLAY)
    assert_alike(*trainings)
    assert trainings[1].captured.num_captures == 1


def test_what_eager_steps_leave_in_the_graphs_memory_ends_it():
    """Losses of refreshes that the caller keeps stay as they are; after some, eager steps get memory of their own."""
    kept: dict[Training, list[Tensor]] = {}

    def keeping(training: Training, *inputs: Tensor) -> Tensor:
        loss = training.function(*inputs)
        if training.preconditioner.num_steps % 5 == 1:
            kept.setdefault(training, []).append(loss.clone())
        return loss

    eager, captured = both(Case({"structure": "sua", "inverse_period": 5}), keeping)
    take((eager, captured), 45)
    assert kept[eager] == kept[captured]
    assert captured.captured.num_captures == 1 + MOST_LEFTOVERS
    assert_alike(eager, captured)


@pytest.mark.parametrize("period", [1, 4])
def test_captures_that_are_of_no_use_end(period):
    """A step whose numbers change in every step, or every few, is left eager after some captures."""
    eager, captured = both(Case(SUA))
    for images, labels in batches(45):
        for training in (eager, captured):
            group = training.optimizers[0].param_groups[0]
            group["lr"] = LR / (2 + training.preconditioner.num_steps // period)
            training._step(images, labels)
    assert_alike(eager, captured)
    assert captured.captured.num_captures == MOST_FUTILE_CAPTURES
    assert captured.captured.why_eager.endswith("as this keeps changing: lr of group 0")


def test_a_change_that_nothing_watches_is_dangling_at_worst(monkeypatch):
    """Were the check of addresses missing, the emulator would find the freed inverse: this test can fail."""
    monkeypatch.setattr(CapturedStep, "_change", lambda step, capture: "")

    monkeypatch.setattr("kfac_sua.preconditioner.kfac.take_inverses", rebind)
    training = Training(Case(SUA), is_captured=True)
    training.captured._num_leftovers = MOST_LEFTOVERS  # or new inverses would be seen in the graph's memory
    with pytest.raises(DanglingError):
        training.take(PERIOD + 2)
