"""run.json reads back, and says what is wrong with a foreign or changed file; what it says of the environment."""

import dataclasses
import errno
import json
import socket
import subprocess

import numpy as np
import pytest
import torch
from runs.synthetic_runs import run_info

from kfac_sua.files.lock import RunBusyError
from kfac_sua.runs import environment as environment_module
from kfac_sua.runs.environment import environment
from kfac_sua.runs.run_info import RecordError, failure_reason, read_run_info, write_run_info


@pytest.mark.parametrize("info", [run_info(), run_info(status="diverged", diverged_at_epoch=3, test_error=None)])
def test_run_info_round_trip(tmp_path, info):
    """run.json reads back as what was written."""
    write_run_info(tmp_path / "run.json", info)
    assert read_run_info(tmp_path / "run.json") == info
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_run_info_has_the_fields_of_the_contract(tmp_path):
    """run.json is a flat JSON object with the agreed names."""
    write_run_info(tmp_path / "run.json", run_info())
    names = json.loads((tmp_path / "run.json").read_text()).keys()
    run = {"config", "fingerprint", "seed", "status", "started", "ended", "diverged_at_epoch"}
    machine = {"commit", "versions", "device", "device_name", "num_threads", "machines", "process_counts"}
    assert set(names) == run | machine | {
        "test_loss",
        "test_error",
        "failure",
        "skipped_steps",
        "records_digest",
        "digest",
        "command",
        "overrides",
        "source",
    }


def test_run_info_of_before_its_end_had_its_name(tmp_path):
    """The time of a run's end was called as the status of some of them."""
    content = dataclasses.asdict(run_info())
    content["finished"] = content.pop("ended")
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert read_run_info(tmp_path / "run.json") == run_info()


def test_run_info_of_before_failures_were_recorded(tmp_path):
    """Without the fields that came later their defaults are meant; any other missing or new one is refused."""
    content = dataclasses.asdict(run_info())
    path = tmp_path / "run.json"
    for kept in ({}, {"failure": "Out of memory."}, {"skipped_steps": 2}):
        older = {
            name: value
            for name, value in content.items()
            if name not in ("failure", "skipped_steps", "process_counts", "machines", "command", "overrides", "source")
        }
        path.write_text(json.dumps(older | kept))
        assert read_run_info(path) == run_info(**kept)
    path.write_text(json.dumps(content | {"retries": 1}))
    with pytest.raises(RecordError, match=r"unknown fields \(retries\)"):
        read_run_info(path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/run.json"), "Cannot use a/run.json: No space left on de"),
        (OSError(errno.ENOSPC, "No space left on device"), "Cannot use a file: No space left on device."),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "Out of memory; lower batch_size or model.width."),
        (MemoryError(), "Out of memory; lower batch_size or model.width."),
        (np._core._exceptions._ArrayMemoryError((2**40,), np.dtype("u1")), "Out of memory (asked for 1.00 TiB); lower"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
            "Out of memory (asked for 2.00 GiB); lower",
        ),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "Out of memory; lower"),
        (RuntimeError("shape '[2]' is\n  invalid"), "RuntimeError: shape '[2]' is invalid"),
        (KeyError("width"), "KeyError: 'width'"),
        (ValueError(), "ValueError: no details"),
        (RunBusyError("x is being trained by process 3; wait for it or stop it."), "x is being trained by process 3;"),
    ],
)
def test_reasons_of_failures_are_one_sentence(error, reason):
    """Ours as they are, the system's with the file, memory with the cure, and of anything else the type."""
    assert failure_reason(error).startswith(reason)
    assert "\n" not in failure_reason(error)


def test_reason_of_a_real_allocation_that_fails():
    """PyTorch's own error on the CPU names the bytes, and so does the reason."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert failure_reason(caught.value) == (
        "Out of memory (asked for 1152921504606846976 bytes); lower batch_size or model.width."
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ('{"status": "fin', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1, 2]", r"not written by this version.*\(list\)"),
        ('{"status": "finished"}', "missing or unknown fields .*commit, config"),
    ],
)
def test_foreign_run_info_is_one_sentence(tmp_path, content, message):
    """A file that is not a run.json is named, with what is wrong with it."""
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RecordError, match=rf"run\.json.*{message}"):
        read_run_info(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("status", "done", r"Literal\['running', 'finished', 'diverged', 'failed'\]"),
        ("seed", "0", "int"),
        ("seed", True, "int"),
        ("failure", 3, r"str \| None"),
        ("config", None, "dict"),
        ("machines", "node1", r"list\[str\]"),
        ("test_error", "0.1", r"float \| None"),
    ],
)
def test_run_info_with_a_wrong_type_names_the_field(tmp_path, field, value, wanted):
    """A field of another type is reported with what was expected and what was found."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(run_info()) | {field: value}))
    with pytest.raises(RecordError, match=rf"run\.json: {field} must be {wanted}.*, got {value!r}\."):
        read_run_info(path)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("num_threads", 0, r"\[1, inf\]"),
        ("test_error", 5.0, r"\[0, 1\]"),
        ("test_error", -0.1, r"\[0, 1\]"),
        ("diverged_at_epoch", 0, r"\[1, inf\]"),
        ("skipped_steps", -1, r"\[0, inf\]"),
        ("process_counts", [2, 0], r"\[1, inf\]"),
    ],
)
def test_run_info_out_of_range_names_the_field(tmp_path, field, value, wanted):
    """A number that no run comes to is reported with the range that it has to be in."""
    path = tmp_path / "run.json"
    path.write_text(json.dumps(dataclasses.asdict(run_info()) | {field: value}))
    with pytest.raises(RecordError, match=rf"run\.json: {field} must be in {wanted}, got "):
        read_run_info(path)


def test_config_that_json_cannot_hold_is_an_error(tmp_path):
    """An unresolved configuration is refused before anything is written."""
    with pytest.raises(RecordError, match="resolve the configuration"):
        write_run_info(tmp_path / "run.json", run_info(config={"path": tmp_path}))
    assert list(tmp_path.iterdir()) == []


def test_environment_names_versions_and_processor():
    """The versions are those of the running process, and the processor has a name."""
    found = environment("cpu")
    assert found.versions["torch"] == torch.__version__
    assert {"python", "torchvision", "numpy", "hydra-core", "kfac_sua"} <= found.versions.keys()
    assert found.machine == f"{socket.gethostname()} ({found.device_name})"
    assert found.device_name


def test_commit_marks_changes_and_ignores_surrounding_repositories(tmp_path):
    """A clean checkout gives its hash, a changed one a mark, and a directory that is no checkout nothing."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert environment_module._commit(tmp_path) is None
    git("init", "--quiet")
    assert environment_module._commit(tmp_path) is None
    (tmp_path / "inner").mkdir()
    git("commit", "--quiet", "--allow-empty", "-m", "x")
    assert environment_module._commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "inner" / "file").write_text("x")
    assert environment_module._commit(tmp_path) == git("rev-parse", "HEAD") + "+dirty"
    assert environment_module._commit(tmp_path / "inner") is None


def test_a_changed_run_json_is_refused(tmp_path):
    """A flipped digit of a result is noticed; a file of before there were digests is read."""
    path = tmp_path / "run.json"
    write_run_info(path, dataclasses.replace(run_info(), test_error=0.25))
    intact = path.read_text()
    path.write_text(intact.replace("0.25", "0.15"))
    with pytest.raises(RecordError, match=r"run.json is not as it was written; restore it"):
        read_run_info(path)
    path.write_text(json.dumps({key: value for key, value in json.loads(intact).items() if "digest" not in key}))
    assert read_run_info(path).test_error == 0.25
