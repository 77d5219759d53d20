"""Layers that are large on their device are said once, with the cure, before anything is allocated."""

import pytest
import torch
from foreign_models import FOREIGN_MODELS
from torch import nn

from kfac_sua.models import VGG11, PreActResNet50
from kfac_sua.preconditioner import KroneckerPreconditioner, large
from kfac_sua.preconditioner.forms import cost
from kfac_sua.preconditioner.structures import factor_statistics

DENSE = {
    "ema_decay=0.95": {"ema_decay": 0.95},
    "damping_rule=exact": {"damping_rule": "exact"},
    "inverse_method=cholesky": {"inverse_method": "cholesky"},
}


def language_model():
    """Return a head of 50,257 words on device meta, where its 38 million numbers take no memory."""
    return nn.ModuleDict({"body": nn.Linear(768, 768, device="meta"), "head": nn.Linear(768, 50_257, device="meta")})


def warnings(caplog):
    """Return what is said of large layers."""
    return [record.getMessage() for record in caplog.records if record.name == large.logger.name]


@pytest.mark.parametrize("cause", DENSE)
def test_a_wide_head_is_said_once_with_memory_work_and_cure(caplog, monkeypatch, cause):
    """At construction, and in the table; the layer beside it is not named."""
    monkeypatch.setattr(large, "device_memory", lambda device: 64 * 2**30)
    preconditioner = KroneckerPreconditioner(language_model(), **DENSE[cause])
    (message,) = warnings(caplog)
    num_kept = 2 if "ema" in cause else 1
    gib = num_kept * 4 * (50_257**2 + 769**2) / 2**30
    assert message.startswith(f"Large: layer head keeps {gib:.1f} GiB of the 64.0 GiB of device meta and inverts ")
    assert f"{cause} makes factors dense: list such layers in skip, set group_size, or" in message
    assert "body" not in message
    assert message.replace("Large: ", "large: ") in " ".join(str(preconditioner.describe()).split())
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("cure", [{"skip": ["head"]}, {"group_size": 256}, {"ema_decay": 0.0}])
def test_each_cure_leaves_nothing_to_say(caplog, monkeypatch, cure):
    """What the sentence tells to do works."""
    monkeypatch.setattr(large, "device_memory", lambda device: 64 * 2**30)
    KroneckerPreconditioner(language_model(), **({"ema_decay": 0.95} | cure))
    assert not warnings(caplog)


@pytest.mark.parametrize(("memory", "is_said"), [(None, False), (2**30, False), (2**26, True)])
def test_memory_is_judged_where_it_is_known(caplog, monkeypatch, memory, is_said):
    """A layer of 2 × 1,025² and 2 × 1,024² numbers is 16 MiB: a quarter of 64 MiB, and little of any machine."""
    monkeypatch.setattr(large, "device_memory", lambda device: memory)
    KroneckerPreconditioner(nn.Linear(1024, 1024), ema_decay=0.5)
    assert bool(warnings(caplog)) == is_said


def test_a_long_inversion_is_said_though_memory_suffice(caplog, monkeypatch):
    """It is the hours that one would not expect."""
    monkeypatch.setattr(large, "device_memory", lambda device: 2**60)
    monkeypatch.setattr(large, "LARGE_INVERSION_S", 0.01)
    KroneckerPreconditioner(nn.Linear(1024, 1024), inverse_method="cholesky")
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        "meta",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")),
    ],
)
def test_a_device_says_its_memory_if_it_has_any(device):
    """In bytes, and more than a small machine has."""
    memory = large.device_memory(torch.device(device))
    assert memory is None if device == "meta" else memory > 2**28


@pytest.mark.parametrize("cause", DENSE)
def test_ordinary_models_are_not_called_large(caplog, monkeypatch, cause):
    """The paper's networks at full width, and the models of others, on a machine of 8 GiB."""
    monkeypatch.setattr(large, "device_memory", lambda device: 8 * 2**30)
    with torch.device("meta"):
        paper = [VGG11(10), PreActResNet50(10)]
    for model in [*paper, *(foreign.make() for foreign in FOREIGN_MODELS.values())]:
        KroneckerPreconditioner(model, **DENSE[cause])
    assert not warnings(caplog)


def test_many_layers_that_fill_the_memory_together_are_said(caplog, monkeypatch):
    """Twenty of 16 MiB, each of them less than a tenth of 512 MiB."""
    monkeypatch.setattr(large, "device_memory", lambda device: 2**29)
    layers = [nn.Linear(1024, 1024) for _ in range(20)]
    KroneckerPreconditioner(nn.Sequential(*layers[:15]), ema_decay=0.5)
    assert not warnings(caplog)
    KroneckerPreconditioner(nn.Sequential(*layers), ema_decay=0.5)
    (message,) = warnings(caplog)
    assert message.startswith("Large: all layers together keep 0.3 GiB of the 0.5 GiB of device cpu. ema_decay=0.5")


def test_auto_forms_a_factor_rather_than_factorise_too_many_rows(monkeypatch):
    """A layer wider than the most rows that the Woodbury identity may factorise."""
    monkeypatch.setattr(cost, "MAX_KEPT_ROWS", 8)
    monkeypatch.setattr(factor_statistics, "MAX_KEPT_ROWS", 8)
    net = nn.Linear(64, 2, bias=False)
    grads = {}
    for method in ("auto", "cholesky"):
        preconditioner = KroneckerPreconditioner(net, inverse_method=method)
        net.zero_grad()
        net(torch.arange(12 * 64.0).reshape(12, 64).sin()).square().mean().backward()
        preconditioner.step()
        grads[method] = net.weight.grad
        preconditioner.remove_hooks()
    torch.testing.assert_close(grads["auto"], grads["cholesky"])
