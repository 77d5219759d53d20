"""What the preconditioner can be asked for, and which combinations make sense.

This file imports the standard library only; settings that are checked load the class of their structure.

A setting is one field of :class:`KroneckerSettings`: name, type, default, range and meaning. The constructor of the
preconditioner, the configuration of the command line and their documentation take it from there.
"""

import ast
import contextlib
import dataclasses
import difflib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import NoneType
from typing import Any, TypedDict, get_args, get_type_hints

from kfac_sua.preconditioner.plain_numbers import checked_integer, checked_number, shown
from kfac_sua.preconditioner.registry import BUILT_IN, structure_class, structure_names


class Choice(StrEnum):
    """A string-valued choice whose member names equal their values, so that YAML, Python and messages agree."""


class Structure(Choice):
    """The package's own structures of a layer's Fisher block. Others may be registered (``registry.py``)."""

    kfac = "kfac"
    """A Kronecker product with channels and kernel taps together: ``d = channels · taps`` (Laurent et al. 2018)."""
    sua = "sua"
    """Spatially uncorrelated activations: identity over taps ⊗ channel factor, ``d = channels`` (Sec. 2.1 there)."""
    activation_only = "activation_only"
    """The activation factor alone, FOOF (Benzing 2022)."""
    eigenvalue_corrected = "eigenvalue_corrected"
    """K-FAC's eigenbasis with exact second moments along it, EKFAC (George et al. 2018)."""


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


READ_BY_ALL = frozenset(
    (
        *("structure", "damping", "fisher_type", "likelihood", "loss_reduction", "inverse_period", "factor_period"),
        *("application", "kl_clip", "skip"),
    )
)
"""Settings that every structure has. ``application=auto`` takes the weight where a structure has no sides."""

LEAST_FLOAT, LARGEST_FLOAT = 1e-37, 1e37
"""Bounds of numbers that float32 holds with their full precision: beyond them numbers become 0 or infinite."""


def _field(default: Any, is_allowed: Callable[[Any], bool], allowed: str) -> Any:
    """Return a field of :class:`KroneckerSettings` with a range.

    Args:
        default: Its default.
        is_allowed: Whether a number of its type is in the range.
        allowed: The range, for messages and documentation: "must be ...".
    """
    return dataclasses.field(default=default, metadata={"is_allowed": is_allowed, "allowed": allowed})


