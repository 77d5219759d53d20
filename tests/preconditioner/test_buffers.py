"""What a refresh changes and a plain step reads: tensors that are written in place, and what they hold."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from captured_training import rebind
from identical import assert_identical
from torch import Tensor, nn

from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings
from kfac_sua.preconditioner.checkpoint.in_place import written_over
from kfac_sua.preconditioner.forms import DenseInverse, EigenBasis, LowRankInverse, PatchInverse

LR = 0.05
PERIOD = 2
SETTINGS = [
    {"structure": "kfac"},
    {"structure": "kfac", "inverse_method": "cholesky", "kl_clip": 1e-4},
    {"structure": "kfac", "inverse_method": "low_rank", "kl_clip": 1e-4},
    {"structure": "kfac", "inverse_method": "low_rank", "group_size": 2, "application": "auto"},
    {"structure": "kfac", "inverse_method": "cholesky", "group_size": 2, "damping_rule": "factored_pi"},
    {"structure": "kfac", "inverse_method": "cholesky", "ema_decay": 0.5, "factor_period": 1, "application": "auto"},
    {"structure": "kfac", "damping_rule": "exact"},
    {"structure": "kfac", "damping_rule": "exact", "group_size": 2, "ema_decay": 0.5, "weight_sharing": "reduce"},
    {"structure": "kfac", "weight_sharing": "reduce", "application": "auto"},
    {"structure": "sua", "inverse_method": "low_rank", "damping_rule": "factored_pi", "application": "auto"},
    {"structure": "sua", "inverse_method": "cholesky", "group_size": 2, "kl_clip": 1e-4},
    {"structure": "sua", "damping_rule": "exact", "ema_decay": 0.5, "factor_period": 1, "kl_clip": 1e-4},
    {"structure": "sua", "weight_sharing": "reduce", "group_size": 2, "application": "auto"},
]
PATCH_FORM = {"structure": "kfac", "inverse_method": "low_rank"}
RESIZED = [
    PATCH_FORM,
    {"structure": "kfac", "inverse_method": "low_rank", "group_size": 2, "application": "auto"},
    {"structure": "sua", "inverse_method": "low_rank", "damping_rule": "factored_pi", "kl_clip": 1e-4},
    {"structure": "kfac", "inverse_method": "cholesky", "application": "auto"},
    {"structure": "sua", "damping_rule": "exact"},
]
RESTORED = [
    {"structure": "kfac", "inverse_method": "cholesky"},
    PATCH_FORM,
    {"structure": "sua", "inverse_method": "low_rank", "group_size": 2},
    {"structure": "kfac", "damping_rule": "exact"},
    {"structure": "sua", "ema_decay": 0.5, "factor_period": 1},
]


def make_net() -> nn.Sequential:
    """Return a small float32 net with every kind of layer that there is, and one that keeps the plain gradient."""
    torch.manual_seed(0)
    convolutions = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 2, bias=False)
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24, 3))


def batch(index: int, size: int = 4) -> tuple[Tensor, Tensor]:
    """Return mini-batch ``index``."""
    generator = torch.Generator().manual_seed(index)
    return torch.randn(size, 2, 5, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator)


@dataclass
class Run:
    """A training whose inverses are refreshed at every second step."""

    settings: dict[str, Any]
    net: nn.Sequential = field(default_factory=make_net)

    def __post_init__(self) -> None:
        settings = KroneckerSettings(inverse_period=PERIOD, **self.settings)
        self.preconditioner = KroneckerPreconditioner(self.net, settings=settings)
        self.optimizer = torch.optim.SGD(self.net.parameters(), lr=LR, momentum=0.9)

    def train(self, indices: Iterable[int], size: int = 4) -> None:
        """Train on the given mini-batches."""
        for index in indices:
            inputs, labels = batch(index, size)
            self.optimizer.zero_grad()
            inputs = inputs.to(self.net[0].weight)
            nn.functional.cross_entropy(self.net(inputs), labels).backward()
            self.preconditioner.step(lr=LR)
            self.optimizer.step()

    @property
    def read_tensors(self) -> list[Tensor]:
        """What plain steps read."""
        return [tensor for layer in self.preconditioner.layers for tensor in layer.read_tensors]

    @property
    def written_tensors(self) -> list[Tensor]:
        """The same, and what they write for whoever reads it from outside."""
        scale = self.preconditioner.kl_scale
        return self.read_tensors if scale is None else [*self.read_tensors, scale]

    @property
    def changing_tensors(self) -> list[Tensor]:
        """Those that depend on the mini-batch of a refresh in every setting: a tensor for each side of each layer."""
        inverses = [layer.inverse for layer in self.preconditioner.layers]
        sides = [side for inverse in inverses for side in (inverse.activation, inverse.gradient)]
        return [next(iter(side.tensors().values())) for side in sides]

    @property
    def state(self) -> list[Tensor]:
        """Copies of all numbers of the training."""
        return [tensor.detach().clone() for tensor in (*self.written_tensors, *self.net.state_dict().values())]


def places(tensors: Iterable[Tensor]) -> list[tuple]:
    """Return where tensors lie and how."""
    return [(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors]


def assert_equal(got: Iterable[Tensor], want: Iterable[Tensor]) -> None:
    """Check that tensors are equal bit for bit, shapes and precisions included."""
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested dicts."""
    if isinstance(state, Mapping):
        for value in state.values():
            yield from tensors_in(value)
    elif isinstance(state, Tensor):
        yield state


