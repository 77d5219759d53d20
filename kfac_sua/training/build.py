"""From a configuration to the state of a run before its first step."""

import torch

from kfac_sua.build import (
    build_adaptive_damping,
    build_model,
    build_optimizer,
    build_preconditioner,
    build_splits,
    fetch_images,
    has_images,
    memory_format,
)
from kfac_sua.config import Config
from kfac_sua.data import BatchLoader, DataError
from kfac_sua.models.sync_batch_norm import synchronise_batch_norm
from kfac_sua.training.capturing import build_step
from kfac_sua.training.determinism import seed_everything
from kfac_sua.training.diagnostics import Diagnostics
from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.process_group import ProcessGroup
from kfac_sua.training.state import Training
from kfac_sua.training.step_losses import StepLosses
from kfac_sua.training.timing import Stopwatch


def build_training(config: Config, device: torch.device, process_group: ProcessGroup | None = None) -> Training:
    """Build everything that a run trains with; nothing is written but images that have to be fetched.

    Args:
        config: The checked configuration, its ``precision`` resolved.
        device: Where to train.
        process_group: The processes that carry out the run, all of which call this; ``None`` for this one alone.

    Raises:
        ConfigError: If the preconditioner's settings do not fit the network, or ``capture=true`` does not fit the
            device or the configuration.
        DataError: If the data set cannot be had, is damaged or too small, if the mini-batch is too small for so many
            processes, or if these have different images.
    """
    process_group = process_group or ProcessGroup()
    if process_group.any(not process_group.run_on_all(lambda: has_images(config.dataset))):
        patient_group = process_group.with_long_timeout()
        patient_group.broadcast(lambda: fetch_images(config.dataset))
        patient_group.run_on_all(
            lambda: fetch_images(config.dataset)
        )  # on other machines, whose data_dir may be their own
    training = process_group.run_on_all(lambda: _build_own(config, device, process_group))
    for rank, digest in enumerate(digests := process_group.all_gather(training.data_digest)):
        if digest != digests[0]:
            raise DataError(
                "The processes of a run must train on the same images, but those in dataset.data_dir differ "
                f"between process 0 and process {rank}; give all the same files."
            )
    training.forward = process_group.data_parallel(training.model, broadcast_buffers=not config.sync_batch_norm)
    return training


def _build_own(config: Config, device: torch.device, process_group: ProcessGroup) -> Training:
    """Build what a process can build without the others."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    splits = build_splits(config.dataset)
    loader = BatchLoader(
        splits.train,
        splits.mean,
        splits.std,
        config.batch_size,
        device,
        config.dataset.augmentation.value,
        memory_format(config),
        process_group.part,
    )
    seed_everything(config.seed)
    model = build_model(config, splits.num_classes, device)
    if process_group.size > 1 and config.sync_batch_norm:
        model = synchronise_batch_norm(model, device)
    preconditioner = build_preconditioner(config, model, distributed=process_group.size > 1)
    watch = Stopwatch(device)
    if preconditioner is not None:
        preconditioner.phase = watch.phase
    sums = ErrorCounter(device, process_group)
    training = Training(
        config=config,
        device=device,
        splits=splits,
        loader=loader,
        model=model,
        optimizer=build_optimizer(config.optimizer, model),
        preconditioner=preconditioner,
        watch=watch,
        sums=sums,
        diagnostics=Diagnostics(model, preconditioner, device),
        step_losses=StepLosses(sums, config.log_interval, config.batch_size, len(loader), process_group),
        data_digest=splits.digest(),
        process_group=process_group,
        adaptive_damping=build_adaptive_damping(config.preconditioner, preconditioner),
        forward=model,
    )
    training.take_step = build_step(training)
    return training
