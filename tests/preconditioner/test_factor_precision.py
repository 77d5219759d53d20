"""Reduced precision of float32 products: off while factors and inverses are made, and as the caller set it elsewhere.

The switches are the process's, and may be set through either of PyTorch's two interfaces. Whether a CPU has hardware
for what they allow makes no difference here: what is looked at are the switches, not the products.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.backends import cuda, cudnn, mkldnn

from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.forms import dense
from kfac_sua.preconditioner.precision import factor_precision, without_autocast

OLD_API = [
    "torch.backends.cuda.matmul.allow_tf32 = True",
    "torch.backends.cuda.matmul.allow_tf32 = False",
    "torch.set_float32_matmul_precision('high')",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('highest')",
]
NEW_API = [
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'tf32'",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'ieee'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
]
BOTH_APIS = [
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.set_float32_matmul_precision('high'); torch.backends.cuda.matmul.fp32_precision = 'ieee'",
    "torch.backends.cuda.matmul.allow_tf32 = True; torch.backends.mkldnn.matmul.fp32_precision = 'bf16'",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.allow_tf32 = False",
]
"""Callers, by what they have run."""

HIGH = "torch.set_float32_matmul_precision('high')"
HANDED_DOWN = "torch.backends.fp32_precision = 'tf32'"

GETTERS: dict[str, Callable[[], Any]] = {
    "fp32_precision": lambda: torch.backends.fp32_precision,
    "cuda.matmul.fp32_precision": lambda: cuda.matmul.fp32_precision,
    "cudnn.fp32_precision": lambda: cudnn.fp32_precision,
    "cudnn.conv.fp32_precision": lambda: cudnn.conv.fp32_precision,
    "cudnn.rnn.fp32_precision": lambda: cudnn.rnn.fp32_precision,
    "mkldnn.fp32_precision": lambda: mkldnn.fp32_precision,
    "mkldnn.matmul.fp32_precision": lambda: mkldnn.matmul.fp32_precision,
    "mkldnn.conv.fp32_precision": lambda: mkldnn.conv.fp32_precision,
    "mkldnn.rnn.fp32_precision": lambda: mkldnn.rnn.fp32_precision,
    "cuda.matmul.allow_tf32": lambda: cuda.matmul.allow_tf32,
    "cudnn.allow_tf32": lambda: cudnn.allow_tf32,
    "get_float32_matmul_precision": torch.get_float32_matmul_precision,
}


def reset() -> None:
    """Set the switches to what a fresh process has."""
    torch.set_float32_matmul_precision("highest")  # the old interface's memory, which nothing else resets
    torch.backends.fp32_precision = "none"
    cuda.matmul.fp32_precision = "none"
    mkldnn.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def switches_at_their_defaults() -> Iterator[None]:
    """Begin and end every test with the defaults: the switches are the process's."""
    reset()
    yield
    reset()


def read(getter: Callable[[], Any]) -> Any:
    """Return what a getter reads, or that it refuses to read a mixture of both interfaces."""
    try:
        return getter()
    except RuntimeError:
        return "refused"


def readings() -> dict[str, Any]:
    """Return what every getter reads."""
    return {name: read(getter) for name, getter in GETTERS.items()}


def products() -> tuple[str, str]:
    """Return the switches of products of matrices, on CUDA and on the CPU."""
    return cuda.matmul.fp32_precision, mkldnn.matmul.fp32_precision


def test_the_defaults_are_left_alone():
    """Where nothing was set, nothing is set inside either."""
    before = readings()
    assert products() == ("none", "none")
    assert (before["cuda.matmul.allow_tf32"], before["get_float32_matmul_precision"]) == (False, "highest")
    with factor_precision():
        assert readings() == before
    assert readings() == before


@pytest.mark.parametrize("caller", OLD_API + NEW_API + BOTH_APIS)
def test_products_are_ieee_inside_and_as_before_afterwards(caller):
    """Both matmul switches are IEEE or unset inside, and no others move; then every getter reads what it read."""
    exec(caller)
    before = readings()
    others = [name for name in GETTERS if name.endswith("fp32_precision") and ".matmul." not in name]
    with factor_precision():
        assert set(products()) <= {"none", "ieee"}
        assert {name: read(GETTERS[name]) for name in others} == {name: before[name] for name in others}
    assert readings() == before


@pytest.mark.parametrize("caller", OLD_API)
def test_the_old_interface_can_be_read_afterwards(caller):
    """A caller who never used ``fp32_precision`` is not told that both interfaces were mixed."""
    exec(caller)
    with factor_precision():
        assert "refused" not in readings().values()  # by PyTorch's own code neither, which reads it at products
    assert "refused" not in readings().values()


