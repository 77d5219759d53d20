"""Settings check themselves and speak in the user's words; the package stands on torch alone."""

import ast
import dataclasses
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import NoneType
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import nn

import kfac_sua.preconditioner
from kfac_sua.preconditioner import KroneckerPreconditioner, KroneckerSettings, Structure
from kfac_sua.preconditioner.settings import KroneckerOptions

BAD_SETTINGS = {
    "damping must be a number > 0 within the range of float32, got -1.0.": {"damping": -1.0},
    "damping must be a number > 0 within the range of float32, got nan.": {"damping": float("nan")},
    "damping must be a number > 0 within the range of float32, got 0.": {"damping": 0},
    "group_size must be an integer, got 2.5.": {"group_size": 2.5},
    "inverse_period must be an integer, got 2.5.": {"inverse_period": 2.5},
    "damping must be a number, got '0.1' (str).": {"damping": "0.1"},
    "skip must be a list of layer names, got 'head' (str); write ['head'].": {"skip": "head"},
    "skip must be a list of layer names, but one of its entries is 3; write a layer": {"skip": [3]},
    "skip must be a list of layer names, got b'head' (bytes).": {"skip": b"head"},
    "skip must be a list of layer names, got 3.": {"skip": 3},
    "skip must be a list of layer names, got {'head': 1} (dict).": {"skip": {"head": 1}},
    "group_size must be an integer, got 4.0.": {"group_size": 4.0},
    "group_size must be an integer, got 4.0 (numpy.float64).": {"group_size": np.float64(4)},
    "group_size must be an integer, got True (bool).": {"group_size": True},
    "group_size must be an integer, got tensor(..., device='meta', size=()) (torch.Tensor).": {
        "group_size": torch.full((), 4.0, device="meta")
    },
    "ema_decay must be a number, got True (numpy.bool": {"ema_decay": np.bool_(True)},
    "damping must be a number, got [0.1 0.2] (numpy.ndarray).": {"damping": np.array([0.1, 0.2])},
    "damping must be a number, got tensor(True) (torch.Tensor).": {"damping": torch.tensor(True)},
    "structure must be one of kfac, sua, activation_only, eigenvalue_corrected, got 3.": {"structure": 3},
    "group_size must be >= 1 or null (no grouping), got 0.": {"group_size": 0},
    "inverse_period must be >= 1 mini-batch, got 0.": {"inverse_period": 0},
    "ema_decay must be in [0, 1), got 1.0.": {"ema_decay": 1.0},
    "activation_rows must be >= 1 or null (all of them), got 0.": {"activation_rows": 0},
    "activation_rows must be an integer, got 1.5.": {"activation_rows": 1.5},
    "activation_rows=400 takes some of a mini-batch's locations, but weight_sharing=reduce averages": {
        "activation_rows": 400,
        "weight_sharing": "reduce",
    },
    "factor_period must be a divisor of inverse_period=50": {"factor_period": 7, "ema_decay": 0.9},
    "factor_period=10 with ema_decay=0 would measure": {"factor_period": 10},
    "structure must be one of kfac, sua, activation_only, eigenvalue_corrected, got 'suaa'.": {"structure": "suaa"},
    "damping_rule must be one of factored, factored_pi, exact, got 'pi'.": {"damping_rule": "pi"},
    "products=bf16x3 splits inverses, but damping_rule=exact": {"products": "bf16x3", "damping_rule": "exact"},
    "inverse_method=low_rank cannot be combined with damping_rule=exact": {
        "inverse_method": "low_rank",
        "damping_rule": "exact",
    },
    "inverse_method=low_rank needs the rows of one mini-batch": {"inverse_method": "low_rank", "ema_decay": 0.5},
}


@pytest.mark.parametrize("sentence", BAD_SETTINGS)
def test_bad_settings_are_one_sentence(sentence):
    """Every bad setting begins with the field's name and is refused by settings and preconditioner alike."""
    options = BAD_SETTINGS[sentence]
    for build in (KroneckerSettings, lambda **kw: KroneckerPreconditioner(nn.Linear(2, 2), **kw)):
        with pytest.raises(ValueError, match=r".") as error:
            build(**options)
        assert str(error.value).startswith(sentence)
        assert "\n" not in str(error.value)


def test_choices_may_be_strings_or_members():
    """Strings become members, so that comparisons hold either way."""
    settings = KroneckerSettings(structure="sua", damping_rule="exact")
    assert settings.structure is Structure.sua
    assert settings == KroneckerSettings(structure=Structure.sua, damping_rule="exact")


def test_settings_and_options_exclude_each_other():
    """Giving both would leave one of them ignored."""
    with pytest.raises(ValueError, match=r"Give either settings or structure, damping, not both"):
        KroneckerPreconditioner(nn.Linear(2, 2), settings=KroneckerSettings(), structure="sua", damping=0.1)


