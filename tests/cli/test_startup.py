"""What starting costs: PyTorch and Hydra, and none of the packages that only some runs need; Ctrl-C meanwhile."""

import json
import signal
import subprocess
import sys
import time

import pytest
from thinned import one_in

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


def test_command_imports_pytorch_after_it_can_take_an_interrupt(tmp_path):
    """What Python imports before the first line of a command is next to nothing."""
    code = "import sys, kfac_sua, kfac_sua.startup; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


COMMANDS = {
    "kfac_sua.train": ["-m", "kfac_sua.train", "optimizer.lr=0.1"],
    "kfac_sua.reproduce": ["-m", "kfac_sua.reproduce", "fig1", "--scale", "smoke", "--dry-run"],
    # What the installed script does.
    "kfac-sua-train": ["-c", "import sys; from kfac_sua.console import train; sys.exit(train())", "optimizer.lr=0.1"],
}


# Seconds after the process has begun: within the imports of PyTorch, within those after it, and within Hydra.
@pytest.mark.parametrize(
    ("name", "delay_s"), one_in(9, [(name, delay_s) for name in COMMANDS for delay_s in (0.8, 0.3, 1.6)])
)
def test_interrupt_while_importing_shows_no_traceback(tmp_path, name, delay_s):
    """Ctrl-C at any moment of the start leaves one line and code 130."""
    # Python itself takes a moment until it can be told anything: a line from the process says that it has.
    command = [sys.executable, "-X", "importtime", *COMMANDS[name]]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any("kfac_sua.startup" in line for line in lines), "the command was not started"
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    said = [line for line in err.splitlines() if not line.startswith("import time:")]
    assert "Traceback" not in err
    if process.returncode != 130:  # had ended before
        pytest.skip(f"the command had ended after {delay_s} s")
    assert len(said) == 1
    assert said[0].startswith("interrupted")
