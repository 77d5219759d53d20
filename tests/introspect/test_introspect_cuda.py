"""On a CUDA device the numbers are those of the CPU, in float64."""

import copy

import pytest
import torch

from kfac_sua.introspect.approximations import layers_of
from kfac_sua.introspect.gradients import Batch
from kfac_sua.introspect.measure import measure_network
from kfac_sua.introspect.memory import free_bytes
from kfac_sua.introspect.record import MEASURES, OTHER, SAME
from kfac_sua.introspect.study import prepared, renew_normalisation
from kfac_sua.models import TinyConvNet
from kfac_sua.preconditioner import KroneckerSettings
from kfac_sua.preconditioner.settings import FisherType

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = {
    "kfac": KroneckerSettings(structure="kfac", group_size=5),
    "sua": KroneckerSettings(structure="sua", damping_rule="exact"),
}


@pytest.mark.parametrize("fisher", list(FisherType))
def test_numbers_are_those_of_the_cpu(fisher):
    """Every row, to seven digits."""
    torch.manual_seed(0)
    model, images = TinyConvNet(10), torch.randn(2, 20, 3, 32, 32, dtype=torch.float64)
    labels = torch.randint(10, (2, 2, 20))
    tables = []
    for name in ("cpu", "cuda"):
        device = torch.device(name)
        network = prepared(copy.deepcopy(model), device)
        renew_normalisation(network, images[0].to(device))
        batches = {
            statistics: Batch(images[index].to(device), *labels[index].to(device))
            for index, statistics in enumerate((SAME, OTHER))
        }
        rows, _ = measure_network(network, dict(layers_of(network)), batches, METHODS, fisher, [0.1, 1.0])
        tables.append(torch.tensor([[getattr(row, name) for name in MEASURES] for row in rows], dtype=torch.float64))
    torch.testing.assert_close(*tables, rtol=1e-6, atol=1e-7, equal_nan=True)


def test_free_memory_is_the_devices():
    """Not the machine's."""
    assert 0 < free_bytes(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
