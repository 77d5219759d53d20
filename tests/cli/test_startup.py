"""What showing the help costs: importing PyTorch and Hydra, and none of the packages that only some runs need."""

import json
import subprocess
import sys

# Each takes from a tenth of a second to several; `torch._dynamo` is the compiler.
HEAVY = {
    "PIL",
    "markdown",
    "matplotlib",
    "pandas",
    "scipy",
    "sklearn",
    "sympy",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.utils.tensorboard",
    "torchvision",
    "triton",
}

SHOW_HELP = """
import json, runpy, sys
import torch
before = set(sys.modules)  # what PyTorch itself imports is not for this package to choose
sys.argv = ["train", "--help"]
try:
    runpy.run_module("kfac_sua.train", run_name="__main__")
finally:
    print("\\n" + json.dumps(sorted(set(sys.modules) - before)))
"""


def test_help_imports_no_heavy_package(tmp_path):
    """Plotting, tables, data sets, TensorBoard and the compiler are imported where they are used, not before."""
    command = [sys.executable, "-c", SHOW_HELP]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True)
    help_text, _, modules = result.stdout.rstrip().rpartition("\n")
    imported = set(json.loads(modules))
    assert "Train one network" in help_text
    assert {"kfac_sua.training.loop", "kfac_sua.runs.tensorboard", "kfac_sua.data.digits", "hydra"} <= imported
    assert imported & HEAVY == set()
