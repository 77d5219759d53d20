"""Runs stopped between any two mini-batches, and by signals, end bit for bit where they would have."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from identical import assert_identical
from stops import stop_after
from thinned import one_in
from tiny_runs import TINY, TINY_PERIOD, directory_of, metrics_without_times, tiny_config

from kfac_sua.files.lock import RunLostError
from kfac_sua.training import capturing, files, loop, writer
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.signals import Interrupted, StopRequest

BATCHES = 4  # of an epoch of the tiny runs
SETTINGS = {
    "baseline": ("preconditioner=baseline",),
    "kfac": ("preconditioner=kfac", TINY_PERIOD),
    "sua": ("preconditioner=sua", TINY_PERIOD, "dataset.augmentation=flip_crop"),
    "grouped-mc-ema": (
        "preconditioner=grouped",
        "preconditioner.group_size=8",
        TINY_PERIOD,
        "preconditioner.fisher_type=mc",
        "preconditioner.ema_decay=0.5",
        "preconditioner.factor_period=1",
        "schedule=cosine",
    ),
    "sua_grouped-exact-damping": (
        "preconditioner=sua_grouped",
        "preconditioner.group_size=8",
        TINY_PERIOD,
        "preconditioner.damping_rule=exact",
        "non_finite=skip",
    ),
    "kfac-adaptive-damping": ("preconditioner=kfac", TINY_PERIOD, "preconditioner.adaptive_damping=2"),
    "sua-clip-damping-schedule": (
        "preconditioner=sua",
        TINY_PERIOD,
        "preconditioner.application=weight",
        "preconditioner.kl_clip=1e-4",
        "preconditioner.damping_final=0.01",
    ),
    "adamw": ("preconditioner=baseline", "optimizer=adamw"),
}


def final_state(config):
    """Return the checkpoint that a run left."""
    directory = directory_of(config)
    return load_checkpoint(
        directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device=torch.device("cpu")
    )


@pytest.mark.parametrize("setting", one_in(3, SETTINGS))
def test_stopped_between_any_two_mini_batches_a_run_ends_where_it_would_have(tmp_path, monkeypatch, setting):
    """Stopped after every single mini-batch, and in every evaluation: everything is as in the uninterrupted run.

    Parameters, momentum, factors, inverses, counters, sums and records, to the last bit.
    """
    straight, stopped = (
        tiny_config(tmp_path / name, *SETTINGS[setting], "epochs=2", "evaluation_batch_size=400")
        for name in ("straight", "stopped")
    )
    run(straight)
    positions, calls, info = [], 1, None
    while info is None:
        with monkeypatch.context() as context:
            stop_after(context, calls)
            with contextlib.suppress(Interrupted):
                info = run(stopped)
        state = final_state(stopped)
        # An evaluation is repeated from its first mini-batch, so that stopping there again would never end.
        calls = calls + 1 if (state.epoch, state.batch) in positions else 1
        positions.append((state.epoch, state.batch))
    assert set(positions) == {(epoch, batch) for epoch in (0, 1) for batch in range(1, BATCHES + 1)} | {(2, 0)}
    assert info.status == "finished"
    assert metrics_without_times(stopped) == metrics_without_times(straight)
    first, second = (vars(final_state(config)) for config in (stopped, straight))
    for state in (first, second):
        del state["times"], state["records_digest"], state["fingerprint"]
    assert_identical(first, second)


def test_within_an_epoch_checkpoints_are_written_by_the_clock(tmp_path, monkeypatch):
    """A run that dies without a word loses no more than checkpoint_interval_s of work."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1", "checkpoint_interval_s=1e-9")
    take_step, steps = capturing.take_step, iter(range(BATCHES))

    def dying(*arguments):
        if next(steps) == 2:
            raise SystemExit  # no handler saves anything
        return take_step(*arguments)

    with monkeypatch.context() as context:
        context.setattr(capturing, "take_step", dying)
        with pytest.raises(SystemExit):
            run(config)
    state = final_state(config)
    assert (state.epoch, state.batch, state.step) == (0, 2, 2)