def test_constructor_options_cover_every_setting():
    """Each field of the settings is an option of the constructor."""
    fields = {field.name for field in dataclasses.fields(KroneckerSettings)}
    parameters = set(inspect.signature(KroneckerPreconditioner).parameters)
    assert parameters - {"model", "settings", "seed", "distributed", "flops_per_byte"} == fields


def test_the_signature_shows_the_defaults_of_the_settings():
    """What an editor's types and what help() shows are those of the one dataclass."""
    fields = {field.name for field in dataclasses.fields(KroneckerSettings)}
    assert set(KroneckerOptions.__annotations__) == fields
    parameters = inspect.signature(KroneckerPreconditioner).parameters
    assert {name: parameters[name].default for name in fields} == vars(KroneckerSettings())
    held, taken = get_type_hints(KroneckerSettings), get_type_hints(KroneckerOptions)
    for name in fields:
        more = {str, NoneType, Callable[[int], float], Iterable[str]}  # a choice's name, the default, a function, names
        assert {*get_args(taken[name])} - more <= {held[name], *get_args(held[name])}, name


def test_a_subclass_has_the_signature_of_its_own_constructor():
    """Which help() and completion show."""

    class Own(KroneckerPreconditioner):
        def __init__(self, model, extra=1):
            super().__init__(model, damping=extra)

    assert list(inspect.signature(Own).parameters) == ["model", "extra"]


def test_help_tells_the_meaning_of_every_setting():
    """And the range of those that have one."""
    told = inspect.getdoc(KroneckerSettings)
    for field in dataclasses.fields(KroneckerSettings):
        assert f"    {field.name}: " in told
    assert "Must be in [0, 1)." in told
    assert "``sua``: Spatially uncorrelated activations" in " ".join(told.split())


def test_an_unknown_option_is_refused_with_the_name_that_was_meant():
    """Also where its value is None, which stands for a default elsewhere."""
    for value in (0.1, None):
        with pytest.raises(TypeError, match="unexpected keyword argument 'dampin'; did you mean 'damping'\\?"):
            KroneckerPreconditioner(nn.Linear(2, 2), dampin=value)


def test_the_package_imports_torch_and_the_standard_library_only():
    """No module of the preconditioner imports anything else."""
    folder = Path(kfac_sua.preconditioner.__file__).parent
    allowed = set(sys.stdlib_module_names) | {"torch", "kfac_sua"}
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module]
            for name in names:
                assert name.split(".")[0] in allowed, f"{path.name} imports {name}"
                if name.startswith("kfac_sua"):
                    assert name.startswith("kfac_sua.preconditioner"), f"{path.name} imports {name}"


def in_another_shape(shape):
    """Return what makes a number one of NumPy's or PyTorch's."""
    return {
        "numpy scalar": lambda value: np.int64(value) if isinstance(value, int) else np.float64(value),
        "small numpy scalar": lambda value: np.int16(value) if isinstance(value, int) else np.float32(value),
        "numpy array": np.array,
        "tensor": torch.tensor,
    }[shape]


@pytest.mark.parametrize("shape", ["numpy scalar", "small numpy scalar", "numpy array", "tensor"])
def test_numbers_of_numpy_and_pytorch_become_plain(shape):
    """Settings, and so checkpoints, hold Python's own numbers, equal to those that they were given as."""
    make = in_another_shape(shape)
    plain = {
        "group_size": 4,
        "damping": 0.25,
        "inverse_period": 20,
        "factor_period": 10,
        "ema_decay": 0.5,
        "activation_rows": 8,
        "kl_clip": 0.125,
    }
    settings = KroneckerSettings(**{name: make(value) for name, value in plain.items()})
    for name, value in plain.items():
        assert type(getattr(settings, name)) is type(value)
        assert settings.to_plain()[name] == value
    settings.group_size = make(2)
    assert type(KroneckerPreconditioner(nn.Linear(8, 8), settings=settings).settings.group_size) is int


