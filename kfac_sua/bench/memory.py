"""Peak memory of a piece of work.

On a GPU this is the caching allocator's own count. The memory of a captured graph is in it when the step is captured,
and when a refresh is carried out in that memory; what the allocator keeps in reserve is not, captured or eager.

On a CPU it is the peak of live bytes in PyTorch's allocator: the memory events of ``torch.profiler``, each an
allocation or release with its bytes, added up in the order of time. These include what single operators use inside
(workspaces of convolutions and LAPACK), which a count of tensors would miss, and depend on nothing but the operators
that run. The profiler's tables hold only net bytes per operator, so the events are read from its exported trace.
"""

import gc
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that a piece of work holds at once; only its own allocations count.

    Args:
        work: What to run, once.
        device: Whose memory is counted.

    Returns:
        Bytes; on a CPU exact and the same in every run.

    Raises:
        RuntimeError: If PyTorch's profiler reports no memory events.
    """
    gc.collect()  # otherwise cycles of earlier work would be released meanwhile
    return _peak_on_cuda(work, device) if device.type == "cuda" else _peak_on_cpu(work)


def _peak_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    # cuBLAS keeps a workspace per stream: one left by earlier work would not be counted, but one for a graph would.
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()  # a step in a graph's memory cannot use what is in reserve outside of it
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(work: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's library otherwise logs its stages to stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    if not changes:
        raise RuntimeError(f"torch.profiler of PyTorch {torch.__version__} reports no memory events on the CPU.")
    in_order = (change for _, change in sorted(changes, key=lambda event: event[0]))
    return max(itertools.accumulate(in_order, initial=0))  # the largest running sum
