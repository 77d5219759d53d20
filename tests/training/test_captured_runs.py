"""Whole runs of the command with captured steps, on an emulated graph: what they leave, and how they end."""

import contextlib
import gc
import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch
from emulated_runs import emulated  # noqa: F401  # a fixture
from graph_emulator import EmulatedGraph
from identical import assert_identical
from stops import stop_after
from thinned import diagonal, one_in
from tiny_runs import directory_of, metrics_without_times, tiny_config

import kfac_sua
from kfac_sua.config import ConfigError
from kfac_sua.data import BatchLoader
from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner import CapturedStep, KroneckerPreconditioner
from kfac_sua.preconditioner.captured.step import WARM_UP_STEPS
from kfac_sua.runs.metrics import read_records
from kfac_sua.training import capturing, writer
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.divergence import CHECK_PERIOD
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted
from kfac_sua.training.timing import TRAINING_PHASES

SMALL = ("dataset.train_size=100", "batch_size=10", "dataset.train_eval_size=50")  # 10 steps an epoch
SETTINGS = {
    "baseline": ("preconditioner=baseline",),
    "kfac": ("preconditioner=kfac", "preconditioner.inverse_period=5", "dataset.augmentation=flip_crop"),
    "sua-average": (
        *("preconditioner=sua", "preconditioner.inverse_period=10", "preconditioner.factor_period=5"),
        *("preconditioner.ema_decay=0.5", "preconditioner.fisher_type=mc"),
    ),
    "adamw": ("preconditioner=baseline", "optimizer=adamw", "schedule=cosine"),
}


def final_state(config) -> dict:
    """Return all but the seconds of the checkpoint that a run left."""
    directory = directory_of(config)
    state = load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=torch.device("cpu")
    )
    values = vars(state)
    del values["times"], values["records_digest"]  # rows hold seconds
    return values


@pytest.mark.parametrize("setting", one_in(2, SETTINGS))
def test_a_captured_run_that_is_stopped_anywhere_ends_where_it_would_have(tmp_path, monkeypatch, emulated, setting):  # noqa: F811
    """Stopped again and again, with warm-up and capture anew each time: the rows and the state of an eager run."""
    eager, straight, stopped = (
        tiny_config(tmp_path / name, *SMALL, *SETTINGS[setting], "epochs=2", f"capture={capture}")
        for name, capture in (("eager", "false"), ("straight", "true"), ("stopped", "true"))
    )
    run(eager)
    assert emulated == []
    run(straight)
    assert emulated[0].num_replays > 0
    for steps in itertools.cycle([1, 7, 5, 9]):
        with monkeypatch.context() as context:
            stop_after(context, steps)
            try:
                run(stopped)
                break
            except Interrupted:
                continue
    assert len(emulated) > 4
    assert sum(step.num_replays for step in emulated[1:]) > 0
    for config in (straight, stopped):
        assert metrics_without_times(config) == metrics_without_times(eager)
        assert_identical(final_state(config), final_state(eager))


def test_capture_changes_neither_the_directory_nor_who_may_resume(tmp_path, monkeypatch, emulated):  # noqa: F811
    """A run that was begun with captured steps goes on without, and the other way round."""
    first, second = (
        tiny_config(tmp_path, *SMALL, *SETTINGS["kfac"], "epochs=2", f"capture={capture}")
        for capture in ("true", "false")
    )
    assert directory_of(first) == directory_of(second)
    with monkeypatch.context() as context:
        stop_after(context, 8)
        with pytest.raises(Interrupted):
            run(first)
    assert emulated[0].num_replays > 0
    assert run(second).status == "finished"
    straight = tiny_config(tmp_path / "straight", *SMALL, *SETTINGS["kfac"], "epochs=2")
    run(straight)
    assert_identical(final_state(second), final_state(straight))


def test_seconds_of_replays_are_a_part_of_their_own(tmp_path, emulated):  # noqa: F811
    """captured_s is what replays take, and the parts still sum to the training time."""
    config = tiny_config(tmp_path, *SMALL, *SETTINGS["kfac"], "epochs=1", "capture=true")
    run(config)
    _, record = read_records(directory_of(config).metrics)
    assert emulated[0].num_replays > 0
    assert record.captured_s > 0
    assert record.inversion_s > 0
    parts = [getattr(record, f"{phase}_s") for phase in TRAINING_PHASES]
    assert record.train_time_s == pytest.approx(sum(parts), rel=1e-12)


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (("preconditioner=kfac", "preconditioner.inverse_period=1"), "every step measures statistics"),
        (
            ("preconditioner=kfac", "preconditioner.inverse_period=5", "preconditioner.adaptive_damping=1"),
            "adaptive_damping=1 judges every step",
        ),
    ],
    ids=["statistics", "adaptive"],
)
def test_steps_of_which_none_is_plain_are_not_captured(tmp_path, emulated, capsys, keys, reason):  # noqa: F811
    """Named under auto, an error under true, and no second is booked as captured."""
    config = tiny_config(tmp_path, *SMALL, *keys, "epochs=1")
    run(config)
    assert f"steps are not captured: {reason}" in capsys.readouterr().out
    assert emulated == []
    assert read_records(directory_of(config).metrics)[-1].captured_s == 0
    with pytest.raises(ConfigError, match=f"capture=true, but {reason}"):
        run(tiny_config(tmp_path / "true", *SMALL, *keys, "capture=true"))


