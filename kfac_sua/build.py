"""From configuration to objects, by plain look-ups of names; no other file knows both."""

import torch
from torch import nn

from kfac_sua.config import (
    AdamWConfig,
    Config,
    DatasetConfig,
    DatasetName,
    KroneckerConfig,
    ModelName,
    MuonConfig,
    OptimizerConfig,
    PlainNetConfig,
    PreconditionerConfig,
    SGDConfig,
    settings_error,
)
from kfac_sua.data import Splits, is_at_hand, load_archive, load_digits, make_splits, provide_archive
from kfac_sua.models import VGG11, PreActResNet50, TinyConvNet, VisionTransformer
from kfac_sua.optimizers import MuonWithAdamW
from kfac_sua.preconditioner import AdaptiveDamping, KroneckerPreconditioner

# Networks whose batch normalisation can be left out.
PLAIN_NETS = {ModelName.vgg11: VGG11, ModelName.tiny: TinyConvNet}
# All others.
OTHER_NETS = {ModelName.preact_resnet50: PreActResNet50, ModelName.transformer: VisionTransformer}


def has_images(config: DatasetConfig) -> bool:
    """Return whether a data set can be loaded without fetching anything.

    Args:
        config: Which data set.
    """
    return config.name is DatasetName.digits or is_at_hand(config.name.value, config.data_dir)


def fetch_images(config: DatasetConfig) -> None:
    """Fetch a data set that is missing, which may take long.

    Args:
        config: Which data set, and whether it may be downloaded.

    Raises:
        DataError: If it is missing and cannot be had.
    """
    if not has_images(config):
        provide_archive(config.name.value, config.data_dir, download=config.download)


def build_splits(config: DatasetConfig) -> Splits:
    """Load a data set, after fetching it if it is missing, and split it.

    Args:
        config: Which data set, and how to split it.

    Returns:
        Training, validation and test images.

    Raises:
        DataError: If the data set cannot be had or is damaged, or too small for the split.
    """
    if config.name is DatasetName.digits:
        train, test, class_names = load_digits()
    else:
        train, test, class_names = load_archive(config.name.value, config.data_dir, download=config.download)
    return make_splits(
        train,
        test,
        class_names,
        validation_size=config.validation_size,
        train_size=config.train_size,
        split_seed=config.split_seed,
    )


def build_model(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    """Return the network. It is initialised on the CPU, so that a seed gives the same weights on every device.

    Args:
        config: Which network, and the memory layout of its convolutions.
        num_classes: Number of outputs.
        device: The device it is moved to.

    Returns:
        The network, in training mode.
    """
    own, scheme = config.model, config.model.initialisation.value
    if isinstance(own, PlainNetConfig):
        model = PLAIN_NETS[own.name](num_classes, width=own.width, batch_norm=own.batch_norm, initialisation=scheme)
    else:
        model = OTHER_NETS[own.name](num_classes, width=own.width, initialisation=scheme)
    return model.to(device).to(memory_format=memory_format(config))


def memory_format(config: Config) -> torch.memory_format:
    """Return the layout of images and convolution weights."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer over all parameters.

    Args:
        config: Which optimizer, with its settings.
        model: The network, already on its device.

    Returns:
        The optimizer.
    """
    if isinstance(config, MuonConfig):
        return MuonWithAdamW(model, config)
    parameters = list(model.parameters())
    if isinstance(config, AdamWConfig):
        return torch.optim.AdamW(
            parameters,
            lr=config.lr,
            betas=(config.betas[0], config.betas[1]),
            eps=config.eps,
            weight_decay=config.weight_decay,
            # Keeps the count of steps on the GPU; otherwise every step after a resume would wait for it.
            fused=parameters[0].is_cuda,
        )
    assert isinstance(config, SGDConfig)
    return torch.optim.SGD(
        parameters,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
        # One kernel for all parameters on CUDA. On one CPU core it was measured slower than the plain loop (25 against
        # 15 ms, after a backward pass through VGG11 at width 1), and it rounds once where the loop rounds twice.
        fused=parameters[0].is_cuda,
    )


def build_preconditioner(
    config: Config, model: nn.Module, *, distributed: bool = False
) -> KroneckerPreconditioner | None:
    """Return the preconditioner, or None for the baseline.

    Args:
        config: Its settings, the width of the network and the seed of sampled labels.
        model: The network, already on its device.
        distributed: Whether several processes share every mini-batch.

    Returns:
        The preconditioner, hooked into the network.

    Raises:
        ConfigError: If the settings do not fit the network, such as a pattern in ``skip`` that matches no layer.
    """
    own = config.preconditioner
    if not isinstance(own, KroneckerConfig):
        return None
    settings = own.settings(config.model.width)
    try:
        return KroneckerPreconditioner(model, settings=settings, seed=config.seed, distributed=distributed)
    except ValueError as error:
        raise settings_error(error) from error


def build_adaptive_damping(
    config: PreconditionerConfig, preconditioner: KroneckerPreconditioner | None
) -> AdaptiveDamping | None:
    """Return the object that adapts the damping, or None if the damping does not adapt.

    Args:
        config: Its settings.
        preconditioner: The preconditioner, if there is one.

    Raises:
        ConfigError: If the damping lies outside of the range that can be adapted.
    """
    if preconditioner is None or not isinstance(config, KroneckerConfig) or config.adaptive_damping is None:
        return None
    try:
        return AdaptiveDamping(preconditioner, period=config.adaptive_damping)
    except ValueError as error:
        raise settings_error(error) from error
