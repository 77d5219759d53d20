"""Where a scheduler takes jobs off their machines, a run is saved before it is put into the queue again."""

import contextlib
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest
from tiny_runs import directory_of, metrics_without_times, tiny_config

from kfac_sua.training import writer
from kfac_sua.training.checkpoint import load_checkpoint
from kfac_sua.training.loop import run
from kfac_sua.training.signals import StopRequest

REQUEUED = 144


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """Install the handlers of a job of submitit, which leave their number here; that of SIGUSR2 leaves the process."""
    numbers: list[int] = []

    def requeue(number, frame):
        numbers.append(number)
        raise SystemExit(REQUEUED)

    handlers = {signal.SIGUSR2: requeue, signal.SIGTERM: lambda number, frame: numbers.append(number)}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def send_after(monkeypatch, calls: int, number: int, after: Callable[[], None] = lambda: None) -> None:
    """Send this process a signal after so many mini-batches of the next run."""
    between, count = writer.RunWriter.after_batch, iter(range(1, calls + 1))

    def sending(run_writer):
        if next(count, None) == calls:
            os.kill(os.getpid(), number)
            after()
        between(run_writer)

    monkeypatch.setattr(writer.RunWriter, "after_batch", sending)


def steps_saved(config) -> int:
    """Return how many steps the last checkpoint holds."""
    directory = directory_of(config)
    state = load_checkpoint(directory.checkpoint, fingerprint=directory.fingerprint, seed=config.seed, device="cpu")
    return state.step


def test_pre_emption_is_handed_on_once_the_run_is_saved(tmp_path, monkeypatch, handled, capsys):
    """The handler that was there before has the last word, finds the checkpoint, and the next attempt resumes."""
    straight, config = (tiny_config(tmp_path / name, "preconditioner=sua", "epochs=2") for name in ("a", "b"))
    run(straight)
    with monkeypatch.context() as context:
        send_after(context, 3, signal.SIGUSR2)
        with pytest.raises(SystemExit) as caught:
            run(config)
    assert (caught.value.code, handled) == (REQUEUED, [signal.SIGUSR2])
    assert steps_saved(config) == 3
    assert "interrupted; the same command resumes from epoch 1, mini-batch 4 of 4." in capsys.readouterr().out
    assert run(config).status == "finished"
    assert handled == [signal.SIGUSR2]
    assert metrics_without_times(config) == metrics_without_times(straight)


def test_where_pre_emption_may_come_sigterm_saves_and_the_run_goes_on(tmp_path, monkeypatch, handled):
    """A scheduler sends SIGTERM before either signal that ends a job: nothing is lost by the one, nor by the other."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1", "checkpoint_interval_s=null")
    saved, save = [], writer.RunWriter.save
    monkeypatch.setattr(writer.RunWriter, "save", lambda one: (save(one), saved.append(one.training.step)))
    send_after(monkeypatch, 2, signal.SIGTERM)
    assert run(config).status == "finished"
    assert (saved, handled) == ([2, 4], [])


def test_a_run_that_fails_is_not_queued_again(tmp_path, monkeypatch, handled):
    """It would fail again, and its reason would be lost."""

    def fail():
        raise OSError(28, "No space left on device")

    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")
    send_after(monkeypatch, 2, signal.SIGUSR2, after=fail)
    with pytest.raises(OSError, match="No space left"):
        run(config)
    assert handled == []


def test_a_scheduler_may_name_another_signal(monkeypatch):
    """A run reads it where submitit does, from the environment; without a handler no signal is touched."""
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    with StopRequest():
        assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert stop.signal_number == signal.SIGUSR1
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # as the process that watches over the job repeats it
            assert stop.signal_number == signal.SIGINT
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGINT, inherited)


@pytest.mark.parametrize(("calls", "hosts"), [(None, ["node2"]), (3, ["node1", "node2"])], ids=["anew", "resumed"])
def test_a_run_knows_every_machine_that_its_seconds_come_from(tmp_path, monkeypatch, handled, calls, hosts):
    """A job that is queued again may come to another host; what an earlier one has not saved does not count."""
    config = tiny_config(tmp_path, "preconditioner=baseline", "epochs=1")
    for host, is_last in (("node1", False), ("node2", True)):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        with monkeypatch.context() as context:
            if not is_last and calls is None:
                context.setattr(writer.RunWriter, "save", lambda _: None)
            if not is_last:
                send_after(context, calls or 2, signal.SIGUSR2)
            with contextlib.suppress(SystemExit):
                info = run(config)
    assert [machine.partition(" (")[0] for machine in info.machines] == hosts
