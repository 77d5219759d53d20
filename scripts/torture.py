"""Faults against the training command, and one table: ``python scripts/torture.py --minutes 15``."""

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
    sys.exit(importlib.import_module("torture.campaign").main())
