"""What the preconditioner can be asked for, and which combinations make sense. Standard library only."""

import dataclasses
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from kfac_sua.preconditioner.plain_numbers import checked_integer, checked_number, shown


class Choice(StrEnum):
    """A string-valued choice whose member names equal their values, so that YAML, Python and messages agree."""


class Structure(Choice):
    """Structure of the activation factor (Laurent et al. 2018, Sec. 1 and 2.1)."""

    kfac = "kfac"
    """Channels and kernel taps together: ``d = channels · taps``."""
    sua = "sua"
    """Spatially uncorrelated activations: identity over taps ⊗ channel factor, ``d = channels``."""


class DampingRule(Choice):
    """Where the Tikhonov term goes."""

    factored = "factored"
    """√(ε/scale) I on each factor (the first author's convention)."""
    factored_pi = "factored_pi"
    """The same, split by the ratio of the factors' mean eigenvalues (Martens & Grosse 2015, Sec. 6.3)."""
    exact = "exact"
    """ε I on the Kronecker product itself, through eigendecompositions."""


class WeightSharing(Choice):
    """How output locations that share one weight enter the factors (Eschenhagen et al. 2023)."""

    expand = "expand"
    """Every location is a sample of its own (Grosse & Martens 2016)."""
    reduce = "reduce"
    """Inputs are averaged and output gradients summed over locations first (eq. 1 as printed)."""


class FisherType(Choice):
    """Which labels define the output gradients."""

    empirical = "empirical"
    """The true labels: the training backward itself, at no extra cost."""
    mc = "mc"
    """One label per example drawn from the model: one extra backward from the same forward."""
    exact = "exact"
    """The expectation over all labels: one extra backward per output."""


class Likelihood(Choice):
    """The model's predictive distribution, needed by ``mc`` and ``exact`` Fisher."""

    categorical = "categorical"
    """Softmax over ``[examples, classes]`` logits (cross-entropy)."""
    gaussian = "gaussian"
    """Unit-variance Gaussian around outputs of any shape (the loss ½‖y − f(x)‖², summed over outputs)."""


class LossReduction(Choice):
    """How the training loss combines examples; it fixes the scale of the empirical output gradients."""

    mean = "mean"
    sum = "sum"


class InverseMethod(Choice):
    """How a damped factor is inverted."""

    auto = "auto"
    """Per layer, whichever takes less time over one refresh period, by the rates of the device."""
    cholesky = "cholesky"
    """Always the dense factor and its Cholesky inverse."""
    low_rank = "low_rank"
    """Always the Woodbury identity on the mini-batch's rows."""


class Application(Choice):
    """Where the inverse is applied."""

    weight = "weight"
    """To the weight gradient, in ``step()``: until then ``.grad`` is the plain gradient."""
    auto = "auto"
    """Per layer and side where it takes less time: to the weight gradient, or to inputs and output gradients inside
    the backward pass, after which ``.grad`` is already preconditioned: so do not clip before ``step()``, and leave
    weight decay to the optimizer, as the gradient of a loss term on the weights themselves would stay plain."""


class Products(Choice):
    """In what inverses are applied, where the device's units for float32 are slower than those for bfloat16."""

    auto = "auto"
    """In three products of bfloat16 parts with float32 sums where that is faster, and where the loop lets float32
    products compute in less than IEEE float32 (TF32); in IEEE float32 elsewhere."""
    ieee = "ieee"
    """In IEEE float32, always."""
    bf16x3 = "bf16x3"
    """In bfloat16 parts, always."""


