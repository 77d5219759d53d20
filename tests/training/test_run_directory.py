"""The directory of a run: fixed by what decides its numbers, and by nothing else."""

import pytest
import torch
from tiny_runs import tiny_config

from kfac_sua.compose import compose_config
from kfac_sua.config import ConfigError
from kfac_sua.runs.directory import resolved, run_directory

# Of configurations of before ``precision`` held for convolutions and products alike, by device and precision:
# fingerprints of the baseline and of SUA.
FINGERPRINTS_OF_BEFORE = {
    ("cpu", "float32"): ("4a336409", "dfe15960"),
    ("cpu", "bfloat16"): ("8faffbae", "525c101a"),
    ("cuda", "float32"): ("059aaf52", "decb5f09"),
    ("cuda", "bfloat16"): ("b88e025a", "084222b0"),
}


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without CUDA, on which a CUDA device is that of another machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def fingerprints(device: str, *overrides: str) -> tuple[str, ...]:
    """Return the first digits of the fingerprints of the baseline and of SUA."""
    configs = [
        compose_config(["model=tiny", "dataset=digits", "optimizer.lr=0.03", f"preconditioner={name}", *overrides])
        for name in ("baseline", "sua")
    ]
    return tuple(run_directory(config, device).fingerprint[:8] for config in configs)


def test_path_names_setting_cell_and_seed(tmp_path):
    """The path reads data set, model and preconditioner, then learning rate and damping, then the seed."""
    directory = run_directory(tiny_config(tmp_path, "optimizer.lr=0.01", "seed=4"), "cpu")
    assert directory.path.relative_to(tmp_path).as_posix() == (
        f"digits-tiny-sua/lr=0.01,damping=0.1-{directory.fingerprint[:8]}/seed=4"
    )


def test_baseline_has_no_damping(tmp_path):
    """The cell of the baseline is its learning rate."""
    directory = run_directory(tiny_config(tmp_path, "preconditioner=baseline", "optimizer.lr=0.03"), "cpu")
    assert directory.path.parent.name == f"lr=0.03-{directory.fingerprint[:8]}"


@pytest.mark.parametrize(
    "override",
    [
        *("seed=1", "progress=bar", "num_threads=2", "capture=false", "capture=true"),
        *("dataset.data_dir=elsewhere", "dataset.download=false"),
    ],
)
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
        "precision=bfloat16",
        "deterministic=true",
        "model.initialisation=he_fan_in",
    ],
)
def test_fingerprint_depends_on_everything_else(tmp_path, override):
    """Whatever changes the numbers changes the directory."""
    first, second = (run_directory(tiny_config(tmp_path, *more), "cpu") for more in ((), (override,)))
    assert first.fingerprint != second.fingerprint
    assert first.path != second.path


@pytest.mark.parametrize("override", ["model.initialisation=he_fan_out"])
def test_a_key_from_after_the_first_runs_keeps_their_fingerprints(tmp_path, override):
    """Given the value that says what those runs did; the numbers are pinned further below."""
    assert run_directory(tiny_config(tmp_path, override), "cpu") == run_directory(tiny_config(tmp_path), "cpu")


def test_fingerprint_depends_on_the_device_in_use(tmp_path):
    """device=auto belongs to whatever device it came to."""
    config = tiny_config(tmp_path, "device=auto")
    assert run_directory(config, "cpu").fingerprint != run_directory(config, "cuda").fingerprint
    assert run_directory(config, "cpu") == run_directory(tiny_config(tmp_path, "device=cpu"), "cpu")


def test_spelling_of_a_number_does_not_matter(tmp_path):
    """0.10, 1e-1 and 0.1 are one learning rate."""
    paths = {run_directory(tiny_config(tmp_path, f"optimizer.lr={lr}"), "cpu") for lr in ("0.10", "1e-1", "0.1")}
    assert len(paths) == 1


def test_runs_of_before_a_key_was_added_are_found_again():
    """A key that came later changes no run's place while it says what runs did before: these digits are of then."""
    assert fingerprints("cpu") == FINGERPRINTS_OF_BEFORE["cpu", "float32"]
    assert fingerprints("cpu", "precision=bfloat16") == FINGERPRINTS_OF_BEFORE["cpu", "bfloat16"]
    assert fingerprints("cpu", "capture=false", "deterministic=false") == FINGERPRINTS_OF_BEFORE["cpu", "float32"]
    assert fingerprints("cpu", "non_finite=skip")[0] != FINGERPRINTS_OF_BEFORE["cpu", "float32"][0]


def test_runs_on_cuda_of_before_precision_held_for_products_lie_elsewhere(no_gpu):
    """float32 on CUDA meant TF32 in convolutions alone, and bfloat16 the network alone: no run goes on as another."""
    before = {digits for (device, _), both in FINGERPRINTS_OF_BEFORE.items() if device == "cuda" for digits in both}
    now = {
        precision: fingerprints("cuda", f"precision={precision}")
        for precision in ("float32", "tf32", "bfloat16", "auto")
    }
    assert not before & {digits for both in now.values() for digits in both}
    assert now["auto"] == now["tf32"]
    assert len(set(now.values())) == 3


def test_auto_precision_is_what_the_device_has(no_gpu):
    """TF32 on a CUDA device, of another machine too; IEEE float32 on a CPU. Neither records nor places keep auto."""
    config = compose_config(["model=tiny", "dataset=digits"])
    assert resolved(config, "cuda")["precision"] == "tf32"
    assert resolved(config, "cpu")["precision"] == "float32"
    assert fingerprints("cpu", "precision=auto") == fingerprints("cpu", "precision=float32")


def test_auto_precision_is_float32_on_a_device_without_tf32(monkeypatch):
    """A card of before 2020 has no TF32, and saying that it should compute in it is an error that names the card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "An Old Card")
    config = compose_config(["model=tiny", "dataset=digits"])
    assert resolved(config, "cuda")["precision"] == "float32"
    with pytest.raises(ConfigError, match=r"^precision=tf32, which An Old Card does not have; use precision=float32 "):
        fingerprints("cuda", "precision=tf32")


def test_tf32_on_a_cpu_is_refused(tmp_path):
    """A CPU has none, and a run that says it had would be compared with those that do."""
    sentence = r"^precision=tf32, which the CPU does not have; use precision=float32 or precision=auto\.$"
    with pytest.raises(ConfigError, match=sentence):
        run_directory(tiny_config(tmp_path, "precision=tf32"), "cpu")


def test_determinism_has_a_place_of_its_own_on_every_device(no_gpu):
    """It changes the numbers on a GPU; on a CPU it is kept apart as well, so that one key has one meaning."""
    for device in ("cpu", "cuda"):
        assert not set(fingerprints(device, "deterministic=true")) & set(fingerprints(device))
