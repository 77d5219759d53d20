"""The state of a run: everything that changes while it trains, to and from a checkpoint."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.build import memory_format
from kfac_sua.config import Config, KroneckerConfig
from kfac_sua.data import BatchLoader, ImageSet, Splits, epoch_generator
from kfac_sua.preconditioner import AdaptiveDamping, KroneckerPreconditioner
from kfac_sua.training.checkpoint import Checkpoint
from kfac_sua.training.diagnostics import Diagnostics
from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.process_group import ProcessGroup
from kfac_sua.training.schedule import learning_rate, scheduled_damping
from kfac_sua.training.step_losses import StepLosses
from kfac_sua.training.timing import Stopwatch

IMPLEMENTATION_KEYS = {"foreach", "fused"}
"""Keys in the parameter groups of PyTorch's optimizers that say how a step is computed, not what."""


@dataclasses.dataclass
class Training:
    """Everything that training needs and changes.

    Attributes:
        data_digest: Digest of all images and labels.
        epoch: Completed epochs.
        batch: Mini-batches of the epoch after these that have been taken.
        skipped_steps: Mini-batches whose step was skipped, because their loss or gradient was not finite.
        sums: Losses and errors of the epoch's mini-batches.
        diagnostics: Norms of gradients and updates at some of these mini-batches.
        step_losses: The losses of single mini-batches, for ``log_interval``.
        process_group: The processes that carry out the run.
        forward: The module that is called in training: the network, wrapped in ``DistributedDataParallel`` if there are
            several processes.
        adaptive_damping: Adapts the damping after steps; ``None`` without ``adaptive_damping``.
        take_step: Takes one step; ``build_training`` sets it, since a step acts on this state.
        best: The weights with the lowest validation error so far, on the CPU; see ``Checkpoint``.
    """

    config: Config
    device: torch.device
    splits: Splits
    loader: BatchLoader
    model: nn.Module
    optimizer: torch.optim.Optimizer
    preconditioner: KroneckerPreconditioner | None
    watch: Stopwatch
    sums: ErrorCounter
    diagnostics: Diagnostics
    step_losses: StepLosses
    data_digest: str
    process_group: ProcessGroup
    adaptive_damping: AdaptiveDamping | None
    forward: nn.Module
    take_step: Callable[[], None] = dataclasses.field(init=False)
    epoch: int = 0
    batch: int = 0
    skipped_steps: int = 0
    best: dict[str, Any] | None = None

    @property
    def step(self) -> int:
        """Completed optimisation steps."""
        return self.epoch * len(self.loader) + self.batch - self.skipped_steps

    @property
    def statistics_due(self) -> bool:
        """Whether the next step measures statistics."""
        return self.preconditioner is not None and self.preconditioner.statistics_due

    @property
    def loss_weight(self) -> float:
        """Factor on this process's mean loss with which the mean over processes is that of the whole mini-batch.

        It differs from 1 because parts of a mini-batch may differ by one example.
        """
        num_processes = self.process_group.size
        return num_processes * self.loader.part_size / self.config.batch_size if num_processes > 1 else 1.0

    @functools.cached_property
    def train_subset(self) -> BatchLoader:
        """The training images on which train_eval_loss is measured: the same for all seeds and settings."""
        size, images = self.config.dataset.train_eval_size, self.splits.train
        if size is not None and size < len(images):
            generator = epoch_generator(self.config.dataset.split_seed, 0, "train_eval")
            images = images.select(torch.randperm(len(images), generator=generator)[:size].sort().values)
        return self.evaluation_loader(images)

    @functools.cached_property
    def validation(self) -> BatchLoader:
        """The held-out images."""
        return self.evaluation_loader(self.splits.val)

    def evaluation_loader(self, images: ImageSet) -> BatchLoader:
        """Return a loader that serves images in order, normalised like those that are trained on."""
        layout = memory_format(self.config)
        return BatchLoader(
            images,
            self.splits.mean,
            self.splits.std,
            device=self.device,
            memory_format=layout,
            part=self.process_group.part,
        )

    def lr(self, epoch: int) -> float:
        """Return the learning rate of an epoch, counted from 0."""
        return learning_rate(self.config.schedule, self.config.optimizer.lr, epoch, self.config.epochs)

    def begin_epoch(self) -> None:
        """Set learning rate, damping and the order of the images, for an epoch that begins or is resumed."""
        for group in self.optimizer.param_groups:
            lr = self.lr(self.epoch) * group.get("lr_ratio", 1.0)
            # A captured step of a fused optimizer reads the rate in float32 on the device; an eager step must as well.
            group["lr"] = torch.tensor(lr, dtype=torch.float32).item() if group.get("fused") else lr
        if self.preconditioner is not None and isinstance(self.config.preconditioner, KroneckerConfig):
            damping = scheduled_damping(self.config.preconditioner, self.epoch, self.config.epochs)
            if damping is not None:
                self.preconditioner.damping = damping
        self.model.train()
        with self.watch.phase("data"):
            self.loader.begin_epoch(self.config.seed, self.epoch, first=self.batch)

    def end_epoch(self) -> None:
        """Count the epoch, of which all mini-batches have been taken, and reset its sums."""
        self.epoch, self.batch = self.epoch + 1, 0
        self.sums.reset()
        self.diagnostics.reset()

    def keep_if_best(self, val_error: float) -> None:
        """Keep the weights if the completed epoch has the lowest validation error so far, the first of equals.

        Args:
            val_error: That of the completed epoch.
        """
        if self.best is None or val_error < self.best["val_error"]:
            self.best = {"epoch": self.epoch, "val_error": val_error, "model": weights(self.model)}

    def close(self) -> None:
        """Release captured graphs and ``DistributedDataParallel``; no further step can be taken.

        A graph must not wait for the garbage collector, which might free it during another capture, and
        ``DistributedDataParallel`` must not outlive the process group.
        """
        del self.take_step, self.forward

    def checkpoint(self, fingerprint: str, records_digest: str) -> Checkpoint:
        """Return the state between two mini-batches; all processes have to call this, and get the same."""
        return Checkpoint(
            fingerprint=fingerprint,
            seed=self.config.seed,
            data_digest=self.data_digest,
            records_digest=records_digest,
            epoch=self.epoch,
            batch=self.batch,
            step=self.step,
            skipped_steps=self.skipped_steps,
            model=self.model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            preconditioner=self.preconditioner.state_dict() if self.preconditioner else None,
            sums=self.sums.state_dict(),
            diagnostics=self.diagnostics.state_dict(),
            times=self.watch.totals(),
            best=self.best,
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Restore a checkpoint of the same configuration and seed that ``check_fits`` has accepted."""
        self.epoch, self.batch, self.skipped_steps = checkpoint.epoch, checkpoint.batch, checkpoint.skipped_steps
        self.model.load_state_dict(checkpoint.model)
        load_optimizer_state(self.optimizer, checkpoint.optimizer)
        if self.preconditioner is not None and checkpoint.preconditioner is not None:
            self.preconditioner.load_state_dict(checkpoint.preconditioner)
        self.sums.load_state_dict(checkpoint.sums)
        if checkpoint.diagnostics is not None:
            self.diagnostics.load_state_dict(checkpoint.diagnostics)
        self.watch.restore(checkpoint.times)
        self.best = checkpoint.best


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's parameters and buffers on the CPU.

    Args:
        model: The network.
    """
    return {name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, but keep the implementation (fused or not) that it was made with.

    PyTorch saves the implementation with the learning rate, so an older checkpoint could switch it back.

    Args:
        optimizer: An optimizer for the same parameters as the saved one.
        state: The saved ``state_dict``.
    """
    made_with = [{key: group[key] for key in IMPLEMENTATION_KEYS & group.keys()} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, implementation in zip(optimizer.param_groups, made_with, strict=True):
        group.update(implementation)
