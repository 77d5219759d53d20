"""metrics.csv survives crashes, and a foreign or damaged file is one sentence."""

import dataclasses
import hashlib
import math
from pathlib import Path

import pytest
import torch
from full_disk import fill, largest_file, small_disk
from runs.synthetic_runs import epoch_record, run_info

from kfac_sua.runs import metrics as metrics_module
from kfac_sua.runs.metrics import (
    COLUMNS,
    MAY_BE_UNMEASURED,
    EpochRecord,
    append_record,
    read_ended_records,
    read_records,
    records_digest,
    rewrite_records,
)
from kfac_sua.runs.run_info import RecordError, read_run_info, write_run_info


def _texts(records: list) -> list:
    """Compare by repr, because NaN does not equal itself."""
    return [repr(record) for record in records]


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """A metrics.csv of three epochs."""
    path = tmp_path / "metrics.csv"
    for epoch in (1, 2, 3):
        append_record(path, epoch_record(epoch))
    return path


def test_columns_are_those_of_the_contract():
    """The columns of metrics.csv have the agreed names and order."""
    assert ",".join(COLUMNS) == (
        "epoch,step,lr,train_loss,train_error,train_eval_loss,val_loss,val_error,train_time_s,"
        "forward_backward_s,statistics_s,inversion_s,application_s,optimizer_s,data_s,other_s,evaluation_s,writing_s,"
        "captured_s,current_damping,gradient_norm,update_norm,update_cosine,kl_scale,numerical_faults,other_events,"
        "skipped_steps"
    )


def test_appended_records_read_back_exactly(tmp_path):
    """Every float survives the round trip bit for bit, NaN and infinities included."""
    values = {"train_loss": 0.1 + 0.2, "val_loss": math.nan, "lr": 5e-324, "train_eval_loss": math.inf}
    records = [epoch_record(1, **values), epoch_record(2, train_loss=-math.inf, val_error=1 / 3)]
    for record in records:
        append_record(tmp_path / "metrics.csv", record)
    read = read_records(tmp_path / "metrics.csv")
    assert _texts(read) == _texts(records)
    assert type(read[0].epoch) is int
    assert type(read[0].val_error) is float


def test_file_has_one_header_and_one_line_per_epoch(metrics):
    """The file is plain CSV, which other tools can read."""
    lines = metrics.read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    old = "2,100,0.1,1.0,0.25,0.75,1.25,0.3,20.0,12.0,2.0,3.0,1.5,1.0,0.0,0.0,0.0,0.0,0.0"
    assert lines[2] == old + ",nan" * 5 + ",0" * 3
    assert len(lines) == 4


def test_numbers_of_numpy_and_torch_are_written_as_plain_numbers(tmp_path):
    """A tensor or NumPy scalar in a record does not put its type's name into the file."""
    record = dataclasses.replace(epoch_record(1), train_loss=torch.tensor(0.5), val_loss=torch.ones(1).numpy()[0])
    append_record(tmp_path / "metrics.csv", record)
    (read,) = read_records(tmp_path / "metrics.csv")
    assert (read.train_loss, read.val_loss) == (0.5, 1.0)


@pytest.mark.parametrize("tail", [b"4", b"4,200,0.1,", b"4,200" + b",0.5" * 17, b"4,200,0.1\n", b"\0\0\0"])
def test_torn_last_line_is_dropped_and_overwritten(metrics, tail):
    """A last line without newline or with too few fields is left out, and the next epoch takes its place."""
    metrics.write_bytes(metrics.read_bytes() + tail)
    assert read_records(metrics) == [epoch_record(1), epoch_record(2), epoch_record(3)]
    append_record(metrics, epoch_record(4))
    assert read_records(metrics) == [epoch_record(epoch) for epoch in (1, 2, 3, 4)]


def test_every_cut_of_the_file_reads_as_its_complete_lines(metrics):
    """Wherever a crash cuts the file, exactly the rows whose newline was written remain."""
    content = metrics.read_bytes()
    for size in range(len(content) + 1):
        metrics.write_bytes(content[:size])
        complete = max(content[:size].count(b"\n") - 1, 0)
        assert read_records(metrics) == [epoch_record(epoch) for epoch in range(1, complete + 1)]


