"""Event files, read back by TensorBoard's own reader."""

import contextlib
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from full_disk import largest_file
from runs.synthetic_runs import epoch_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginEventAccumulator
from torch.utils.tensorboard.summary import scalar
from torch.utils.tensorboard.writer import FileWriter

from kfac_sua.runs import event_file
from kfac_sua.runs.metrics import COLUMNS, MAY_BE_UNMEASURED
from kfac_sua.runs.tensorboard import SCALARS, TensorBoardLog

STARTED_UNIX_S = 1_700_000_000.25
HYPER_PARAMETERS = {"preconditioner": "sua", "lr": 0.1, "seed": 3, "nesterov": False}


def _write(directory: Path, existing: range, logged: range) -> None:
    """Open the log with some epochs done, add some and close it."""
    log = TensorBoardLog(directory, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(e) for e in existing])
    for epoch in logged:
        log.log(epoch_record(epoch))
    log.close()


def _read(directory: Path) -> EventAccumulator:
    """Return everything that TensorBoard sees in a directory."""
    accumulator = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_every_measured_column_has_one_tag():
    """Nothing that metrics.csv measures is missing from TensorBoard."""
    assert sorted(SCALARS.values()) == sorted(set(COLUMNS) - {"epoch", "step"})


def test_steps_are_epochs_and_wall_times_are_training_seconds(tmp_path):
    """A point stands at its epoch and at the run's start plus its training seconds, with the recorded value."""
    _write(tmp_path, range(1, 1), range(1, 4))
    accumulator = _read(tmp_path)
    measured = {tag: column for tag, column in SCALARS.items() if column not in MAY_BE_UNMEASURED}
    assert set(accumulator.Tags()["scalars"]) == set(measured)
    for tag, column in measured.items():
        events = accumulator.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.wall_time for event in events] == [STARTED_UNIX_S + 10.0 * epoch for epoch in (1, 2, 3)]
        expected = [getattr(epoch_record(epoch), column) for epoch in (1, 2, 3)]
        np.testing.assert_allclose([event.value for event in events], expected, rtol=1e-6)  # float32 in the file


# Readers that may stay open: the library's, the server's in Python, and the same that looks at all files again.
OPEN_READERS = {
    "library": EventAccumulator,
    "server": PluginEventAccumulator,
    "multifile": lambda path, **options: PluginEventAccumulator(path, event_file_active_filter=is_recent, **options),
}


def is_recent(wall_time: float) -> bool:
    """Say what ``--reload_multifile`` asks of the latest event of a file, by default."""
    return wall_time >= time.time() - 86_400


def _open(kind: str, directory: Path) -> Callable[[], list[tuple[int, float]]]:
    """Open a reader; return what reads on with it, and gives all steps and values of a tag."""
    reader = OPEN_READERS[kind](str(directory), size_guidance={"scalars": 0, "tensors": 0})

    def read(tag: str = "val/loss") -> list[tuple[int, float]]:
        reader.Reload()
        if kind == "library":
            return [(event.step, event.value) for event in reader.Scalars(tag)]
        return [(event.step, event.tensor_proto.float_val[0]) for event in reader.Tensors(tag)]

    return read