def test_messages_name_the_mini_batch(tmp_path, monkeypatch):
    """The sentence of an interruption says from where the same command goes on."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")
    with monkeypatch.context() as context:
        stop_after(context, calls=3)
        with pytest.raises(
            Interrupted, match=r"^interrupted; the same command resumes from epoch 1, mini-batch 4 of 4\.$"
        ):
            run(config)
    with monkeypatch.context() as context:
        stop_after(context, calls=2)
        with pytest.raises(Interrupted, match=r"resumes with the evaluation of epoch 1\.$"):
            run(config)


def test_ctrl_c_after_a_first_signal_stops_at_once():
    """The first one is remembered, as is a SIGTERM after it; a SIGINT then raises; at last the handlers are the old."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_an_ignored_signal_stays_ignored():
    """Workers of a campaign leave Ctrl-C to their parent."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal_number is None
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_finishes_its_step_saves_and_leaves(tmp_path, number, code):
    """The real command, signalled in the middle of a long epoch, leaves with the conventional code and resumes."""
    arguments = [*TINY, "preconditioner=sua", "epochs=400", f"output_dir={tmp_path}", "progress=lines"]
    command = [sys.executable, "-m", "kfac_sua.train", *arguments]
    process = subprocess.Popen(
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        args=command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    config = tiny_config(tmp_path, "preconditioner=sua", "epochs=400")
    deadline = time.monotonic() + 120
    while not directory_of(config).checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert "stopping after this step; Ctrl-C stops at once." in stderr
    assert "interrupted; the same command resumes" in stderr
    assert "Traceback" not in stderr
    assert final_state(config).step > 0


def test_a_signal_at_the_end_of_a_run_stops_the_sweep(tmp_path, monkeypatch):
    """Asked to stop while its last lines are written, a run ends as finished, and none comes after it."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")
    write = files.write_run_info

    def signalling(path, info):
        write(path, info)
        if info.status == "finished":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(files, "write_run_info", signalling)
    with pytest.raises(Interrupted, match=r"^interrupted; this run has ended\.$") as caught:
        run(config)
    assert caught.value.signal_number == signal.SIGTERM
    monkeypatch.undo()
    assert run(config).status == "finished"


def test_a_run_whose_directory_was_replaced_writes_nothing_more(tmp_path, monkeypatch):
    """Moved away, and begun anew by another process: the first one leaves with a sentence and touches neither."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=3")
    path = directory_of(config).path
    train_epoch = loop.train_epoch

    def moving(training, *arguments):
        if training.epoch == 1:
            path.rename(tmp_path / "moved")
            path.mkdir()
            (path / "metrics.csv").write_text("another's")
        return train_epoch(training, *arguments)

    monkeypatch.setattr(loop, "train_epoch", moving)
    with pytest.raises(RunLostError, match=r"was removed or replaced; this process writes nothing more"):
        run(config)
    assert [file.name for file in path.iterdir()] == ["metrics.csv"]
    assert (path / "metrics.csv").read_text() == "another's"


def test_what_goes_wrong_after_the_end_does_not_undo_it(tmp_path, monkeypatch):
    """A finished run stays finished if its last sentence cannot be printed."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")

    def closed(directory, info):
        raise BrokenPipeError(32, "Broken pipe")

    with monkeypatch.context() as context:
        context.setattr(writer, "summary_line", closed)
        with pytest.raises(BrokenPipeError):
            run(config)
    assert run(config).status == "finished"


def test_a_signal_is_taken_though_nobody_reads_stderr(capfd):
    """The line that a signal prints may fail; the request is remembered all the same."""
    read, write = os.pipe()
    before = os.dup(2)
    os.dup2(write, 2)
    os.close(write)
    os.close(read)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.signal_number == signal.SIGTERM
    finally:
        os.dup2(before, 2)
        os.close(before)
