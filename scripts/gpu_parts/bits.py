"""Whether two sweeps ended with the same bits: ``python scripts/gpu_parts/bits.py runs/captured runs/eager``.

Compares every run of the first directory with its namesake in the second: the network of the last checkpoint bit by
bit, and metrics.csv without the measured seconds. Exit code 1 if anything differs or is missing.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import sys
from pathlib import Path

import torch
from torch import Tensor

from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.startup import run_command
from kfac_sua.training.checkpoint import Checkpoint, load_checkpoint


def main() -> int:
    """Print a line per run, and return the exit code."""
    first, second = map(Path, sys.argv[1:])
    names = sorted(path.parent.relative_to(first) for path in first.rglob("run.json"))
    if not names:
        print(f"No run below {first}.")
        return 1
    same = [_is_same(name, first / name, second / name) for name in names]
    return int(not all(same))


def _is_same(name: Path, first: Path, second: Path) -> bool:
    """Compare two directories of runs, and say what comes out."""
    checkpoints = _checkpoint(first), _checkpoint(second)
    parameters = _difference(checkpoints[0].model, checkpoints[1].model)
    metrics = _metrics(first) == _metrics(second)
    steps = " and ".join(str(checkpoint.step) for checkpoint in checkpoints)
    print(f"{name}: steps {steps}; parameters {parameters}; metrics {'equal' if metrics else 'different'}", flush=True)
    return parameters == "equal" and metrics


def _checkpoint(directory: Path) -> Checkpoint:
    info = read_run_info(directory / "run.json")
    path = directory / "checkpoint.state"
    checkpoint = load_checkpoint(path, fingerprint=info.fingerprint, seed=info.seed, device=torch.device("cpu"))
    if checkpoint is None:
        sys.exit(f"{path} is missing.")
    return checkpoint


def _difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    """Return ``equal``, or how many tensors differ and by how much at most; NaN are equal if their bits are."""
    different = [name for name in first if not torch.equal(_bits(first[name]), _bits(second[name]))]
    if not different:
        return "equal"
    largest = max(float((first[name].double() - second[name].double()).abs().max()) for name in different)
    return f"different in {len(different)} of {len(first)} tensors, by {largest:.3g} at most"


def _bits(values: Tensor) -> Tensor:
    return values.contiguous().flatten().view(torch.uint8)


def _metrics(directory: Path) -> list[str]:
    """Return the rows of metrics.csv without seconds, as text: a NaN equals itself there."""
    records = read_records(directory / "metrics.csv")
    return [
        repr({name: value for name, value in vars(record).items() if not name.endswith("_s")}) for record in records
    ]


if __name__ == "__main__":
    run_command(main)