@pytest.mark.parametrize("cut", [0, 10])
def test_appending_to_an_empty_file_or_torn_header_writes_the_header(metrics, cut):
    """A crash while the header was being written leaves a file that can be continued."""
    metrics.write_bytes(metrics.read_bytes()[:cut])
    append_record(metrics, epoch_record(1))
    assert read_records(metrics) == [epoch_record(1)]


@pytest.mark.parametrize("line", ["2,100,0.1", "", "2,100,abc" + ",0" * 24, "2,100" + ",0" * 26, "2.5,1" + ",0" * 25])
def test_malformed_inner_line_names_file_and_line(metrics, line):
    """Only the last line may be torn: damage elsewhere is reported with its place."""
    lines = metrics.read_text().split("\n")
    lines[2] = line
    metrics.write_text("\n".join(lines))
    with pytest.raises(RecordError, match=r"metrics\.csv, line 3: expected 27 numbers"):
        read_records(metrics)


def test_complete_last_line_that_is_not_numbers_is_an_error(metrics):
    """A last line with its newline and all fields is not torn, so damage in it is reported."""
    metrics.write_text(metrics.read_text() + "x,200" + ",0" * 25 + "\n")
    with pytest.raises(RecordError, match="line 5"):
        read_records(metrics)


def test_foreign_file_is_neither_read_nor_overwritten(tmp_path):
    """A file with another header is reported and left as it was."""
    path = tmp_path / "metrics.csv"
    path.write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(RecordError, match="line 1: expected the header"):
        read_records(path)
    with pytest.raises(RecordError, match="line 1: expected the header"):
        append_record(path, epoch_record(1))
    assert path.read_text() == "epoch,loss\n1,0.5\n"


# Columns that a file had at the time, and the last of them.
OLD_FILES = {14: "optimizer_s", 18: "writing_s", 19: "captured_s"}


@pytest.fixture(params=OLD_FILES)
def old_metrics(metrics: Path, request: pytest.FixtureRequest) -> Path:
    """The same file as it was before the last columns were measured, which have their defaults in these records."""
    lines = metrics.read_text().splitlines()
    metrics.write_text("".join(",".join(line.split(",")[: request.param]) + "\n" for line in lines))
    return metrics


def _num_columns(path: Path) -> int:
    """Return how many columns the header of a file has."""
    return path.read_text().splitlines()[0].count(",") + 1


def test_file_without_the_newer_columns_is_read(old_metrics):
    """What was not measured then has its default; a torn last line is dropped as in any file."""
    num_columns = _num_columns(old_metrics)
    assert old_metrics.read_text().splitlines()[0].endswith(f",{OLD_FILES[num_columns]}")
    assert read_records(old_metrics) == [epoch_record(1), epoch_record(2), epoch_record(3)]
    for tail in ("4,200" + ",0.5" * (num_columns - 6) + "\n", "4,200" + ",0.5" * (num_columns - 2)):
        torn = old_metrics.with_name(f"torn-{len(tail)}.csv")
        torn.write_text(old_metrics.read_text() + tail)
        assert read_records(torn) == [epoch_record(1), epoch_record(2), epoch_record(3)]


@pytest.mark.parametrize("tail", ["", "4,200,0.1,"])
def test_appending_to_a_file_without_the_newer_columns_adds_them(old_metrics, tail):
    """Every row gets all columns, so that the file stays one table."""
    old_metrics.write_text(old_metrics.read_text() + tail)
    added = epoch_record(4, data_s=0.25, other_s=0.5, evaluation_s=2.0, writing_s=0.125, captured_s=3.0)
    append_record(old_metrics, added)
    assert read_records(old_metrics) == [*map(epoch_record, (1, 2, 3)), added]
    assert {line.count(",") + 1 for line in old_metrics.read_text().splitlines()} == {len(COLUMNS)}