def test_the_host_does_one_replay_per_plain_step(tmp_path, monkeypatch, emulated):  # noqa: F811
    """The function that takes a step runs where it must: at refreshes, to warm up, and at the capture."""
    calls, take_step = itertools.count(), capturing.take_step
    monkeypatch.setattr(capturing, "take_step", lambda training: (next(calls), take_step(training))[1])
    run(tiny_config(tmp_path, *SMALL, *SETTINGS["kfac"], "epochs=3", "capture=true"))
    refreshes = 30 // 5
    assert next(calls) == refreshes + WARM_UP_STEPS + 1
    assert emulated[0].num_replays == 30 - refreshes - WARM_UP_STEPS


def test_capture_true_where_it_cannot_be_is_refused_before_anything_is_written(tmp_path):
    """On a CPU, with the reason and the cure."""
    config = tiny_config(tmp_path / "runs", "preconditioner=sua", "capture=true")
    with pytest.raises(ConfigError, match=r"^capture=true, but device=cpu has no CUDA graphs; give capture=auto or"):
        run(config)
    assert not (tmp_path / "runs").exists()


def test_capture_auto_on_a_cpu_says_nothing(tmp_path, capsys):
    """There is nothing to miss."""
    run(tiny_config(tmp_path, *SMALL, "preconditioner=baseline", "epochs=1"))
    out, err = capsys.readouterr()
    assert "captured" not in out + err


def test_capture_auto_says_why_not(tmp_path, emulated, capsys):  # noqa: F811
    """One line; with capture=true it is an error."""
    skip = (*SMALL, "preconditioner=baseline", "epochs=1", "non_finite=skip")
    assert run(tiny_config(tmp_path, *skip)).status == "finished"
    assert emulated == []
    line = "steps are not captured: non_finite=skip decides on the host whether to take each step\n"
    assert line in capsys.readouterr().out
    with pytest.raises(ConfigError, match="capture=true, but non_finite=skip decides on the host"):
        run(tiny_config(tmp_path / "true", *skip, "capture=true"))


def test_what_only_a_step_shows_is_an_error_under_capture_true(tmp_path, monkeypatch, emulated, caplog):  # noqa: F811
    """A network that reads a value back: a warning under auto, which trains all the same."""
    forward = TinyConvNet.forward

    def reading(net, images):
        logits = forward(net, images)
        assert logits.sum().item() != 0
        return logits

    monkeypatch.setattr(TinyConvNet, "forward", reading)
    plain = ("dataset.train_size=200", "batch_size=2", "preconditioner=baseline", "epochs=1")  # 100 steps
    config = tiny_config(tmp_path, *plain)
    with caplog.at_level("WARNING", logger="kfac_sua"):
        assert run(config).status == "finished"
    assert "is not captured: it reads a value back to the host" in caplog.text
    assert read_records(directory_of(config).metrics)[-1].captured_s == 0
    steps, between = [], writer.RunWriter.after_batch
    monkeypatch.setattr(writer.RunWriter, "after_batch", lambda one: (steps.append(one.training.step), between(one)))
    with pytest.raises(RuntimeError, match=r"^capture=true, but it reads a value back"):
        run(tiny_config(tmp_path / "true", *plain, "capture=true"))
    assert steps[-1] == CHECK_PERIOD  # rather than at the end of a long epoch


