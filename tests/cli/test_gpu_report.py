"""``scripts/gpu_report.py``: a trial on the CPU, parts that hang, crash or leave processes behind, and Ctrl-C."""

import os
import random
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from thinned import one_in

from kfac_sua.compose import compose_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_report.py"
sys.path.append(str(SCRIPT.parent))

import gpu_report  # noqa: E402
from gpu_parts import bits, processes  # noqa: E402
from gpu_parts import part as part_module  # noqa: E402
from gpu_parts.archive import LIMIT, NAME, write_archive  # noqa: E402
from gpu_parts.definitions import MINUTES, define_parts  # noqa: E402
from gpu_parts.part import Outcome, Part  # noqa: E402
from gpu_parts.report import TITLE, Machine, excerpt  # noqa: E402

MACHINE = Machine(("device: none",))
DEADLINE_S = 60.0
# A process in a session of its own, as torchrun starts its own: signals to the part's group do not reach it.
GRANDCHILD = (
    f"{sys.executable} -c \"import subprocess; print(subprocess.Popen(['sleep', '300'], start_new_session=True).pid)\""
)


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script from the root of the checkout, on one core and one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def in_process(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Call the script's main function, and return its exit code and stderr."""
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", *arguments])
    return gpu_report.main(), capsys.readouterr().err


def rows_of(out: Path) -> dict[str, str]:
    """Return the outcome of each part in the table of a report."""
    lines = (out / "report.md").read_text().split("\n\n")[2].splitlines()[2:]
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[-1] for row in cells}


