"""Models in wrappers, compiled, copied, pickled, moved or changed: as the bare model, or one clear sentence."""

import copy
import io
import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune as prune
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

from kfac_sua.preconditioner import KroneckerPreconditioner

LABELS = torch.tensor([0, 1, 2, 1])
DTYPE = torch.float64


class Net(nn.Module):
    """Two convolutions, one of which ``application=auto`` treats in the backward pass, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 20, 3, bias=False)
        self.norm = nn.BatchNorm2d(20)
        self.second = nn.Conv2d(20, 20, 3, bias=False)
        self.head = nn.Linear(20, 3)

    def forward(self, x):
        """Return logits."""
        return self.head(self.second(self.norm(self.first(x)).relu_()).flatten(1))


def make_net() -> Net:
    """Return the same float64 net every time."""
    torch.manual_seed(0)
    return Net().to(DTYPE)


def batch(index: int) -> torch.Tensor:
    """Return the inputs of mini-batch ``index``."""
    return torch.randn(4, 3, 5, 5, dtype=DTYPE, generator=torch.Generator().manual_seed(index))


def train(model, preconditioner, steps=range(6)) -> list[float]:
    """Take SGD steps and return the losses."""
    losses = []
    for index in steps:
        model.zero_grad()
        outputs = model(batch(index).to(next(model.parameters())))
        preconditioner.fisher_backward(outputs)
        loss = nn.functional.cross_entropy(outputs, LABELS)
        loss.backward()
        preconditioner.step()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter -= 0.05 * parameter.grad
        losses.append(loss.item())
    return losses


def start(model, **options) -> KroneckerPreconditioner:
    """Return a preconditioner that refreshes at every third mini-batch."""
    return KroneckerPreconditioner(model, inverse_period=3, damping=0.01, **options)


def reference(**options) -> list[float]:
    """Return the losses of the bare model."""
    net = make_net()
    return train(net, start(net, **options))


# --- torch.compile ----------------------------------------------------------------------------------------------------


def compile_first(net, backend):
    """Compile by a wrapper, then construct on the wrapper."""
    compiled = torch.compile(net, backend=backend)
    return compiled, compiled


def compile_and_call_first(net, backend):
    """Compile and call in training mode before constructing: graphs without hooks exist already."""
    compiled = torch.compile(net, backend=backend)
    saved = copy.deepcopy(net.state_dict())
    compiled(batch(0)).sum().backward()
    net.load_state_dict(saved)
    return compiled, compiled


def compile_in_place(net, backend):
    """Compile by ``model.compile()``, and call before constructing."""
    net.compile(backend=backend)
    saved = copy.deepcopy(net.state_dict())
    net(batch(0)).sum().backward()
    net.load_state_dict(saved)
    return net, net


def compile_a_part(net, backend):
    """Compile one layer of the model only, by ``layer.compile()``."""
    net.second.compile(backend=backend)
    return net, net


def compile_inside(net, backend):
    """Replace a layer by its compiled wrapper, whose name has a part more."""
    net.second = torch.compile(net.second, backend=backend)
    return net, net


@pytest.fixture
def graph_breaks():
    """Return the count of graph breaks and of graphs, starting from none."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


ORDERS = [
    (compile_first, "weight"),
    (compile_and_call_first, "auto"),
    (compile_in_place, "auto"),
    (compile_a_part, "auto"),
    (compile_inside, "weight"),
]


@pytest.mark.parametrize(("compiling", "application"), ORDERS, ids=lambda value: getattr(value, "__name__", value))
def test_a_compiled_model_trains_as_the_bare_one(graph_breaks, application, compiling):
    """Whatever was compiled and called before, the losses and the layers' names are those of the bare model."""
    model, given = compiling(make_net(), "eager")
    preconditioner = start(given, application=application)
    assert train(model, preconditioner) == pytest.approx(reference(application=application), rel=1e-9)
    names = [row.name for row in preconditioner.describe().rows]
    assert names == ["first", "norm", "second", "head"]
    assert preconditioner.events == {}


