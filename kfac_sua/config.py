"""Configuration of a training run: the typed schema and its registration with Hydra.

Types live here, values in ``configs/*.yaml``, checks of values in ``checks.py``.
"""

import dataclasses
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.config_store import ConfigStore

from kfac_sua.preconditioner.registry import structure_names
from kfac_sua.preconditioner.settings import Choice, KroneckerSettings

# A wheel carries the YAML files inside the package; a checkout has them at its root.
_PACKAGED = Path(__file__).resolve().parent / "configs"
CONFIG_DIR = _PACKAGED if _PACKAGED.is_dir() else _PACKAGED.parents[1] / "configs"
CONFIG_NAME = "config"
VERSION_BASE = "1.3"


# What stands in a configuration for "a number that suits the network" (tuned.py).
AUTO = "auto"
# Files and command lines may hold the word; a ``Config`` holds the number. The annotation is Any because OmegaConf 2.3
# cannot merge a node that has a union.
if TYPE_CHECKING:
    AutoFloat = float
else:
    AutoFloat = Any


class ConfigError(Exception):
    """A configuration that cannot be run; the message is one sentence naming key, value and cure.

    Args:
        sentence: The message. It is put on one line, as what it quotes of a user may hold several.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(" ".join(sentence.split()))


class Device(Choice):
    """Where to train."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class ProgressStyle(Choice):
    """How a run shows that it is alive."""

    auto = "auto"
    bar = "bar"
    lines = "lines"
    none = "none"


class ModelName(Choice):
    """The networks."""

    vgg11 = "vgg11"
    preact_resnet50 = "preact_resnet50"
    transformer = "transformer"
    tiny = "tiny"


class Initialisation(Choice):
    """The schemes of initial weights; ``models/initialisation.py`` says what each is."""

    he_fan_out = "he_fan_out"
    he_fan_in = "he_fan_in"
    xavier = "xavier"
    pytorch = "pytorch"


class DatasetName(Choice):
    """The data sets."""

    cifar10 = "cifar10"
    cifar100 = "cifar100"
    digits = "digits"


class Augmentation(Choice):
    """What happens to training images."""

    none = "none"
    flip_crop = "flip_crop"


class PreconditionerName(Choice):
    """The five curves of Figure 1. A preconditioner may also have the name of any other structure."""

    baseline = "baseline"
    kfac = "kfac"
    sua = "sua"
    grouped = "grouped"
    sua_grouped = "sua_grouped"


class GroupSizeScaling(Choice):
    """What the channels per group are multiplied by: the width of the network, or nothing."""

    width = "width"
    none = "none"


class OptimizerName(Choice):
    """The paper's optimizer, and two that a reader compares it with."""

    sgd = "sgd"
    adamw = "adamw"
    muon = "muon"


class Precision(Choice):
    """How convolutions and matrix products compute, in the network and where the preconditioner is applied.

    Parameters are always float32. Factors and inverses are always made in IEEE float32.
    """

    auto = "auto"
    float32 = "float32"
    tf32 = "tf32"
    bfloat16 = "bfloat16"


class NonFinite(Choice):
    """What a run does when a loss or a gradient is not finite."""

    stop = "stop"
    skip = "skip"


class Objective(Choice):
    """The number by which an optimising sweeper judges a run; as in ``python -m kfac_sua.runs.collect --best-by``."""

    best_val_error = "best_val_error"
    final_val_error = "final_val_error"
    final_val_loss = "final_val_loss"
    train_loss = "train_loss"
    train_eval_loss = "train_eval_loss"


class ScheduleName(Choice):
    """The learning-rate schedules."""

    constant = "constant"
    step = "step"
    cosine = "cosine"


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """Which network, with its own normalisation: ``preact_resnet50`` and ``transformer``; see ``configs/model``."""

    name: ModelName
    width: float
    initialisation: Initialisation


@dataclasses.dataclass(kw_only=True)
class PlainNetConfig(ModelConfig):
    """A network without shortcuts, which also trains without batch normalisation: ``vgg11`` and ``tiny``."""

    batch_norm: bool


@dataclasses.dataclass(kw_only=True)
class DatasetConfig:
    """Which images, how they are split and augmented; see ``configs/dataset``."""

    name: DatasetName
    data_dir: str
    download: bool
    validation_size: int
    train_size: int | None
    train_eval_size: int | None
    augmentation: Augmentation
    split_seed: int


@dataclasses.dataclass(kw_only=True)
class PreconditionerConfig:
    """The baseline, which has no settings; :class:`KroneckerConfig` is everything else."""

    name: str


@dataclasses.dataclass(kw_only=True)
class KroneckerConfig(PreconditionerConfig, KroneckerSettings):
    """All settings of the preconditioner; see ``configs/preconditioner`` and :class:`KroneckerSettings`."""

    damping: AutoFloat = 0.1
    group_size_scaling: GroupSizeScaling = GroupSizeScaling.width
    allow_exact_fisher: bool = False
    damping_final: float | None = None
    adaptive_damping: int | None = None

    def channels_per_group(self, width: float) -> int | None:
        """Return the channels of a group in a network of some width; None without groups.

        Args:
            width: Of the network, by which ``group_size_scaling=width`` multiplies ``group_size``.
        """
        if self.group_size is None or self.group_size_scaling is GroupSizeScaling.none:
            return self.group_size
        return scaled_group_size(self.group_size, width)

    def settings(self, width: float) -> KroneckerSettings:
        """Return what the preconditioner itself takes, without the keys of the command line.

        Args:
            width: Of the network, by which groups may be scaled; the preconditioner knows of none.
        """
        names = (field.name for field in dataclasses.fields(KroneckerSettings))
        values = {name: getattr(self, name) for name in names}
        return KroneckerSettings(**values | {"group_size": self.channels_per_group(width)})