def is_running(process: int) -> bool:
    """Whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes() != b""
    except OSError:
        return False


def wait_for(path: Path, process: subprocess.Popen[str]) -> list[int]:
    """Return the numbers in a file, as soon as a line is there."""
    deadline = time.monotonic() + DEADLINE_S
    while not path.exists() or not path.read_text().endswith("\n"):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return [int(word) for word in path.read_text().split()]


@pytest.mark.slow
def test_a_trial_of_one_part_leaves_report_and_archive(tmp_path):
    """``--tiny --only training``: a table of what the runs measured, and an archive without checkpoints."""
    out = tmp_path / "report"
    done = run_script("--tiny", "--out", str(out), "--only", "training")
    assert done.returncode == 0, done.stdout + done.stderr
    assert rows_of(out) == {"training": "ok"}
    text = (out / "report.md").read_text()
    assert text.startswith(TITLE)
    assert "| run | status | epoch | train_time_s | captured_s |" in text
    assert "| digits-tiny-baseline | finished | 1 |" in text
    assert list(out.rglob("checkpoint.state"))
    with tarfile.open(out / NAME) as archive:
        names = archive.getnames()
    assert {"report/report.md", "report/training.log"} <= set(names)
    assert not [name for name in names if name.endswith(".pt") or "tfevents" in name]


@pytest.mark.slow
def test_a_trial_of_all_parts_is_ok(tmp_path):
    """``--tiny``: every part does its work on a CPU."""
    out = tmp_path / "report"
    done = run_script("--tiny", "--out", str(out))
    outcomes = rows_of(out)
    assert set(outcomes.values()) == {"ok"}, (out / "report.md").read_text()
    assert list(outcomes) == [part.name for part in define_parts(out, is_tiny=True)]
    assert done.returncode == 0
    assert done.stderr == ""
    text = (out / "report.md").read_text()
    assert text.count("Time over plain SGD's step") == 6
    assert "parameters equal; metrics equal" in text
    assert (out / NAME).stat().st_size < LIMIT


def test_bad_parts_take_no_other_along_and_leave_no_process(tmp_path, monkeypatch):
    """One that hangs and ignores SIGTERM, one that crashes, one that leaves processes: the others are carried out."""
    monkeypatch.setattr(part_module, "GRACE_S", 0.5)
    hang, left = tmp_path / "hang", tmp_path / "left"
    parts = [
        Part("hangs", (f"trap '' TERM; {GRANDCHILD} > {hang}; echo $$ >> {hang}; while :; do sleep 0.2; done",), 2),
        Part("crashes", ("kill -SEGV $$", "echo the next is tried"), 10),
        Part("leaves", (f"{GRANDCHILD} > {left}; sleep 300 & echo $! >> {left}",), 10),
        Part("exits", ("exit 7",), 10, summary=lambda: str(1 / 0)),
        Part("cannot", ("exit 9",), 10, skipped="no card"),
        Part("works", ("printf 'bar\\rall \\033[1mwell\\033[0m \\377\\n'",), 10),
    ]
    out = tmp_path / "report"
    assert gpu_report.conduct(parts, out, MACHINE, MINUTES) == 1
    outcomes = rows_of(out)
    assert outcomes.pop("hangs").startswith("timed out after ")
    assert outcomes == {
        "crashes": "failed by SIGSEGV",
        "leaves": "ok",
        "exits": "failed with exit code 7",
        "cannot": "skipped: no card",
        "works": "ok",
    }
    for path in (hang, left):
        numbers = [int(word) for word in path.read_text().split()]
        assert len(numbers) == 2
        assert not [number for number in numbers if is_running(number)]
    text = (out / "report.md").read_text()
    assert "the next is tried" in text
    assert "No table: ZeroDivisionError" in text
    assert "\nall well \ufffd\n" in text


def test_skipped_parts_are_no_failure(tmp_path):
    """Exit code 0 if every part is ok or skipped for a reason."""
    parts = [Part("works", ("true",), 10), Part("cannot", ("false",), 10, skipped="no card")]
    assert gpu_report.conduct(parts, tmp_path, MACHINE, MINUTES) == 0


@pytest.mark.parametrize(("number", "code"), one_in(2, [(signal.SIGINT, 130), (signal.SIGTERM, 143)]))
def test_an_interrupted_report_says_what_there_is(tmp_path, number, code):
    """Ctrl-C or SIGTERM ends the part that runs, with all its processes, and leaves report and archive."""
    out, started = tmp_path / "report", tmp_path / "started"
    script = tmp_path / "planted.py"
    parts = [
        ("first", "echo done"),
        ("second", f"{GRANDCHILD} > {tmp_path / 'pid'}; cat {tmp_path / 'pid'} > {started}; sleep 300"),
        ("third", f"touch {tmp_path / 'third'}"),
    ]
    script.write_text(
        f"import sys; from pathlib import Path; sys.path.append({str(SCRIPT.parent)!r})\n"
        "import gpu_report; from gpu_parts.part import Part; from gpu_parts.report import Machine\n"
        f"parts = [Part(name, (command,), 60) for name, command in {parts!r}]\n"
        f"sys.exit(gpu_report.conduct(parts, Path({str(out)!r}), Machine(('device: none',)), 8.0))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background shell ignores it
        args=[sys.executable, str(script)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        numbers = wait_for(started, process)
        assert rows_of(out) == {"first": "ok", "second": "running", "third": "not started"}
        process.send_signal(number)
        _, said = process.communicate(timeout=DEADLINE_S)
    finally:
        process.kill()
    assert process.returncode == code, said
    assert said == ""
    assert rows_of(out) == {"first": "ok", "second": "interrupted", "third": "not started"}
    assert (out / NAME).exists()
    assert not (tmp_path / "third").exists()
    assert not [number for number in numbers if is_running(number)]


def test_a_part_may_use_what_those_before_it_have_left(tmp_path, monkeypatch):
    """Up to twice its own limit; all limits together are never exceeded."""
    limits = []

    def note(part, log, limit_s, cwd, interruption):
        limits.append(limit_s)
        return Outcome("ok", 0.0)

    monkeypatch.setattr(gpu_report, "carry_out", note)
    parts = [Part(name, ("true",), 60) for name in ("first", "second", "third")]
    gpu_report.conduct(parts, tmp_path, MACHINE, MINUTES / 2)
    assert limits == pytest.approx([30, 60, 60], abs=5)


def test_the_archive_leaves_out_the_largest_logs(tmp_path):
    """Checkpoints never, the largest logs where the limit is reached, with a word in the report that is part of it."""
    noise = random.Random(0).randbytes
    for name, size in {"a.log": 40_000, "b.log": 20_000, "kept.json": 50_000, "run/checkpoint.state": 9}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(noise(size))
    (tmp_path / "run" / "events.out.tfevents.1").write_bytes(b"x")

    def describe(left_out: list[str]) -> None:
        (tmp_path / "report.md").write_text(f"{left_out}")

    assert write_archive(tmp_path, describe, limit=80_000) == ["a.log"]
    assert (tmp_path / NAME).stat().st_size < 80_000
    with tarfile.open(tmp_path / NAME) as archive:
        assert sorted(Path(name).name for name in archive.getnames()) == ["b.log", "kept.json", "report.md"]
        assert archive.extractfile(f"{tmp_path.name}/report.md").read() == b"['a.log']"


def test_what_the_archive_lacks_is_in_the_report(tmp_path):
    """A part that prints too much keeps its lines in the report and loses its log."""
    loud = f'{sys.executable} -c "import random; print(random.Random(0).randbytes(30000).hex()); print(1234)"'
    assert gpu_report.conduct([Part("loud", (loud,), 30, shown_lines=1)], tmp_path, MACHINE, MINUTES, 20_000) == 0
    text = (tmp_path / "report.md").read_text()
    assert f"Left out of {NAME}, which stays under 16 MiB: `loud.log`." in text
    assert "\n1234\n" in text


def test_an_excerpt_is_whole_tables_of_what_is_ok_and_the_end_of_what_is_not():
    """A bench's report begins with its first table; one that failed shows its last lines."""
    part = Part("bench", (), 1, shown_from="Time over", shown_lines=2)
    text = "warm-up\nTime over SGD\nrow\n\nPeak memory\nrow\n"
    assert excerpt(text, part, Outcome("ok", 1.0)) == "Time over SGD\nrow\n\nPeak memory\nrow"
    assert excerpt(text, part, Outcome("failed with exit code 1", 1.0)) == "Peak memory\nrow"


