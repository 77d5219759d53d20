"""The networks that are looked at: states of a finished run, or of a short one that is trained for it."""

import dataclasses
import io
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kfac_sua.build import build_model
from kfac_sua.config import Config, to_plain
from kfac_sua.data.sizes import SIZES
from kfac_sua.device import choose_device, choose_precision, rates_as_configured
from kfac_sua.files.atomic import write_atomically
from kfac_sua.files.openers import read_regular
from kfac_sua.introspect.record import IntrospectionError
from kfac_sua.load import LoadedRun, load_run
from kfac_sua.runs.run_info import RecordError
from kfac_sua.training.build import build_training
from kfac_sua.training.determinism import seed_everything
from kfac_sua.training.divergence import Diverged
from kfac_sua.training.precision import computing_in
from kfac_sua.training.state import Training

UNTRAINED = "untrained"
FRACTIONS = {UNTRAINED: 0.0, "early": 0.1, "middle": 0.5, "end": 1.0}
"""Checkpoints of a fresh run, as fractions of its steps."""
SAVED: tuple[Literal["best", "last"], ...] = ("best", "last")


@dataclasses.dataclass(frozen=True)
class State:
    """A network at one moment of its training.

    Attributes:
        network: The network, on the CPU.
        step: Optimisation steps that it had taken.
    """

    network: nn.Module
    step: int


class Source(ABC):
    """Where networks come from.

    Attributes:
        config: The run's configuration, with the first seed.
        checkpoints: Names of the states that there are, in the order of training.
        defaults: Those that are looked at unless others are named.
    """

    config: Config
    checkpoints: tuple[str, ...]
    defaults: tuple[str, ...]

    @abstractmethod
    def state(self, seed: int, checkpoint: str, tell: Callable[[str], None]) -> State:
        """Return a state of the run with a seed.

        Raises:
            IntrospectionError: If there is none.
        """

    def blank(self) -> nn.Module:
        """Return a network of the same shapes, on the CPU."""
        return _new_network(self.config)

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what tells this source from others, as plain values."""

    @property
    @abstractmethod
    def description(self) -> str:
        """How the network was trained, as the rest of a sentence."""


class FreshRun(Source):
    """A short run of a configuration, trained when a state of it is first needed, and kept.

    Args:
        config: Its configuration.
        steps: Optimisation steps.
        directory: Where its states are kept.
        wanted: The checkpoints that will be asked for.

    Raises:
        IntrospectionError: If so few steps make two of them the same.
    """

    def __init__(self, config: Config, steps: int, directory: Path, wanted: Sequence[str]) -> None:
        self.config, self._steps, self._directory = config, steps, directory
        self.checkpoints = tuple(FRACTIONS)
        self.defaults = tuple(FRACTIONS)
        self._wanted = [name for name in FRACTIONS if name in wanted]
        for one, following in itertools.pairwise(self._wanted):
            step = _step_of(one, steps)
            if step == _step_of(following, steps):
                enough = next(
                    more for more in itertools.count(steps) if _step_of(one, more) < _step_of(following, more)
                )
                raise IntrospectionError(
                    f"--steps {steps} makes {one} and {following} both step {step}; give --steps {enough} or more, or"
                    " leave one of them out with --checkpoints."
                )

    def state(self, seed: int, checkpoint: str, tell: Callable[[str], None]) -> State:
        """Return a state, after training the run if it is not kept."""
        path = self._path(seed, checkpoint)
        if not path.exists():
            self._train(seed, tell)
        kept = torch.load(io.BytesIO(read_regular(path)), map_location="cpu", weights_only=True)
        network = _new_network(dataclasses.replace(self.config, seed=seed))
        network.load_state_dict(kept["model"])
        return State(network, kept["step"])

    def identity(self) -> dict[str, Any]:
        """Return configuration and steps."""
        return {"config": _without_circumstances(self.config), "steps": self._steps}

    @property
    def description(self) -> str:
        """What it was trained with."""
        config = to_plain(self.config)
        own = config["preconditioner"]
        damping = f", damping {own['damping']:g}" if "damping" in own else ""
        return (
            f"trained for {self._steps} steps of {config['batch_size']} images with preconditioner={own['name']}"
            f", lr {config['optimizer']['lr']:g}{damping}"
        )

    def _path(self, seed: int, checkpoint: str) -> Path:
        return self._directory / f"seed{seed}-{checkpoint}.pt"

    def _train(self, seed: int, tell: Callable[[str], None]) -> None:
        """Train the run and keep the wanted states."""
        device = choose_device(self.config.device)
        precision = choose_precision(self.config.precision, device.type)
        # Steps are few, and states are taken between them: nothing is captured.
        config = dataclasses.replace(self.config, seed=seed, precision=precision, capture=False)
        stops = {_step_of(name, self._steps): name for name in self._wanted}
        states: dict[str, bytes] = {}
        with computing_in(precision, device), rates_as_configured(config.device_rates, device):
            training = build_training(config, device)
            try:
                for step in range(max(stops) + 1):
                    if step in stops:
                        states[stops[step]] = _saved(training, step)
                    if step < max(stops):
                        tell(f"training, step {step + 1} of {max(stops)}")
                        _take_step(training)
            except Diverged as error:
                raise IntrospectionError(
                    f"The run with seed {seed} diverged after {training.step} steps; lower optimizer.lr."
                ) from error
            finally:
                training.close()
        # All at the end, so that a run that diverged leaves none.
        self._directory.mkdir(parents=True, exist_ok=True)
        for name, state in states.items():
            write_atomically(self._path(seed, name), state)


class SavedRun(Source):
    """A run that has been trained: its weights, and those that it began with.

    Args:
        directory: The run's directory.

    Raises:
        RecordError: If it is not that of a run, has no weights, or weights that are damaged.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        loaded: dict[str, LoadedRun] = {}
        for weights in SAVED:
            try:
                loaded[weights] = load_run(directory, weights)
            except RecordError:
                # A run without a complete epoch has no best weights, and a diverged one no last ones.
                if (directory / f"{weights}.pt").exists() or (not loaded and weights == SAVED[-1]):
                    raise
        *_, self._newest = loaded.values()
        self.config = self._newest.config
        begins = () if self.config.start_from else (UNTRAINED,)  # else its first weights are another run's
        self.checkpoints = self.defaults = (*begins, *loaded)

    def state(self, seed: int, checkpoint: str, tell: Callable[[str], None]) -> State:
        """Return a state of the run."""
        del seed, tell
        if checkpoint == UNTRAINED:
            return State(_new_network(self.config), 0)
        assert checkpoint in SAVED
        run = load_run(self._directory, checkpoint)
        step = next(record.step for record in run.records if record.epoch == run.epoch)
        return State(run.network, step + run.batch)

    def identity(self) -> dict[str, Any]:
        """Return the configuration, and how far the run has been trained."""
        ended = {"epoch": self._newest.epoch, "batch": self._newest.batch}
        return {"config": _without_circumstances(self.config) | {"seed": self.config.seed}, "ended": ended}

    @property
    def description(self) -> str:
        """What it was trained with."""
        place = Path(*self._directory.resolve().parts[-3:])  # data set and configuration are above the seed
        diverged_at = self._newest.info.diverged_at_epoch
        end = "" if diverged_at is None else f" before it diverged in epoch {diverged_at}"
        return (
            f"of the run {place}, trained for {self._newest.epoch} epochs with"
            f" preconditioner={self.config.preconditioner.name}{end}"
        )


