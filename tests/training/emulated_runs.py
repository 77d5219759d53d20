"""Runs on a CPU whose plain steps are captured by an emulated graph."""

import pytest
import torch
from graph_emulator import EmulatedGraph

from kfac_sua.preconditioner import CapturedStep
from kfac_sua.training import capturing


class EmulatedStep(CapturedStep):
    """A captured step of a run on a CPU.

    Attributes:
        made: All since the list was emptied.
    """

    made: list["EmulatedStep"] = []  # noqa: RUF012  # for all

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments, graph=EmulatedGraph())
        self.made.append(self)


class FusedAdamW(torch.optim.AdamW):
    """AdamW as on a GPU: its count of steps is a tensor that stays where it is, and its rate may be one."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options | {"fused": True})


@pytest.fixture
def emulated(monkeypatch) -> list[EmulatedStep]:
    """Let runs capture on the CPU, where their configuration asks for it; return the steps that do."""
    monkeypatch.setattr(capturing, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(capturing, "CapturedStep", EmulatedStep)
    monkeypatch.setattr(torch.optim, "AdamW", FusedAdamW)
    monkeypatch.setattr(EmulatedStep, "made", [])
    return EmulatedStep.made