def test_old_file_with_a_row_of_all_columns_is_an_error(old_metrics):
    """The header decides how many numbers a row has."""
    num_columns = _num_columns(old_metrics)
    lines = old_metrics.read_text().splitlines()
    lines[2] += ",0.0" * (len(COLUMNS) - num_columns)
    old_metrics.write_text("\n".join(lines) + "\n")
    with pytest.raises(RecordError, match=rf"metrics\.csv, line 3: expected {num_columns} numbers"):
        read_records(old_metrics)


def test_file_with_a_number_of_columns_that_none_ever_had_is_an_error(metrics):
    """Of the last columns either all are there, or those that came together are not."""
    lines = metrics.read_text().splitlines()
    metrics.write_text("".join(",".join(line.split(",")[:16]) + "\n" for line in lines))
    with pytest.raises(RecordError, match="line 1: expected the header"):
        read_records(metrics)


# Of the 18 columns that there were when digests came to be kept, of the rows of ``metrics``.
OLD_DIGEST = "beed7ba4d1bb1e27877f33ea50858f6c1a5ec80cb7a5bd192917c8c80078e5f6"


OLD_ROWS = """\
1,50,0.1,2.0,0.5,1.5,2.5,0.6,10.0,6.0,1.0,1.5,0.75,0.5,0.0,0.0,0.0,0.0
2,100,0.1,1.0,0.25,0.75,1.25,0.3,20.0,12.0,2.0,3.0,1.5,1.0,0.0,0.0,0.0,0.0
3,150,0.1,0.6666666666666666,0.16666666666666666,0.5,0.8333333333333334,0.19999999999999998,30.0,18.0,3.0,4.5,2.25,1.5,0.0,0.0,0.0,0.0
"""


def test_digests_kept_before_steps_were_captured_still_hold(metrics, old_metrics):
    """A digest of rows without captured steps is that of the 18 columns of then, whatever the file has now."""
    assert hashlib.sha256(OLD_ROWS.encode()).hexdigest() == OLD_DIGEST
    assert records_digest(read_records(old_metrics)) == OLD_DIGEST
    append_record(old_metrics, epoch_record(4))
    assert records_digest(read_records(metrics)[:3]) == OLD_DIGEST


def test_digests_see_the_seconds_of_captured_steps():
    """Seconds of captured steps cannot be changed, added or removed without a digest that says so."""
    rows = [epoch_record(1), epoch_record(2, captured_s=4.0)]
    changes = [rows, [rows[0], epoch_record(2, captured_s=4.5)], [rows[0], epoch_record(2)], rows[:1]]
    changes += [[epoch_record(1, captured_s=4.0), rows[1]], [epoch_record(1, captured_s=4.0), epoch_record(2)]]
    # The same value in another of the later columns, and zero in place of what was not measured.
    changes += [[rows[0], epoch_record(2, **{name: 4})] for name in COLUMNS[COLUMNS.index("current_damping") :]]
    changes += [[rows[0], epoch_record(2, **{name: 0.0})] for name in MAY_BE_UNMEASURED]
    assert len(set(map(records_digest, changes))) == len(changes)


def test_an_ended_run_whose_file_has_fewer_columns_is_the_one_of_its_digest(old_metrics):
    """Records of before are believed, and one changed digit in them is not."""
    info = run_info(records_digest=OLD_DIGEST)
    assert len(read_ended_records(old_metrics, info)) == 3
    old_metrics.write_text(old_metrics.read_text().replace(",0.6,", ",0.5,"))
    with pytest.raises(RecordError, match="not as it was at the end of the run"):
        read_ended_records(old_metrics, info)


def test_missing_file_is_an_error(tmp_path):
    """A run that has recorded nothing is told apart from a path that is wrong."""
    with pytest.raises(RecordError, match=r"Cannot read .*nothing\.csv"):
        read_records(tmp_path / "nothing.csv")


def test_rewriting_replaces_all_rows(metrics):
    """Resuming from an earlier checkpoint drops the epochs after it, and no temporary file stays."""
    rewrite_records(metrics, [epoch_record(1)])
    assert read_records(metrics) == [epoch_record(1)]
    assert [path.name for path in metrics.parent.iterdir()] == ["metrics.csv"]