def _read_fast(directory: Path, tag: str = "val/loss") -> list[tuple[int, float]]:
    """Return what the fast loader shows: by its rule, a point takes the place of those of its tag at later steps."""
    points: list[tuple[int, float]] = []
    for path in sorted(directory.glob("*tfevents*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == tag:
                    points = [point for point in points if point[0] < event.step]
                    points.append((event.step, value.tensor.float_val[0]))
    return points


def _expected(epochs: range) -> list[tuple[int, Any]]:
    return [(epoch, pytest.approx(epoch_record(epoch).val_loss)) for epoch in epochs]


def _write_as_before(directory: Path, name: str, epochs: range) -> None:
    """Write an event file of a version that replaced it when it resumed: without a note of the start."""
    writer = FileWriter(str(directory), filename_suffix=name)
    for epoch in epochs:
        writer.add_summary(scalar("val/loss", 7.0), epoch)
    writer.close()


@pytest.mark.parametrize("kind", OPEN_READERS)
@pytest.mark.parametrize(("logged", "kept"), [(4, 4), (4, 2), (2, 0)])
def test_an_open_reader_survives_a_resume(tmp_path, kind, logged, kept):
    """It shows every epoch once, those taken again as they are now, and goes on; no file is touched meanwhile."""
    _write(tmp_path, range(1, 2), range(2, logged + 1))
    read = _open(kind, tmp_path)
    assert read() == _expected(range(1, logged + 1))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    log = TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(e) for e in range(1, kept + 1)])
    if kept:
        assert read() == _expected(range(1, kept + 1))
    log.log(epoch_record(kept + 1, val_loss=9.0))
    again = [*_expected(range(1, kept + 1)), (kept + 1, 9.0)]
    assert read() == again
    log.log(epoch_record(kept + 2))
    log.close()
    assert read() == _read_fast(tmp_path) == _open(kind, tmp_path)() == [*again, *_expected(range(kept + 2, kept + 3))]
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.iterdir())) == len(before) + 1


@pytest.mark.parametrize("kind", OPEN_READERS)
def test_directories_of_before_are_resumed(tmp_path, kind):
    """Their event files do not say when an attempt began, and there may be several."""
    for number, epochs in enumerate((range(1, 3), range(1, 6))):
        _write_as_before(tmp_path, f".{number}", epochs)
    read = _open(kind, tmp_path)
    read()
    _write(tmp_path, range(1, 4), range(4, 5))
    assert read() == _read_fast(tmp_path) == _open(kind, tmp_path)() == _expected(range(1, 5))


@pytest.mark.parametrize("kind", OPEN_READERS)
@pytest.mark.parametrize("damage", ["torn", "zeros", "bit", "empty"])
def test_a_damaged_record_hides_nothing_that_comes_later(tmp_path, kind, damage):
    """Whatever a crash has left of a file, the next attempt's tells everything, also to a reader that was there."""
    _write(tmp_path, range(1, 1), range(1, 4))
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-40] ^= damage == "bit"
    path.write_bytes({"torn": content[:-40], "zeros": content[:-40] + bytes(40), "empty": b""}.get(damage, content))
    read = _open(kind, tmp_path)
    if damage != "empty":
        assert read() == _expected(range(1, 3))
    _write(tmp_path, range(1, 4), range(4, 6))
    assert read() == _read_fast(tmp_path) == _expected(range(1, 6))


def test_an_attempt_of_days_stays_in_sight(tmp_path, monkeypatch):
    """A reader of many files gives up one whose latest event is a day old; points may carry times from long ago."""
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    log = TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1)])
    read = _open("multifile", tmp_path)
    for epoch in (2, 3):
        now[0] += 20 * 3600
        log.log(epoch_record(epoch))
        assert read() == _expected(range(1, epoch + 1))
    log.close()


def test_names_are_in_the_order_of_attempts(tmp_path, monkeypatch):
    """Within a second, by a clock that was set back, and after a file of another host."""
    (tmp_path / "events.out.tfevents.1700000005.zz.9.9").write_bytes(b"")
    names = [path.name for path in tmp_path.iterdir()]
    for now in (1_700_000_000.9, 1_700_000_001.0, 1_700_000_100.0, 1_700_000_100.1, 5.0, 1_700_000_050.0):
        monkeypatch.setattr(event_file.time, "time", lambda now=now: now)
        _write(tmp_path, range(1, 2), range(2, 2))
        (added,) = {path.name for path in tmp_path.iterdir()} - set(names)
        names.append(added)
    assert sorted(names) == names