def _step_of(checkpoint: str, steps: int) -> int:
    """Return the step of a checkpoint in a fresh run of so many steps."""
    return round(FRACTIONS[checkpoint] * steps)


def _saved(training: Training, step: int) -> bytes:
    """Return a network and its step as ``torch.load`` reads them."""
    content = io.BytesIO()
    model = {name: tensor.detach().cpu() for name, tensor in training.model.state_dict().items()}
    torch.save({"model": model, "step": step}, content)
    return content.getvalue()


def _take_step(training: Training) -> None:
    if training.batch == 0:
        training.begin_epoch()
    training.take_step()
    training.batch += 1
    if training.batch == len(training.loader):
        training.end_epoch()


def _new_network(config: Config) -> nn.Module:
    """Return the network that a run begins with, on the CPU."""
    seed_everything(config.seed)
    return build_model(config, SIZES[config.dataset.name].classes, torch.device("cpu"))


def _without_circumstances(config: Config) -> dict[str, Any]:
    """Return a configuration as plain values, without what does not change a network."""
    left_out = {"seed", "output_dir", "progress", "verbose", "num_threads", "checkpoint_interval_s", "log_interval"}
    plain = {name: value for name, value in to_plain(config).items() if name not in left_out}
    plain["dataset"] = {name: value for name, value in plain["dataset"].items() if name != "data_dir"}
    return plain