def test_a_compiled_model_takes_sampled_labels(graph_breaks):
    """The extra backward pass of ``fisher_type=mc`` goes through the uncompiled mini-batches' graph."""
    compiled = torch.compile(make_net(), backend="eager")
    losses = train(compiled, start(compiled, fisher_type="mc"))
    assert losses == pytest.approx(reference(fisher_type="mc"), rel=1e-9)


@pytest.mark.parametrize("application", ["weight", pytest.param("auto", marks=pytest.mark.slow)])
def test_a_model_compiled_after_construction_trains_as_the_bare_one(graph_breaks, application):
    """Its first mini-batch with statistics breaks the graph at every layer, later ones run uncompiled."""
    net = make_net()
    preconditioner = start(net, application=application)
    compiled = torch.compile(net, backend="eager")
    losses = train(compiled, preconditioner, range(2))
    num_graphs = graph_breaks["stats"]["unique_graphs"]
    losses += train(compiled, preconditioner, range(2, 6))
    assert losses == pytest.approx(reference(application=application), rel=1e-9)
    assert graph_breaks["stats"]["unique_graphs"] == num_graphs > 1


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_mini_batches_without_statistics_are_one_graph(graph_breaks, application):
    """One graph, compiled once, serves all of them, over several refreshes; the one break is on the others."""
    compiled = torch.compile(make_net(), backend="eager")
    train(compiled, start(compiled, application=application), range(10))
    assert graph_breaks["stats"]["unique_graphs"] == 1
    assert sum(graph_breaks["graph_break"].values()) == 1


def test_the_bare_model_of_one_that_was_compiled_and_called_is_an_error(graph_breaks):
    """Hooks are not in the graphs there are, and the wrapper cannot be seen from inside: the cure is named."""
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    compiled(batch(0)).sum().backward()
    with pytest.raises(RuntimeError, match=r"of a compiled model, what torch\.compile returned"):
        train(compiled, start(net))


