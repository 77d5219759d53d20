"""Captured training equals eager training bit for bit, each setting alone and in pairs, on an emulated graph."""

import itertools
from typing import Any

import pytest
import torch
from captured_training import LR, Case, Training, adamw, make_net, muon, num_plain, sgd, with_dropout
from identical import assert_identical
from thinned import diagonal, one_in
from torch import nn

from kfac_sua.models import PreActResNet50, VisionTransformer
from kfac_sua.preconditioner import KroneckerSettings, exponential_damping
from kfac_sua.preconditioner.captured.step import WARM_UP_STEPS
from kfac_sua.preconditioner.forms.rates import CUDA, rates_in_force

NUM_STEPS = 45  # three refreshes, the last of them followed by replays

STRUCTURES: dict[str, dict[str, Any]] = {
    "kfac": {"structure": "kfac"},
    "sua": {"structure": "sua"},
    "grouped": {"structure": "kfac", "group_size": 6},
    "sua_grouped": {"structure": "sua", "group_size": 6},
}
# One key of the preconditioner's each.
SETTINGS: dict[str, dict[str, Any]] = {
    "pi": {"damping_rule": "factored_pi"},
    "exact": {"damping_rule": "exact"},
    "schedule": {"damping": exponential_damping(0.1, 1.0, 50)},
    "mc": {"fisher_type": "mc"},
    "exact_fisher": {"fisher_type": "exact"},
    "average": {"ema_decay": 0.5, "factor_period": 10},
    "auto": {"application": "auto"},
    "cholesky": {"inverse_method": "cholesky"},
    "low_rank": {"inverse_method": "low_rank"},
    "reduce": {"weight_sharing": "reduce"},
    "bf16x3": {"products": "bf16x3"},
    "kl_clip": {"kl_clip": 1e-3},
    "sampled": {"activation_rows": 20},
    "skip": {"skip": ["0"]},
}
# One choice outside of the preconditioner each.
SURROUNDINGS: dict[str, dict[str, Any]] = {
    "plain_sgd": {"optimizer": lambda net: sgd(net, momentum=0)},
    "fused_sgd": {"optimizer": lambda net: sgd(net, fused=True)},
    "nesterov": {"optimizer": lambda net: sgd(net, nesterov=True, weight_decay=1e-3, foreach=False)},
    "adamw": {"optimizer": adamw},
    "muon": {"optimizer": muon},
    "autocast": {"autocast": True},
    "dropout": {"make": with_dropout},
    "channels_last": {"make": lambda: make_net().to(memory_format=torch.channels_last)},
    "clipping": {"after_backward": lambda net: nn.utils.clip_grad_norm_(net.parameters(), 0.5)},
}
KEYS = {name: {"settings": settings} for name, settings in SETTINGS.items()} | SURROUNDINGS


def case_of(structure: dict[str, Any] | None, *names: str) -> Case:
    """Return the case of a structure and some keys; ``None`` for plain SGD."""
    options: dict[str, Any] = {}
    for name in names:
        for field, value in KEYS[name].items():
            options[field] = options.get(field, {}) | value if field == "settings" else value
    settings = None if structure is None else structure | options.pop("settings", {})
    return Case(settings, **options)


def check(case: Case, num_steps: int = NUM_STEPS) -> None:
    """Train eagerly and captured, and compare all that training changes, losses included."""
    eager, captured = (Training(case, is_captured=is_captured) for is_captured in (False, True))
    losses = []
    for training in (eager, captured):
        torch.manual_seed(7)  # of dropout
        losses.append(training.take(num_steps))
    assert captured.captured.why_eager == ""
    assert captured.captured.num_captures == 1
    assert captured.captured.num_replays == num_plain(case, num_steps) - WARM_UP_STEPS
    assert losses[0] == losses[1]
    assert_identical(captured.state(), eager.state())
    assert losses[0][0] != losses[0][-1]


# Every structure without a key, and every key with one structure, in turn; the rest of the product takes a minute.
NAMES = sorted({"none", *KEYS})
ALONE = [
    pytest.param(structure, name, marks=() if name == "none" or number % len(STRUCTURES) == index else pytest.mark.slow)
    for index, structure in enumerate(STRUCTURES)
    for number, name in enumerate(NAMES)
]


@pytest.mark.parametrize(("structure", "name"), ALONE)
def test_each_key_alone(structure, name):
    """Parameters, momentum, buffers, gradients, inverses, averages and sums are those of eager steps."""
    check(case_of(STRUCTURES[structure], *([] if name == "none" else [name])))


@pytest.mark.parametrize(("structure", "name"), diagonal(STRUCTURES, ["none", "bf16x3", "low_rank", "auto", "reduce"]))
def test_forms_that_a_gpu_chooses(structure, name):
    """What a captured step reads lies where it was in every form that the rates of a GPU lead to."""
    with rates_in_force(CUDA, "cpu"):
        check(case_of(STRUCTURES[structure], *([] if name == "none" else [name])))


@pytest.mark.parametrize("name", one_in(3, ["none", *SURROUNDINGS]))
def test_without_a_preconditioner(name):
    """A step of the optimizer alone is captured in the same way."""
    check(case_of(None, *([] if name == "none" else [name])))


def pairs() -> list[tuple[str, str]]:
    """Return the pairs of keys that can be combined."""

    def can_be(one: str, other: str) -> bool:
        first, second = KEYS[one], KEYS[other]
        if (first.keys() & second.keys()) - {"settings"}:
            return False
        settings = first.get("settings", {}), second.get("settings", {})
        if settings[0].keys() & settings[1].keys():
            return False
        joined = {key: value for one in settings for key, value in one.items() if not callable(value)}
        try:
            KroneckerSettings(**{"inverse_period": 20} | joined)
        except ValueError:
            return False
        return True

    return [pair for pair in itertools.combinations(KEYS, 2) if can_be(*pair)]


@pytest.mark.slow
@pytest.mark.parametrize("pair", pairs(), ids="-".join)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_pairs_of_keys(structure, pair):
    """Nothing in one key's code depends on what another leaves in place."""
    check(case_of(STRUCTURES[structure], *pair), num_steps=45)


class Resized(nn.Module):
    """A network of the command line at an eighth of the width, on the cases' images."""

    def __init__(self, kind: type[PreActResNet50] | type[VisionTransformer]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = kind(10, width=0.125)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of ``[n, 3, 8, 8]``."""
        return self.net(nn.functional.interpolate(images, size=(32, 32)))


@pytest.mark.slow
@pytest.mark.parametrize("structure", [None, *STRUCTURES])
def test_residual_network(structure):
    """Shortcuts, strides and 53 convolutions of PreAct-ResNet50 under a changing optimizer's state."""
    settings = None if structure is None else {**STRUCTURES[structure], "inverse_period": 8, "damping": 1.0}
    case = Case(settings, lambda: Resized(PreActResNet50), lambda net: sgd(net, lr=LR / 3))
    check(case, num_steps=24)


@pytest.mark.parametrize("structure", one_in(2, ["sua_grouped", "kfac"]))
def test_transformer(structure):
    """Attention, layer normalisation and 18 linear layers, 17 of them on sequences."""
    check(Case({**STRUCTURES[structure], "inverse_period": 8}, lambda: Resized(VisionTransformer)), num_steps=16)
