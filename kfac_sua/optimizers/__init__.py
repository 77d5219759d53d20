"""Optimizers that PyTorch does not have in the form needed; the others are made in ``build.py``."""

from kfac_sua.optimizers.muon import MuonWithAdamW

__all__ = ["MuonWithAdamW"]
