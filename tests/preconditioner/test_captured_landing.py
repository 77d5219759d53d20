"""Captured steps that take other passes than one: replays are the eager steps bit for bit, under both applications."""

from functools import partial

import pytest
import torch
from captured_training import Case, Training
from identical import assert_identical
from thinned import diagonal
from torch import Tensor, nn

SETTINGS = [
    {"structure": "sua", "application": "auto"},
    {"structure": "kfac", "application": "auto", "group_size": 8},
    {"structure": "kfac"},
    {"structure": "sua", "fisher_type": "mc", "application": "auto"},
]


def finish(training: Training, loss: Tensor) -> Tensor:
    """Precondition, and take the optimizer's step."""
    training.preconditioner.step()
    training.optimizers[0].step()
    return loss.detach()


def loss_of(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Return the training loss, of a pass that sampled labels are drawn for."""
    logits = training.net(images)
    training.preconditioner.fisher_backward(logits)
    return nn.functional.cross_entropy(logits, labels)


def adversarial(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Train on images that were moved along their gradient."""
    training.optimizers[0].zero_grad()
    inputs = images.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nn.functional.cross_entropy(training.net(inputs), labels), inputs)
    loss = loss_of(training, (images + 0.1 * grad.sign()).detach(), labels)
    loss.backward()
    return finish(training, loss)


def gradient_penalty(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Add the squared norm of the input gradient."""
    training.optimizers[0].zero_grad()
    inputs = images.clone().requires_grad_()
    loss = loss_of(training, inputs, labels)
    (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
    (loss + grad.square().sum()).backward()
    return finish(training, loss)


def ascent_first(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Take a first pass for its plain gradient, whose squares scale the loss, and drop it."""
    training.optimizers[0].zero_grad(set_to_none=False)
    with training.preconditioner.paused():
        nn.functional.cross_entropy(training.net(images), labels).backward()
    norm = torch.stack([parameter.grad.square().sum() for parameter in training.net.parameters()]).sum()
    training.optimizers[0].zero_grad(set_to_none=False)
    loss = loss_of(training, images, labels) / (1 + norm)
    loss.backward()
    return finish(training, loss)


def uneven(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Accumulate a large and a small micro-batch, and one in paused()."""
    training.optimizers[0].zero_grad()
    for part in (slice(0, 3), slice(3, 4)):
        loss = loss_of(training, images[part], labels[part])
        (loss / 2).backward()
    with training.preconditioner.paused():
        (nn.functional.cross_entropy(training.net(images), labels) / 10).backward()
    return finish(training, loss)


def logged_norm(training: Training, images: Tensor, labels: Tensor) -> Tensor:
    """Return the norm of the plain gradient, asked for apart."""
    training.optimizers[0].zero_grad()
    parameters = list(training.net.parameters())
    grads = torch.autograd.grad(nn.functional.cross_entropy(training.net(images), labels), parameters)
    loss_of(training, images, labels).backward()
    return finish(training, torch.stack([grad.square().sum() for grad in grads]).sum())


FUNCTIONS = [adversarial, gradient_penalty, ascent_first, uneven, logged_norm]


@pytest.mark.parametrize(
    ("function", "settings"), diagonal(FUNCTIONS, SETTINGS), ids=lambda value: getattr(value, "__name__", str(value))
)
def test_steps_of_several_passes_are_captured(function, settings):
    """Two refreshes and the replays between them."""
    trainings = []
    for is_captured in (False, True):
        training = Training(Case(settings), is_captured=is_captured)
        step = partial(function, training)
        if is_captured:
            training.captured._function = step
        else:
            training._step = step
        trainings.append((training.take(45), training))
    (eager_losses, eager), (losses, captured) = trainings
    assert captured.captured.why_eager == ""
    assert captured.captured.num_captures == 1
    assert captured.captured.num_replays > 30
    assert losses == eager_losses
    assert_identical(captured.state(), eager.state())


@pytest.mark.parametrize(
    ("function", "structure"), diagonal(FUNCTIONS, ["sua", "kfac"]), ids=lambda value: getattr(value, "__name__", value)
)
def test_both_applications_train_alike(function, structure):
    """In float64, over a refresh and plain steps on both sides of it."""
    results = []
    for application in ("weight", "auto"):
        training = Training(Case({"structure": structure, "application": application}), is_captured=False)
        training.net.double()
        training._step = partial(function, training)
        losses = training.take(25)
        results.append((torch.tensor(losses, dtype=torch.float64), [*training.net.parameters()]))
        allowed = {"gradient_not_explained"} if function is gradient_penalty else set()
        assert {event.partition(":")[0] for event in training.preconditioner.events} <= allowed
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-7, atol=1e-9)
    for got, want in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-9)
