"""The whole step of the command, captured by an emulated graph: equal to the eager one, with every key of configs/."""

from itertools import product

import pytest
import torch
from emulated_runs import EmulatedStep, emulated  # noqa: F401  # a fixture
from identical import assert_identical
from thinned import one_in
from tiny_runs import tiny_config

from kfac_sua.compose import compose_config
from kfac_sua.config import AdamWConfig, Config, KroneckerConfig, ScheduleName, to_plain
from kfac_sua.preconditioner.captured.step import WARM_UP_STEPS
from kfac_sua.runs.directory import flat
from kfac_sua.training.build import build_training
from kfac_sua.training.loop import train_epoch
from kfac_sua.training.progress import Progress
from kfac_sua.training.state import Training

CPU = torch.device("cpu")
PERIOD = 6
# 16 steps an epoch on mini-batches of six, in refresh periods of six: nearly three plain stretches, and a resume's.
SMALL = ("dataset.train_size=100", "batch_size=6", "epochs=2")
GROUPS_OF_8 = ("preconditioner.group_size=8", "preconditioner.group_size_scaling=none")  # at every width
STRUCTURES = {
    "kfac": ("preconditioner=kfac",),
    "sua": ("preconditioner=sua",),
    "grouped": ("preconditioner=grouped", *GROUPS_OF_8),
    "sua_grouped": ("preconditioner=sua_grouped", *GROUPS_OF_8),
}
BASELINE = ("preconditioner=baseline",)

# Each key that a step depends on, at a value that is not its default.
KEYS = {
    "seed": ("seed=3",),
    "batch_size": ("batch_size=5",),
    "channels_last": ("channels_last=false",),
    "precision": ("precision=bfloat16",),
    "deterministic": ("deterministic=true",),
    "model.width": ("model.width=0.5",),
    "model.batch_norm": ("model.batch_norm=false",),
    "dataset.augmentation": ("dataset.augmentation=flip_crop",),
    "dataset.train_size": ("dataset.train_size=90",),
    "optimizer.lr": ("optimizer.lr=0.003",),
    "optimizer.weight_decay": ("optimizer.weight_decay=0.001",),
    "optimizer.momentum": ("optimizer.momentum=0.5",),
    "optimizer.nesterov": ("optimizer.nesterov=true",),
    "schedule.name": ("schedule=cosine",),
    "schedule.milestones": ("schedule=step", "schedule.milestones=[0.5]"),
    "schedule.gamma": ("schedule=step", "schedule.milestones=[0.5]", "schedule.gamma=0.5"),
    "preconditioner.damping": ("preconditioner.damping=1.0",),
    "preconditioner.damping_rule": ("preconditioner.damping_rule=exact",),
    "preconditioner.damping_rule pi": ("preconditioner.damping_rule=factored_pi",),
    "preconditioner.weight_sharing": ("preconditioner.weight_sharing=reduce",),
    "preconditioner.fisher_type": ("preconditioner.fisher_type=mc",),
    "preconditioner.fisher_type exact": ("preconditioner.fisher_type=exact",),
    "preconditioner.inverse_period": ("preconditioner.inverse_period=8",),
    "preconditioner.factor_period": ("preconditioner.ema_decay=0.5", "preconditioner.factor_period=3"),
    "preconditioner.ema_decay": ("preconditioner.ema_decay=0.5",),
    "preconditioner.skip": ("preconditioner.skip=[classifier]",),
    "preconditioner.application": ("preconditioner.application=weight",),
    "preconditioner.products": ("preconditioner.products=bf16x3",),
    "preconditioner.inverse_method": ("preconditioner.inverse_method=cholesky",),
    "preconditioner.inverse_method low": (
        "preconditioner.inverse_method=low_rank",
        "preconditioner.weight_sharing=reduce",
    ),
    "preconditioner.activation_rows": ("preconditioner.activation_rows=40",),
    "preconditioner.kl_clip": ("preconditioner.kl_clip=1e-4", "preconditioner.application=weight"),
    "preconditioner.damping_final": ("preconditioner.damping_final=0.01",),
    "preconditioner.adaptive_damping": ("preconditioner.adaptive_damping=5",),
}
OPTIMIZERS = {
    "adamw": ("optimizer=adamw",),
    "adamw betas": ("optimizer=adamw", "optimizer.betas=[0.8,0.9]", "schedule=cosine"),
    "adamw eps": ("optimizer=adamw", "optimizer.eps=1e-4", "optimizer.weight_decay=0.1"),
    "muon": ("optimizer=muon",),
    "muon cosine": ("optimizer=muon", "schedule=cosine", "optimizer.adamw_lr_ratio=0.5", "optimizer.adamw_eps=1e-6"),
    "muon momentum": ("optimizer=muon", "optimizer.momentum=0.5", "optimizer.nesterov=false", "optimizer.ns_steps=3"),
    "muon betas": ("optimizer=muon", "optimizer.adamw_betas=[0.8,0.9]"),
}
# Keys that no step sees, or that make no step a captured one, and why.
NOT_OF_A_STEP = {
    "device": "what this is about",
    **dict.fromkeys(("objective", "verbose", "start_from"), "before and after all steps"),
    "capture": "what this is about",
    "device_rates": "which forms: those of a GPU are in test_captured_equality",
    "epochs": "a resume in every epoch is in test_captured_runs",
    "non_finite": "skip stays eager, by name",
    "evaluation_batch_size": "evaluation is eager",
    "sync_batch_norm": "of several processes, which stay eager, by name",
    "num_threads": "how, not what",
    "checkpoint_interval_s": "between steps",
    "log_interval": "between steps",
    "output_dir": "between steps",
    "progress": "between steps",
    "dataset.name": "comes with its file; other images",
    "dataset.data_dir": "where images are read",
    "dataset.download": "how images come there",
    "dataset.validation_size": "evaluation",
    "dataset.train_eval_size": "evaluation",
    "dataset.split_seed": "which images",
    "model.name": "comes with its file; the others below",
    "model.initialisation": "before the first step",
    "optimizer.name": "comes with its file; all below",
    "preconditioner.name": "comes with its file; all below",
    "preconditioner.structure": "comes with its file; all below",
    "preconditioner.group_size": "comes with its file; all below",
    "preconditioner.group_size_scaling": "how many channels a group has, before the first step",
    "preconditioner.likelihood": "categorical for the command",
    "preconditioner.loss_reduction": "mean for the command",
    "preconditioner.allow_exact_fisher": "lets fisher_type=exact pass",
}