def inverses_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inverses in a preconditioner's state, by layer."""
    return {name: layer["inverse"] for name, layer in state["layers"].items()}


def averages_of(preconditioner: KroneckerPreconditioner) -> list[Tensor]:
    """Return the running averages of all layers, as they are kept."""
    averages = [layer.average.value for layer in preconditioner.layers if layer.average.value is not None]
    return [side.values for average in averages for side in (average.activation, average.gradient)]


def continue_from(run: Run, other: Run) -> None:
    """Bring a training to where another is, its preconditioner apart."""
    run.net.load_state_dict(other.net.state_dict())
    run.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_refreshes_write_in_place(monkeypatch, settings):
    """Refreshes leave every tensor where it is, with new numbers: bit for bit those of tensors that are rebound."""
    run, twin = Run(settings), Run(settings)
    run.train([0])
    kept = run.written_tensors  # held, so that no address is used a second time
    before = places(kept)
    assert len(kept) == len(run.read_tensors) + ("kl_clip" in settings)
    states = [run.state]
    for index in range(1, 3 * PERIOD):
        old = [tensor.clone() for tensor in run.changing_tensors]
        run.train([index])
        assert places(run.written_tensors) == before
        assert_equal(kept, run.written_tensors)
        is_new = [not torch.equal(*pair) for pair in zip(old, run.changing_tensors, strict=True)]
        assert set(is_new) == {index % PERIOD == 0}
        states.append(run.state)

    monkeypatch.setattr("kfac_sua.preconditioner.kfac.take_inverses", rebind)
    twin_kept = []
    for index, state in enumerate(states):
        twin.train([index])
        twin_kept += twin.read_tensors if index % PERIOD == 0 else []
        assert_equal(twin.state, state)
    addresses = {tensor.data_ptr() for tensor in twin_kept}
    assert len(addresses) > 2 * len(run.read_tensors)  # those of a run that rebinds do move


def test_every_form_of_an_inverse_is_tried():
    """The settings above bring forth each of them."""
    seen = set()
    for settings in SETTINGS:
        run = Run(settings)
        run.train([0])
        inverses = [layer.inverse for layer in run.preconditioner.layers]
        seen |= {type(side) for inverse in inverses for side in (inverse.activation, inverse.gradient)}
    assert seen == {DenseInverse, LowRankInverse, PatchInverse, EigenBasis}


@pytest.mark.parametrize("settings", RESIZED, ids=str)
def test_a_mini_batch_of_another_size(monkeypatch, settings):
    """Tensors whose shapes it changes are new, all others stay in place, and all numbers are those of rebound ones."""
    sizes = {0: 4, 2: 6, 4: 6, 6: 3, 8: 4}
    run, twin = (Run(settings, make_net().double()) for _ in range(2))
    states, held, num_moved = [], [], 0
    for index in range(10):
        before, numbers = run.read_tensors, [tensor.clone() for tensor in run.read_tensors]
        held += before
        run.train([index], sizes[index - index % PERIOD])
        states.append(run.state)
        if index == 0:
            continue
        for old, number, new in zip(before, numbers, run.read_tensors, strict=True):
            if old.shape == new.shape:
                assert places([old]) == places([new])
            else:
                assert new.data_ptr() not in {tensor.data_ptr() for tensor in held}
                assert torch.equal(old, number)  # what has been let go is not written
                num_moved += 1
    assert (num_moved > 0) == (settings.get("inverse_method") == "low_rank")

    monkeypatch.setattr("kfac_sua.preconditioner.kfac.take_inverses", rebind)
    for index, state in enumerate(states):
        twin.train([index], sizes[index - index % PERIOD])
        for got, want in zip(state, twin.state, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-10)


