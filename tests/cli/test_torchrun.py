"""One run by several real processes under torchrun, and under what srun sets: who speaks, who dies, who goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kfac_sua import train
from kfac_sua.config import ConfigError
from kfac_sua.runs.metrics import read_records
from kfac_sua.runs.run_info import read_run_info
from kfac_sua.training import launch as launch_module
from kfac_sua.training.launch import Launch, read_launch

TINY = (
    *("model=tiny", "dataset=digits", "dataset.train_size=400", "device=cpu", "progress=none"),
    *("preconditioner.inverse_period=3", "batch_size=100", "epochs=30"),
)
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    **{"SLURM_JOB_ID": "12", "SLURM_STEP_ID": "3", "SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8"},
    **{"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "node7", "SLURM_NTASKS": "8"},
}
DEADLINE_S = 60.0


def start(size: int, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start a run by so many processes."""
    launcher = ("torch.distributed.run", "--standalone", f"--nproc_per_node={size}", "-m", "kfac_sua.train")
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *TINY, *arguments],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(agent: subprocess.Popen[str]) -> list[int]:
    """Return the processes that torchrun has started, by rank."""
    children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    workers = [int(child) for child in children if b"kfac_sua.train" in Path(f"/proc/{child}/cmdline").read_bytes()]
    return sorted(workers, key=rank_of)


def rank_of(process: int) -> int:
    """Return the rank that torchrun gave a process."""
    variables = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return int(dict(variable.split("=", 1) for variable in variables if "=" in variable)["RANK"])


def wait_for_checkpoint(root: Path, agent: subprocess.Popen[str]) -> None:
    """Wait until a run has saved something."""
    deadline = time.monotonic() + 180
    while not list(root.rglob("checkpoint.state")):
        assert agent.poll() is None, agent.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def the_info(root: Path):
    """Return run.json of the only run below a directory."""
    (path,) = root.rglob("run.json")
    return read_run_info(path)


