"""Faults against the training command, and one table: ``python scripts/torture.py --minutes 15``."""

import importlib
import sys
from pathlib import Path

from kfac_sua.startup import begin, run_command

if __name__ == "__main__":
    begin()
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    run_command(importlib.import_module("torture.campaign").main)
