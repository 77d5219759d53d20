"""Captured steps: a training step recorded once, and from then on replayed by the device without Python."""

from kfac_sua.preconditioner.captured.graph import StepGraph
from kfac_sua.preconditioner.captured.step import CapturedStep

__all__ = ["CapturedStep", "StepGraph"]
