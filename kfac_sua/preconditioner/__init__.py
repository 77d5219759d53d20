"""Structured Fisher preconditioners for PyTorch: K-FAC, SUA, channel groups. Imports torch and the standard library."""

from kfac_sua.preconditioner.adaptive_damping import AdaptiveDamping
from kfac_sua.preconditioner.captured import CapturedStep, StepGraph
from kfac_sua.preconditioner.damping_schedule import DampingScheduler, exponential_damping
from kfac_sua.preconditioner.forms.rates import DeviceRates, rates_of, use_rates
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner
from kfac_sua.preconditioner.registry import register_structure, structure_names
from kfac_sua.preconditioner.report import LayerReport, LayerTable
from kfac_sua.preconditioner.settings import (
    Application,
    DampingRule,
    FisherType,
    InverseMethod,
    KroneckerSettings,
    Likelihood,
    LossReduction,
    Products,
    Structure,
    WeightSharing,
)
from kfac_sua.preconditioner.structures.row_structure import RowStructure, Spectrum
from kfac_sua.preconditioner.structures.rows import LayerRows
from kfac_sua.preconditioner.structures.structure import FisherStructure

__all__ = [
    "AdaptiveDamping",
    "Application",
    "CapturedStep",
    "DampingRule",
    "DampingScheduler",
    "DeviceRates",
    "FisherStructure",
    "FisherType",
    "InverseMethod",
    "KroneckerPreconditioner",
    "KroneckerSettings",
    "LayerReport",
    "LayerRows",
    "LayerTable",
    "Likelihood",
    "LossReduction",
    "Products",
    "RowStructure",
    "Spectrum",
    "StepGraph",
    "Structure",
    "WeightSharing",
    "exponential_damping",
    "rates_of",
    "register_structure",
    "structure_names",
    "use_rates",
]
