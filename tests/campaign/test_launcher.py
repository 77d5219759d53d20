"""Settings of launchers: what they come to, and what is refused with a sentence before anything is written."""

from pathlib import Path

import pytest

from kfac_sua.campaign.launcher import Launcher, load_launcher, require_cluster, with_device
from kfac_sua.compose import launchers
from kfac_sua.config import ConfigError
from kfac_sua.reproduce import main
from kfac_sua.train import main as train

FIG1 = ("fig1", "--scale", "smoke", "--only", "baseline", "--dry-run")


def test_a_cluster_is_set_by_its_file_and_the_command_line():
    """Partition, time, memory and GPUs as given; --jobs is how many jobs of an array run at the same time."""
    launcher = load_launcher("slurm", ["hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=30"], 8)
    settings = launcher.settings
    assert (settings["partition"], settings["timeout_min"], settings["array_parallelism"]) == ("gpu", 30, 8)
    assert (settings["gpus_per_node"], settings["cpus_per_task"], launcher.num_threads) == (1, 4, 4)
    assert settings["signal_delay_s"] > 0
    assert settings["max_num_timeout"] > 0
    assert "array_parallelism=8, cpus_per_task=4, gpus_per_node=1, max_num_timeout=" in launcher.describe()
    assert "partition=gpu" in launcher.describe()
    assert load_launcher("slurm", [], None).jobs == settings_of_file("array_parallelism")


def settings_of_file(key: str) -> int:
    """Return what configs/hydra/launcher/slurm.yaml says."""
    path = Path(__file__).resolve().parents[2] / "configs" / "hydra" / "launcher" / "slurm.yaml"
    (line,) = (line for line in path.read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("given", "overrides", "device", "gpus"),
    [
        ([], [], "cuda", 1),
        (["device=auto"], [], "cuda", 1),
        (["device=cpu"], [], "cpu", None),
        ([], ["hydra.launcher.gpus_per_node=null"], "cpu", None),
        (["device=cuda"], ["hydra.launcher.gpus_per_node=null", "hydra.launcher.gres='gpu:1'"], "cuda", None),
    ],
)
def test_jobs_are_told_their_device(given, overrides, device, gpus):
    """What another machine finds cannot be seen from here, and decides in which directory a run lies."""
    launcher, runs = with_device(load_launcher("slurm", overrides, None), ["epochs=1", *given])
    assert runs == ["epochs=1", f"device={device}"]
    assert launcher.settings["gpus_per_node"] == gpus


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--launcher", "slurm", "hydra.launcher.partitio=x"], "There is no key 'hydra.launcher.partitio'"),
        (
            ["--launcher", "slurm", "hydra.launcher.timeout_min=x"],
            "hydra.launcher.timeout_min must be an integer, got 'x'",
        ),
        (["--launcher", "slurm", "hydra.launcher.nodes=2"], "hydra.launcher.nodes must be 1, as a run is one process"),
        (["--launcher", "slurm", "hydra.launcher.array_parallelism=0"], "array_parallelism must be at least 1, got 0"),
        (["--launcher", "slurm", "hydra.launcher._target_=os.system"], "names code to run"),
        (["--launcher", "slurm", "hydra.launcher.additional_parameters={_target_:os.getcwd}"], "names code to run"),
        (
            ["--launcher", "slurm", "hydra.launcher.gpus_per_node=null", "device=cuda"],
            "device=cuda needs a GPU per run; give hydra.launcher.gpus_per_node=1",
        ),
        (["--launcher", "joblib", "--jobs", "1"], "--launcher joblib needs --jobs of at least 2"),
        (["hydra.launcher.partition=gpu"], "hydra.launcher.partition=gpu means nothing to --launcher local"),
    ],
)
def test_bad_settings_are_one_sentence(tmp_path, capsys, arguments, sentence):
    """Exit code 2, the key, and the cure."""
    assert main([*FIG1, "--out", str(tmp_path / "out"), *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("slurm", "hydra-submitit-launcher"),
        ("submitit_local", "hydra-submitit-launcher"),
        ("joblib", "hydra-joblib-launcher"),
    ],
)
def test_a_missing_plugin_is_named_with_what_installs_it(tmp_path, capsys, monkeypatch, launcher, package):
    """Campaigns and sweeps alike end with one sentence."""
    monkeypatch.setattr(launchers, "find_spec", lambda name: None)
    sentence = f"The launcher {launcher} needs {package}, which is not installed: pip install {package}.\n"
    assert main([*FIG1, "--out", str(tmp_path / "out"), "--launcher", launcher]) == 2
    assert capsys.readouterr().err == sentence
    monkeypatch.setattr("sys.argv", ["train", "-m", f"hydra/launcher={launcher}", "seed=0,1"])
    assert train() == 2
    assert capsys.readouterr().err == sentence


def test_dry_run_shows_the_launcher_and_what_each_run_gets(tmp_path, capsys):
    """Before anything is submitted, on a machine without Slurm too."""
    arguments = ["--launcher", "slurm", "--jobs", "3", "hydra.launcher.partition=gpu", "--out", str(tmp_path / "out")]
    assert main([*FIG1, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "Launcher: slurm (array_parallelism=3, cpus_per_task=4, gpus_per_node=1, " in shown
    assert "4 runs, 0 done, 4 to do, 3 at a time" in shown
    assert "final runs: 3 runs, 0 done, 3 to do, 3 at a time, each in a job of its own with the same resources" in shown
    assert main([*FIG1, "--launcher", "submitit_local", "--jobs", "3", "--out", str(tmp_path / "out")]) == 0
    assert "final runs: 3 runs, 0 done, 3 to do, alone on the device" in capsys.readouterr().out


def test_where_there_is_no_slurm_no_job_is_tried(tmp_path, monkeypatch):
    """A missing command and a cluster without accounts, where a killed job would be waited for, are sentences."""
    launcher = Launcher("slurm", (), {}, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="needs sbatch, which is not on this machine; start it on a login node"):
        require_cluster(launcher)
    for name in ("sbatch", "srun", "sacct"):
        (tmp_path / name).write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(ConfigError, match=r"sacct fails \(Slurm accounting storage is disabled\)"):
        require_cluster(launcher)
    (tmp_path / "sacct").write_text("#!/bin/sh\nexit 0\n")
    require_cluster(launcher)
