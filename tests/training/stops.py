"""Runs that are asked to stop after a number of mini-batches."""

import signal

import pytest

from kfac_sua.training.writer import RunWriter


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Ask the next run to stop after so many mini-batches, of training or of evaluation."""
    between, count = RunWriter.after_batch, iter(range(1, calls + 1))

    def counting(writer: RunWriter) -> None:
        if next(count, None) == calls:
            writer._stop.signal_number = signal.SIGTERM
        between(writer)

    monkeypatch.setattr(RunWriter, "after_batch", counting)
