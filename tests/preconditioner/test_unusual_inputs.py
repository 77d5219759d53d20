"""Inputs of unusual kinds: none at all, sparse, nested, of subclasses, on the way to derivatives of other kinds."""

import copy
import io
import subprocess
import sys

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from thinned import one_in
from torch import Tensor, nn

from kfac_sua.preconditioner import KroneckerPreconditioner

DTYPE = torch.float64
SETTINGS = [
    {"structure": "kfac"},
    {"structure": "kfac", "weight_sharing": "reduce", "inverse_method": "low_rank"},
    {"structure": "sua", "group_size": 3},
    {"structure": "sua", "application": "auto", "ema_decay": 0.5},
    {"structure": "kfac", "application": "auto", "damping_rule": "factored_pi"},
    {"structure": "kfac", "damping_rule": "exact"},
    {"structure": "sua", "fisher_type": "mc"},
    {"structure": "kfac", "fisher_type": "exact", "likelihood": "gaussian"},
]


class Experts(nn.Module):
    """Routes examples to convolutions, each of which may get none."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, 4, 3, padding=1)
        self.experts = nn.ModuleList(nn.Conv2d(4, 12, 3, bias=False) for _ in range(2))
        self.head = nn.Linear(12 * 4, 3)

    def forward(self, x: Tensor, route: Tensor) -> Tensor:
        """Return logits of ``[n, 3, 4, 4]``, by way of the experts that the route names."""
        hidden = self.enter(x).tanh()
        out = hidden.new_zeros(len(x), 12, 2, 2)
        for number, expert in enumerate(self.experts):
            chosen = (route == number).nonzero().flatten()
            out = out.index_add(0, chosen, expert(hidden[chosen]))
        return self.head(out.flatten(1))


def train(make_parts, **options):
    """Take a step for each list of micro-batches ``(inputs, route)``; return all parameters and the events."""
    torch.manual_seed(0)
    net = Experts().to(DTYPE)
    preconditioner = KroneckerPreconditioner(net, inverse_period=2, damping=0.1, **options)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for parts in make_parts:
        optimizer.zero_grad()
        total = max(1, sum(len(inputs) for inputs, _ in parts))
        for inputs, route in parts:
            outputs = net(inputs, route)
            preconditioner.fisher_backward(outputs)
            (F.cross_entropy(outputs, torch.arange(len(inputs)) % 3, reduction="sum") / total).backward()
        preconditioner.step()
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()], preconditioner.events


def drawn(seed: int, sizes: list[int], num_experts: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Return micro-batches of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 4, 4, dtype=DTYPE, generator=generator),
            torch.randint(0, num_experts, (size,), generator=generator),
        )
        for size in sizes
    ]


@pytest.mark.parametrize("options", one_in(2, SETTINGS), ids=str)
@settings(max_examples=12, deadline=None)
@given(sizes=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=4))
def test_micro_batches_without_examples_change_nothing(options, sizes):
    """Empty parts, experts and whole mini-batches: no error, and the numbers of training without them."""
    steps = [drawn(seed, some) for seed, some in enumerate(sizes)]
    parameters, events = train(steps, **options)
    assert all(parameter.isfinite().all() for parameter in parameters)
    assert {event.partition(":")[0] for event in events} <= {"no_examples", "other_examples"}
    if options.get("fisher_type") == "mc":
        return  # draws differ with the number of parts
    without = [[part for part in parts if len(part[0])] or parts[:1] for parts in steps]
    for got, want in zip(parameters, train(without, **options)[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_an_idle_expert_keeps_what_it_has_and_is_named(options, caplog):
    """On the first step it keeps the plain gradient, later its last inverse."""
    busy, idle = drawn(0, [6]), [(drawn(1, [6])[0][0], torch.zeros(6, dtype=torch.long))]
    _, events = train([idle], **options)
    assert events["no_examples:experts.1"] == 1
    assert "experts.1: no examples; all its calls had 0 examples; it goes on with the plain gradient" in caplog.text
    caplog.clear()
    _, events = train([busy, busy, idle], **options)
    assert events["no_examples:experts.1"] == 1
    assert "it goes on with its last inverse, until a refresh that has some" in caplog.text


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 4), (0, 5, 4)], ids=str)
def test_empty_shapes_of_linear_layers_are_no_examples(shape):
    """Neither no examples nor no locations are measured."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    preconditioner = KroneckerPreconditioner(net, inverse_period=1)
    net(torch.zeros(shape)).sum().backward()
    preconditioner.step()
    assert preconditioner.events == {"no_examples:0": 1, "no_examples:1": 1}
    net.zero_grad()
    (net(torch.randn(6, 4)).square().mean() + net(torch.zeros(shape)).sum()).backward()
    preconditioner.step()
    assert preconditioner.events == {"no_examples:0": 1, "no_examples:1": 1}
    assert [layer.num_examples for layer in preconditioner.layers] == [6, 6]