def test_the_clip_is_written_in_place():
    """The scale of the first step is that of every later one, until the model's precision is another."""
    run = Run({"kl_clip": 1e-6})
    run.train([0])
    scale, numbers = run.preconditioner.kl_scale, []
    for index in range(1, 5):
        numbers.append(float(scale))
        run.train([index])
        assert run.preconditioner.kl_scale is scale
    assert len(set(numbers)) == 4
    assert max(numbers) < 1
    last = scale.clone()
    run.net.double()
    run.train([5])
    assert run.preconditioner.kl_scale.dtype == torch.float64
    assert torch.equal(scale, last)


def test_a_failed_refresh_writes_nothing(monkeypatch):
    """The tensors at hand keep the numbers of the last good refresh."""
    run = Run({"structure": "kfac"})
    run.train([0, 1])
    before, numbers = places(run.read_tensors), [tensor.clone() for tensor in run.read_tensors]
    monkeypatch.setattr(
        "torch.linalg.cholesky_ex", lambda cores: (torch.zeros_like(cores), torch.ones(len(cores), dtype=torch.int32))
    )
    run.train([2, 3])
    assert run.preconditioner.events["failed_inverse:0"] == 1
    assert places(run.read_tensors) == before
    assert_equal(run.read_tensors, numbers)


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_the_models_precision_is_followed_in_new_tensors(settings):
    """A model moved to float64 has the same inverses there; those of float32 are not written again."""
    run = Run(settings)
    run.train([0])
    kept, numbers = run.read_tensors, [tensor.clone() for tensor in run.read_tensors]
    run.net.double()
    run.train([1])  # a plain step
    assert_equal(run.read_tensors, [number.double() for number in numbers])
    before = places(run.read_tensors)
    run.train([2])
    assert places(run.read_tensors) == before
    assert_equal(kept, numbers)


@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_a_changed_damping_is_written_in_place(structure):
    """Under exact damping it enters with the next refresh, in the tensors that hold it."""
    run = Run({"structure": structure, "damping_rule": "exact", "damping": 0.25})
    run.train([0])
    dampings = [layer.inverse.damping for layer in run.preconditioner.layers]
    assert len({tensor.data_ptr() for tensor in dampings}) == 3
    run.preconditioner.damping = 0.5
    run.train([1])
    assert [float(damping) for damping in dampings] == [0.25] * 3
    run.train([2])
    assert [float(damping) for damping in dampings] == [0.5] * 3
    for layer, damping in zip(run.preconditioner.layers, dampings, strict=True):
        assert layer.inverse.damping is damping


@pytest.mark.parametrize("structure", ["kfac", "sua"])
def test_running_averages_are_written_in_place(structure):
    """From the second measurement on, average · decay + new · (1 − decay) lies where the average lay."""
    net, decay = make_net().double(), 0.7
    averaging = Run({"structure": structure, "ema_decay": decay, "factor_period": 1}, net).preconditioner
    single = Run({"structure": structure, "inverse_method": "cholesky"}, net).preconditioner
    held: list[Tensor] = []
    expected: list[Tensor] = []
    for index in range(5):
        inputs, labels = batch(index)
        nn.functional.cross_entropy(net(inputs.double()), labels).backward()
        averaging.update_factors()
        single.update_factors()
        averages, measured = averages_of(averaging), averages_of(single)
        if not held:
            held, before = averages, places(averages)
            expected = [(1 - decay) * new for new in measured]
        else:
            expected = [decay * old + (1 - decay) * new for old, new in zip(expected, measured, strict=True)]
        assert places(averages) == before
        for got, want in zip(averages, expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-15)
        if index % PERIOD == 0:
            averaging.update_inverses()  # leaves it alone


