"""The peak of live bytes is exact."""

import pytest
import torch
from bench_runs import tiny_contenders

from kfac_sua.bench.memory import peak_bytes

CPU = torch.device("cpu")


def allocate(num_bytes: int, device: torch.device = CPU) -> torch.Tensor:
    """Return a tensor of so many bytes."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def replace_one_of_two(device: torch.device = CPU) -> None:
    """Hold 4 + 2, then 2, then 2 + 3 MiB."""
    first, second = allocate(4 * 2**20, device), allocate(2 * 2**20, device)
    del first
    third = allocate(3 * 2**20, device)
    assert len(second) + len(third) == 5 * 2**20


def test_peak_of_a_hand_made_case():
    """What is released before the next allocation does not add to the peak."""
    assert peak_bytes(replace_one_of_two, CPU) == 6 * 2**20


def test_views_and_work_in_place_need_nothing():
    """Only allocations count, each once."""

    def work() -> None:
        values = allocate(1000)
        values.view(10, 100).mT.zero_()

    assert peak_bytes(work, CPU) == 1000


def test_operators_count_with_what_they_use_inside():
    """An intermediate tensor that no one else sees is held as well."""
    values = torch.ones(1024)
    held = 2 * 4096  # the sum of two and its exponential
    assert peak_bytes(lambda: torch.exp(values + values), CPU) == held


def test_earlier_tensors_do_not_count():
    """Neither does a release of what was allocated before make room, nor does it count as held."""
    earlier = [allocate(8000)]

    def work() -> None:
        earlier.clear()
        allocate(500)

    assert peak_bytes(work, CPU) == 500


def test_training_needs_the_same_every_time():
    """The number depends on nothing but what runs."""

    def train() -> None:
        for contender in tiny_contenders("kfac").values():
            contender.timed_step()
            contender.timed_step()

    train()  # fills caches
    peaks = [peak_bytes(train, CPU) for _ in range(2)]
    assert peaks[0] == peaks[1] > 8 * 3 * 32 * 32 * 4  # at least the images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu():
    """The caching allocator's peak, of which what was held before is no part."""
    device = torch.device("cuda")
    held = allocate(2**20, device)
    assert peak_bytes(lambda: replace_one_of_two(device), device) == 6 * 2**20
    assert len(held) == 2**20
