"""The directory of a run: fixed by what decides its numbers, and by nothing else."""

import pytest
from tiny_runs import tiny_config

from kfac_sua.compose import compose_config
from kfac_sua.runs.directory import run_directory


def test_path_names_setting_cell_and_seed(tmp_path):
    """The path reads data set, model and preconditioner, then learning rate and damping, then the seed."""
    directory = run_directory(tiny_config(tmp_path, "optimizer.lr=0.01", "seed=4"), "cpu")
    assert directory.path.relative_to(tmp_path).as_posix() == (
        f"digits-tiny-sua/lr=0.01,damping=0.1-{directory.fingerprint[:8]}/seed=4"
    )


def test_baseline_has_no_damping(tmp_path):
    """The cell of the baseline is its learning rate."""
    directory = run_directory(tiny_config(tmp_path, "preconditioner=baseline"), "cpu")
    assert directory.path.parent.name == f"lr=0.03-{directory.fingerprint[:8]}"


@pytest.mark.parametrize("override", ["seed=1", "progress=bar", "num_threads=2", "dataset.data_dir=elsewhere"])
def test_fingerprint_ignores_what_does_not_change_the_setting(tmp_path, override):
    """Runs that differ in their seed, or in how and where they run, share a fingerprint."""
    first, second = (run_directory(tiny_config(tmp_path, *more), "cpu") for more in ((), (override,)))
    assert first.fingerprint == second.fingerprint


def test_output_directory_moves_the_run_but_not_its_fingerprint(tmp_path):
    """The same setting elsewhere has the same fingerprint."""
    first, second = (run_directory(tiny_config(tmp_path / name), "cpu") for name in "ab")
    assert first.fingerprint == second.fingerprint
    assert first.path.relative_to(tmp_path / "a") == second.path.relative_to(tmp_path / "b")


@pytest.mark.parametrize(
    "override",
    [
        "epochs=11",
        "optimizer.lr=0.031",
        "preconditioner.damping=0.11",
        "preconditioner.skip=[classifier]",
        "preconditioner.damping_final=0.01",
        "preconditioner.adaptive_damping=5",
        "dataset.train_size=401",
        "dataset.split_seed=1",
        "channels_last=false",
        "schedule=cosine",
    ],
)
def test_fingerprint_depends_on_everything_else(tmp_path, override):
    """Whatever changes the numbers changes the directory."""
    first, second = (run_directory(tiny_config(tmp_path, *more), "cpu") for more in ((), (override,)))
    assert first.fingerprint != second.fingerprint
    assert first.path != second.path


def test_fingerprint_depends_on_the_device_in_use(tmp_path):
    """device=auto belongs to whatever device it came to."""
    config = tiny_config(tmp_path, "device=auto")
    assert run_directory(config, "cpu").fingerprint != run_directory(config, "cuda").fingerprint
    assert run_directory(config, "cpu") == run_directory(tiny_config(tmp_path, "device=cpu"), "cpu")


def test_spelling_of_a_number_does_not_matter(tmp_path):
    """0.10, 1e-1 and 0.1 are one learning rate."""
    paths = {run_directory(tiny_config(tmp_path, f"optimizer.lr={lr}"), "cpu") for lr in ("0.10", "1e-1", "0.1")}
    assert len(paths) == 1


def test_runs_of_before_a_key_was_added_are_found_again(tmp_path):
    """A key that came later changes no run's place while it says what runs did before: these digits are of then."""
    digests = [
        run_directory(compose_config(["model=tiny", "dataset=digits", f"preconditioner={name}"]), "cpu").fingerprint[:8]
        for name in ("baseline", "sua")
    ]
    assert digests == ["4a336409", "dfe15960"]
    skipping = compose_config(["model=tiny", "dataset=digits", "preconditioner=baseline", "non_finite=skip"])
    assert run_directory(skipping, "cpu").fingerprint[:8] != "4a336409"