def test_factors_of_a_refresh_are_not_averaged_further():
    """What is kept of them, for whoever looks at a step, stays as it was until the next refresh."""
    run = Run({"ema_decay": 0.7, "factor_period": 1})
    for layer in run.preconditioner.layers:
        layer.keeps_factors = True
    run.train([0])
    factors = [layer.factors for layer in run.preconditioner.layers]
    numbers = copy.deepcopy(factors)
    run.train([1])
    for layer, got, want in zip(run.preconditioner.layers, factors, numbers, strict=True):
        assert layer.factors is got
        assert_equal([got.activation.values, got.gradient.values], [want.activation.values, want.gradient.values])


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_a_state_is_loaded_in_place(settings):
    """Where shapes agree every tensor stays where it is, and the training goes on bit for bit."""
    source, target = Run(settings), Run(settings)
    source.train(range(5))
    target.train(range(10, 13))
    held = [*tensors_in(target.preconditioner.state_dict())]
    before = places(held)
    assert any(not torch.equal(*pair) for pair in zip(target.read_tensors, source.read_tensors, strict=True))
    target.preconditioner.load_state_dict(source.preconditioner.state_dict())
    assert places(tensors_in(target.preconditioner.state_dict())) == before
    assert_identical(target.preconditioner.state_dict(), source.preconditioner.state_dict())
    continue_from(target, source)
    inverses = places(target.read_tensors)
    for run in (source, target):
        run.train(range(5, 9))
    assert places(target.read_tensors) == inverses
    assert_equal(target.state, source.state)


@pytest.mark.parametrize("settings", RESTORED, ids=str)
@pytest.mark.parametrize("steps", [0, 3])
def test_a_loaded_state_is_copied(settings, steps):
    """Neither the source's training nor what becomes of the state's tensors reaches who has loaded it."""
    source, target = Run(settings), Run(settings)
    source.train(range(5))
    target.train(range(10, 10 + steps))
    state = source.preconditioner.state_dict()
    target.preconditioner.load_state_dict(state)
    loaded = copy.deepcopy(target.preconditioner.state_dict())
    assert_identical(loaded, state)
    source.train(range(5, 8))
    for tensor in tensors_in(state):
        tensor.fill_(torch.nan)
    assert_identical(target.preconditioner.state_dict(), loaded)
    storages = {tensor.data_ptr() for tensor in tensors_in(state)}
    assert storages.isdisjoint(tensor.data_ptr() for tensor in tensors_in(target.preconditioner.state_dict()))


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_a_state_of_another_batch_size(settings):
    """Numbers are the state's also where its tensors have other shapes than those at hand."""
    source, target = Run(settings), Run(settings)
    source.train(range(3), size=6)
    target.train(range(3), size=4)
    target.preconditioner.load_state_dict(source.preconditioner.state_dict())
    assert_identical(target.preconditioner.state_dict(), source.preconditioner.state_dict())


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_its_own_state_changes_nothing(settings):
    """A preconditioner that is given what it holds holds it still, where it was."""
    run = Run(settings)
    run.train(range(3))
    state = run.preconditioner.state_dict()
    before, numbers = places(tensors_in(state)), copy.deepcopy(state)
    run.preconditioner.load_state_dict(state)
    assert places(tensors_in(run.preconditioner.state_dict())) == before
    assert_identical(run.preconditioner.state_dict(), numbers)


@pytest.mark.parametrize("structure", ["kfac", "sua"])
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("damping", [0.1, 1])
def test_a_state_with_python_numbers_is_read(structure, steps, damping):
    """Version 3 had numbers where exact damping has 0-d tensors: they get there, and the training goes on the same."""
    settings = {"structure": structure, "damping_rule": "exact", "damping": damping}
    source, target = Run(settings), Run(settings)
    source.train(range(3))
    target.train(range(10, 10 + steps))
    held = target.read_tensors
    state = copy.deepcopy(source.preconditioner.state_dict()) | {"version": 3}
    for layer in state["layers"].values():
        layer["inverse"] |= {"scale": float(layer["inverse"]["scale"]), "damping": damping}
    target.preconditioner.load_state_dict(state)
    assert state["version"] == 3  # the caller's stays as it is
    assert not any(isinstance(layer["inverse"]["damping"], Tensor) for layer in state["layers"].values())
    assert_identical(target.preconditioner.state_dict(), source.preconditioner.state_dict())
    if steps:
        assert places(held) == places(target.read_tensors)
    continue_from(target, source)
    for run in (source, target):
        run.train(range(3, 7))
    assert_equal(target.state, source.state)


