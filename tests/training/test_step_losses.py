"""The losses of single mini-batches in TensorBoard: every step once, wherever a run was stopped."""

import itertools

import pytest
import torch
from emulated_runs import emulated  # noqa: F401  # a fixture
from stops import stop_after
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.tensorboard import STEP_LOSS, STEPS
from kfac_sua.training import files
from kfac_sua.training.evaluate import ErrorCounter
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted

SUA = ("preconditioner=sua", TINY_PERIOD, "epochs=3")  # twelve steps
SMALL = ("batch_size=40", "preconditioner=sua", "preconditioner.inverse_period=5", "epochs=2")  # twenty


def logged(config) -> list[tuple[int, float]]:
    """Return steps and losses as TensorBoard shows them; their wall times must be those of training."""
    reader = EventAccumulator(str(directory_of(config).path / STEPS))
    reader.Reload()
    points = reader.Scalars(STEP_LOSS)
    times = [point.wall_time for point in points]
    assert times == sorted(times)
    return [(point.step, point.value) for point in points]


def with_losses(monkeypatch, config) -> list[float]:
    """Carry out a run, and return the losses of its training steps."""
    losses, add = [], ErrorCounter.add

    def noting(counter, logits, labels, loss):
        if torch.is_grad_enabled() and loss.requires_grad:
            losses.append(loss.item())
        add(counter, logits, labels, loss)

    with monkeypatch.context() as context:
        context.setattr(ErrorCounter, "add", noting)
        run(config)
    return losses


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_every_nth_loss_is_logged_with_its_step(tmp_path, monkeypatch, interval):
    """That of the mini-batch, before its step; the last point lies where the epoch's does on the axis of time."""
    config = tiny_config(tmp_path, *SUA, f"log_interval={interval}")
    losses = with_losses(monkeypatch, config)
    assert len(losses) == 12
    expected = [(step, pytest.approx(losses[step - 1], rel=1e-5)) for step in range(interval, 13, interval)]
    assert logged(config) == expected


def test_nothing_changes_and_nothing_is_left_without(tmp_path):
    """The same directory and rows; no directory of steps where none are asked for."""
    without, with_them = (tiny_config(tmp_path / name, *SUA, f"log_interval={name}") for name in ("null", "1"))
    for config in (without, with_them):
        run(config)
    assert metrics_without_times(without) == metrics_without_times(with_them)
    assert directory_of(without).fingerprint == directory_of(with_them).fingerprint
    assert not (directory_of(without).path / STEPS).exists()


def test_a_captured_run_that_is_stopped_anywhere_shows_every_step_once(tmp_path, monkeypatch, emulated):  # noqa: F811
    """Also after a crash between the writing of losses and that of the checkpoint, which takes steps again."""
    eager, stopped = (
        tiny_config(tmp_path / capture, *SMALL, "log_interval=1", f"capture={capture}") for capture in ("false", "true")
    )
    losses = with_losses(monkeypatch, eager)
    assert len(losses) == 20
    crashes = iter([False, True, False, True])
    for steps in itertools.cycle([4, 9, 7]):
        with monkeypatch.context() as context:
            stop_after(context, steps)
            if next(crashes, False):
                context.setattr(files, "save_checkpoint", lambda path, checkpoint: 1 / 0)
            try:
                run(stopped)
                break
            except (Interrupted, ZeroDivisionError):
                continue
    assert any(step.num_replays for step in emulated)
    assert logged(stopped) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in enumerate(losses, start=1)]
    assert metrics_without_times(stopped) == metrics_without_times(eager)


def test_a_diverging_run_shows_how(tmp_path):
    """The losses of the epoch that is not recorded are there."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "optimizer.lr=1e18", "epochs=2", "log_interval=1")
    assert run(config).status == "diverged"
    assert len(read_records(directory_of(config).metrics)) == 1
    steps = [step for step, _ in logged(config)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 2


def test_a_skipped_mini_batch_is_no_step(tmp_path, monkeypatch):
    """Its number is that of the one that comes in its place."""
    from kfac_sua.training import step

    bad = itertools.count()
    monkeypatch.setattr(step, "_is_finite", lambda loss, model: next(bad) not in (0, 5, 6))
    config = tiny_config(tmp_path, *SUA, "non_finite=skip", "log_interval=1")
    losses = with_losses(monkeypatch, config)
    assert logged(config) == [(number, pytest.approx(loss, rel=1e-5)) for number, loss in enumerate(losses, start=1)]
    assert len(losses) == 9
    assert read_records(directory_of(config).metrics)[-1].skipped_steps == 3