@dataclasses.dataclass(kw_only=True)
class OptimizerConfig:
    """What every optimizer has; see ``configs/optimizer``."""

    name: OptimizerName
    lr: AutoFloat
    weight_decay: float


@dataclasses.dataclass(kw_only=True)
class SGDConfig(OptimizerConfig):
    """SGD with momentum, the only optimizer that takes a preconditioned gradient."""

    momentum: float
    nesterov: bool


@dataclasses.dataclass(kw_only=True)
class AdamWConfig(OptimizerConfig):
    """AdamW, a comparator."""

    betas: list[float]
    eps: float


@dataclasses.dataclass(kw_only=True)
class MuonConfig(OptimizerConfig):
    """Muon for the weights of hidden layers and AdamW for all other parameters, a comparator."""

    momentum: float
    nesterov: bool
    ns_steps: int
    adamw_lr_ratio: float
    adamw_betas: list[float]
    adamw_eps: float


@dataclasses.dataclass(kw_only=True)
class ScheduleConfig:
    """A schedule without settings: ``constant`` and ``cosine``."""

    name: ScheduleName


@dataclasses.dataclass(kw_only=True)
class StepScheduleConfig(ScheduleConfig):
    """The learning rate times ``gamma`` after each of the ``milestones``, fractions of the run's epochs."""

    milestones: list[float]
    gamma: float


@dataclasses.dataclass(kw_only=True)
class Config:
    """Everything that defines a run; see ``configs/config.yaml``."""

    seed: int
    device: Device
    epochs: int
    batch_size: int
    evaluation_batch_size: int
    channels_last: bool
    sync_batch_norm: bool
    precision: Precision
    capture: bool | str
    device_rates: str | None
    deterministic: bool
    num_threads: int | None
    non_finite: NonFinite
    checkpoint_interval_s: float | None
    log_interval: int | None
    start_from: str | None
    output_dir: str
    progress: ProgressStyle
    verbose: bool
    objective: Objective
    model: ModelConfig
    dataset: DatasetConfig
    preconditioner: PreconditionerConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig


# The type of the node that has each name. A YAML file that changes the name alone would keep the keys of another type.
MODEL_TYPES: dict[ModelName, type[ModelConfig]] = {
    ModelName.vgg11: PlainNetConfig,
    ModelName.preact_resnet50: ModelConfig,
    ModelName.transformer: ModelConfig,
    ModelName.tiny: PlainNetConfig,
}
OPTIMIZER_TYPES: dict[OptimizerName, type[OptimizerConfig]] = {
    OptimizerName.sgd: SGDConfig,
    OptimizerName.adamw: AdamWConfig,
    OptimizerName.muon: MuonConfig,
}


def register_schema() -> None:
    """Store the schema where the defaults lists of ``configs`` find it."""
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    store.store(group="schema", name="plain_net", node=PlainNetConfig)
    store.store(group="schema", name="kronecker", node=KroneckerConfig)
    store.store(group="schema", name="sgd", node=SGDConfig)
    store.store(group="schema", name="adamw", node=AdamWConfig)
    store.store(group="schema", name="muon", node=MuonConfig)
    store.store(group="schema", name="step", node=StepScheduleConfig)
    register_structures()


def register_structures() -> None:
    """Store a ``preconditioner=NAME`` for every registered structure that has no file in ``configs/preconditioner``."""
    for name in structure_names():
        if not (CONFIG_DIR / "preconditioner" / f"{name}.yaml").is_file():
            node = {"defaults": ["/kronecker/defaults@_here_", "_self_"], "name": name, "structure": name}
            ConfigStore.instance().store(group="preconditioner", name=name, node=node)


register_schema()


def scaled_group_size(group_size: int, width: float) -> int:
    """Return the channels of a group with which layers of some width have as many groups as at width 1.

    Args:
        group_size: Channels per group at width 1.
        width: The width.

    Returns:
        The product, rounded as the channels of the network are (ties to even), at least 1.
    """
    return max(1, round(group_size * width))


def to_plain(config: Any) -> Any:
    """Return a configuration, or a part of one, as dictionaries, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(config):
        names = (field.name for field in dataclasses.fields(config))
        return {name: to_plain(getattr(config, name)) for name in names}
    if isinstance(config, list):
        return [to_plain(item) for item in config]
    return config.value if isinstance(config, Enum) else config


def shown(value: object) -> str:
    """Return a value as a user would write it, text in quotes."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else f"'{value}'" if isinstance(value, str) else str(value)


def settings_error(error: ValueError) -> ConfigError:
    """Return an error of the preconditioner package with the key as the command line spells it.

    Args:
        error: What the package raised. Its message begins with the name of the setting at fault, if there is one,
            without the node of the configuration, which the package does not know.
    """
    message = str(error)
    names = {field.name for field in dataclasses.fields(KroneckerSettings)}
    is_setting = message.replace("=", " ").split(" ")[0] in names
    return ConfigError(f"preconditioner.{message}" if is_setting else message)