def test_a_model_compiled_as_one_graph_without_exception_is_an_error(graph_breaks):
    """``fullgraph=True`` forbids to leave mini-batches with statistics uncompiled: PyTorch's error says the cure."""
    compiled = torch.compile(make_net(), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile without fullgraph=True"):
        train(compiled, start(compiled))


def test_one_gradient_from_compiled_and_other_passes_is_an_error(graph_breaks):
    """Under ``auto`` a compiled pass leaves a plain gradient, which cannot be added to a preconditioned one."""
    net = make_net()
    preconditioner = start(net, application="auto")
    train(net, preconditioner, range(1))
    for model in (net, torch.compile(net, backend="eager")):
        nn.functional.cross_entropy(model(batch(1)), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"torch\.compile off and then on.*application=weight"):
        preconditioner.step()


def test_removing_the_preconditioner_restores_a_compiled_model(graph_breaks):
    """Its forward is its own again, and copies of the model never had another."""
    net = make_net()
    compiled = torch.compile(net, backend="eager")
    preconditioner = start(compiled, application="auto")
    assert "forward" in net.__dict__
    twin = copy.deepcopy(net)
    assert twin.forward.__self__ is twin
    assert pickle.loads(pickle.dumps(net)).forward.__func__ is Net.forward
    preconditioner.remove_hooks()
    assert "forward" not in net.__dict__
    assert "forward" not in net.second.__dict__


@pytest.mark.slow
def test_aot_autograd_trains_as_the_bare_model(graph_breaks):
    """Where forward and backward are traced together, as inductor does."""
    compiled = torch.compile(make_net(), backend="aot_eager")
    assert train(compiled, start(compiled)) == pytest.approx(reference(), rel=1e-9)


@pytest.mark.slow
def test_inductor_trains_as_the_bare_model(graph_breaks):
    """With the default backend, in float32, over two refreshes."""
    net = make_net().float()
    twin = copy.deepcopy(net)
    compiled, bare = (train(model, start(model), range(5)) for model in (torch.compile(net), twin))
    assert compiled == pytest.approx(bare, rel=1e-4)


# --- data parallel ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_process(tmp_path):
    """Be the only process of a group."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("compiled", [False, True])
def test_distributed_data_parallel_is_unwrapped(one_process, graph_breaks, compiled):
    """Given in place of the bare model: the same losses, names, skip patterns and checkpoint keys."""
    wrapped = nn.parallel.DistributedDataParallel(make_net())
    wrapped = torch.compile(wrapped, backend="eager") if compiled else wrapped
    preconditioner = start(wrapped, skip=["first"])
    assert train(wrapped, preconditioner) == pytest.approx(reference(skip=["first"]), rel=1e-9)
    bare = start(make_net(), skip=["first"])
    assert [*preconditioner.state_dict()["layers"]] == [*bare.state_dict()["layers"]] == ["second", "head"]
    bare.load_state_dict(preconditioner.state_dict())


def test_data_parallel_is_refused():
    """Its copies on other devices cannot be recorded; the cure is named, also where only the bare model is given."""
    net = make_net()
    with pytest.raises(ValueError, match=r"nn\.DataParallel, .* use DistributedDataParallel"):
        start(nn.DataParallel(net))
    preconditioner = start(net)
    replica = net.head._replicate_for_data_parallel()
    replica.weight, replica.bias = net.head.weight, net.head.bias
    with pytest.raises(RuntimeError, match=r"'head' runs in a copy that nn\.DataParallel made"):
        replica(torch.randn(4, 20, dtype=DTYPE))
    del preconditioner


def test_what_is_no_module_is_refused():
    """A function, say."""
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got function"):
        KroneckerPreconditioner(make_net)


# --- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_preconditioner_can_be_neither_copied_nor_pickled(copier):
    """It belongs to one model; its state can be given to one of another model, which then goes on as it did."""
    net = make_net()
    preconditioner = start(net)
    train(net, preconditioner, range(4))
    with pytest.raises(TypeError, match=r"belongs to one model.*load_state_dict\(preconditioner\.state_dict\(\)\)"):
        copier(preconditioner)
    twin = copy.deepcopy(net)
    other = start(twin)
    other.load_state_dict(preconditioner.state_dict())
    assert train(net, preconditioner, range(4, 8)) == train(twin, other, range(4, 8))


def test_copies_of_a_preconditioned_model_can_have_a_preconditioner_of_their_own():
    """Deep or pickled copies of a model whose convolutions are treated in the backward pass leave no layer out."""
    net = make_net()
    preconditioner = start(net, application="auto")
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        other = start(twin, application="auto")
        assert [row.reason for row in other.describe().rows] == ["", "normalisation layer", "", ""]
        assert train(twin, other) == reference(application="auto")
    assert preconditioner.num_steps == 0


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_averaged_weights_are_those_of_the_trained_model(application):
    """AveragedModel copies the model with its hooks, before or in the midst of training; the copy is inert."""
    net = make_net()
    preconditioner = start(net, application=application)
    average = AveragedModel(net, use_buffers=True)
    by_hand = []
    for index in range(5):
        train(net, preconditioner, [index])
        average.update_parameters(net)
        by_hand.append([parameter.detach().clone() for parameter in net.parameters()])
        with torch.no_grad():
            average(batch(index))
    for parameter, *values in zip(average.parameters(), *by_hand, strict=True):
        torch.testing.assert_close(parameter.detach(), sum(values) / 5, rtol=1e-10, atol=1e-12)
    train(net, preconditioner, [5])
    torch.optim.swa_utils.update_bn([batch(7), batch(8)], average)
    alone = make_net()
    train(alone, start(alone, application=application))
    for got, want in zip(net.parameters(), alone.parameters(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_the_model_can_be_sent_to_other_processes(application):
    """As torch.multiprocessing pickles it: what arrives has the weights, and gradients that are plain."""
    net = make_net()
    preconditioner = start(net, application=application)
    train(net, preconditioner, range(1))
    arrived = pickle.loads(bytes(ForkingPickler.dumps(net.state_dict())))
    assert arrived.keys() == net.state_dict().keys()
    received = pickle.loads(pickle.dumps(net))
    plain = make_net()
    plain.load_state_dict(net.state_dict())
    for model in (received, plain):
        model.zero_grad()
        nn.functional.cross_entropy(model(batch(3)), LABELS).backward()
    for got, want in zip(received.parameters(), plain.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad)


def _gradient_norm(net, queue):
    nn.functional.cross_entropy(net(batch(3)), LABELS).backward()
    queue.put(sum(parameter.grad.norm().item() for parameter in net.parameters()))


@pytest.mark.slow
def test_a_spawned_process_gets_the_plain_model():
    """The real thing: a process of its own computes the plain gradient of the model it was sent."""
    net = make_net()
    preconditioner = start(net, application="auto")
    train(net, preconditioner, range(1))
    net.zero_grad()
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=_gradient_norm, args=(net, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    plain = make_net()
    plain.load_state_dict(net.state_dict())
    nn.functional.cross_entropy(plain(batch(3)), LABELS).backward()
    assert queue.get() == pytest.approx(sum(parameter.grad.norm().item() for parameter in plain.parameters()))


def test_workers_of_a_data_loader_do_not_disturb():
    """Mini-batches from forked workers give the losses of those from this process."""
    data = TensorDataset(torch.cat([batch(index) for index in range(4)]), LABELS.repeat(4))
    losses = []
    for workers in (0, 2):
        net = make_net()
        preconditioner = start(net)
        losses.append([])
        for inputs, labels in DataLoader(data, batch_size=4, num_workers=workers):
            net.zero_grad()
            loss = nn.functional.cross_entropy(net(inputs), labels)
            loss.backward()
            preconditioner.step()
            losses[-1].append(loss.item())
    assert losses[0] == losses[1]


def test_a_checkpoint_of_a_compiled_model_loads_into_the_bare_one(graph_breaks):
    """State written under one wrapper can be read under another, from a file, weights only."""
    compiled = torch.compile(make_net(), backend="eager")
    preconditioner = start(compiled)
    train(compiled, preconditioner, range(2))
    buffer = io.BytesIO()
    torch.save({"model": compiled._orig_mod.state_dict(), "preconditioner": preconditioner.state_dict()}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    net = make_net()
    net.load_state_dict(state["model"])
    bare = start(net)
    bare.load_state_dict(state["preconditioner"])
    assert train(net, bare, range(2, 6)) == pytest.approx(train(compiled, preconditioner, range(2, 6)), rel=1e-9)


# --- moved and changed ------------------------------------------------------------------------------------------------

SETTINGS = [
    {},
    {"application": "auto"},
    {"ema_decay": 0.9},
    {"damping_rule": "exact"},
    {"inverse_method": "low_rank"},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("after", [1, 2, 3])
def test_inverses_and_averages_follow_the_model_to_another_precision(settings, after):
    """Made double before or after a refresh, training goes on close to that in float64, and in float64."""
    net = make_net().float()
    preconditioner = start(net, **settings)
    losses = []
    for index in range(6):
        if index == after:
            net.double()
        net.zero_grad()
        loss = nn.functional.cross_entropy(net(batch(index).to(net.head.weight)), LABELS)
        loss.backward()
        preconditioner.step()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.requires_grad:
                    parameter -= 0.05 * parameter.grad
        losses.append(loss.item())
        kept = [layer.inverse.reference_tensor.dtype for layer in preconditioner._layers.values()]
        if "ema_decay" in settings:
            kept += [layer.average.value.gradient.values.dtype for layer in preconditioner._layers.values()]
        assert set(kept) == {net.head.weight.dtype}
    assert losses == pytest.approx(reference(**settings), rel=2e-3)


def test_the_first_step_after_a_move_is_in_the_new_precision():
    """Also where inverses are applied in the backward pass, which comes before the step that moves them."""
    grads = []
    for application in ("weight", "auto"):
        net = make_net().float()
        preconditioner = start(net, application=application, structure="sua")
        nn.functional.cross_entropy(net(batch(0).float()), LABELS).backward()
        preconditioner.step()
        net.double().zero_grad()
        nn.functional.cross_entropy(net(batch(1)), LABELS).backward()
        preconditioner.step()
        grads.append([parameter.grad for parameter in net.parameters()])
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_memory_format_does_not_matter(application):
    """``channels_last``, from the start or midway, gives the same losses."""
    for when in (0, 2):
        net = make_net()
        preconditioner = start(net, application=application)
        losses = train(net, preconditioner, range(when))
        net.to(memory_format=torch.channels_last)
        losses += train(net, preconditioner, range(when, 6))
        assert losses == pytest.approx(reference(application=application), rel=1e-9)


def test_layers_of_different_precision_are_refreshed_together():
    """A float32 backbone under a float64 head: each layer has factors in its own precision."""
    net = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 5).double(), nn.Linear(5, 3).double())
    preconditioner = KroneckerPreconditioner(net)
    net[2](net[1](net[0](torch.randn(6, 4)).double())).square().sum(1).mean().backward()
    preconditioner.step()
    dtypes = [layer.inverse.reference_tensor.dtype for layer in preconditioner._layers.values()]
    assert dtypes == [torch.float32, torch.float64, torch.float64]


def test_a_layer_unfrozen_later_is_an_error_at_the_next_step():
    """Also between refreshes; under ``skip`` it is a decision, and a new preconditioner takes it in."""
    net = make_net()
    net.first.weight.requires_grad_(False)
    twin = copy.deepcopy(net)
    preconditioner, skipping = start(net), start(twin, skip=["first"])
    for model, one in ((net, preconditioner), (twin, skipping)):
        nn.functional.cross_entropy(model(batch(0)), LABELS).backward()
        one.step()
        model.first.weight.requires_grad_(True)
        model.zero_grad()
        nn.functional.cross_entropy(model(batch(1)), LABELS).backward()
    skipping.step()
    with pytest.raises(RuntimeError, match=r"'first' was frozen when .* trainable now; make the preconditioner anew"):
        preconditioner.step()
    preconditioner.remove_hooks()
    train(net, start(net), range(2))


def test_a_bias_unfrozen_or_added_later_is_an_error():
    """It would silently get the plain gradient."""
    for bias in (True, False):
        layer = nn.Linear(3, 2, bias=bias)
        if bias:
            layer.bias.requires_grad_(False)
        preconditioner = KroneckerPreconditioner(layer)
        layer.bias = nn.Parameter(torch.zeros(2))
        layer(torch.randn(4, 3)).square().mean().backward()
        with pytest.raises(RuntimeError, match=r"bias of layer '' was frozen or missing"):
            preconditioner.step()


@pytest.mark.parametrize("application", ["weight", "auto"])
def test_a_layer_frozen_later_is_left_alone_and_named(caplog, application):
    """The others train on as if it had been frozen from then on; once it is free again it goes on."""
    net = make_net()
    preconditioner = start(net, application=application)
    train(net, preconditioner, range(1))
    net.second.weight.requires_grad_(False)
    net.second.weight.grad = None
    before = net.second.weight.clone()
    for index in range(1, 5):
        for parameter in net.parameters():
            parameter.grad = None
        nn.functional.cross_entropy(net(batch(index)), LABELS).backward()
        assert net.second.weight.grad is None
        preconditioner.step()
    assert torch.equal(net.second.weight, before)
    assert preconditioner.events == {"frozen:second": 4}
    assert [record.getMessage() for record in caplog.records] == [
        "second: frozen; it is left alone, and a trainable bias gets the plain gradient."
    ]
    net.second.weight.requires_grad_(True)
    train(net, preconditioner, range(5, 8))
    assert preconditioner.events == {"frozen:second": 4}


def replace_head(net):
    """Put a new head on, as fine-tuning does."""
    net.head = nn.Linear(20, 3).to(DTYPE)


def add_adapter(net):
    """Register one more layer."""
    net.adapter = nn.Linear(2, 2).to(DTYPE)


def remove_layer(net):
    """Take a layer out."""
    net.second = nn.Flatten()
    net.head = nn.Linear(180, 3).to(DTYPE)


def parametrise(net):
    """Compute a weight from other parameters."""
    nn.utils.parametrizations.spectral_norm(net.head)


def tie(net):
    """Let two layers share a weight."""
    net.other = nn.Linear(20, 3).to(DTYPE)
    net.other.weight = net.head.weight


def wrap(net):
    """Put a layer inside of another module, as adapters do."""
    net.head = nn.Sequential(net.head, nn.Linear(3, 3).to(DTYPE))


def prune_weight(net):
    """Mask a weight, which is computed from then on."""
    prune.l1_unstructured(net.second, "weight", 0.5)


def normalise(net):
    """Compute a weight in a hook, as older releases of PyTorch do."""
    nn.utils.weight_norm(net.first)


def reshape(net):
    """Give a layer a weight of another shape."""
    net.head.weight = nn.Parameter(torch.randn(3, 10, dtype=DTYPE))
    net.forward = lambda inputs: net.head(inputs.flatten(1)[:, :10])


def reshape_in_place(net):
    """Give a weight itself another shape."""
    net.head.weight.data = torch.randn(3, 10, dtype=DTYPE)
    net.forward = lambda inputs: net.head(inputs.flatten(1)[:, :10])


def drop_bias(net):
    """Take a layer's bias away."""
    net.head.bias = None


def patch(net):
    """Let a layer compute something else."""
    net.head.forward = lambda inputs: nn.Linear.forward(net.head, 2 * inputs)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("steps", [1, 3], ids=["between refreshes", "at a refresh"])
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (replace_head, "'head' was replaced since"),
        (wrap, "'head' was removed, and is 'head.0' now since"),
        (prune_weight, r"'second' cannot be preconditioned any more \(its weight is computed"),
        (normalise, r"'first' cannot be preconditioned any more \(its weight is computed"),
        (reshape, r"'head' has got another shape or other options \(in_channels: \d+ then, 10 now\)"),
        (reshape_in_place, r"'head' has got another shape or other options \(in_channels: \d+ then, 10 now\)"),
        (drop_bias, "'head' has lost its bias"),
        (patch, r"'head' cannot be preconditioned any more \(its forward has been replaced, by .*\.patch"),
        (add_adapter, "'adapter' was added since"),
        (remove_layer, "'second' was removed since"),
        (parametrise, r"'head' cannot be preconditioned any more \(its weight is computed"),
        (tie, r"'head' cannot be preconditioned any more \(it shares a parameter"),
    ],
)
def test_a_model_whose_layers_change_is_refused_at_the_next_step(change, sentence, steps):
    """What is changed, and what to do, is said, over and over; a new preconditioner accepts the new model."""
    net = make_net()
    preconditioner = start(net)
    train(net, preconditioner, range(steps))
    change(net)
    for parameter in net.parameters():
        parameter.grad = None
    with preconditioner.paused():  # what passes record of a changed layer is another matter
        nn.functional.cross_entropy(net(batch(3)), LABELS).backward()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=sentence + ".*make the preconditioner anew"):
            preconditioner.step()
    assert preconditioner.num_steps == steps
    preconditioner.remove_hooks()
    nn.functional.cross_entropy(net(batch(3)), LABELS)
    assert start(net)


