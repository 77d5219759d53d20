"""A short cut of ``scripts/fuzz.py``, and proof that it would find something."""

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from targets import ACCEPTED, REFUSED, TARGETS, TimeLimitExceededError, time_limit

EXAMPLES = 40


@pytest.mark.parametrize("name", TARGETS)
def test_reader_accepts_or_refuses(name):
    """Whatever it is given, a reader returns what was written or raises its own error, within seconds."""
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(target.strategy)
    def examine(example):
        with time_limit():
            assert target.examine(example) in (ACCEPTED, REFUSED)

    examine()


@pytest.mark.parametrize("name", [name for name in TARGETS if name != "options"])
def test_unchanged_file_is_accepted(name):
    """Readers that refuse everything would pass the test above."""
    assert TARGETS[name].examine([]) == ACCEPTED


def test_sound_options_are_accepted():
    """The same for options."""
    assert TARGETS["options"].examine((["preconditioner=kfac", "optimizer.lr=0.1,0.3"], True)) == ACCEPTED


def test_time_limit_ends_what_does_not_end():
    """A reader that hangs is a finding, not a fuzzer that hangs."""

    def hang():
        while True:
            pass

    with pytest.raises(TimeLimitExceededError, match="no end within 1 s"), time_limit(1):
        hang()


def test_wrong_acceptance_is_found(monkeypatch):
    """If the checkpoint's digest were not compared, the fuzzer would say so."""
    import kfac_sua.training.checkpoint as checkpoint

    path_of_payload = len(checkpoint.MAGIC) + 32
    monkeypatch.setattr(checkpoint, "_payload", lambda path: path.read_bytes()[path_of_payload:])
    target = TARGETS["checkpoint"]

    @settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.lists(target.strategy.map(lambda changes: changes[:1]), min_size=1, max_size=1))
    def examine(examples):
        target.examine(examples[0])

    with pytest.raises(AssertionError, match="a changed checkpoint was accepted"):
        examine()