def test_what_is_handed_down_goes_on_following_the_switch_above():
    """A product's switch that only inherits from the global one still does afterwards."""
    torch.backends.fp32_precision = "tf32"
    with factor_precision():
        assert products() == ("ieee", "ieee")
    assert products() == ("tf32", "tf32")
    for value in ("ieee", "tf32", "none"):
        torch.backends.fp32_precision = value
        assert products() == (value, value)


def test_what_was_set_itself_does_not_follow_the_switch_above():
    """A product's own switch is not turned into an inherited one."""
    cuda.matmul.fp32_precision = "tf32"
    mkldnn.matmul.fp32_precision = "bf16"
    with factor_precision():
        pass
    torch.backends.fp32_precision = "ieee"
    assert products() == ("tf32", "bf16")


def fail_inside() -> None:
    """Raise where products are IEEE."""
    with factor_precision():
        assert products()[0] == "ieee"
        raise ZeroDivisionError


@pytest.mark.parametrize("caller", [HIGH, HANDED_DOWN, "torch.backends.cuda.matmul.fp32_precision = 'tf32'"])
def test_all_comes_back_after_an_error(caller):
    """An error of the body goes through, and switches and autocast are as before."""
    exec(caller)
    before = readings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(ZeroDivisionError):
            fail_inside()
        assert torch.is_autocast_enabled("cpu")
    assert readings() == before


@pytest.mark.parametrize("caller", [HIGH, HANDED_DOWN])
def test_nested(caller):
    """The inner one gives back what the outer one set."""
    exec(caller)
    before = readings()
    with factor_precision():
        with factor_precision():
            assert products() == ("ieee", "ieee")
        assert products() == ("ieee", "ieee")
    assert readings() == before


@pytest.mark.parametrize("manager", [factor_precision, without_autocast])
def test_autocast_is_off_inside_and_on_again_afterwards(manager):
    """Products of float32 matrices are float32 inside, and whichever device has autocast on has it back."""
    matrix = torch.ones(2, 2)
    torch.set_autocast_enabled("cuda", True)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with manager():
                assert (matrix @ matrix).dtype == torch.float32
                assert not torch.is_autocast_enabled("cuda")
            assert (matrix @ matrix).dtype == torch.bfloat16
            assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)
    with manager():
        assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("caller", OLD_API + NEW_API)
def test_without_autocast_leaves_the_switches_alone(caller):
    """Applying an inverse is the caller's product, in the precision that the caller chose."""
    exec(caller)
    before = readings()
    with torch.autocast("cpu", dtype=torch.bfloat16), without_autocast():
        assert readings() == before
    assert readings() == before


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[str, str]]:
    """Return a list that grows by the switches of products at every call of a function."""
    function, seen = getattr(owner, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        seen.append(products())
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)
    return seen


@pytest.mark.parametrize("fisher_type", ["empirical", "mc"])
@pytest.mark.parametrize(("rule", "routine"), [("factored", "cholesky_ex"), ("exact", "eigh")])
@pytest.mark.parametrize("caller", [HIGH, HANDED_DOWN])
def test_a_training_step(monkeypatch, caller, rule, routine, fisher_type):
    """Hooks, statistics, inversion and application see IEEE; the model sees the caller's choice."""
    exec(caller)
    before, ieee, chosen = readings(), {("ieee", "ieee")}, {("tf32", "tf32")}
    grams, inversions = watch(monkeypatch, dense, "gram"), watch(monkeypatch, torch.linalg, routine)
    applications, passes = watch(monkeypatch, torch, "bmm"), watch(monkeypatch, nn.functional, "linear")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    preconditioner = KroneckerPreconditioner(
        net, damping_rule=rule, fisher_type=fisher_type, inverse_method="cholesky", inverse_period=2
    )
    counts = []
    for _ in range(2):
        net.zero_grad()
        outputs = net(torch.randn(4, 2, 4, 4))
        counts.append(len(grams))
        preconditioner.fisher_backward(outputs)
        nn.functional.cross_entropy(outputs, torch.tensor([0, 1, 2, 0])).backward()
        counts.append(len(grams))
        assert readings() == before
        applications.clear()  # what came before is no application
        preconditioner.step()
        assert set(applications) == ieee
        assert readings() == before
    after_forward, after_backward, *later = counts
    assert 0 < after_forward < after_backward  # hooks of the forward and of the backward pass
    assert later == [len(grams)] * 2  # the second step is a plain one
    assert inversions
    assert set(grams) | set(inversions) == ieee
    assert set(passes) == chosen