# --- other kinds of tensors -------------------------------------------------------------------------------------------


class Named(Tensor):
    """Carries a name along, and computes as any other tensor."""


def grads_of(inputs: Tensor, **options) -> list[Tensor]:
    """Return all gradients of a linear net after a step with statistics and a plain one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)).to(DTYPE)
    preconditioner = KroneckerPreconditioner(net, inverse_period=2, **options)
    for _ in range(2):
        net.zero_grad()
        F.cross_entropy(torch.as_tensor(net(inputs)).as_subclass(Tensor), torch.arange(4) % 3).backward()
        preconditioner.step()
    assert not preconditioner.events
    return [parameter.grad for parameter in net.parameters()]


@pytest.mark.parametrize("kind", ["coo", "csr", "subclass", "parameter"])
def test_sparse_inputs_and_plain_subclasses_have_the_factors_of_dense_ones(kind):
    """They are what their dense numbers are."""
    dense = torch.randn(4, 6, dtype=DTYPE) * (torch.rand(4, 6) < 0.5)
    makers = {
        "coo": dense.to_sparse,
        "csr": dense.to_sparse_csr,
        "subclass": lambda: dense.as_subclass(Named),
        "parameter": lambda: nn.Parameter(dense),
    }
    for got, want in zip(grads_of(makers[kind]()), grads_of(dense), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_images_of_a_subclass_train_as_plain_ones(application):
    """A convolution whose inverse is applied in the backward pass takes them too."""
    results = []
    for kind in (Tensor, Named):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 20, 3, bias=False), nn.Flatten(), nn.Linear(80, 3)).to(DTYPE)
        preconditioner = KroneckerPreconditioner(net, application=application, inverse_period=2)
        for index in range(3):
            net.zero_grad()
            generator = torch.Generator().manual_seed(index)
            outputs = net(torch.randn(6, 3, 4, 4, dtype=DTYPE, generator=generator).as_subclass(kind))
            F.cross_entropy(outputs.as_subclass(Tensor), torch.arange(6) % 3).backward()
            preconditioner.step()
        results.append([parameter.grad.as_subclass(Tensor) for parameter in net.parameters()])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_nested_inputs_are_refused_by_name():
    """With the cure, where statistics are due; other steps take them."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    nested = torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)
    preconditioner = KroneckerPreconditioner(net, inverse_period=2)
    with pytest.raises(RuntimeError, match=r"Layer '0' was called with a NestedTensor, .*to_padded_tensor.* skip"):
        net(nested)
    preconditioner.discard()
    net(torch.randn(6, 4)).square().mean().backward()
    preconditioner.step()
    net.zero_grad()
    net(nested).values().square().mean().backward()
    preconditioner.step()


