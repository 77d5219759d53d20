"""The emulator of CUDA graphs finds what a graph would get wrong in silence; each fault is planted and seen found."""

import pytest
import torch
from captured_training import Case, Training, batches, rebind
from graph_emulator import CaptureError, DanglingError, EmulatedGraph
from torch import Tensor


def recorded(function) -> EmulatedGraph:
    """Return a graph that holds a function."""
    graph = EmulatedGraph()
    graph.capture(function)
    return graph


KEPT = list(batches(2))


def refreshed(training: Training, graph: EmulatedGraph) -> None:
    """Capture the plain step after a refresh, and refresh again, without the class that looks after it all."""
    first, second = KEPT
    training.function(*first)
    training.function(*first)
    graph.capture(lambda: training.function(*first))
    training.preconditioner.go_to_step(0)
    training.function(*second)


@pytest.mark.parametrize("structure", ["kfac", "sua"])
@pytest.mark.parametrize("rule", ["factored", "exact"])
@pytest.mark.parametrize("group_size", [None, 6])
def test_inverses_that_are_replaced_leave_a_graph_dangling(monkeypatch, structure, rule, group_size):
    """Where a refresh makes new tensors instead of writing over the old ones, a replay would read freed memory."""
    settings = {"structure": structure, "damping_rule": rule, "group_size": group_size}
    graph = EmulatedGraph()
    refreshed(Training(Case(settings), is_captured=False), graph)
    graph.replay()

    monkeypatch.setattr("kfac_sua.preconditioner.kfac.take_inverses", rebind)
    refreshed(Training(Case(settings), is_captured=False), graph := EmulatedGraph())
    with pytest.raises(DanglingError, match="reads a freed tensor"):
        graph.replay()


def test_a_result_that_nobody_declared_is_poisoned(monkeypatch):
    """Where each step makes a new scale of the KL clip, a replay leaves the one of the capture undefined."""

    def scale_after_replay() -> Tensor:
        training = Training(Case({"kl_clip": 1e-3}), is_captured=False)
        training.function(*KEPT[0])
        recorded(lambda: training.function(*KEPT[1])).replay()
        return training.preconditioner.kl_scale

    assert 0 < scale_after_replay() < 1
    monkeypatch.setattr("kfac_sua.preconditioner.kfac.written_over", lambda kept, new, like: new)
    assert scale_after_replay().isnan()


VALUES = torch.tensor([1.0, -2.0, 3.0])
PLANTED = {
    "item": lambda: VALUES.sum().item(),
    "float": lambda: float(VALUES[0]),
    "condition": lambda: bool((VALUES > 0).any()),
    "tolist": lambda: VALUES.tolist(),
    "numpy": lambda: VALUES.numpy(),
    "equal": lambda: torch.equal(VALUES, VALUES + 1),
    "number": lambda: VALUES * torch.tensor(2.0),
    "list": lambda: VALUES + torch.tensor([1.0, 2.0, 3.0]),
    "nonzero": lambda: VALUES.nonzero(),
    "masked_select": lambda: VALUES.masked_select(VALUES > 0),
    "index": lambda: VALUES[VALUES > 0],
    "index_put": lambda: VALUES.clone().index_put_((VALUES > 0,), torch.zeros(2)),
    "unique": lambda: VALUES.unique(),
    "repeat": lambda: VALUES.repeat_interleave(torch.ones_like(VALUES).long()),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_no_graph_can_hold_is_refused(name):
    """Reads back to the host, copies from it, and sizes that depend on values."""
    with pytest.raises(CaptureError):
        recorded(PLANTED[name])


def test_selection_by_numbers_is_recorded():
    """Indices that are numbers select as many as they are."""
    chosen = torch.tensor([2, 0])
    result = torch.zeros(2)
    graph = recorded(lambda: result.copy_(VALUES[chosen]))
    chosen.copy_(torch.tensor([1, 1]))
    graph.replay()
    assert result.tolist() == [-2.0, -2.0]


def test_a_capture_carries_nothing_out():
    """Weights, momentum, running statistics, sums and random numbers are after it what they were before."""
    training = Training(Case(None), is_captured=False)
    training.take(2)
    before = {name: value.clone() for name, value in training.state().items() if not name.startswith("grad")}
    generator = torch.get_rng_state()

    def function() -> None:
        training.function(*KEPT[0])
        torch.rand(3)

    graph = recorded(function)
    after = training.state()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(torch.get_rng_state(), generator)
    graph.replay()
    assert not any(torch.equal(after[name], before[name]) for name in ("total", "0.weight", "1.running_mean"))
    assert not torch.equal(torch.get_rng_state(), generator)


def test_numbers_are_those_of_the_capture():
    """A Python number that changes later is not seen, a tensor is."""
    number, tensor, result = [2.0], torch.ones(()), torch.zeros(())
    graph = recorded(lambda: result.copy_(VALUES[0] * number[0] + tensor))
    number[0] = 100.0
    tensor.fill_(5.0)
    graph.replay()
    assert result == 7.0


def test_what_an_eager_step_leaves_in_shared_memory_is_seen_and_overwritten():
    """Only what is kept on purpose may be left, until the next replay."""
    graph = recorded(lambda: VALUES * 2)
    kept = []
    assert graph.run(lambda: float((VALUES + 1).sum()), is_shared=True) == 5.0
    assert not graph.has_left([])
    graph.run(lambda: kept.append(VALUES + 1), is_shared=True)
    assert graph.has_left([])
    assert not graph.has_left(kept)
    graph.replay()
    assert kept[0].isnan().all()
    graph.run(lambda: kept.append(VALUES + 1), is_shared=False)
    graph.replay()
    assert not kept[1].isnan().any()