class Bystander:
    """Has the factors of refreshes kept, and wants nothing else."""

    def wants(self, step: int) -> bool:
        """Never."""
        del step
        return False

    def forget(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_inverses_share_no_memory(settings):
    """Neither with each other nor with kept factors: a state whose parts differ more is loaded part by part."""
    run, bystander = Run(settings), Bystander()
    run.preconditioner.observe_gradients(bystander)
    run.train(range(3))
    addresses = [tensor.untyped_storage().data_ptr() for tensor in tensors_in(run.preconditioner.state_dict())]
    assert len(addresses) == len(set(addresses))
    assert any(layer.factors is not None for layer in run.preconditioner.layers)
    state = copy.deepcopy(run.preconditioner.state_dict())
    for number, tensor in enumerate(tensors_in(state)):
        tensor.fill_(number)
    run.preconditioner.load_state_dict(state)
    assert_equal(tensors_in(run.preconditioner.state_dict()), tensors_in(state))


@pytest.mark.parametrize("settings", RESTORED, ids=str)
def test_a_state_holds_the_tensors_in_use(settings):
    """Later steps write over it; a deep copy stays as it is."""
    run = Run(settings)
    run.train([0])
    state = run.preconditioner.state_dict()
    addresses = {tensor.data_ptr() for tensor in tensors_in(state)}
    assert addresses.issuperset(tensor.data_ptr() for tensor in run.read_tensors)
    assert addresses.issuperset(tensor.data_ptr() for tensor in averages_of(run.preconditioner))
    copied, numbers = copy.deepcopy(state), [tensor.clone() for tensor in tensors_in(state)]
    run.train([1, 2])
    assert_equal(tensors_in(copied), numbers)
    assert_identical(inverses_in(state), inverses_in(run.preconditioner.state_dict()))
    assert not torch.equal(next(tensors_in(inverses_in(state))), next(tensors_in(inverses_in(copied))))


def test_written_over_keeps_tensors():
    """Where shapes agree the tensors returned are the kept ones, as they lie, with the new ones' numbers."""
    kept = {"a": torch.zeros(3, 2).mT, "b": {"c": torch.tensor(1.0)}}
    strides = kept["a"].stride()
    new = {"a": torch.arange(6.0, dtype=torch.float64).view(2, 3), "b": {"c": torch.tensor(5.0)}}
    result = written_over(kept, new, torch.zeros(0))
    assert result["a"] is kept["a"]
    assert result["b"]["c"] is kept["b"]["c"]
    assert result["a"].stride() == strides
    assert result["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert result["b"]["c"] == 5


@pytest.mark.parametrize(
    "kept",
    [
        {},
        None,
        3.0,
        {"a": None},
        {"a": 1.0},
        {"a": {"b": torch.zeros(2)}},
        {"a": torch.zeros(3)},
        {"a": torch.zeros(2, 1)},
        {"a": torch.zeros(1, 2)},
        {"a": torch.zeros(2, dtype=torch.float64)},
        {"a": torch.zeros(2, dtype=torch.bfloat16)},
        {"a": torch.zeros(2, device="meta")},
        torch.zeros(2),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_written_over_copies_where_there_is_no_such_tensor(kept, dtype):
    """Missing keys, numbers, other shapes, precisions or devices: a copy, of the precision asked for."""
    before, new = copy.deepcopy(kept), {"a": torch.tensor([1.0, 2.0], dtype=dtype)}
    result = written_over(kept, new, torch.zeros(3))
    assert result.keys() == {"a"}
    assert result["a"].dtype == torch.float32
    assert result["a"].tolist() == [1, 2]
    new["a"].zero_()
    assert result["a"].tolist() == [1, 2]
    assert str(kept) == str(before)


def test_written_over_takes_everything_else_from_the_new():
    """Numbers, truth values, None, empty dicts and the set of keys are the new ones', whatever was kept."""
    kept = {"a": torch.zeros(2), "b": 1, "c": {"d": torch.zeros(1)}, "e": torch.zeros(1), "f": torch.zeros(1)}
    new = {"a": None, "b": 2, "c": {}, "e": 1.5, "g": {"h": {"i": True}}}
    assert written_over(kept, new, torch.zeros(1)) == new
    assert kept["a"].tolist() == [0, 0]
    assert written_over(kept, {}, torch.zeros(1)) == {}
    assert written_over(kept, None, torch.zeros(1)) is None
    assert written_over(None, 0.5, torch.zeros(1)) == 0.5
