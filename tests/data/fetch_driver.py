"""A command of the project with another server for torchvision: ``fetch_driver.py mirror.json train epochs=1``."""

import importlib
import json
import signal
import sys
from datetime import timedelta
from pathlib import Path

from torchvision.datasets import CIFAR10

from kfac_sua.training import process_group


def main() -> int:
    """Carry out the command and return its exit code."""
    settings = json.loads(Path(sys.argv[1]).read_text())
    module = importlib.import_module(f"kfac_sua.{sys.argv[2]}")
    for name, value in settings["attributes"].items():
        setattr(CIFAR10, name, value)
    if settings["patience_s"] is not None:
        process_group.TIMEOUT = timedelta(seconds=settings["patience_s"])
    sys.argv[1:] = sys.argv[3:]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    return module.main() or 0


if __name__ == "__main__":
    sys.exit(main())
