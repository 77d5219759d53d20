"""States that no training has left: every entry in turn is exchanged, and either refused in a sentence or harmless."""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from identical import assert_identical
from thinned import one_in
from torch import Tensor, nn

from kfac_sua.preconditioner import (
    AdaptiveDamping,
    DampingScheduler,
    KroneckerPreconditioner,
    KroneckerSettings,
    exponential_damping,
)

SETTINGS = [
    {"structure": "kfac"},
    {"structure": "sua", "damping_rule": "factored_pi", "inverse_method": "cholesky"},
    {"structure": "kfac", "group_size": 3, "products": "bf16x3"},
    {"structure": "sua", "group_size": 2, "ema_decay": 0.9, "factor_period": 1},
    {"structure": "sua", "damping_rule": "exact", "ema_decay": 0.9, "factor_period": 1},
    {"structure": "kfac", "inverse_method": "cholesky", "damping_rule": "exact"},
    {"structure": "kfac", "inverse_method": "low_rank", "fisher_type": "mc"},
    {"structure": "sua", "inverse_method": "low_rank", "products": "bf16x3"},
]

DELETED = object()
"""Stands for an entry that is taken out."""

VALUES = [
    DELETED,
    None,
    "text",
    b"",
    True,
    False,
    -1,
    0,
    1e9,
    2**70,
    10**5000,
    math.nan,
    math.inf,
    [],
    (),
    {},
    {"a": 1},
]
"""What stands in for any entry."""

OPEN = {"rows": {1}, "root": {1}, "root_parts": {1}, "pixels": {0, 1, 2}}
"""Dimensions that may have any size: rows, and height, width and number of images."""

Path = tuple[str, ...]


class Run:
    """A small net of a convolution with patches, one with groups and a linear layer, and its preconditioner."""

    def __init__(self, settings: dict[str, Any], classes: int = 3) -> None:
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1, bias=False),
            nn.Tanh(),
            nn.Conv2d(4, 6, 2, groups=2),
            nn.Flatten(),
            nn.Linear(54, classes),
        )
        self.preconditioner = KroneckerPreconditioner(
            self.net, settings=KroneckerSettings(inverse_period=2, **settings)
        )
        self.observer = Bystander()
        self.preconditioner.observe_gradients(self.observer)

    def train(self, num_steps: int, seed: int = 0) -> None:
        """Take steps."""
        generator = torch.Generator().manual_seed(seed)
        for _ in range(num_steps):
            self._backward(generator)
            self.preconditioner.step()

    def measure(self) -> None:
        """Take in the factors of a mini-batch, and leave the inverses as they are."""
        with self.preconditioner.capture():
            self._backward(torch.Generator().manual_seed(7))
        self.preconditioner.update_factors()

    def _backward(self, generator: torch.Generator) -> None:
        inputs = torch.randn(4, 2, 4, 4, generator=generator)
        labels = torch.randint(0, 3, (4,), generator=generator)
        self.net.zero_grad()
        outputs = self.net(inputs)
        self.preconditioner.fisher_backward(outputs)
        nn.functional.cross_entropy(outputs, labels).backward()


class Bystander:
    """Has the factors of refreshes kept, and wants nothing else."""

    def wants(self, step: int) -> bool:
        """Never."""
        del step
        return False

    def forget(self) -> None:
        """Nothing."""