def test_failed_rewrite_keeps_the_old_rows(metrics, monkeypatch):
    """A crash before the rename leaves the old file intact."""

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(metrics_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        rewrite_records(metrics, [])
    assert read_records(metrics) == [epoch_record(1), epoch_record(2), epoch_record(3)]
    assert [path.name for path in metrics.parent.iterdir()] == ["metrics.csv"]


def _append_all(path: Path, rows: list[EpochRecord], written: list[EpochRecord]) -> None:
    """Append rows, and keep those that have been."""
    for row in rows:
        append_record(path, row)
        written.append(row)


def test_full_disk_keeps_the_old_files_and_names_them(tmp_path):
    """ENOSPC of a real file system: every file is as before, but for a torn last line that the next row repairs."""
    with small_disk(tmp_path / "disk", 64):
        path, info = tmp_path / "disk" / "metrics.csv", tmp_path / "disk" / "run.json"
        rows = [epoch_record(epoch) for epoch in range(1, 5)]
        rewrite_records(path, rows)
        write_run_info(info, run_info(status="running"))
        ballast = fill(tmp_path / "disk")
        for write in (lambda: rewrite_records(path, rows * 20), lambda: write_run_info(info, run_info())):
            with pytest.raises(OSError, match="No space left") as caught:
                write()
            assert str(caught.value.filename).startswith(str(tmp_path / "disk"))
            assert not list((tmp_path / "disk").glob("*.tmp"))
        with pytest.raises(OSError, match=r"No space left.*metrics\.csv"):
            _append_all(path, [epoch_record(epoch) for epoch in range(5, 1000)], rows)
        assert read_records(path) == rows
        assert read_run_info(info).status == "running"
        ballast.unlink()
        rows.append(epoch_record(len(rows) + 1))
        append_record(path, rows[-1])
        assert read_records(path) == rows


def test_a_row_that_does_not_fit_is_torn_and_repaired(tmp_path):
    """Half a row, as a limit on the size of files leaves it, is no row, and the next one takes its place."""
    path = tmp_path / "metrics.csv"
    append_record(path, epoch_record(1))
    with largest_file(path.stat().st_size + 20), pytest.raises(OSError, match=r"File too large.*metrics\.csv"):
        append_record(path, epoch_record(2))
    assert not path.read_bytes().endswith(b"\n")
    assert read_records(path) == [epoch_record(1)]
    append_record(path, epoch_record(2))
    assert read_records(path) == [epoch_record(1), epoch_record(2)]


@pytest.mark.parametrize("text", ["1_0", " 10", "10 ", "1\t0"])
def test_numbers_that_no_program_writes_are_refused(metrics, text):
    """Python would read an underscore or a blank inside a number; in a record it is damage."""
    lines = metrics.read_text().splitlines(keepends=True)
    lines[1] = text + lines[1][1:]
    metrics.write_text("".join(lines))
    with pytest.raises(RecordError, match=r"metrics\.csv, line 2"):
        read_records(metrics)


@pytest.mark.parametrize(
    ("column", "text"),
    [
        *(("epoch", "-1"), ("lr", "nan"), ("val_error", "1.5"), ("train_time_s", "-2.0"), ("writing_s", "inf")),
        *(("current_damping", "inf"), ("update_norm", "-1.0"), ("update_cosine", "-1.5"), ("kl_scale", "2.0")),
    ],
)
def test_a_row_out_of_range_names_line_and_column(tmp_path, column, text):
    """A number that no epoch comes to is reported; a loss may be anything."""
    path = tmp_path / "metrics.csv"
    values = dict.fromkeys(COLUMNS, "1") | {"train_loss": "nan", "val_loss": "-inf"}
    values |= {"gradient_norm": "inf", "update_norm": "nan", "update_cosine": "-1"}
    for row in (values, values | {column: text}):
        path.write_text(",".join(COLUMNS) + "\n" + ",".join(row.values()) + "\n")
        if row is values:
            assert read_records(path)[0].epoch == 1
            continue
        with pytest.raises(RecordError, match=rf"line 2: {column} is {text}, expected a number .*; restore the"):
            read_records(path)
