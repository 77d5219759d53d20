"""Structured Fisher preconditioners (K-FAC, SUA, channel groups) for PyTorch."""

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings

__all__ = ["KroneckerPreconditioner", "KroneckerSettings"]