def test_forward_mode_derivatives_are_recorded_as_numbers():
    """A pass with dual numbers has the statistics of the numbers themselves."""
    grads = []
    for is_dual in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(DTYPE)
        inputs = torch.randn(6, 4, dtype=DTYPE)
        preconditioner = KroneckerPreconditioner(net)
        with forward_ad.dual_level():
            outputs = net(forward_ad.make_dual(inputs, torch.ones_like(inputs)) if is_dual else inputs)
            outputs = forward_ad.unpack_dual(outputs).primal if is_dual else outputs
            F.cross_entropy(outputs, torch.arange(6) % 3).backward()
        preconditioner.step()
        grads.append([parameter.grad for parameter in net.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


class Folded(nn.Module):
    """Works on images, then on their quarters as examples, as MobileViT and Swin do."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.folded = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        """Return logits."""
        hidden = self.first(x * scale)  # [n, 4, 4, 4]
        hidden = hidden.unflatten(2, (2, 2)).unflatten(4, (2, 2)).permute(0, 2, 4, 3, 5, 1).flatten(0, 2).flatten(1, 2)
        for layer in self.folded:
            hidden = layer(hidden).tanh()  # [4 n, 4, channels]
        return self.head(hidden.mean(1).unflatten(0, (-1, 4)).mean(1))


@pytest.mark.parametrize("call", [lambda net, x: net(x), lambda net, x: net(x=x, scale=2.0)], ids=["args", "kwargs"])
def test_the_batch_is_that_of_the_models_input(call):
    """Layers that see it folded are named although they are most, over two micro-batches too."""
    net = Folded()
    preconditioner = KroneckerPreconditioner(net)
    for size in (3, 2):
        call(net, torch.randn(size, 3, 4, 4)).square().mean().backward()
    preconditioner.step()
    assert preconditioner.events == {f"other_examples:folded.{index}": 1 for index in range(3)}


# --- models that leave ------------------------------------------------------------------------------------------------

LOADING = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "kfac_sua":
            raise ModuleNotFoundError("kfac_sua is not installed here")
sys.meta_path.insert(0, Absent())
import torch
model = torch.load(sys.argv[1], weights_only=False)
print(model(torch.ones(1, 3, 3, 3)).tolist())
torch.save(model, sys.argv[1])
"""


@pytest.mark.parametrize("application", one_in(2, ["weight", "auto"]))
def test_a_pickled_model_loads_without_this_package(application, tmp_path):
    """Where it is deployed nothing else is needed, and nothing of the preconditioner is left on it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(8, 2))
    preconditioner = KroneckerPreconditioner(net, application=application, inverse_period=2)
    net(torch.randn(4, 3, 3, 3)).square().mean().backward()
    preconditioner.step()
    path = tmp_path / "model.pt"
    torch.save(net, path)
    done = subprocess.run([sys.executable, "-c", LOADING, path], capture_output=True, text=True, check=True)
    expected = net(torch.ones(1, 3, 3, 3))
    assert torch.allclose(torch.tensor(eval(done.stdout)), expected)
    loaded = torch.load(path, weights_only=False)  # saved once more where the package is absent
    KroneckerPreconditioner(loaded)
    assert torch.allclose(loaded(torch.ones(1, 3, 3, 3)), expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("application", ["weight", "auto"])
@pytest.mark.parametrize("which", ["live", "copied", "removed"])
def test_models_are_traced_and_exported_and_scripted_where_that_can_be(application, which):
    """``torch.jit.script`` compiles hooks: its error names the cure, which works; all else takes the model as it is."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(72, 2))
    inputs = torch.randn(2, 3, 5, 5)
    preconditioner = KroneckerPreconditioner(net, application=application, inverse_period=2)
    net(inputs).square().mean().backward()
    preconditioner.step()
    model = copy.deepcopy(net) if which == "copied" else net
    if which == "removed":
        preconditioner.remove_hooks()
    model.eval()
    with torch.no_grad():
        expected = net(inputs)
        ways = {
            "trace": lambda: torch.jit.trace(model, inputs),
            "export": lambda: torch.export.export(model, (inputs,)).module(),
            "fx": lambda: torch.fx.symbolic_trace(model),
        }
        for way in ways.values():
            torch.testing.assert_close(way()(inputs), expected)
        if which == "removed":
            torch.testing.assert_close(torch.jit.script(model)(inputs), expected)
        else:
            with pytest.raises(
                AttributeError, match=r"call preconditioner\.remove_hooks\(\) first, .* or script a new model"
            ):
                torch.jit.script(model)


def test_another_weight_is_refused_where_statistics_would_be_measured():
    """The layer's hook says so, before its sums would not fit."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    preconditioner = KroneckerPreconditioner(net)
    net[0].weight = nn.Parameter(torch.randn(5, 7))
    with pytest.raises(
        RuntimeError, match=r"Layer '0' has got a weight of shape \[5, 7\] .*make the preconditioner anew"
    ):
        net(torch.randn(6, 7))
    del preconditioner


def test_a_saved_model_is_loaded_by_weights_alone_as_ever():
    """``state_dict`` holds nothing of the preconditioner."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    preconditioner = KroneckerPreconditioner(net)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)).load_state_dict(torch.load(buffer, weights_only=True))
    del preconditioner
