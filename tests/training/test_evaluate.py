"""Evaluation against sums over single images."""

import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from torch import nn

from kfac_sua.training.evaluate import ErrorCounter, evaluate

CPU = torch.device("cpu")


def test_every_image_counts_the_same_whatever_the_batches():
    """With batches of 4, 4 and 1, loss and error are the means over the nine images."""
    generator = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(9, 5, generator=generator), torch.randint(0, 3, (9,), generator=generator)
    model = nn.Linear(5, 3)
    result = evaluate(model, zip(inputs.split(4), labels.split(4), strict=True), CPU)
    with torch.no_grad():
        losses = [F.cross_entropy(model(x[None]), y[None]).item() for x, y in zip(inputs, labels, strict=True)]
        wrong = [int(model(x).argmax()) != int(y) for x, y in zip(inputs, labels, strict=True)]
    assert result.loss == pytest.approx(sum(losses) / 9, rel=1e-6)
    assert result.error == sum(wrong) / 9


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_no_trace(training):
    """Batch-norm statistics do not move, and the mode stays as it was."""
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    evaluate(model, [(torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))], CPU)
    assert_identical(dict(model.state_dict()), before)
    assert model.training is training


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_loss_is_remembered(value):
    """A loss that is not finite shows in the sum however many good ones follow."""
    counter = ErrorCounter(CPU)
    logits, labels = torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64)
    for loss in (1.0, value, 1.0):
        counter.add(logits, labels, torch.tensor(loss))
    assert not counter.loss_sum().isfinite()
