"""The stopwatch: exclusive phases, resumable totals, and nothing counted outside a phase."""

import time

import pytest
import torch

from kfac_sua.training.timing import PHASES, Stopwatch


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now

    def work(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


@pytest.fixture
def clock() -> FakeClock:
    """Return a clock at an arbitrary time."""
    return FakeClock()


@pytest.fixture
def watch(clock: FakeClock) -> Stopwatch:
    """Return a stopwatch on the fake clock."""
    return Stopwatch("cpu", clock)


def test_a_watch_that_is_off_leaves_no_marks(clock):
    """Whoever reads it finds nothing; phases still nest, and unknown ones are refused."""
    watch = Stopwatch("cpu", clock, is_on=False)
    with watch.phase("other"), watch.phase("optimizer"):
        clock.work(1.0)
    assert set(watch.totals().values()) == {0.0}
    with pytest.raises(ValueError, match="no phase 'lunch'"), watch.phase("lunch"):
        pass


def nonzero(watch: Stopwatch) -> dict[str, float]:
    """Return the phases in which time was spent."""
    return {name: seconds for name, seconds in watch.totals().items() if seconds}


def test_every_phase_is_reported(watch):
    """A phase that never ran is reported as zero seconds."""
    assert watch.totals() == dict.fromkeys(PHASES, 0.0)


def test_nested_phase_takes_its_time_away_from_the_outer_one(watch, clock):
    """Of 1 + 2 + 4 + 8 seconds, the inner phases get 2 and 8, the outer one 1 and 4."""
    with watch.phase("forward_backward"):
        clock.work(1)
        with watch.phase("statistics"):
            clock.work(2)
        clock.work(4)
        with watch.phase("inversion"):
            clock.work(8)
    assert nonzero(watch) == {"forward_backward": 5, "statistics": 2, "inversion": 8}


def test_a_phase_inside_itself_counts_once(watch, clock):
    """Entering a phase twice does not count its seconds twice."""
    with watch.phase("application"):
        clock.work(1)
        with watch.phase("application"):
            clock.work(2)
    assert nonzero(watch) == {"application": 3}


def test_time_outside_phases_is_not_counted(watch, clock):
    """Evaluation and checkpoints between phases leave no trace."""
    for _ in range(2):
        clock.work(50)
        with watch.phase("optimizer"):
            clock.work(1)
        clock.work(50)
    assert nonzero(watch) == {"optimizer": 2}


def test_totals_accumulate_and_may_be_read_at_any_time(watch, clock):
    """Reading the totals, even inside a phase, neither loses time nor counts it twice."""
    with watch.phase("optimizer"):
        clock.work(1)
    assert nonzero(watch) == {"optimizer": 1}
    assert nonzero(watch) == {"optimizer": 1}
    with watch.phase("optimizer"):
        clock.work(2)
        watch.totals()
        clock.work(4)
    assert nonzero(watch) == {"optimizer": 7}


def test_a_phase_ends_with_an_exception(watch, clock):
    """An exception inside a phase closes it, and the time up to it counts."""

    def fail():
        with watch.phase("inversion"):
            clock.work(3)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    clock.work(100)
    assert nonzero(watch) == {"inversion": 3}


def test_restore_goes_on_from_earlier_totals(watch, clock):
    """Seconds of an earlier process are kept and added to."""
    watch.restore({**dict.fromkeys(PHASES, 0.0), "statistics": 5.0})
    with watch.phase("statistics"):
        clock.work(1)
    assert nonzero(watch) == {"statistics": 6}


def test_restoring_totals_of_fewer_phases_keeps_the_others(watch, clock):
    """A checkpoint from before a phase was measured starts it at zero."""
    watch.restore({"forward_backward": 5.0})
    with watch.phase("data"):
        clock.work(1)
    assert nonzero(watch) == {"forward_backward": 5, "data": 1}


def test_unknown_phase_names_the_choices(watch):
    """A misspelt phase would silently drop time from metrics.csv, so it is an error."""
    with pytest.raises(ValueError, match=r"no phase 'inverse'; choose one of data, forward_backward, statistics"):
        watch.phase("inverse").__enter__()


def test_real_clock_measures_seconds():
    """The default clock measures wall-clock seconds."""
    watch = Stopwatch("cpu")
    with watch.phase("optimizer"):
        time.sleep(0.02)
    assert 0.02 <= watch.totals()["optimizer"] < 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_measure_the_device_not_the_launch():
    """On CUDA, the phase of long kernels gets their time although launching them takes none."""
    watch = Stopwatch("cuda")
    matrix = torch.randn(4096, 4096, device="cuda")
    matrix @ matrix  # initialises cuBLAS outside any phase
    with watch.phase("forward_backward"):
        for _ in range(200):
            matrix @ matrix
        with watch.phase("optimizer"):
            matrix.add_(0)
    totals = watch.totals()
    assert totals["forward_backward"] > 10 * totals["optimizer"] > 0