@pytest.mark.parametrize("shape", ["numpy scalar", "small numpy scalar", "numpy array", "tensor"])
def test_numbers_given_in_the_loop_become_plain(shape, tmp_path):
    """Damping, learning rate, seed and loss factors may come from a grid; the state loads from a file, weights only."""
    make = in_another_shape(shape)

    def train(give):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        preconditioner = KroneckerPreconditioner(
            layer, kl_clip=1e-3, inverse_period=2, fisher_type="mc", seed=give(3), flops_per_byte=give(5.0)
        )
        preconditioner.damping = give(0.25)
        for _ in range(3):
            layer.zero_grad()
            outputs = layer(torch.randn(5, 4))
            preconditioner.fisher_backward(outputs)
            (2 * torch.nn.functional.cross_entropy(outputs, torch.arange(5) % 3)).backward()
            assert preconditioner.step(lr=give(0.5), loss_scale=give(2.0), loss_weight=give(1.0))
        return layer, preconditioner

    layer, preconditioner = train(make)
    expected, _ = train(lambda value: value)
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)
    torch.save(preconditioner.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert (state["seed"], state["damping"]) == (3, 0.25)


@pytest.mark.parametrize("names", [("0", "2"), {"2", "0"}, iter(["0", "2"]), [np.str_("0"), "2"]], ids=type)
def test_names_to_skip_may_come_in_any_collection(names):
    """They become a list of plain strings, in an order that is always the same."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 2))
    settings = KroneckerPreconditioner(net, skip=names).settings
    assert settings.skip == ["0", "2"]
    assert {type(name) for name in settings.skip} == {str}
    assert KroneckerSettings(skip=None).skip == []


@pytest.mark.parametrize("settings", [{}, {"damping": 0.1}, "kfac", KroneckerSettings], ids=str)
def test_settings_of_another_type_are_refused(settings):
    """The sentence says what was given, and both ways to give settings."""
    with pytest.raises(TypeError, match=r"^settings must be KroneckerSettings, got .*; give KroneckerSettings\("):
        KroneckerPreconditioner(nn.Linear(2, 2), settings=settings)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64 - 1, 10**30, -(10**30), 123])
def test_any_integer_is_a_seed(seed):
    """Labels can be drawn from it, and other seeds draw others."""

    def gradient(seed):
        torch.manual_seed(0)
        layer = nn.Linear(4, 3)
        preconditioner = KroneckerPreconditioner(layer, fisher_type="mc", seed=seed)
        outputs = layer(torch.randn(50, 4))
        preconditioner.fisher_backward(outputs)
        outputs.square().mean().backward()
        preconditioner.step()
        return layer.weight.grad

    assert torch.equal(gradient(seed), gradient(seed))
    assert not torch.equal(gradient(seed), gradient(seed + 1))


@pytest.mark.parametrize("seed", [None, 1.0, "1", True, [1]])
def test_what_is_no_integer_is_no_seed(seed):
    """It is refused at construction, and where it is set."""
    preconditioner = KroneckerPreconditioner(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^seed must be an integer, got "):
        KroneckerPreconditioner(nn.Linear(2, 2), seed=seed)
    with pytest.raises(ValueError, match=r"^seed must be an integer, got "):
        preconditioner.seed = seed


@pytest.mark.parametrize("value", ["1", None, [1.0], torch.ones(2), True, np.bool_(True), 10**400], ids=type)
def test_what_is_no_number_is_refused_in_the_loop(value):
    """Each says its name and what it got, and leaves the gradient alone."""
    layer = nn.Linear(2, 2)
    preconditioner = KroneckerPreconditioner(layer, kl_clip=1e-3)
    layer(torch.randn(3, 2)).square().mean().backward()
    grad = layer.weight.grad.clone()
    with pytest.raises(ValueError, match=r"^damping must be a number.*, got "):
        preconditioner.damping = value
    with pytest.raises(ValueError, match=r"^loss_weight must be the finite number > 0 .*, got "):
        preconditioner.step(lr=0.1, loss_weight=value)
    if value is not None:
        with pytest.raises(ValueError, match=r"^lr must be the learning rate of the step, .*, got "):
            preconditioner.step(lr=value)
        with pytest.raises(ValueError, match=r"^loss_scale must be the finite number > 0 .*, got "):
            preconditioner.step(lr=0.1, loss_scale=value)
    if (value is not None and not isinstance(value, int)) or value is True:  # others say something
        with pytest.raises(ValueError, match=r"^flops_per_byte must be a number >= 0 .*, got "):
            KroneckerPreconditioner(layer, flops_per_byte=value)
    assert torch.equal(layer.weight.grad, grad)


def test_the_step_to_go_to_becomes_plain():
    """A count out of a table of NumPy's does not get into the checkpoint as such."""
    preconditioner = KroneckerPreconditioner(nn.Linear(2, 2))
    preconditioner.go_to_step(np.int64(7))
    assert type(preconditioner.state_dict()["num_steps"]) is int
    with pytest.raises(ValueError, match=r"^num_steps must be an integer, got 7\.0\.$"):
        preconditioner.go_to_step(7.0)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_distributed_is_a_bool(value):
    """A string would be taken as true, whatever it says."""
    with pytest.raises(TypeError, match="distributed must be True or False, got "):
        KroneckerPreconditioner(nn.Linear(2, 2), distributed=value)