def entries(state: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield every entry of nested mappings, these included."""
    for key, value in state.items():
        yield (*path, key), value
        if isinstance(value, Mapping):
            yield from entries(value, (*path, key))


def exchanged(state: Any, path: Path, value: Any) -> Any:
    """Return a state with another value at a path, or none; all else is shared with the state."""
    if not path:
        return value
    key, *rest = path
    changed = dict(state)
    if not rest and value is DELETED:
        del changed[key]
    else:
        changed[key] = exchanged(state[key], tuple(rest), value)
    return changed


def bad_tensors(path: Path, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    """Yield what cannot stand in for a tensor, each with what the message has to say."""
    yield "shape", tensor.flatten().repeat(2)
    yield "shape", tensor[None]
    yield "shape", tensor.new_zeros((0, *tensor.shape[1:]))
    for dim in set(range(tensor.ndim)) - OPEN.get(path[-1], set()):
        yield "shape", torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim)
    yield "numbers in", tensor.to(torch.int64)
    yield "numbers in", tensor.to(torch.complex64)
    yield "numbers in", torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    if tensor.ndim:
        yield "numbers in", tensor.to_sparse()
    if path[-1].endswith("parts"):
        yield "numbers in", tensor.float()
    else:
        yield "finite", torch.full_like(tensor, 1e300, dtype=torch.float64)  # which float32 does not hold
    for number in (math.nan, math.inf, -math.inf):
        with_one = tensor.clone()
        with_one[(0,) * tensor.ndim] = number
        yield "finite", with_one
    if path[-1] in ("scale", "bias_scale", "damping", "triangle"):
        yield "positive", tensor * 0
        yield "positive", -tensor
    if path[-1] == "values":
        yield "negative", tensor - tensor.max() - 1


def is_harmless(path: Path, value: Any, run: Run, state: Mapping[str, Any]) -> bool:
    """Whether a state may have another value there, by what the documentation says of the entry."""
    name, is_count = path[-1], type(value) is int and value >= 0
    if path[0] == "settings":  # read to be compared with those at hand, and a state lacks those that came later
        own = run.preconditioner.settings.to_plain()[name] if len(path) > 1 else DELETED
        return own is None and value in (None, DELETED) if own in (None, DELETED) else value == own
    if path[0] == "events":
        return value in ({}, {"a": 1}) if len(path) == 1 else value is DELETED or is_count
    if path == ("num_steps",):
        return value == 0 and is_count
    if path == ("seed",):
        return type(value) is int
    if path == ("damping",):
        return value in (1e9, 2**70)
    if name == "is_fresh":
        return value is False or (value is True and bool(state["layers"][path[1]]["average"]))
    if name == "num_examples":
        return value is None
    if name == "scale" and path[-2] in ("average", "factors"):
        return type(value) is float and 0 < value <= 2**40
    # Before the first measurement or the first refresh there is nothing.
    return value == {} and len(path) == 3 and (name != "average" or not state["layers"][path[1]]["is_fresh"])


@pytest.mark.parametrize("settings", one_in(3, SETTINGS), ids=str)
def test_every_entry_is_checked(settings):
    """What stands in for an entry is refused with one sentence and changes nothing, or training goes on with it."""
    source, target = Run(settings), Run(settings)
    source.preconditioner.events["frozen:0"] = 2
    source.train(4)
    target.train(2, seed=1)
    state, before = copy.deepcopy(source.preconditioner.state_dict()), copy.deepcopy(target.preconditioner.state_dict())
    num_refused = num_accepted = 0
    is_first = settings is SETTINGS[0]
    for path, _ in entries(state):
        if path[:2] == ("layers", "2") and not is_first:
            continue
        # Under all settings these are read in one way.
        for value in VALUES if is_first or path[0] in ("layers", "damping", "seed") else VALUES[:2]:
            changed = exchanged(state, path, value)
            if is_harmless(path, value, target, state):
                target.preconditioner.load_state_dict(changed)
                target.train(2)
                target.preconditioner.load_state_dict(before)
                num_accepted += 1
            else:
                assert_refused(target.preconditioner, changed, before, path)
                num_refused += 1
    assert num_refused > 100
    assert num_accepted > 20


@pytest.mark.parametrize("settings", one_in(3, SETTINGS), ids=str)
def test_every_tensor_is_checked(settings):
    """A tensor of another shape, kind or without meaning is refused by layer and entry, and nothing is changed."""
    source, target = Run(settings), Run(settings)
    source.train(4)
    source.measure()
    target.train(2, seed=1)
    state, before = copy.deepcopy(source.preconditioner.state_dict()), copy.deepcopy(target.preconditioner.state_dict())
    tensors = [(path, value) for path, value in entries(state) if isinstance(value, Tensor)]
    assert {path[2] for path, _ in tensors} == {"average", "inverse", "factors"}
    for path, tensor in tensors:
        for said, bad in bad_tensors(path, tensor):
            message = assert_refused(target.preconditioner, exchanged(state, path, bad), before, path)
            assert said in message
            assert f"{'.'.join(path[2:])} of layer '{path[1]}'" in message


def is_same(state: Any, before: Any) -> bool:
    """Whether two states agree to the last bit; quicker than ``assert_identical``, which says where they do not."""
    if isinstance(before, Mapping):
        return state.keys() == before.keys() and all(is_same(state[key], before[key]) for key in before)
    return torch.equal(state, before) if isinstance(before, Tensor) else state == before


def assert_refused(preconditioner: KroneckerPreconditioner, state: Any, before: Mapping[str, Any], path: Path) -> str:
    """Check that a state is refused in one sentence, and that nothing has changed; return the sentence."""
    with pytest.raises(ValueError, match=r"^Preconditioner state .*; .*(without the state)\.$") as caught:
        preconditioner.load_state_dict(state)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 700, path
    assert is_same(preconditioner.state_dict(), before)
    return message


@pytest.mark.parametrize(
    "state", [{}, None, [], 3, "state", {"version": 5}, {"version": 3}, {"version": 2, "layers": {}}]
)
def test_what_is_no_state_is_refused(state):
    """Of whatever type it is, it is a ValueError that says what a state is."""
    preconditioner = Run({}).preconditioner
    before = copy.deepcopy(preconditioner.state_dict())
    message = assert_refused(preconditioner, state, before, ())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        preconditioner.check_state_dict(state)


@pytest.mark.parametrize(("version", "settings"), [(2, SETTINGS[5]), (3, SETTINGS[5]), (4, SETTINGS[0])], ids=str)
def test_older_states_are_checked_alike(version, settings):
    """What stands in for an entry of an older state is refused with a ValueError or harmless, and never half taken."""
    run = Run(settings)
    run.train(1)
    state = copy.deepcopy(run.preconditioner.state_dict()) | {"version": version}
    before = copy.deepcopy(run.preconditioner.state_dict())
    if version == 2:
        for layer in state["layers"].values():
            del layer["num_examples"], layer["factors"]
    messages = set()
    for path, _ in entries(state):
        for value in VALUES:
            try:
                run.preconditioner.load_state_dict(exchanged(state, path, value))
            except ValueError as error:
                messages.add(str(error)[:21])
                assert is_same(run.preconditioner.state_dict(), before)
            else:
                run.preconditioner.load_state_dict(before)
    assert messages == {"Preconditioner state "}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_last_layer_is_checked_before_the_first_is_changed(settings):
    """A head of other classes is named with both shapes, and training goes on as if nothing had been loaded."""
    source, target, untouched = Run(settings, classes=10), Run(settings), Run(settings)
    source.train(3, seed=1)
    for run in (target, untouched):
        run.train(3)
    with pytest.raises(ValueError, match=r"of layer '4' is a tensor of shape \[.*\], expected a tensor of shape \["):
        target.preconditioner.load_state_dict(source.preconditioner.state_dict())
    for run in (target, untouched):
        run.train(3)
    assert_identical(target.preconditioner.state_dict(), untouched.preconditioner.state_dict())
    for got, want in zip(target.net.parameters(), untouched.net.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


def test_a_layer_checks_its_own_state():
    """The state of another layer is refused by name, also where a layer is given it alone."""
    run = Run({})
    run.train(1)
    first, second, _ = run.preconditioner.layers
    before = copy.deepcopy(first.state_dict())
    with pytest.raises(ValueError, match=r"of layer '0' is"):
        first.load_state_dict(second.state_dict())
    assert_identical(first.state_dict(), before)


def test_patches_fit_into_an_image():
    """Pixels that the kernel does not fit into are refused, although their other sizes are right."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.Flatten())
    preconditioner = KroneckerPreconditioner(net, inverse_method="low_rank")
    net(torch.randn(2, 2, 4, 4)).square().sum(1).mean().backward()
    preconditioner.step()
    state = preconditioner.state_dict()
    path = ("layers", "0", "inverse", "activation", "pixels")
    with pytest.raises(ValueError, match=r"pixels of layer '0' is an image of 1 x 4 pixels, expected one that the"):
        preconditioner.load_state_dict(exchanged(state, path, torch.ones(1, 4, 2, 2)))


def test_a_function_of_the_step_is_asked_first():
    """A number of steps at which it gives no damping is refused before anything is changed."""
    net = nn.Sequential(nn.Linear(2, 2))
    preconditioner = KroneckerPreconditioner(net, damping=lambda step: 0.5**step)
    state = preconditioner.state_dict() | {"num_steps": 10_000}
    with pytest.raises(ValueError, match="damping must be a number > 0"):
        preconditioner.load_state_dict(state)
    assert preconditioner.num_steps == 0
    later = KroneckerPreconditioner(net, damping=exponential_damping(0.5, 0.1, 10))
    later.load_state_dict(state)
    assert later.damping == 0.1


def test_a_state_that_requires_gradients_is_copied_without():
    """What is kept stays outside of every graph, whatever the state's tensors are in."""
    run = Run({"ema_decay": 0.5, "factor_period": 1})
    run.train(2)
    state = copy.deepcopy(run.preconditioner.state_dict())
    for _, value in entries(state):
        if isinstance(value, Tensor):
            value.requires_grad_()
    run.preconditioner.load_state_dict(state)
    assert not any(
        value.requires_grad for _, value in entries(run.preconditioner.state_dict()) if isinstance(value, Tensor)
    )


@pytest.mark.parametrize("make", [lambda one: DampingScheduler(one, lambda call: 0.5**call), AdaptiveDamping])
def test_what_changes_the_damping_checks_its_state(make):
    """A scheduler's and an adapter's own states go through the same: one sentence, and nothing is changed."""
    owner = make(Run({}).preconditioner)
    state = owner.state_dict()
    owner.load_state_dict(state)
    for bad in (None, {}, [], 3, "state"):
        with pytest.raises(ValueError, match=rf"^{type(owner).__name__} state must be a mapping of .*; give what"):
            owner.load_state_dict(bad)
    for path, _ in entries(state):
        for value in VALUES:
            is_good = value in (1e9, 2**70) if path == ("base",) else type(value) is int and value >= 0
            if path == ("reduction_ratio",):
                is_good = value is None or isinstance(value, float)
            if is_good:
                owner.load_state_dict(exchanged(state, path, value))
                owner.load_state_dict(state)
                continue
            with pytest.raises(
                ValueError, match=rf"^{type(owner).__name__} state.*; give what its .* without a state\.$"
            ):
                owner.load_state_dict(exchanged(state, path, value))
            assert owner.state_dict() == state
