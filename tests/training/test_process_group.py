"""What processes of one run tell each other: results, failures, and requests."""

import json
from pathlib import Path

import pytest
import torch
from process_group import free_ports, run_processes

from kfac_sua.training.connection import ConnectionLostError, connection_errors
from kfac_sua.training.launch import Launch
from kfac_sua.training.process_group import OtherProcessError, ProcessGroup, open_process_group


def fail_on(ranks: tuple[int, ...], rank: int, sentence: str = "No room.") -> int:
    """Return the rank, or fail on some ranks."""
    if rank in ranks:
        raise ValueError(sentence)
    return rank


def outcome(work) -> str:
    """Return what something gives or raises, as text."""
    try:
        return repr(work())
    except (ValueError, OtherProcessError) as error:
        return f"{type(error).__name__}: {error}"


def talk(rank: int, size: int, port: int, directory: str) -> None:
    """Write down what this process hears."""
    with open_process_group(Launch(rank, size, rank, "127.0.0.1", port), torch.device("cpu")) as process_group:
        heard = {
            "each, none fails": outcome(lambda: process_group.run_on_all(lambda: fail_on((), rank))),
            "each, the last fails": outcome(lambda: process_group.run_on_all(lambda: fail_on((2,), rank))),
            "each, all fail": outcome(lambda: process_group.run_on_all(lambda: fail_on((0, 1, 2), rank))),
            "each, two fail differently": outcome(
                lambda: process_group.run_on_all(lambda: fail_on((0, 1), rank, f"No {rank}."))
            ),
            "first": outcome(lambda: process_group.broadcast(lambda: fail_on((), rank))),
            "first fails": outcome(lambda: process_group.broadcast(lambda: fail_on((0,), rank))),
            "gather": repr(process_group.all_gather(rank)),
            "sum": repr(process_group.all_reduce_sum(torch.tensor(rank + 1.0)).item()),
            "any": repr((process_group.any(rank == 2), process_group.any(False))),
            "agree": repr([process_group.delayed_all_reduce_max(request) for request in (rank, 0, 5 * rank, 0)]),
        }
        process_group.discard_delayed()
        heard["agree anew"] = repr(process_group.delayed_all_reduce_max(7))
    Path(directory, f"{rank}.json").write_text(json.dumps(heard))


def test_three_processes_hear_the_same(tmp_path):
    """Results and sums are the same on all; a failure is raised where it is to be said, and told to the others."""
    run_processes(talk, 3, 3, *free_ports(1), str(tmp_path))
    heard = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    told, failed = "OtherProcessError: ValueError: No room.", "ValueError: No room."
    expected = {
        "each, none fails": ["0", "1", "2"],
        "each, the last fails": [told, told, failed],
        "each, all fail": [failed, told, told],  # said once
        "each, two fail differently": [
            "ValueError: No 0.",
            "ValueError: No 1.",
            "OtherProcessError: ValueError: No 0.",
        ],
        "first": ["0", "0", "0"],
        "first fails": [failed, told, told],
        "gather": ["[0, 1, 2]"] * 3,
        "sum": ["6.0"] * 3,
        "any": ["(True, False)"] * 3,
        "agree": ["[0, 2, 0, 10]"] * 3,  # one call later
        "agree anew": ["0"] * 3,
    }
    for what, answers in expected.items():
        assert [one[what] for one in heard] == answers, what


def test_a_process_alone_hears_itself():
    """Nothing is exchanged, and requests count at once."""
    alone = ProcessGroup()
    assert alone.run_on_all(lambda: 1) == alone.broadcast(lambda: 1) == 1
    assert alone.all_reduce_max(1) == alone.delayed_all_reduce_max(1) == 1
    assert alone.all_gather("a") == ["a"]
    with pytest.raises(ValueError, match="No room"):
        alone.run_on_all(lambda: fail_on((0,), 0))


@pytest.mark.parametrize(
    ("message", "is_loss"),
    [
        ("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:3470", True),
        ("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete", True),
        ("NCCL error: remote process exited or there was a network error", True),
        ("[gloo/transport/tcp/pair.cc:470] op.preamble.length <= op.nbytes. 24 vs 8", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_what_says_that_a_process_is_gone_is_called_that(message, is_loss):
    """Other errors of the libraries below are bugs and keep their words."""
    with pytest.raises(ConnectionLostError if is_loss else RuntimeError) as caught, connection_errors(1, 2):
        raise RuntimeError(message)
    assert str(caught.value).startswith("process 1 of 2 has lost contact") == is_loss
    with pytest.raises(RuntimeError), connection_errors(0, 1):
        raise RuntimeError(message)