def test_other_options_of_a_convolution_are_refused_at_the_next_refresh():
    """Strides are read where statistics are: their layout goes by them."""
    net = make_net()
    preconditioner = start(net)
    train(net, preconditioner, range(3))
    net.second.dilation = (2, 2)
    net.second(torch.randn(1, 20, 5, 5, dtype=DTYPE)).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"'second' has got .* \(dilation: \(1, 1\) then, \(2, 2\) now\)"):
        preconditioner.step()


def test_changes_that_concern_no_layer_are_fine():
    """Another parameter of the same shape, other activations, a frozen bias, evaluation, another precision."""
    net = make_net()
    net.act = nn.Tanh()
    preconditioner = start(net)
    train(net, preconditioner, range(1))
    net.head.weight = nn.Parameter(net.head.weight.detach().clone())
    net.act = nn.Sequential(nn.ReLU(), nn.Dropout())
    train(net, preconditioner, range(1, 2))
    net.head.bias.requires_grad_(False)
    net.norm.eval()
    train(net, preconditioner, range(2, 5))
    assert preconditioner.num_steps == 5


def test_a_preconditioner_made_again_takes_over():
    """As when a notebook's cell is run twice: the second one treats all layers, and the first one's hooks go."""
    net = make_net()
    preconditioner = start(net, application="auto")
    train(net, preconditioner, range(2))
    preconditioner = start(net, application="auto")
    assert [row.reason for row in preconditioner.describe().rows] == ["", "normalisation layer", "", ""]
    assert len(net.second._forward_hooks) == 1
    train(net, preconditioner, range(2))
    preconditioner.remove_hooks()
    assert "forward" not in net.second.__dict__
