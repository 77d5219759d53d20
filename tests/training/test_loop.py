"""Whole runs: exact repetition, exact resumption, equality with a plain loop, divergence, and what is left on disk."""

import copy
import csv
import dataclasses
import itertools
import json
import math
import shutil

import pytest
import torch
import torch.nn.functional as F
from identical import assert_identical
from tiny_runs import TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.build import build_splits
from kfac_sua.data import BatchLoader
from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.runs.metrics import read_records
from kfac_sua.training import files, loop
from kfac_sua.training.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted
from kfac_sua.training.timing import TRAINING_PHASES, Stopwatch

CPU = torch.device("cpu")
SUA = ("preconditioner=sua", TINY_PERIOD)
GROUPED = ("preconditioner=grouped", "preconditioner.group_size=8", TINY_PERIOD)
STATEFUL = (
    *GROUPED,
    "preconditioner.fisher_type=mc",
    "preconditioner.ema_decay=0.5",
    "preconditioner.factor_period=1",
    "dataset.augmentation=flip_crop",
    "schedule=cosine",
)
BASELINE = ("preconditioner=baseline",)


def final_state(config) -> Checkpoint:
    """Return the checkpoint that a run left."""
    directory = directory_of(config)
    return load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=CPU)


def assert_equal_states(first: Checkpoint, second: Checkpoint) -> None:
    """Compare bit for bit all but the seconds."""
    for name in ("epoch", "step", "model", "optimizer", "preconditioner"):
        assert_identical(getattr(first, name), getattr(second, name), name)


def interrupt_after(monkeypatch, epochs: int) -> None:
    """Press Ctrl-C in the middle of the next epoch, of four steps each."""
    steps = itertools.count(1)

    def step(progress):
        if next(steps) == 4 * epochs + 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "step", step)


@pytest.mark.parametrize("overrides", [BASELINE, STATEFUL], ids=["baseline", "grouped-mc-ema"])
def test_two_runs_with_one_seed_are_identical(tmp_path, overrides):
    """The same configuration gives the same metrics and parameters; another seed gives others."""
    first, second = (tiny_config(tmp_path / name, *overrides, "epochs=2") for name in ("first", "second"))
    other = tiny_config(tmp_path / "other", *overrides, "epochs=2", "seed=1")
    for config in (first, second, other):
        run(config)
    assert metrics_without_times(first) == metrics_without_times(second)
    assert_equal_states(final_state(first), final_state(second))
    assert metrics_without_times(first) != metrics_without_times(other)


@pytest.mark.parametrize("overrides", [BASELINE, SUA, STATEFUL], ids=["baseline", "sua", "grouped-mc-ema"])
def test_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch, overrides):
    """Interrupted after one of three epochs and started again, a run ends bit for bit where it would have."""
    straight, resumed = (tiny_config(tmp_path / name, *overrides, "epochs=3") for name in ("straight", "resumed"))
    run(straight)
    with monkeypatch.context() as context:
        interrupt_after(context, epochs=1)
        with pytest.raises(Interrupted):
            run(resumed)
    assert [row["epoch"] for row in metrics_without_times(resumed)] == [0, 1]
    assert run(resumed).status == "finished"
    assert metrics_without_times(resumed) == metrics_without_times(straight)
    assert_equal_states(final_state(resumed), final_state(straight))


def test_interruption_says_where_the_same_command_goes_on(tmp_path, monkeypatch):
    """After Ctrl-C, the message names the epoch, and run.json still says that the run is not over."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=3")
    interrupt_after(monkeypatch, epochs=2)
    with pytest.raises(Interrupted, match=r"interrupted; the same command resumes from epoch 3\."):
        run(config)
    assert json.loads(directory_of(config).info.read_text())["status"] == "running"


def test_times_and_start_survive_a_resume(tmp_path, monkeypatch):
    """Seconds go on from those of the first attempt, and the start stays the first one."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=2")
    with monkeypatch.context() as context:
        interrupt_after(context, epochs=1)
        with pytest.raises(Interrupted):
            run(config)
    started = json.loads(directory_of(config).info.read_text())["started"]
    info = run(config)
    _, first, second = read_records(directory_of(config).metrics)
    assert second.train_time_s > first.train_time_s > 0
    assert info.started == started


