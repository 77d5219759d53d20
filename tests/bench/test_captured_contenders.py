"""Plain steps are measured as training takes them: replayed where they are captured, and several at a time on CUDA."""

import itertools
import json
import re
from contextlib import contextmanager

import pytest
import torch
from bench_runs import TINY, shrink_rates, tiny_contenders
from graph_emulator import EmulatedGraph

from kfac_sua.bench import contender as contenders
from kfac_sua.bench import measure
from kfac_sua.bench.__main__ import main
from kfac_sua.bench.contender import PHASES, Contender
from kfac_sua.bench.costs import Rounds, measure_costs
from kfac_sua.bench.layers import count_steps
from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.step_kinds import StepKind
from kfac_sua.preconditioner import CapturedStep
from kfac_sua.training import capturing
from kfac_sua.training.timing import Stopwatch

# Where the number of plain steps does not matter: memory is that of several periods, whose steps are emulated.
SHORT = ("--period", "10")
AVERAGED = "sua:ema_decay=0.9,factor_period=5"


class EmulatedStep(CapturedStep):
    """A step that is captured on a CPU."""

    def __init__(self, *arguments: object, graph: None) -> None:
        super().__init__(*arguments, graph=EmulatedGraph())


class ReadingGraph(EmulatedGraph):
    """A graph whose captures find that the step reads back."""

    def capture(self, function: object) -> None:
        """Refuse."""
        raise RuntimeError("it reads back")


