"""The clock of every measurement, which other processes disturb as little as possible."""

import time

import torch


def seconds_now(device: torch.device | str) -> float:
    """Return the seconds of a monotonic clock after all work given to the device so far.

    On a CPU these are the CPU seconds of this process, so that what other processes do counts little; with several
    threads, those of all threads. On a GPU they are wall seconds, after waiting for the device.

    Args:
        device: The device whose work is measured.

    Returns:
        Seconds, of which only differences mean anything.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