def test_without_a_gpu_it_says_so(monkeypatch, capsys, tmp_path):
    """One sentence and exit code 2, and nothing written."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    code, said = in_process(monkeypatch, capsys, "--out", str(tmp_path / "report"))
    assert code == 2
    assert said == "PyTorch finds no usable CUDA device here; --tiny tries all parts on the CPU.\n"
    assert not (tmp_path / "report").exists()


def test_bad_input_is_refused(monkeypatch, capsys, tmp_path):
    """A part that does not exist, no minutes, and a directory of somebody else's, which stays as it is."""
    code, said = in_process(monkeypatch, capsys, "--tiny", "--out", str(tmp_path), "--only", "bit")
    assert (code, said.startswith("There is no part 'bit'; there are tests, device-rates, bench-vgg11,")) == (2, True)
    code, said = in_process(monkeypatch, capsys, "--tiny", "--out", str(tmp_path), "--minutes", "0")
    assert (code, said) == (2, "--minutes must be > 0, got 0.\n")
    (tmp_path / "mine").write_text("mine")
    code, said = in_process(monkeypatch, capsys, "--tiny", "--out", str(tmp_path))
    assert (code, said.endswith("holds no earlier report; give --out a directory of its own.\n")) == (2, True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("is_tiny", one_in(2, [False, True]))
def test_the_limits_add_up_and_all_training_commands_are_good(tmp_path, is_tiny):
    """The limits add up, and keys that the configuration knows."""
    parts = define_parts(tmp_path, is_tiny=is_tiny)
    assert sum(part.limit_s for part in parts) == MINUTES * 60 - (30 if is_tiny else 0)  # a trial compiles nothing
    words = [shlex.split(command) for part in parts for command in part.commands if "kfac_sua.train" in command]
    assert len(words) == (3 if is_tiny else 4)
    for command in words:
        keys = [key for key in command[3:] if key != "-m"]
        swept = next(key for key in keys if key.startswith("preconditioner="))
        for name in swept.partition("=")[2].split(","):
            compose_config([f"preconditioner={name}", *(key for key in keys if key != swept)])


def test_a_gpu_measures_compiled_models_and_a_trial_does_not(tmp_path):
    """Compiling takes longer than a trial on a CPU may."""
    assert [part.name for part in define_parts(tmp_path, is_tiny=False) if "--compiled" in part.commands[0]] == [
        "bench-vgg11-compiled"
    ]
    assert not [part for part in define_parts(tmp_path, is_tiny=True) if "--compiled" in part.commands[0]]


def test_bits_are_compared_and_not_values(tmp_path, monkeypatch, capsys):
    """A NaN equals itself, zero is not minus zero, and a sweep without runs is not equal to anything."""
    same = {"weight": torch.tensor([1.0, float("nan")]), "count": torch.tensor(3)}
    assert bits._difference(same, {name: value.clone() for name, value in same.items()}) == "equal"
    signs = {"weight": torch.tensor([0.0, 1.0])}, {"weight": torch.tensor([-0.0, 1.5])}
    assert bits._difference(*signs) == "different in 1 of 1 tensors, by 0.5 at most"
    monkeypatch.setattr(sys, "argv", ["bits.py", str(tmp_path), str(tmp_path)])
    assert bits.main() == 1
    assert capsys.readouterr().out == f"No run below {tmp_path}.\n"


def test_processes_that_train_otherwise_are_noticed():
    """More than rounding apart, or not a number, ends with a sentence."""
    start, alone = torch.zeros(2), torch.ones(2)
    processes.compare(alone + 1e-6, alone, start)
    for together in (alone + 0.1, alone * float("nan")):
        with pytest.raises(SystemExit, match="The parameters differ by"):
            processes.compare(together, alone, start)