@dataclass(kw_only=True)
class KroneckerSettings:
    """Settings of a :class:`KroneckerPreconditioner`, checked when created.

    Numbers may be NumPy's, or tensors without dimensions; they become Python's own.

    Args:
        structure: Structure of the activation factor of convolutions, ``kfac`` or ``sua``.
        group_size: Channels per group, on the activation side and on the gradient side; ``None`` for no grouping.
        damping: Tikhonov ε added to a layer's Fisher block, > 0. It means the same in every structure.
        damping_rule: ``factored``, ``factored_pi`` or ``exact``.
        weight_sharing: ``expand`` or ``reduce``.
        fisher_type: ``empirical``, ``mc`` or ``exact``.
        likelihood: ``categorical`` or ``gaussian``; read by ``mc`` and ``exact`` only.
        loss_reduction: Whether the training loss is the ``mean`` or the ``sum`` over examples.
        inverse_period: Mini-batches between two refreshes of the inverses, ≥ 1.
        factor_period: Mini-batches between two measurements of the statistics; ``None`` for ``inverse_period``.
        ema_decay: Decay of the running average of the factors per measurement, in [0, 1); 0 uses the statistics of
            the refresh's own mini-batch alone.
        activation_rows: An approximation: measure activation factors from at most so many rows (output locations;
            under SUA, input pixels) per call of a layer, spread evenly over its examples, ≥ 1. ``None`` measures all.
            Processes that share a mini-batch take equal parts of them, each from its own examples: the one setting
            in which they do not choose as one process would.
        inverse_method: ``auto``, ``cholesky`` or ``low_rank``.
        application: ``weight`` or ``auto``; the result is the same to rounding.
        products: In what inverses are applied: ``auto``, ``ieee`` or ``bf16x3``.
        kl_clip: κ > 0: shorten steps whose lr² Σ g·u exceeds it, see ``kl_clip.py``; ``None`` never does.
        skip: Names of layers to leave to the plain gradient; shell-style wildcards such as ``features.*``.

    Raises:
        ValueError: If a value is out of range or of another type, or a combination cannot work; the message begins with
            the field's name.
    """

    structure: Structure = Structure.kfac
    group_size: int | None = None
    damping: float = 0.1
    damping_rule: DampingRule = DampingRule.factored
    weight_sharing: WeightSharing = WeightSharing.expand
    fisher_type: FisherType = FisherType.empirical
    likelihood: Likelihood = Likelihood.categorical
    loss_reduction: LossReduction = LossReduction.mean
    inverse_period: int = 50
    factor_period: int | None = None
    ema_decay: float = 0.0
    activation_rows: int | None = None
    inverse_method: InverseMethod = InverseMethod.auto
    application: Application = Application.weight
    products: Products = Products.auto
    kl_clip: float | None = None
    skip: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            setattr(self, name, _as_choice(kind, name, getattr(self, name)))
        self.validate()

    @property
    def needs_dense_factors(self) -> bool:
        """Whether factors must be formed densely: a running average, or eigendecompositions."""
        return self.ema_decay > 0 or self.damping_rule is DampingRule.exact

    def validate(self) -> None:
        """Make fields plain, and raise ``ValueError`` naming the first that is out of range or contradicts another."""
        self._make_plain()
        _require(
            self.group_size is None or self.group_size >= 1,
            "group_size",
            ">= 1 or null (no grouping)",
            self.group_size,
        )
        _require(self.inverse_period >= 1, "inverse_period", ">= 1 mini-batch", self.inverse_period)
        _require(0 <= self.ema_decay < 1, "ema_decay", "in [0, 1)", self.ema_decay)
        self._validate_periods()
        self._validate_activation_rows()
        self._validate_inverse_method()
        self._validate_kl_clip()
        if self.products is Products.bf16x3 and self.damping_rule is DampingRule.exact:
            raise ValueError(
                "products=bf16x3 splits inverses, but damping_rule=exact applies eigenvectors, in IEEE float32; use "
                "products=auto or damping_rule=factored."
            )

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as strings, numbers and lists, as a checkpoint can hold them."""
        values = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, str) else value for key, value in values.items()}

    def _make_plain(self) -> None:
        self.damping = checked_damping(self.damping)
        self.inverse_period = checked_integer("inverse_period", self.inverse_period)
        for name in ("group_size", "factor_period", "activation_rows"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, checked_integer(name, value))
        self.ema_decay = checked_number("ema_decay", self.ema_decay)
        self.kl_clip = None if self.kl_clip is None else checked_number("kl_clip", self.kl_clip)
        self.skip = checked_names(self.skip)

    def _validate_periods(self) -> None:
        period = self.factor_period
        if period is None:
            return
        _require(
            period >= 1 and self.inverse_period % period == 0,
            "factor_period",
            f"a divisor of inverse_period={self.inverse_period}, so that a refresh never lacks statistics",
            period,
        )
        if self.ema_decay == 0 and period != self.inverse_period:
            raise ValueError(
                f"factor_period={period} with ema_decay=0 would measure statistics that no refresh uses; "
                f"set ema_decay > 0 or factor_period=null."
            )

    def _validate_activation_rows(self) -> None:
        if self.activation_rows is None:
            return
        _require(self.activation_rows >= 1, "activation_rows", ">= 1 or null (all of them)", self.activation_rows)
        if self.weight_sharing is WeightSharing.reduce:
            raise ValueError(
                f"activation_rows={self.activation_rows} takes some of a mini-batch's locations, but "
                f"weight_sharing=reduce averages over them first; use weight_sharing=expand or activation_rows=null."
            )

    def _validate_inverse_method(self) -> None:
        if self.inverse_method is not InverseMethod.low_rank:
            return
        if self.damping_rule is DampingRule.exact:
            raise ValueError(
                "inverse_method=low_rank cannot be combined with damping_rule=exact, which needs the dense factors' "
                "eigenvectors; use damping_rule=factored or factored_pi, or inverse_method=auto."
            )
        if self.ema_decay > 0:
            raise ValueError(
                f"inverse_method=low_rank needs the rows of one mini-batch, but ema_decay={self.ema_decay} averages "
                f"over many; set ema_decay=0 or inverse_method=auto."
            )

    def _validate_kl_clip(self) -> None:
        if self.kl_clip is None:
            return
        is_usable = 1e-37 <= self.kl_clip <= 1e37
        _require(is_usable, "kl_clip", "> 0 within the range of float32, or null (no clipping)", self.kl_clip)
        if self.application is Application.auto:
            raise ValueError(
                f"kl_clip={self.kl_clip:g} needs the plain gradient in every step, but application=auto preconditions "
                f"that of some layers inside the backward pass; use application=weight or kl_clip=null."
            )


def checked_damping(value: object) -> float:
    """Return a damping if it can be one.

    Raises:
        ValueError: If it is not a number > 0 within the range of float32.
    """
    number = checked_number("damping", value)
    _require(1e-37 <= number <= 1e37, "damping", "a number > 0 within the range of float32", number)
    return float(number)


def checked_names(skip: object) -> list[str]:
    """Return the names of layers to leave out as a list; ``None`` for none.

    Raises:
        ValueError: If they are one name, or anything but names.
    """
    if skip is None:
        return []
    if isinstance(skip, str):
        raise ValueError(f"skip must be a list of layer names, got {shown(skip)}; write [{str(skip)!r}].")
    if not isinstance(skip, Iterable) or isinstance(skip, Mapping | bytes):
        raise ValueError(f"skip must be a list of layer names, got {shown(skip)}.")
    names = list(skip)
    for name in names:
        if not isinstance(name, str):
            raise ValueError(
                f"skip must be a list of layer names, but one of its entries is {shown(name)}; write a layer of an "
                f"nn.Sequential as a string, such as '3'."
            )
    return [str(name) for name in (sorted(names) if isinstance(skip, Set) else names)]


def merge_settings(settings: KroneckerSettings | None, options: Mapping[str, Any]) -> KroneckerSettings:
    """Return the settings, or those that the options (where not ``None``) make.

    Raises:
        ValueError: If both are given, as one of them would be ignored.
        TypeError: If the settings are something else.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if settings is None:
        return KroneckerSettings(**given)
    if not isinstance(settings, KroneckerSettings):
        raise TypeError(
            f"settings must be KroneckerSettings, got {shown(settings)}; give KroneckerSettings(damping=..., ...), or "
            f"each setting as an option of its own."
        )
    if given:
        raise ValueError(f"Give either settings or {', '.join(given)}, not both.")
    settings.validate()  # fields may have been set since
    return settings


_CHOICES: dict[str, type[Choice]] = {
    "structure": Structure,
    "damping_rule": DampingRule,
    "weight_sharing": WeightSharing,
    "fisher_type": FisherType,
    "likelihood": Likelihood,
    "loss_reduction": LossReduction,
    "inverse_method": InverseMethod,
    "application": Application,
    "products": Products,
}


def _as_choice(kind: type[Choice], name: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member) for member in kind)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.") from None


def _require(condition: bool, name: str, expected: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value}.")