def test_what_is_no_file_but_called_like_one_is_refused(tmp_path):
    """Every reader would fail at it."""
    (tmp_path / "events.out.tfevents.1.host").mkdir()
    with pytest.raises(IsADirectoryError, match=r"events\.out\.tfevents\.1\.host"):
        _write(tmp_path, range(1, 1), range(1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["true", "false"])
def test_an_open_tensorboard_survives_a_resume(tmp_path, loader):
    """The server itself, with the fast loader and without: epochs are replaced, and new ones appear."""
    _write(tmp_path / "run", range(1, 1), range(1, 5))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--reload_interval", "1", f"--load_fast={loader}"]
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=run&tag=val%2Floss"
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(url, _expected(range(1, 5)))
        log = TensorBoardLog(tmp_path / "run", STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1), epoch_record(2)])
        _wait_for(url, _expected(range(1, 3)))
        log.log(epoch_record(3, val_loss=9.0))
        _wait_for(url, [*_expected(range(1, 3)), (3, 9.0)])
        log.close()
    finally:
        server.terminate()
        server.wait(30)


def _wait_for(url: str, expected: list[tuple[int, Any]]) -> None:
    """Ask a server for points until they are as expected."""
    got: object = None
    for _ in range(120):
        with contextlib.suppress(OSError):  # it does not listen, or know the run, yet
            got = [(step, value) for _, step, value in json.load(urllib.request.urlopen(url, timeout=10))]
        if got == expected:
            return
        time.sleep(0.5)
    raise AssertionError(got)


@pytest.mark.parametrize("resumed_after", range(6))
@pytest.mark.parametrize("logged_before", range(6))
def test_resuming_anywhere_shows_every_epoch_once(tmp_path, resumed_after, logged_before):
    """Whatever the first attempt logged and its records kept, all epochs are there once, with their values."""
    _write(tmp_path, range(1, 1), range(1, logged_before + 1))
    _write(tmp_path, range(1, resumed_after + 1), range(resumed_after + 1, 6))
    events = _read(tmp_path).Scalars("val/loss")
    assert [event.step for event in events] == [1, 2, 3, 4, 5]
    assert [event.value for event in events] == pytest.approx([epoch_record(e).val_loss for e in (1, 2, 3, 4, 5)])


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    """It comes back to the caller, once, and what was logged before is still there."""
    log = TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1)])
    (path,) = tmp_path.iterdir()
    with largest_file(path.stat().st_size + 100), pytest.raises(OSError, match=r"File too large.*tfevents"):
        log.log(epoch_record(2))
    log.close()
    assert [event.step for event in _read(tmp_path).Scalars("train/loss")][:1] == [1]
    with pytest.raises(ValueError, match="closed"):  # what follows half a record would never be read
        log.log(epoch_record(2))
    with largest_file(100), pytest.raises(OSError, match=r"File too large.*next_events"):
        TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1)])
    assert list(tmp_path.iterdir()) == [path]


def test_points_are_on_disk_after_each_epoch(tmp_path):
    """A TensorBoard that is open during training sees an epoch as soon as it is logged."""
    log = TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1)])
    assert [event.step for event in _read(tmp_path).Scalars("train/loss")] == [1]
    log.log(epoch_record(2))
    assert [event.step for event in _read(tmp_path).Scalars("train/loss")] == [1, 2]
    log.close()


def test_hyper_parameters_are_in_the_run_itself(tmp_path):
    """The HPARAMS tab has one row per run: no second directory, and the values as given."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    _write(tmp_path, range(1, 1), range(1, 2))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    metadata = _read(tmp_path).SummaryMetadata("_hparams_/session_start_info")
    hparams = HParamsPluginData.FromString(metadata.plugin_data.content).session_start_info.hparams
    assert hparams["preconditioner"].string_value == "sua"
    assert hparams["lr"].number_value == pytest.approx(0.1)
    assert hparams["seed"].number_value == 3


def test_non_finite_values_are_logged(tmp_path):
    """The epoch in which a run diverges is written like any other."""
    log = TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [])
    log.log(epoch_record(1, train_loss=float("nan")))
    log.close()
    (event,) = _read(tmp_path).Scalars("train/loss")
    assert np.isnan(event.value)
