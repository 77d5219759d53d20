"""Event files, read back by TensorBoard's own reader."""

from pathlib import Path

import numpy as np
import pytest
from full_disk import largest_file
from runs.synthetic_runs import epoch_record
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kfac_sua.runs.record import COLUMNS
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
    assert set(accumulator.Tags()["scalars"]) == set(SCALARS)
    for tag, column in SCALARS.items():
        events = accumulator.Scalars(tag)
        assert [event.step for event in events] == [1, 2, 3]
        assert [event.wall_time for event in events] == [STARTED_UNIX_S + 10.0 * epoch for epoch in (1, 2, 3)]
        expected = [getattr(epoch_record(epoch), column) for epoch in (1, 2, 3)]
        np.testing.assert_allclose([event.value for event in events], expected, rtol=1e-6)  # float32 in the file


def test_reopening_leaves_no_duplicate_point(tmp_path):
    """A resumed run shows every epoch once, also those that were logged before the crash and run again."""
    _write(tmp_path, range(1, 1), range(1, 4))
    _write(tmp_path, range(1, 3), range(3, 6))
    assert [event.step for event in _read(tmp_path).Scalars("val/error")] == [1, 2, 3, 4, 5]
    assert len(list(tmp_path.iterdir())) == 1


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
    with largest_file(100), pytest.raises(OSError, match=r"File too large.*tfevents"):
        TensorBoardLog(tmp_path, STARTED_UNIX_S, HYPER_PARAMETERS, [epoch_record(1)])
    assert list(tmp_path.iterdir()) == [path]


def test_only_event_files_are_removed(tmp_path):
    """The run's other files may live in the same directory."""
    (tmp_path / "metrics.csv").write_text("kept")
    _write(tmp_path, range(1, 1), range(1, 2))
    assert (tmp_path / "metrics.csv").read_text() == "kept"


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