@dataclass(kw_only=True)
class KroneckerSettings:
    """Settings of a :class:`KroneckerPreconditioner`, checked when created.

    Choices may be given as strings; numbers may be NumPy's, or tensors without dimensions. They become members of the
    choices' classes and Python's own numbers.

    Raises:
        ValueError: If a value is out of range or of another type, or a combination cannot work; the message begins with
            the field's name.
    """

    structure: str = Structure.kfac
    """How a layer's Fisher block is approximated: one of the package's own structures, or the name of another that is
    registered."""
    group_size: int | None = _field(None, lambda size: size >= 1, ">= 1 or null (no grouping)")
    """Channels per group, on the activation side and on the gradient side; ``None`` for no grouping."""
    damping: float = _field(
        0.1, lambda value: LEAST_FLOAT <= value <= LARGEST_FLOAT, "a number > 0 within the range of float32"
    )
    """Tikhonov ε added to a layer's Fisher block. It means the same in every structure."""
    damping_rule: DampingRule = DampingRule.factored
    """Where ε goes: on the factors or on their product."""
    weight_sharing: WeightSharing = WeightSharing.expand
    """How output locations that share one weight enter the factors."""
    fisher_type: FisherType = FisherType.empirical
    """Which labels define the output gradients."""
    likelihood: Likelihood = Likelihood.categorical
    """The model's predictive distribution; read under ``fisher_type`` ``mc`` and ``exact`` only."""
    loss_reduction: LossReduction = LossReduction.mean
    """How the training loss combines examples; read under ``fisher_type`` ``empirical`` only."""
    inverse_period: int = _field(50, lambda period: period >= 1, ">= 1 mini-batch")
    """Mini-batches between two refreshes of the inverses."""
    factor_period: int | None = None
    """Mini-batches between two measurements of the statistics, a divisor of ``inverse_period``; ``None`` for
    ``inverse_period``."""
    ema_decay: float = _field(0.0, lambda decay: 0 <= decay < 1, "in [0, 1)")
    """Decay of the running average of the factors per measurement; 0 uses the refresh's own mini-batch alone."""
    activation_rows: int | None = _field(None, lambda rows: rows >= 1, ">= 1 or null (all of them)")
    """An approximation: measure activation factors from at most so many rows (output locations; under SUA, input
    pixels) per call of a layer, spread evenly over its examples. ``None`` measures all. Processes that share a
    mini-batch take equal parts of them, each from its own examples: the one setting in which they do not choose as one
    process would."""
    inverse_method: InverseMethod = InverseMethod.auto
    """How a damped factor is inverted; the result is the same to rounding."""
    application: Application = Application.weight
    """Where the inverse is applied; the result is the same to rounding."""
    products: Products = Products.auto
    """The arithmetic in which inverses are applied."""
    kl_clip: float | None = _field(
        None,
        lambda kappa: LEAST_FLOAT <= kappa <= LARGEST_FLOAT,
        "> 0 within the range of float32, or null (no clipping)",
    )
    """κ: shorten steps whose lr² Σ g·u exceeds it (see ``kl_clip.py``); then ``step()`` needs ``lr``, and
    ``application`` must be ``weight``. ``None`` never does."""
    skip: list[str] = dataclasses.field(default_factory=list)
    """Names of layers to leave to the plain gradient; shell-style wildcards such as ``features.*``."""

    def __post_init__(self) -> None:
        self.validate()

    @property
    def needs_dense_factors(self) -> bool:
        """Whether factors must be formed densely: a running average, or eigendecompositions."""
        return self.ema_decay > 0 or self.damping_rule is DampingRule.exact

    def validate(self) -> None:
        """Convert the fields, and raise ``ValueError`` naming the first that is out of range or contradicts another."""
        for field in dataclasses.fields(KroneckerSettings):
            setattr(self, field.name, _checked(field, getattr(self, field.name)))
        self._validate_factor_period()
        self._validate_inverse_method()
        self._validate_read_settings()
        if self.activation_rows is not None and self.weight_sharing is WeightSharing.reduce:
            raise ValueError(
                f"activation_rows={self.activation_rows} takes some of a mini-batch's locations, but "
                f"weight_sharing=reduce averages over them first; use weight_sharing=expand or activation_rows=null."
            )
        has_sides = structure_class(self.structure).has_sides
        if self.kl_clip is not None and self.application is Application.auto and has_sides:
            raise ValueError(
                f"kl_clip={self.kl_clip:g} needs the plain gradient in every step, but application=auto preconditions "
                f"that of some layers inside the backward pass; use application=weight or kl_clip=null."
            )
        if self.products is Products.bf16x3 and self.damping_rule is DampingRule.exact:
            raise ValueError(
                "products=bf16x3 splits inverses, but damping_rule=exact applies eigenvectors, in IEEE float32; use "
                "products=auto or damping_rule=factored."
            )

    def to_plain(self) -> dict[str, Any]:
        """Return the settings as strings, numbers and lists, as a checkpoint can hold them."""
        values = dataclasses.asdict(self)
        return {key: str(value) if isinstance(value, str) else value for key, value in values.items()}

    def _validate_factor_period(self) -> None:
        period = self.factor_period
        if period is None:
            return
        if period < 1 or self.inverse_period % period:
            raise ValueError(
                f"factor_period must be a divisor of inverse_period={self.inverse_period}, so that a refresh never "
                f"lacks statistics, got {period}."
            )
        if self.ema_decay == 0 and period != self.inverse_period:
            raise ValueError(
                f"factor_period={period} with ema_decay=0 would measure statistics that no refresh uses; "
                f"set ema_decay > 0 or factor_period=null."
            )

    def _validate_read_settings(self) -> None:
        """Refuse settings that the structure would ignore."""
        structure = structure_class(self.structure)
        reads = structure.reads | READ_BY_ALL
        if not structure.needs_output_grads:
            reads -= {"fisher_type", "likelihood"}
        for field in dataclasses.fields(KroneckerSettings):
            value = getattr(self, field.name)
            if field.name not in reads and value != field.default:
                raise ValueError(
                    f"{field.name}={value} is not read by structure={self.structure}; leave it out, or use a "
                    f"structure that reads it, such as kfac."
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


class KroneckerOptions(TypedDict, total=False):
    """The types in which :class:`KroneckerPreconditioner` takes the settings; ``None`` is the default."""

    structure: str | None
    group_size: int | None
    damping: float | Callable[[int], float] | None
    damping_rule: DampingRule | str | None
    weight_sharing: WeightSharing | str | None
    fisher_type: FisherType | str | None
    likelihood: Likelihood | str | None
    loss_reduction: LossReduction | str | None
    inverse_period: int | None
    factor_period: int | None
    ema_decay: float | None
    activation_rows: int | None
    inverse_method: InverseMethod | str | None
    application: Application | str | None
    products: Products | str | None
    kl_clip: float | None
    skip: Iterable[str] | None


def settings_from(settings: KroneckerSettings | None, options: Mapping[str, Any]) -> KroneckerSettings:
    """Return the settings, or those that the options (where not ``None``) make.

    Args:
        settings: Settings; then no option may be given.
        options: What :class:`KroneckerOptions` lists; a damping that is a function counts with its value at step 0.

    Raises:
        ValueError: If both are given, as one of them would be ignored, or a value is out of range.
        TypeError: If the settings are something else, or there is no such option.
    """
    for name in options:
        if name not in KroneckerOptions.__annotations__:
            close = difflib.get_close_matches(name, KroneckerOptions.__annotations__, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"KroneckerPreconditioner() got an unexpected keyword argument {name!r}{hint}")
    given = {name: value for name, value in options.items() if value is not None}
    if settings is None:
        if callable(function := given.get("damping")):
            given["damping"] = function(0)
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


def signature_with_settings(function: Callable[..., Any]) -> inspect.Signature:
    """Return the signature of a function with the fields of the settings, and their defaults, for its ``**options``.

    It is what ``help()`` and notebooks show.
    """
    signature = inspect.signature(function)
    own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    values = KroneckerSettings()
    fields = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(values, name), annotation=kind)
        for name, kind in get_type_hints(KroneckerOptions).items()
    ]
    return signature.replace(parameters=[*own[:2], *fields, *own[2:]])  # after self and the model


