"""Carries out a study: which parts there are, what each measures, and what is kept of it."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.build import build_splits
from kfac_sua.data import BatchLoader, Splits, epoch_generator
from kfac_sua.introspect.approximations import layers_of
from kfac_sua.introspect.gradients import Batch
from kfac_sua.introspect.measure import measure_network
from kfac_sua.introspect.memory import bytes_needed, refuse_too_little
from kfac_sua.introspect.networks import Source
from kfac_sua.introspect.record import OTHER, SAME, IntrospectionError, Part, Provenance, write_part
from kfac_sua.preconditioner.settings import FisherType, KroneckerSettings

INHERITED = ("weight_sharing", "activation_rows", "damping_rule", "inverse_method")
"""Settings that a method takes from the run, where its structure reads them and it does not say otherwise."""


@dataclasses.dataclass(frozen=True)
class Study:
    """What is measured.

    Attributes:
        source: Where networks come from.
        seeds: Seeds of the runs.
        checkpoints: States of each.
        fishers: Fishers that are approximated.
        images: Images per Fisher.
        methods: Settings by name.
        dampings: Values of ε.
        layer_patterns: Layers to look at, shell-style; empty for all.
        device: Where to measure.
    """

    source: Source
    seeds: Sequence[int]
    checkpoints: Sequence[str]
    fishers: Sequence[FisherType]
    images: Mapping[FisherType, int]
    methods: Mapping[str, KroneckerSettings]
    dampings: Sequence[float]
    layer_patterns: Sequence[str]
    device: torch.device

    def parts(self) -> list[Part]:
        """Return all parts, in the order in which they are measured."""
        return [
            Part(seed, checkpoint, fisher.value)
            for seed in self.seeds
            for checkpoint in self.checkpoints
            for fisher in self.fishers
        ]

    def identity(self) -> dict[str, Any]:
        """Return what all parts in a directory share, as plain values; further seeds and checkpoints may be added."""
        methods = {name: settings.to_plain() for name, settings in self.methods.items()}
        # Which of these a method takes is said elsewhere, by the Fisher and the dampings of the study.
        for settings in methods.values():
            for key in ("damping", "fisher_type", "inverse_period", "factor_period", "ema_decay", "skip"):
                settings.pop(key)
        return self.source.identity() | {
            "images": {fisher.value: number for fisher, number in self.images.items()},
            "methods": methods,
            "dampings": list(self.dampings),
            "layers": list(self.layer_patterns),
        }

    @functools.cached_property
    def splits(self) -> Splits:
        """The run's images.

        Raises:
            DataError: If they cannot be had.
        """
        return build_splits(self.source.config.dataset)

    def batches(self, seed: int, images: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return images in float64 and labels of the exact Fisher, and as many others, drawn from the training images.

        Args:
            seed: Seed of the run.
            images: At most half of the training images.
        """
        train = self.splits.train
        order = torch.randperm(len(train), generator=epoch_generator(seed, 0, "introspection"))
        loader = BatchLoader(train.select(order[: 2 * images]), self.splits.mean, self.splits.std, device=self.device)
        (same, same_labels), (other, other_labels) = loader.sequential(images)
        return {SAME: (same.double(), same_labels), OTHER: (other.double(), other_labels)}


def state_memory(study: Study) -> str:
    """Return in words what the part that needs most memory needs.

    Raises:
        IntrospectionError: If it does not fit, there are too few images, or a pattern matches no layer.
    """
    largest_batch, available = max(study.images.values()), len(study.splits.train)
    if 2 * largest_batch > available:
        raise IntrospectionError(
            f"{largest_batch} images and as many others are more than the {available} training images; lower --images."
        )
    network = prepared(study.source.blank(), torch.device("cpu"))
    layers = chosen_layers(network, study.layer_patterns)
    needs = {
        fisher: bytes_needed(
            network,
            layers,
            torch.zeros(1, *study.splits.train.images.shape[1:], dtype=torch.float64),
            list(study.methods.values()),
            images=study.images[fisher],
            backward_passes=study.splits.num_classes if fisher is FisherType.exact else 1,
            num_dampings=len(study.dampings),
        )
        for fisher in study.fishers
    }
    largest = max(needs, key=lambda fisher: needs[fisher])
    return refuse_too_little(needs[largest], study.device, largest=largest.value)


def measure_part(
    study: Study, part: Part, directory: Path, provenance: Provenance, tell: Callable[[str], None]
) -> float:
    """Measure a part and keep it.

    Args:
        study: The study.
        part: Which part.
        directory: Where parts are kept.
        provenance: What the source and its machine are.
        tell: Called with what comes next.

    Returns:
        Seconds that it took, without training.
    """
    fisher = FisherType(part.fisher)
    state = study.source.state(part.seed, part.checkpoint, tell)
    started = time.perf_counter()
    network = prepared(state.network, study.device)
    layers = chosen_layers(network, study.layer_patterns)
    drawn = study.batches(part.seed, study.images[fisher])
    renew_normalisation(network, drawn[SAME][0])
    generator = epoch_generator(part.seed, 0, f"introspection labels {part.checkpoint}")
    batches = {name: _with_sampled(network, *pair, generator) for name, pair in drawn.items()}
    rows, loss = measure_network(network, layers, batches, study.methods, fisher, study.dampings, tell)
    write_part(directory, part, rows, provenance, step=state.step, images=study.images[fisher], loss=loss)
    return time.perf_counter() - started


def prepared(network: nn.Module, device: torch.device) -> nn.Module:
    """Return a network in evaluation mode and in float64 on a device."""
    return network.to(device, torch.float64).to(memory_format=torch.contiguous_format).eval()


def chosen_layers(network: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the preconditioned layers whose names match one of the patterns; all without patterns.

    Raises:
        IntrospectionError: If a pattern matches none.
    """
    layers = dict(layers_of(network))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise IntrospectionError(f"--layers {pattern} matches no layer; there are {', '.join(layers)}.")
    is_wanted = {name: not patterns or any(fnmatchcase(name, pattern) for pattern in patterns) for name in layers}
    return {name: module for name, module in layers.items() if is_wanted[name]}


@torch.no_grad()
def renew_normalisation(network: nn.Module, inputs: Tensor) -> None:
    """Hold the statistics of batch normalisation at those of some images, in place.

    In training mode an example's loss depends on the others, so that it has no gradient of its own; the running
    averages of evaluation mode are not yet those of the network early in training. With constants equal to the
    statistics of the images, their activations are those of a training step and their gradients are their own.

    Args:
        network: The network, which is left in evaluation mode.
        inputs: The images, ``[images, channels, height, width]``.
    """
    norms = [module for module in network.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    network(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()


@torch.no_grad()
def _with_sampled(network: nn.Module, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> Batch:
    """Return a batch with labels drawn from the network's distribution, on the CPU, so that a seed fixes them."""
    probabilities = network(inputs).softmax(-1).cpu()
    if not probabilities.isfinite().all():
        raise IntrospectionError("The network's outputs are not finite: its training diverged; lower optimizer.lr.")
    sampled = torch.multinomial(probabilities, 1, generator=generator)[:, 0]  # [images]
    return Batch(inputs, labels, sampled.to(labels.device))


def title_of(study: Study) -> str:
    """Return network and data set in words."""
    model = study.source.config.model
    return f"{model.name} width {model.width:g} on {study.source.config.dataset.name}"