@pytest.mark.parametrize(("bad", "is_captured"), diagonal([0, 60, 149], [True, False]))
def test_divergence_is_noticed_within_two_looks(tmp_path, monkeypatch, emulated, is_captured, bad):  # noqa: F811
    """Of an epoch of 400 steps no more than 100 follow the first loss that is not finite."""
    config = tiny_config(
        tmp_path,
        "dataset.train_size=400",
        "batch_size=1",
        "model.batch_norm=false",
        "preconditioner=baseline",
        "epochs=2",
        f"capture={is_captured}",
        "optimizer.lr=1e-4",
    )
    steps = []
    between = writer.RunWriter.after_batch
    monkeypatch.setattr(writer.RunWriter, "after_batch", lambda one: (steps.append(one.training.step), between(one)))
    begin_epoch = BatchLoader.begin_epoch

    def spoiling(loader, *arguments, **options):
        begin_epoch(loader, *arguments, **options)
        order = loader._order[bad]
        loader._images = loader._images.float()
        loader._images[order] = float("nan")

    monkeypatch.setattr(BatchLoader, "begin_epoch", spoiling)
    info = run(config)
    assert (info.status, info.diverged_at_epoch) == ("diverged", 1)
    assert bad < steps[-1] <= bad + 2 * CHECK_PERIOD
    assert bool(emulated) is is_captured


def test_divergence_is_seen_before_statistics(tmp_path, monkeypatch, emulated):  # noqa: F811
    """A refresh after the first loss that is not finite is not made."""
    refreshes, update_inverses = [], KroneckerPreconditioner.update_inverses
    monkeypatch.setattr(
        KroneckerPreconditioner, "update_inverses", lambda one: (refreshes.append(one.num_steps), update_inverses(one))
    )
    config = tiny_config(
        tmp_path,
        *SMALL,
        "preconditioner=kfac",
        "preconditioner.inverse_period=5",
        "optimizer.lr=1e18",
        "epochs=1",
        "capture=true",
    )
    assert run(config).status == "diverged"
    assert refreshes == [0]


def test_at_most_three_frames_between_the_run_and_the_optimizer(tmp_path, monkeypatch):
    """A reader of a traceback sees the run, its epoch, the step, and the optimizer."""
    package, seen = str(Path(kfac_sua.__file__).parent), []
    step = torch.optim.SGD.step

    def looking(optimizer, closure=None):
        seen.append([frame.f_code.co_name for frame in _frames() if frame.f_code.co_filename.startswith(package)])
        return step(optimizer, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", looking)
    run(tiny_config(tmp_path, *SMALL, "preconditioner=kfac", "epochs=1"))
    for names in seen:
        assert names[: names.index("run")] == ["take_step", "train_epoch"]
    assert len(seen) == 10


def _frames():
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def test_ctrl_c_in_a_capture_leaves_a_run_that_goes_on(tmp_path, monkeypatch, emulated):  # noqa: F811
    """A second Ctrl-C raises wherever it arrives, here while the step is recorded."""
    config = tiny_config(tmp_path, *SMALL, *SETTINGS["kfac"], "epochs=2", "capture=true", "checkpoint_interval_s=1e-9")
    take_step, count = capturing.take_step, itertools.count(1)

    def interrupted(training):
        if next(count) == 1 + WARM_UP_STEPS + 1:  # a refresh, three plain steps, and the capture
            raise KeyboardInterrupt
        take_step(training)

    with monkeypatch.context() as context:
        context.setattr(capturing, "take_step", interrupted)
        with pytest.raises(Interrupted, match="mini-batch 5 of 10"):
            run(config)
    assert run(config).status == "finished"
    straight = tiny_config(tmp_path / "straight", *SMALL, *SETTINGS["kfac"], "epochs=2")
    run(straight)
    assert_identical(final_state(config), final_state(straight))


def test_a_graph_ends_with_its_run(tmp_path, monkeypatch):
    """Without the garbage collector, also where the run fails: the next run of a sweep may be about to capture."""
    graphs = []

    class Emulated(CapturedStep):
        def __init__(self, *arguments):
            graph = EmulatedGraph()
            graphs.append(weakref.ref(graph))
            super().__init__(*arguments, graph=graph)

    monkeypatch.setattr(capturing, "DEVICES", ("cpu",))
    monkeypatch.setattr(capturing, "CapturedStep", Emulated)
    gc.disable()
    try:
        run(tiny_config(tmp_path, *SMALL, *SETTINGS["kfac"], "epochs=1", "capture=true"))
        assert [graph() for graph in graphs] == [None]
        monkeypatch.setattr(writer.RunWriter, "log", lambda one, record: 1 / (record.epoch == 0))
        with contextlib.suppress(ZeroDivisionError):
            run(tiny_config(tmp_path / "failing", *SMALL, *SETTINGS["kfac"], "epochs=1", "capture=true"))
        assert [graph() for graph in graphs] == [None, None]
    finally:
        gc.enable()


def test_every_epoch_replays_the_graph_of_the_first(tmp_path, emulated):  # noqa: F811
    """Order, sums and evaluation between epochs leave what was captured as it was."""
    run(tiny_config(tmp_path, *SMALL, *SETTINGS["sua-average"], "epochs=4", "capture=true"))
    assert emulated[0].num_captures == 1