@pytest.fixture
def emulated(monkeypatch):
    """Let the command capture on a CPU."""
    shrink_rates(monkeypatch)
    monkeypatch.setattr(capturing, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(contenders, "CapturedStep", EmulatedStep)


def measured(tmp_path, *options: str) -> dict[str, dict]:
    """Run the command for SUA and return its costs by setting."""
    path = tmp_path / "new.json"
    assert main([*TINY, *SHORT, "--json", str(path), *options, "--settings", "sua"]) == 0
    return {cost["setting"]: cost for cost in json.loads(path.read_text())["costs"]}


def misbooked(contender: Contender) -> list[str]:
    """Return which steps of a warm contender have a split that is not theirs."""
    found = []
    for kind in contender.steps_per_period:
        time = contender.timed_turn(kind)
        booked = {phase for phase, seconds in time.split.items() if seconds > 0}
        expected = {"captured"} if kind is StepKind.plain else {*PHASES}
        expected -= {"inversion"} if kind is StepKind.statistics else set()
        if booked != expected or not 0.5 * time.seconds < sum(time.split.values()) <= time.seconds + 1e-9:
            found.append(kind.value)
    return found


def test_a_step_is_timed_without_the_watch_that_splits_it(monkeypatch):
    """On CUDA: what the marks take is not in the whole; steps of both runs are of the kind asked for."""
    monkeypatch.setitem(contenders.SPLIT_APART, "cpu", True)
    (contender,) = [one for name, one in tiny_contenders("sua").items() if name == "sua"]
    contender.warm_up()
    seen = []
    step = Contender.step

    def watched(self, watch):
        seen.append((watch._is_on, self.preconditioner.statistics_due))
        step(self, watch)

    monkeypatch.setattr(Contender, "step", watched)
    for kind, is_due in ((StepKind.refresh, True), (StepKind.plain, False)):
        seen.clear()
        time = contender.timed_turn(kind)
        assert seen == [(False, is_due), (True, is_due)]
        assert time.seconds > 0
        assert (time.split["inversion"] > 0) == is_due


def test_plain_steps_are_replays_that_are_timed_as_a_whole():
    """Nothing is captured within what is timed, whatever the refresh period has before."""
    own = tiny_contenders("kfac", AVERAGED, new_graph=EmulatedGraph)
    costs = measure_costs(own, Rounds(plain=3, refresh=2, repeats=2), Announcer())
    for cost, contender in zip(costs, own.values(), strict=True):
        assert contender.is_captured
        assert contender.why_eager == ""
        assert {phase for phase, seconds in cost.plain.split.items() if seconds} == {"captured"}
        assert contender._captured.num_captures == 1
        assert misbooked(contender) == []
    assert "captured" not in costs[1].refresh.split


def test_a_replay_that_is_booked_wrongly_is_seen(monkeypatch):
    """Were it to no phase, or eager steps to that of the replays, the split would not be that of the step."""
    contender = tiny_contenders(AVERAGED, new_graph=EmulatedGraph)[AVERAGED]
    contender.warm_up()
    phase = Stopwatch.phase
    assert misbooked(contender) == []
    with monkeypatch.context() as context:
        context.setattr(contenders, "CAPTURED", "other")
        assert misbooked(contender) == ["plain"]

    @contextmanager
    def all_captured(watch, name):
        with phase(watch, "captured" if name == "statistics" else name):
            yield

    monkeypatch.setattr(Stopwatch, "phase", all_captured)
    assert misbooked(contender) == ["statistics", "refresh"]


def test_captured_and_eager_contenders_train_alike():
    """What is measured is the same training, bit for bit."""
    captured = tiny_contenders("sua", new_graph=EmulatedGraph)["sua"]
    eager = tiny_contenders("sua", overrides=["capture=false"], new_graph=EmulatedGraph)["sua"]
    for contender in (captured, eager):
        for _ in range(8):
            contender.timed_step()
    assert captured._captured.num_replays == 4
    assert eager.why_eager == "capture=false"
    for own, other in zip(captured.model.parameters(), eager.model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_steps_that_stay_eager_say_why():
    """A device without graphs, a configuration without captures, a capture that fails, a period of refreshes alone."""
    found = {
        "device=cpu has no CUDA graphs": tiny_contenders("sua")["sua"],
        "capture=false": tiny_contenders("sua", overrides=["capture=false"], new_graph=EmulatedGraph)["sua"],
        "every step measures statistics, so that none is plain": tiny_contenders(
            "sua:inverse_period=1", new_graph=EmulatedGraph
        )["sua:inverse_period=1"],
        "it reads back": tiny_contenders("sua", new_graph=ReadingGraph)["sua"],
    }
    for reason, contender in found.items():
        contender.warm_up()
        for kind in contender.steps_per_period:
            assert set(contender.timed_turn(kind).split) == set(PHASES)
        assert not contender.is_captured
        assert reason in contender.why_eager


def test_a_capture_that_must_be_and_fails_is_an_error():
    """With the setting and the reason, before anything is timed."""
    contender = tiny_contenders("sua", overrides=["capture=true"], new_graph=ReadingGraph)["sua"]
    with pytest.raises(RuntimeError, match=r"capture=true, but with preconditioner=sua: .*it reads back.*capture=auto"):
        contender.warm_up()


@pytest.mark.parametrize(
    ("item", "together"), [("baseline", 10), ("sua", 10), (AVERAGED, 4), ("sua:inverse_period=2", 1)]
)
def test_plain_steps_in_a_row_are_timed_together(item, together, monkeypatch):
    """The clock, which waits for the device, is read before and after all of them; each is plain."""
    contender = tiny_contenders(*([] if item == "baseline" else [item]))[item]
    assert contender.steps_together == 1
    contender.warm_up()
    monkeypatch.setattr(contenders, "STEPS_TOGETHER", {"cpu": 10})
    assert contender.steps_together == together
    ticks, steps, step = itertools.count(), [], contender.step
    monkeypatch.setattr(contenders, "seconds_now", lambda device: float(next(ticks)))
    monkeypatch.setattr(contender, "step", lambda watch: (steps.append(watch), step(watch)))
    for _ in range(3):
        steps.clear()
        time = contender.timed_turn(StepKind.plain)
        assert len(steps) == together
        assert time.seconds == 1 / together
        assert time.split["statistics"] == 0
        assert time.split["forward_backward"] > 0
    assert next(ticks) == 6


def test_flops_of_a_replay_are_those_of_its_step():
    """Its seconds are not told apart, but their sum stands beside all FLOPs."""
    own = tiny_contenders("sua", new_graph=EmulatedGraph)
    costs = measure_costs(own, Rounds(1, 1, 1), Announcer())
    eager = tiny_contenders("sua")
    eager_costs = measure_costs(eager, Rounds(1, 1, 1), Announcer())
    works = count_steps(own, costs, Announcer())
    for work, other in zip(works, count_steps(eager, eager_costs, Announcer()), strict=True):
        assert {part: one.flops for part, one in work.parts.items() if one.flops} == {
            part: one.flops for part, one in other.parts.items() if one.flops
        }
    plain = next(work for work in works if (work.setting, work.step) == ("sua", "plain"))
    assert {part for part, one in plain.parts.items() if one.seconds} == {"captured"}


@pytest.mark.usefixtures("emulated")
def test_file_and_tables_say_what_was_replayed(tmp_path, capsys):
    """By setting, with the reason where it was not; the memory is that of captures too."""
    replayed = measured(tmp_path, "--layers")
    out = capsys.readouterr().out
    assert all(cost["is_captured"] and cost["why_eager"] == "" for cost in replayed.values())
    assert out.splitlines()[1].split()[-2:] == ["plain", "steps"]
    assert [line.split()[-1] for line in out.splitlines()[2:4]] == ["replayed", "replayed"]
    assert out.split("\n\n")[1].splitlines()[1].split()[-1] == "captured"
    eager = measured(tmp_path, "capture=false")
    assert [(cost["is_captured"], cost["why_eager"]) for cost in eager.values()] == 2 * [(False, "capture=false")]
    assert "replayed" not in capsys.readouterr().out
    assert replayed["sua"]["memory"]["peak_bytes"] > eager["sua"]["memory"]["peak_bytes"]


def test_memory_is_that_of_a_whole_captured_training(emulated, monkeypatch):
    """Warm-up, capture, replays, a refresh in the memory of the graph, and replays after it."""
    kinds = []

    class NotingStep(EmulatedStep):
        """Notes what its steps are."""

        def __call__(self) -> None:
            is_plain = self._preconditioner is None or self._preconditioner.step_is_plain
            before = self.num_captures, self.num_replays
            super().__call__()
            kinds.append("capture" if self.num_captures > before[0] else "replay")
            if self.num_replays == before[1]:
                kinds[-1] = "eager" if is_plain else "refresh"

    def noted(work, device):
        kinds.clear()
        work()
        return kinds.index("capture")

    monkeypatch.setattr(contenders, "CapturedStep", NotingStep)
    monkeypatch.setattr(measure, "peak_bytes", noted)
    assert main([*TINY, "--settings", "sua"]) == 0
    assert re.fullmatch(
        r"refresh( eager){3} capture( replay){6,} refresh( replay)+( refresh( replay)+)+", " ".join(kinds)
    )


@pytest.mark.usefixtures("emulated")
def test_captured_steps_are_not_compared_with_eager_ones(tmp_path, capsys):
    """Neither way round; before measuring where that is certain, and never where all is as it was."""
    captured, eager = tmp_path / "captured.json", tmp_path / "eager.json"
    arguments = [*TINY, *SHORT, "--settings", "sua", "--tolerance", "1000"]
    assert main([*arguments, "--json", str(captured)]) == 0
    assert main([*arguments, "--json", str(eager), "capture=false"]) == 0
    assert main([*arguments, "--against", str(captured)]) == 0
    capsys.readouterr()
    assert main([*arguments, "--against", str(captured), "capture=false"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "measured baseline with captured plain steps, this has eager ones; give capture=auto" in err
    assert main([*arguments, "--against", str(eager)]) == 2
    out, err = capsys.readouterr()
    assert out != ""
    assert "measured baseline with eager plain steps, this has captured ones; give capture=false" in err


def test_captures_that_must_be_are_refused_on_a_cpu(capsys):
    """Before anything is measured."""
    assert main([*TINY, "--settings", "sua", "capture=true"]) == 2
    assert "capture=true, but device=cpu has no CUDA graphs; give capture=auto or capture=false" in (
        capsys.readouterr().err
    )