def config_of(tmp_path, *overrides: str) -> Config:
    """Return the configuration of a run that captures."""
    is_plain = BASELINE[0] in overrides
    period = () if is_plain else (f"preconditioner.inverse_period={PERIOD}",)
    return tiny_config(tmp_path, *SMALL, *period, *overrides)


def trained(config: Config, capture: bool) -> tuple[dict, Training]:
    """Train two epochs; return all that changes, and the training."""
    config.capture = capture
    training = build_training(config, CPU)
    progress = Progress(config.progress, "", total_steps=2, done_steps=0, epochs=2)
    results = []
    for _ in range(config.epochs):
        results.append(train_epoch(training, progress))
        training.end_epoch()
    progress.close()
    state = vars(training.checkpoint("f" * 64, "e" * 64))
    del state["times"]
    return state | {"results": [vars(result) for result in results]}, training


def check(tmp_path, steps: list[EmulatedStep], *overrides: str) -> None:
    """Train eagerly and captured, and compare everything bit for bit."""
    config = config_of(tmp_path, *overrides)
    eager, _ = trained(config, capture=False)
    assert steps == []
    captured, training = trained(config, capture=True)
    (step,) = steps
    assert step.why_eager == ""
    assert (step.num_captures, step.num_replays) == expected(training)
    assert_identical(captured, eager)
    assert eager["step"] == config.epochs * len(training.loader)


def expected(training: Training) -> tuple[int, int]:
    """Return how many captures and replays there must have been: of all plain steps but those before a capture.

    There are as many captures as learning rates, where the optimizer holds it as a number.
    """
    num_steps, num_captures, eager = training.step, 1, set()
    config, preconditioner = training.config, training.preconditioner
    if config.schedule.name is not ScheduleName.constant and not isinstance(config.optimizer, AdamWConfig):
        num_captures = config.epochs
    if preconditioner is not None and isinstance(config.preconditioner, KroneckerConfig):
        eager |= set(range(0, num_steps, preconditioner.factor_period))
        if period := config.preconditioner.adaptive_damping:
            eager |= set(range(0, num_steps, period))
    return num_captures, num_steps - len(eager) - WARM_UP_STEPS * num_captures


@pytest.mark.parametrize("name", one_in(2, ["baseline", *STRUCTURES]))
def test_a_captured_run_is_an_eager_run(tmp_path, emulated, name):  # noqa: F811
    """Parameters, momentum, running statistics, factors, inverses, counts, sums: the same bits."""
    check(tmp_path, emulated, *STRUCTURES.get(name, BASELINE))


def of_keys(one_each: bool) -> list[tuple[str, str]]:
    """Return keys with structures: one of them per key, in turns, or all others."""
    names = list(STRUCTURES)
    pairs = list(product(KEYS, names))
    in_turns = [(key, names[index % len(names)]) for index, key in enumerate(KEYS)]
    return in_turns if one_each else [pair for pair in pairs if pair not in in_turns]


@pytest.mark.parametrize(("key", "name"), one_in(3, of_keys(one_each=True)))
def test_every_key_alone(tmp_path, emulated, key, name):  # noqa: F811
    """Each key of configs/, from one of the structures."""
    check(tmp_path, emulated, *STRUCTURES[name], *KEYS[key])


@pytest.mark.slow
@pytest.mark.parametrize(("key", "name"), of_keys(one_each=False))
def test_every_key_from_every_structure(tmp_path, emulated, key, name):  # noqa: F811
    """Each key of configs/, from all other structures."""
    check(tmp_path, emulated, *STRUCTURES[name], *KEYS[key])


@pytest.mark.parametrize("name", one_in(3, OPTIMIZERS))
def test_every_optimizer(tmp_path, emulated, name):  # noqa: F811
    """Those that come without a preconditioner."""
    check(tmp_path, emulated, *BASELINE, *OPTIMIZERS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["baseline", *STRUCTURES])
@pytest.mark.parametrize("model", ["vgg11", "preact_resnet50", "transformer"])
def test_every_model(tmp_path, emulated, model, name):  # noqa: F811
    """All but the tiny one, at a sixteenth of their width."""
    check(tmp_path, emulated, *STRUCTURES.get(name, BASELINE), f"model={model}", "model.width=0.0625")


def test_no_key_is_forgotten():
    """A key that is added to configs/ must be tried here, or excused."""
    tried = {text.partition("=")[0] for keys in (KEYS, OPTIMIZERS) for texts in keys.values() for text in texts}
    tried |= {"schedule.name"}
    for overrides in (["schedule=step"], ["optimizer=adamw", *BASELINE], ["optimizer=muon", *BASELINE], ["model=tiny"]):
        unknown = set(flat(to_plain(compose_config(overrides)))) - tried - NOT_OF_A_STEP.keys()
        assert not unknown
