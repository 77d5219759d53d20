"""What is fuzzed: per reader of user input, a strategy for the input and what must hold for every example.

A reader either accepts an input, and then what it returns is what was written, or refuses it with the one exception
that it documents. Anything else is a finding: another exception, no end within ``LIMIT_S``, a wrong acceptance.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from kfac_sua.checks import check
from kfac_sua.compose import MAX_CELLS, compose_cells
from kfac_sua.config import ConfigError
from kfac_sua.data import DataError, load_archive
from kfac_sua.runs.metrics import EpochRecord, read_records, rewrite_records
from kfac_sua.runs.run_info import RecordError, RunInfo, read_run_info, write_run_info
from kfac_sua.training.checkpoint import MAGIC, Checkpoint, CheckpointError, load_checkpoint, save_checkpoint

LIMIT_S = 20

# Returned by a target: whether the input was taken.
ACCEPTED, REFUSED = "accepted", "refused"


class TimeLimitExceededError(Exception):
    """An example that did not end in time."""


@dataclasses.dataclass(frozen=True)
class Target:
    """One reader under test.

    Attributes:
        strategy: Draws an input.
        examine: Gives it to the reader and returns ``ACCEPTED`` or ``REFUSED``; raises if something is wrong.
    """

    strategy: st.SearchStrategy[Any]
    examine: Callable[[Any], str]


@contextlib.contextmanager
def time_limit(seconds: int = LIMIT_S) -> Iterator[None]:
    """Raise in the block if it takes longer."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeLimitExceededError(f"no end within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Bytes: a sound file with parts overwritten, cut, doubled or inserted.


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One change: ``length`` bytes at ``position``, a fraction of the file, give way to ``new``."""

    position: float
    length: int
    new: bytes

    def apply(self, content: bytes) -> bytes:
        """Return the changed content."""
        start = int(self.position * len(content))
        return content[:start] + self.new + content[start + self.length :]


def mutations() -> st.SearchStrategy[list[Mutation]]:
    """Draw one to four changes: a byte replaced, bytes inserted or taken out, the end cut off."""
    position = st.floats(0, 1, exclude_max=True)
    new = st.binary(max_size=8) | st.sampled_from([b"nan", b"inf", b"-1", b"0", b'"', b",", b"\n", b"null", b"1e999"])
    replaced = st.builds(Mutation, position, st.just(1), st.binary(min_size=1, max_size=1))
    other = st.builds(Mutation, position, st.sampled_from([0, 1, 2, 8, 64]), new)
    cut = st.builds(Mutation, position, st.just(1 << 40), st.just(b""))
    return st.lists(replaced | other | cut, min_size=1, max_size=4)


def mutated(content: bytes, changes: list[Mutation]) -> bytes:
    """Return content after all changes."""
    for change in changes:
        content = change.apply(content)
    return content


# Options of the command line.

_KEYS = (
    *("seed", "device", "epochs", "batch_size", "num_threads", "output_dir", "model", "dataset", "preconditioner"),
    *("optimizer", "schedule", "experiment", "scale", "sweep", "optimizer.lr", "optimizer.betas", "schedule.gamma"),
    *("preconditioner.damping", "preconditioner.group_size", "preconditioner.skip", "preconditioner.fisher_type"),
    *("model.width", "model.name", "dataset.data_dir", "dataset.train_size", "non_finite", "checkpoint_interval_s"),
    *("_target_", "optimizer._target_", "hydra.launcher._target_", "hydra.mode", "hydra.run.dir", "hydra/launcher"),
    *("model@optimizer", "schema", "a.b.c", "optimizer.lr.x", "seed.0", "", ".", "..", "optimizer.", ".lr"),
)
_VALUES = (
    *("", "null", "???", "true", "nan", "-inf", "1e400", "-0", "0x10", "1_000", "9" * 400, "0." + "0" * 400 + "1"),
    *("sua", "baseline", "tiny", "adamw", "step", "cosine", "smoke", "lr", "quickstart_sua", "glob(*)", "glob([)"),
    *("${seed}", "${oc.env:HOME}", "${nothing}", "${oc.env:NOTHING,1}", "${oc.create:{a:1}}", "${optimizer}", "${"),
    *("${oc.decode:'[1,2]'}", "${hydra:run.dir}", "${optimizer.lr}", "${oc.dict.keys:optimizer}", "${..seed}", "$"),
    *("range(1000000000)", "range(0,1,0)", "range(1,2,1e-300)", "range(3)", "range(3,1)", "range(1e308)", "range(-5)"),
    *("interval(0,1)", "choice(1,2)", "choice()", "shuffle(1,2)", "sort(3,1,2)", "tag(a,1,2)", "int(2.5)", "float(x)"),
    *("[1,2", "[0.5,0.8]", "[[[[[[[[1]]]]]]]]", "{a:{b:{c:1}}}", "{name:sgd}", "[sua,kfac]", "1,2", "0.1,abc", ","),
    *("'", '"', "\\", "a\\,b", "é", "\u202e1", "𝟙", "a b", "\t", "#", "!!python/object/apply:os.system", "=", "@", "~"),
)
# Arguments that are all right, at least alone: what stands beside them must be found nevertheless.
_SOUND = (
    *("preconditioner=kfac", "preconditioner=sua_grouped", "optimizer.lr=0.1", "seed=7", "+seed=3", "++epochs=2"),
    *("model=tiny", "dataset=digits", "schedule=step", "schedule.milestones=[0.25,0.5]", "num_threads=null", "~sweep"),
    *("preconditioner.damping=0.3,0.1", "seed=range(3)", "scale=smoke", "experiment=quickstart_sua", "non_finite=skip"),
    *("output_dir=${oc.env:HOME}", "checkpoint_interval_s=1.5", "dataset.train_size=100", "preconditioner.skip=[a,b]"),
)


def options() -> st.SearchStrategy[tuple[list[str], bool]]:
    """Draw up to four arguments, and whether ``-m`` stands before them."""
    text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)
    number = st.one_of(st.integers().map(str), st.floats().map(repr))
    # Known keys and values often enough that many examples pass the parser and meet the checks behind it.
    key = st.one_of(st.sampled_from(_KEYS), st.sampled_from(_KEYS), text)
    value = st.one_of(st.sampled_from(_VALUES), st.sampled_from(_VALUES), number, text, st.recursive(text, _nested))
    prefix = st.sampled_from(["", "", "", "+", "~", "++"])
    sound = st.sampled_from(_SOUND)
    pair = st.builds("{}{}={}".format, prefix, key, value)
    argument = st.one_of(sound, sound, sound, pair, pair, st.builds("{}{}".format, prefix, key), text)
    # What starts with a dash is a flag, which Hydra never sees as an override.
    overrides = st.lists(argument.filter(lambda argument: not argument.startswith("-")), max_size=4)
    return st.tuples(overrides, st.booleans())


def _nested(children: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    forms = ("[{}]", "{{a:{}}}", "${{{}}}", "choice({},{})", "'{}'", "str({})", "({})", "sort({},reverse=true)")
    return st.builds(lambda form, first, second: form.format(first, second), st.sampled_from(forms), children, children)


def examine_options(example: tuple[list[str], bool]) -> str:
    """Options are refused with a ConfigError of one line, or give at least one configuration that passes its checks."""
    overrides, multirun = example
    try:
        cells = compose_cells(overrides, multirun=multirun).configs
    except ConfigError as error:
        _check_sentence(str(error))
        return REFUSED
    assert 1 <= len(cells) <= MAX_CELLS
    for cell in cells:
        check(cell)
    return ACCEPTED


def _check_sentence(text: str) -> None:
    assert "\n" not in text, f"more than one line: {text}"
    assert text.endswith((".", ".)")), f"no sentence: {text}"


# Archives of images.


@functools.cache
def _archive() -> tuple[bytes, dict[str, Any]]:
    generator = np.random.default_rng(0)
    arrays = {
        "train_images": generator.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8),
        "train_labels": np.array([0, 1, 0]),
        "test_images": generator.integers(0, 256, (2, 32, 32, 3), dtype=np.uint8),
        "test_labels": np.array([1, 0]),
        "classes": np.array(["cat", "dog"]),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue(), arrays


def examine_archive(changes: list[Mutation]) -> str:
    """A damaged archive is refused with a DataError, unless its arrays are those that were written."""
    content, arrays = _archive()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.npz").write_bytes(mutated(content, changes))
        try:
            train, test, classes = load_archive("own", folder)
        except DataError:
            return REFUSED
    for split, images in (("train", train), ("test", test)):
        np.testing.assert_array_equal(images.images.permute(0, 2, 3, 1).numpy(), arrays[f"{split}_images"])
        np.testing.assert_array_equal(images.labels.numpy(), arrays[f"{split}_labels"])
    assert classes == arrays["classes"].tolist()
    return ACCEPTED


# Records of runs.


def _records() -> list[EpochRecord]:
    return [EpochRecord(epoch, 10 * epoch, 0.1, *[0.125 * epoch] * 15) for epoch in range(4)]


def _run_info() -> RunInfo:
    return RunInfo(
        status="finished",
        config={"seed": 0, "preconditioner": {"name": "sua", "damping": 0.1}, "skip": [], "train_size": None},
        fingerprint="f" * 64,
        seed=0,
        commit=None,
        versions={"python": "3.11.7", "torchvision": None},
        device="cpu",
        device_name="a processor",
        num_threads=1,
        started="2026-01-02T03:04:05+00:00",
        ended="2026-01-02T03:14:05+00:00",
        test_loss=0.5,
        test_error=0.25,
    )


def examine_metrics(changes: list[Mutation]) -> str:
    """A changed metrics.csv is refused with a RecordError, or read as what its lines say, read and written again."""
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "metrics.csv", Path(folder) / "again.csv"
        rewrite_records(path, _records())
        path.write_bytes(mutated(path.read_bytes(), changes))
        try:
            records = read_records(path)
        except RecordError:
            return REFUSED
        rewrite_records(again, records)
        assert repr(read_records(again)) == repr(records)  # NaN equals nothing, but is written like itself
        _check_lines(path.read_bytes(), records)
    return ACCEPTED


def _check_lines(content: bytes, records: list[EpochRecord]) -> None:
    """Every complete line but the header is one record, whose numbers are those of the line."""
    lines = content.split(b"\n")[1:]
    assert len(records) <= len(lines)
    for record, line in zip(records, lines, strict=False):
        # The text of a number that was changed may be another number; how it is read is Python's.
        values = [float(text) for text in line.decode("ascii").split(",")]
        assert repr([float(value) for value in dataclasses.astuple(record)][: len(values)]) == repr(values)


def examine_run_info(changes: list[Mutation]) -> str:
    """A changed run.json is refused with a RecordError, or what is read is written and read again as the same."""
    with tempfile.TemporaryDirectory() as folder:
        path, again = Path(folder) / "run.json", Path(folder) / "again.json"
        write_run_info(path, _run_info())
        path.write_bytes(mutated(path.read_bytes(), changes))
        try:
            info = read_run_info(path)
        except RecordError:
            return REFUSED
        assert info.status in ("running", "finished", "diverged", "failed")
        write_run_info(again, info)
        assert repr(read_run_info(again)) == repr(info)
    return ACCEPTED


# Checkpoints.


@functools.cache
def _checkpoint() -> Checkpoint:
    generator = torch.Generator().manual_seed(0)
    return Checkpoint(
        fingerprint="f" * 64,
        seed=0,
        data_digest="d" * 64,
        records_digest="e" * 64,
        epoch=1,
        batch=2,
        step=6,
        skipped_steps=0,
        model={"weight": torch.randn(3, 2, generator=generator)},
        optimizer={"state": {0: {"momentum_buffer": torch.randn(3, 2, generator=generator)}}, "param_groups": []},
        preconditioner=None,
        sums={"loss": torch.zeros(())},
        diagnostics=None,
        times={"data": 0.5},
    )


@functools.cache
def _checkpoint_file() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.state"
        save_checkpoint(path, _checkpoint())
        return path.read_bytes()


def examine_checkpoint(changes: list[Mutation]) -> str:
    """A changed checkpoint is refused with a CheckpointError, unless no byte is another."""
    content = mutated(_checkpoint_file(), changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.state"
        path.write_bytes(content)
        try:
            load_checkpoint(path, fingerprint="f" * 64, seed=0, device=torch.device("cpu"))
        except CheckpointError:
            return REFUSED
    assert content == _checkpoint_file(), "a changed checkpoint was accepted"
    return ACCEPTED


def examine_sealed_checkpoint(changes: list[Mutation]) -> str:
    """The same, where the digest was made to match: whoever can write a file can do that."""
    payload = mutated(_checkpoint_file()[len(MAGIC) + 32 :], changes)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.state"
        path.write_bytes(MAGIC + hashlib.sha256(payload).digest() + payload)
        try:
            loaded = load_checkpoint(path, fingerprint="f" * 64, seed=0, device=torch.device("cpu"))
        except CheckpointError:
            return REFUSED
    assert loaded is not None
    assert (loaded.fingerprint, loaded.seed) == ("f" * 64, 0)
    return ACCEPTED


TARGETS = {
    "options": Target(options(), examine_options),
    "archive": Target(mutations(), examine_archive),
    "metrics.csv": Target(mutations(), examine_metrics),
    "run.json": Target(mutations(), examine_run_info),
    "checkpoint": Target(mutations(), examine_checkpoint),
    "sealed checkpoint": Target(mutations(), examine_sealed_checkpoint),
}