def texts_below_names() -> dict[str, dict[str, str]]:
    """Return, for each class of this file, the text below each of its names, which Python does not keep.

    Raises:
        OSError: If the source is not there.
    """
    source = ast.parse(inspect.getsource(sys.modules[__name__]))
    return {node.name: dict(_texts(node.body)) for node in source.body if isinstance(node, ast.ClassDef)}


def _texts(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, below in itertools.pairwise(body):
        text = ast.literal_eval(below.value) if isinstance(below, ast.Expr) else None
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(text, str):
            target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
            if isinstance(target, ast.Name):
                yield target.id, " ".join(text.split())


def _with_fields(docstring: str) -> str:
    """Return the docstring of the settings with the meaning, choices and range of each field, for ``help()``."""
    texts, lines = texts_below_names(), []
    for field in dataclasses.fields(KroneckerSettings):
        choices = texts.get(choices_of(field).__name__, {})
        allowed = [f"Must be {field.metadata['allowed']}."] if field.metadata else []
        parts = [texts["KroneckerSettings"][field.name], *(f"``{name}``: {text}" for name, text in choices.items())]
        entry = f"{field.name}: {' '.join([*parts, *allowed])}"
        lines.append(textwrap.indent(textwrap.fill(entry, 108, subsequent_indent="    "), " " * 8))
    return "\n".join([docstring.rstrip(), "", "    Attributes:", *lines, "    "])


def choices_of(field: "dataclasses.Field[Any]") -> type:
    """Return the class whose members a field may hold, or its type if it has no choices."""
    return Structure if field.name == "structure" else _field_types()[field.name]


def checked_damping(value: object) -> float:
    """Return a damping if it can be one.

    Raises:
        ValueError: If it is not a number > 0 within the range of float32.
    """
    (field,) = (field for field in dataclasses.fields(KroneckerSettings) if field.name == "damping")
    damping: float = _checked(field, value)
    return damping


@cache
def _field_types() -> dict[str, type]:
    """Return the type of each field, without the ``None`` that some may be."""
    hints = get_type_hints(KroneckerSettings)
    return {name: next((kind for kind in get_args(hint) if kind is not NoneType), hint) for name, hint in hints.items()}


def _checked(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """Return what a field holds for what it was given.

    Raises:
        ValueError: If it is of another type, or out of the field's range.
    """
    name, kind = field.name, _field_types()[field.name]
    if name == "skip":
        return _checked_names(value)
    if name == "structure":
        return _checked_structure(value)
    if issubclass(kind, Choice):
        return _as_choice(kind, name, value)
    if value is None and field.default is None:
        return None
    number = checked_integer(name, value) if kind is int else checked_number(name, value)
    if field.metadata and not field.metadata["is_allowed"](number):
        raise ValueError(f"{name} must be {field.metadata['allowed']}, got {number}.")
    return number if kind is int else float(number)


def _as_choice(kind: type[Choice], name: str, value: str) -> Choice:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(str(member) for member in kind)
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.") from None


def _checked_structure(name: object) -> str:
    """Return the name of a structure, if there is one that has it; of the package's own as a :class:`Structure`."""
    names = structure_names()
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"structure must be one of {', '.join(names)}, got {name!r}.")
    return Structure(name) if name in BUILT_IN else name


def _checked_names(skip: object) -> list[str]:
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


with contextlib.suppress(OSError):  # without its source, as in a frozen application, the docstring stays short
    KroneckerSettings.__doc__ = _with_fields(KroneckerSettings.__doc__ or "")