def in_process(monkeypatch, capsys, variables: dict[str, str], *arguments: str) -> tuple[int, str]:
    """Run the command in this process with these variables set, and return its exit code and stderr."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.setattr(sys, "argv", ["train", *TINY, *arguments])
    code = train.main()
    return code, capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_process_ends_all_with_a_sentence_each_and_one_process_goes_on(tmp_path):
    """SIGKILL of one of two ends the other within a minute, by a sentence that run.json keeps; one process resumes."""
    agent = start(2, "epochs=3000", cwd=tmp_path)
    try:
        wait_for_checkpoint(tmp_path, agent)
        os.kill(processes_of(agent)[1], signal.SIGKILL)
        _, said = agent.communicate(timeout=DEADLINE_S)
    finally:
        agent.kill()
    sentence = "process 0 of 2 has lost contact with another one, which has ended or does not answer; the same command"
    assert said.count(sentence) == 1
    assert "pair.cc" not in said  # what gloo says of it
    assert the_info(tmp_path).status == "failed"
    assert sentence in the_info(tmp_path).failure
    alone = subprocess.Popen(
        [sys.executable, "-m", "kfac_sua.train", *TINY, "epochs=3000"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any(line.startswith("resumed on cpu") for line in alone.stdout)
    finally:
        alone.kill()
        alone.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_whichever_process_dies_the_others_say_so_and_all_resume(tmp_path, rank):
    """Of three processes any may be killed: both others say so within a minute, and two processes finish the run."""
    agent = start(3, "epochs=60", cwd=tmp_path)
    wait_for_checkpoint(tmp_path, agent)
    os.kill(processes_of(agent)[rank], signal.SIGKILL)
    _, said = agent.communicate(timeout=DEADLINE_S)
    for other in {0, 1, 2} - {rank}:
        assert said.count(f"process {other} of 3 has lost contact") == 1
    again = start(2, "epochs=60", cwd=tmp_path)
    out, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert out.count("resumed on 2 processes, cpu") == 1
    assert out.count("finished: epoch 60") == 1
    assert (the_info(tmp_path).status, the_info(tmp_path).process_counts) == ("finished", [3, 2])
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert [record.epoch for record in read_records(metrics)] == list(range(61))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_the_run(tmp_path, number):
    """Told to stop, all processes finish their step, the first one saves and says where the same command goes on."""
    agent = start(2, "epochs=3000", cwd=tmp_path)
    wait_for_checkpoint(tmp_path, agent)
    time.sleep(1)
    os.kill(agent.pid, number)
    _, said = agent.communicate(timeout=DEADLINE_S)
    assert said.count("interrupted; the same command resumes ") == 1
    assert "lost contact" not in said
    assert the_info(tmp_path).status == "running"


@pytest.mark.slow
def test_srun_is_understood_as_torchrun_is(tmp_path):
    """Two processes with the variables that srun sets carry out one run."""
    variables = SRUN | {
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "kfac_sua.train", *TINY, "epochs=1"],
            cwd=tmp_path,
            env=os.environ
            | variables
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "started on 2 processes, cpu" in outputs[0]
    assert outputs[1] == ""
    assert the_info(tmp_path).process_counts == [2]


def test_the_environment_says_which_process_this_is(monkeypatch):
    """Of torchrun, of srun with several tasks, and of neither; srun's port is that of the job's step."""
    assert read_launch(TORCHRUN) == Launch(1, 4, 1, "node1", 29500)
    assert read_launch(TORCHRUN | SRUN) == read_launch(TORCHRUN)  # srun that starts torchrun
    assert read_launch(SRUN) == Launch(5, 8, 1, "node7", 20_000 + 7 * 12 + 3)
    assert read_launch(SRUN | {"SLURM_GPUS_PER_TASK": "1"}).local_rank == 0  # each sees one GPU, its own
    assert read_launch({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}) == Launch()  # a batch script without srun
    assert read_launch({}) == Launch()
    said = []

    def answer(command, **options):
        said.append(command)
        return subprocess.CompletedProcess(command, 0, stdout="node03\nnode04\n")

    monkeypatch.setattr(launch_module.subprocess, "run", answer)
    assert read_launch(SRUN | {"SLURM_STEP_NODELIST": "node[03-04]"}).master_address == "node03"
    assert said == [["scontrol", "show", "hostnames", "node[03-04]"]]


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"RANK": "0"}, "has RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE must be a whole number, got 'four'"),
        (TORCHRUN | {"RANK": "4"}, "number 4 of 4"),
        (SRUN | {"SLURM_STEP_NODELIST": "node[03-04]", "PATH": ""}, "scontrol does not tell the first host"),
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(monkeypatch, variables, sentence):
    """The sentence names the variable, and the tool that would set it."""
    monkeypatch.setenv("PATH", variables.get("PATH", os.environ["PATH"]))
    with pytest.raises(ConfigError, match=sentence) as caught:
        read_launch(variables)
    assert "torchrun" in str(caught.value)


def test_bad_input_is_said_by_the_first_process_alone(tmp_path, monkeypatch, capsys):
    """A typo would otherwise be said once per process."""
    monkeypatch.chdir(tmp_path)
    code, said = in_process(monkeypatch, capsys, TORCHRUN, "epoch=3")
    assert (code, said) == (2, "")
    code, said = in_process(monkeypatch, capsys, TORCHRUN | {"RANK": "0"}, "epoch=3")
    assert code == 2
    assert "epoch" in said
    assert said.count("\n") == 1


def test_a_sweep_is_not_given_to_torchrun(tmp_path, monkeypatch, capsys):
    """Several runs by several processes together are refused, with what to do instead."""
    monkeypatch.chdir(tmp_path)
    code, said = in_process(monkeypatch, capsys, TORCHRUN | {"RANK": "0"}, "-m", "optimizer.lr=0.1,0.2")
    assert code == 2
    assert said.startswith("2 runs by 4 processes together: give torchrun one run")


def test_a_mini_batch_smaller_than_the_number_of_processes_is_refused():
    """Some process would have nothing to do."""
    import torch

    from kfac_sua.data import BatchLoader, DataError, ImageSet

    images = ImageSet(torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(DataError, match=r"batch_size=2 is the mini-batch that all 3 processes share"):
        BatchLoader(images, torch.zeros(3), torch.ones(3), 2, part=(0, 3))