def test_row_without_its_checkpoint_is_written_again(tmp_path, monkeypatch):
    """After a crash between an epoch's row and its checkpoint, the epoch is repeated and stands in the file once."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=3")
    save_checkpoint = files.save_checkpoint

    def crash_in_epoch_two(path, checkpoint):
        if checkpoint.epoch == 2:
            raise OSError("disk full")
        save_checkpoint(path, checkpoint)

    with monkeypatch.context() as context:
        context.setattr(files, "save_checkpoint", crash_in_epoch_two)
        with pytest.raises(OSError, match="disk full"):
            run(config)
    assert [row["epoch"] for row in metrics_without_times(config)] == [0, 1, 2]
    run(config)
    assert [row["epoch"] for row in metrics_without_times(config)] == [0, 1, 2, 3]


def test_checkpoint_of_another_configuration_is_refused(tmp_path, monkeypatch):
    """A checkpoint copied into the directory of another run does not go unnoticed."""
    donor, receiver = (tiny_config(tmp_path, *BASELINE, "epochs=2", f"optimizer.lr={lr}") for lr in (0.1, 0.2))
    run(donor)
    directory_of(receiver).path.mkdir(parents=True)
    shutil.copy(directory_of(donor).checkpoint, directory_of(receiver).checkpoint)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        run(receiver)


def plain_loop(config, preconditioner_settings=None) -> torch.nn.Module:
    """Train as anyone would without this package's loop, and return the model."""
    splits = build_splits(config.dataset)
    loader = BatchLoader(
        splits.train, splits.mean, splits.std, config.batch_size, "cpu", memory_format=torch.channels_last
    )
    torch.manual_seed(config.seed)
    model = TinyConvNet(10).to(memory_format=torch.channels_last)
    preconditioner = None
    if preconditioner_settings is not None:
        preconditioner = KroneckerPreconditioner(model, **preconditioner_settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    for epoch in range(config.epochs):
        for inputs, labels in loader.epoch(config.seed, epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            if preconditioner is not None:
                preconditioner.step()
            optimizer.step()
    return model


@pytest.mark.parametrize(
    ("overrides", "settings"),
    [(BASELINE, None), (SUA, {"structure": "sua", "damping": 0.1, "inverse_period": 3, "application": "auto"})],
    ids=["baseline", "sua"],
)
def test_run_is_bit_equal_to_a_plain_loop(tmp_path, overrides, settings):
    """Timing, evaluation and records change nothing: the parameters equal those of the loop written out above."""
    config = tiny_config(tmp_path, *overrides, "epochs=2", "optimizer.lr=0.05", "optimizer.weight_decay=1e-3")
    run(config)
    expected = plain_loop(config, settings).state_dict()
    assert_identical(final_state(config).model, dict(expected))


@pytest.mark.parametrize("overrides", [BASELINE, SUA, STATEFUL], ids=["baseline", "sua", "mc"])
def test_divergence_is_recorded_not_raised(tmp_path, overrides, capsys):
    """A loss that is not finite ends the run as diverged; the same command repeats that instead of the run."""
    config = tiny_config(tmp_path, *overrides, "epochs=3", "optimizer.lr=1e18")
    info = run(config)
    assert (info.status, info.diverged_at_epoch, info.test_error) == ("diverged", 1, None)
    assert info.ended is not None
    assert [row["epoch"] for row in metrics_without_times(config)] == [0]
    assert "diverged in epoch 1" in capsys.readouterr().out
    assert run(config) == info
    assert capsys.readouterr().out.startswith("already diverged in epoch 1")


def test_finished_run_is_not_repeated(tmp_path, capsys, monkeypatch):
    """The same command again prints the final numbers and touches nothing."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=1")
    info = run(config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    monkeypatch.setattr(loop, "train_epoch", lambda *_: pytest.fail("trained again"))
    assert run(config) == info
    out = capsys.readouterr().out
    assert out.startswith("already finished: epoch 1, val error ")
    assert f"test error {info.test_error:.2%}" in out
    assert str(directory_of(config).path) in out
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_test_set_is_evaluated_once_at_the_end(tmp_path, monkeypatch):
    """Over three epochs, the 297 test images pass through the network exactly once, after the last epoch."""
    sizes = []
    evaluate = loop._evaluate

    def counting(training, loader, after_batch):
        sizes.append(len(loader._labels))
        return evaluate(training, loader, after_batch)

    monkeypatch.setattr(loop, "_evaluate", counting)
    run(tiny_config(tmp_path, *BASELINE, "epochs=3", "dataset.train_eval_size=300"))
    assert sizes == [300, 200] * 4 + [297]


def test_what_a_run_leaves_on_disk(tmp_path):
    """The directory holds the files of a run, and they agree with each other."""
    config = tiny_config(tmp_path, *SUA, "epochs=2", "device=auto")
    config = dataclasses.replace(config, device=tiny_config(tmp_path).device)
    info = run(config)
    directory = directory_of(config)
    names = sorted(path.name for path in directory.path.iterdir() if path.name != ".lock")
    assert names[:3] == ["best.pt", "checkpoint.state", "config.yaml"]
    assert names[3].startswith("events.out.tfevents.")
    assert names[4:] == ["last.pt", "metrics.csv", "run.json", "train.log"]
    saved = json.loads(directory.info.read_text())
    assert len(saved.pop("digest")) == 64
    assert saved == dataclasses.asdict(info)
    assert saved["config"]["device"] == "cpu"
    assert saved["config"]["preconditioner"]["structure"] == "sua"
    rows = list(csv.DictReader(directory.metrics.open()))
    assert [(row["epoch"], row["step"], row["lr"]) for row in rows] == [
        ("0", "0", "0.03"),
        ("1", "4", "0.03"),
        ("2", "8", "0.03"),
    ]


def test_row_zero_is_the_untrained_network(tmp_path):
    """Before the first step both training losses are the evaluated one, about ln 10, at zero seconds."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=1")
    run(config)
    untrained = read_records(directory_of(config).metrics)[0]
    assert (untrained.epoch, untrained.step, untrained.train_time_s) == (0, 0, 0.0)
    assert untrained.train_loss == untrained.train_eval_loss == pytest.approx(math.log(10), abs=0.1)
    assert 0.7 < untrained.val_error <= 1


def test_time_is_split_over_the_phases(tmp_path):
    """train_time_s is the sum of its parts, each of which a preconditioned run has spent time on."""
    config = tiny_config(tmp_path, *SUA, "epochs=1")
    run(config)
    _, record = read_records(directory_of(config).metrics)
    parts = [getattr(record, f"{phase}_s") for phase in TRAINING_PHASES]
    assert all(getattr(record, f"{phase}_s") > 0 for phase in TRAINING_PHASES if phase != "captured")
    assert record.captured_s == 0
    assert record.train_time_s == pytest.approx(sum(parts), rel=1e-12)
    assert record.evaluation_s > 0
    assert record.writing_s > 0


class WorkClock:
    """A clock that moves by what the parts of a run are made to cost."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def charge(self, monkeypatch, owner: object, name: str, seconds: float) -> None:
        """Make a function cost this many seconds per call, beside doing what it does."""
        function = getattr(owner, name)

        def costly(*arguments, **options):
            self.now += seconds
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, costly)


def test_every_second_of_an_epoch_has_its_phase(tmp_path, monkeypatch):
    """Four steps, of whose parts each costs a second of its own: where each is booked, and what lies outside."""
    clock = WorkClock()
    monkeypatch.setattr("kfac_sua.training.build.Stopwatch", lambda device: Stopwatch(device, clock))
    clock.charge(monkeypatch, BatchLoader, "_normalised", 0.001)
    clock.charge(monkeypatch, F, "cross_entropy", 0.01)
    clock.charge(monkeypatch, ErrorCounter, "add", 0.1)
    clock.charge(monkeypatch, torch.optim.SGD, "step", 1.0)
    clock.charge(monkeypatch, loop.Progress, "step", 10.0)
    clock.charge(monkeypatch, files, "append_record", 100.0)
    clock.charge(monkeypatch, files, "save_checkpoint", 1000.0)
    config = tiny_config(tmp_path, *BASELINE, "epochs=1")
    run(config)
    untrained, record = read_records(directory_of(config).metrics)
    assert record.data_s == pytest.approx(4 * 0.001)
    assert record.forward_backward_s == pytest.approx(4 * 0.01)
    assert record.optimizer_s == pytest.approx(4 * 1.0)
    assert record.other_s == pytest.approx(4 * (0.1 + 10.0))
    assert record.train_time_s == pytest.approx(4 * 11.111)
    assert untrained.train_time_s == 0
    # Two evaluations of one mini-batch each, before and after the epoch.
    assert record.evaluation_s == pytest.approx(2 * untrained.evaluation_s)
    assert untrained.evaluation_s == pytest.approx(2 * 0.111)
    assert record.writing_s == pytest.approx(100.0)  # of row 0; this row and its checkpoint are yet to be written
    saved = final_state(config).times
    assert saved["writing"] == pytest.approx(200.0)


def test_train_loss_is_the_mean_over_mini_batches(tmp_path, monkeypatch):
    """train_loss and train_error of an epoch are the plain means over its mini-batches, each before its own step."""
    config = tiny_config(tmp_path, *BASELINE, "epochs=1")
    seen = []
    add = ErrorCounter.add

    def spy(counter, logits, labels, loss):
        if loss.requires_grad:
            seen.append((loss.item(), (logits.argmax(1) != labels).double().mean().item()))
        add(counter, logits, labels, loss)

    monkeypatch.setattr(ErrorCounter, "add", spy)
    run(config)
    _, record = read_records(directory_of(config).metrics)
    assert len(seen) == 4
    assert record.train_loss == pytest.approx(sum(loss for loss, _ in seen) / 4, rel=1e-9)
    assert record.train_error == pytest.approx(sum(error for _, error in seen) / 4, rel=1e-9)


def test_bad_data_leaves_nothing_on_disk(tmp_path):
    """Errors that only the data can show come before the first file is written."""
    config = tiny_config(tmp_path / "runs", *BASELINE)
    too_large = copy.deepcopy(config)
    too_large.batch_size = 5000
    with pytest.raises(Exception, match="batch_size must be between 1 and"):
        run(too_large)
    assert list(tmp_path.iterdir()) == []
