"""Measure the rates by which the preconditioner chooses: ``python -m kfac_sua.bench.device_rates --out rates.json``.

``device_rates=rates.json`` on the command line of a training, or :func:`kfac_sua.preconditioner.use_rates` in a loop of
your own, puts them in force.
"""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kfac_sua.bench.progress import Announcer
from kfac_sua.bench.rates import GEMM_SHAPES, gemm, gemm_in_parts, random_numbers, seconds_per_call
from kfac_sua.bench.tables import table
from kfac_sua.command_line import BAD_INPUT, FAILED, INTERRUPTED, count, say
from kfac_sua.config import ConfigError, Device, Precision
from kfac_sua.device import choose_device
from kfac_sua.files.atomic import refuse_unwritable, written_beside
from kfac_sua.files.openers import cannot_use
from kfac_sua.preconditioner.forms.dense import gram, inverses_of_triangles
from kfac_sua.preconditioner.forms.rates import NEVER, DeviceRates, rates_in_force, rates_of
from kfac_sua.runs.environment import environment
from kfac_sua.startup import run_command
from kfac_sua.training.precision import computing_in

Seconds = Callable[[str, Callable[[], object]], float]
"""Measures a named piece of work."""

CALLS = 5
"""Measurements of each rate; the median counts."""

ROWS, WIDTH = 1600, 4608
"""The largest factor of the paper, and the rows that its mini-batch has there: 100 maps of 4×4."""

BLOCKS, BLOCK_WIDTH = 9, 512
"""Blocks of SUA in VGG11 that are factorised in one call."""

LONG_ROWS, NARROW_WIDTH = 102_400, 32
"""A Gram matrix of SUA in groups of 32 channels: 100 maps of 32×32."""

INVERSES = ((300, 32), (70, 288), (9, 512), (1, 2304))
"""Number and width of blocks that VGG11 and ResNet50 have to invert."""

SYMMETRIC_WIDTHS = (256, 512, 1024, 2048, 4096)
SMALL_OPERATIONS = 100
"""Number in a row, so that neither the clock nor the first one matters."""


def measure_device_rates(device: torch.device, announcer: Announcer) -> DeviceRates:
    """Measure a device; takes about a minute.

    Args:
        device: Which one.
        announcer: Told of every rate.
    """
    with computing_in(Precision.float32, device):
        return _measure(device, announcer)


def _measure(device: torch.device, announcer: Announcer) -> DeviceRates:
    def seconds(name: str, work: Callable[[], object]) -> float:
        announcer.show("device rates", name)
        return statistics.median(seconds_per_call(work, device, CALLS))

    def rate(name: str, flops: float, work: Callable[[], object]) -> float:
        return flops / seconds(name, work)

    flops = sum(2 * math.prod(shape) for shape in GEMM_SHAPES)
    products = [gemm(shape, torch.float32, device) for shape in GEMM_SHAPES]
    product = rate("products", flops, lambda: [work() for work in products])
    in_parts = [gemm_in_parts(shape, device) for shape in GEMM_SHAPES]
    split = rate("products in parts", flops, lambda: [work() for work in in_parts])

    # Factorisations and what is made of them.
    spd = _positive_definite(random_numbers(BLOCKS, 2 * BLOCK_WIDTH, BLOCK_WIDTH, device=device))
    cholesky = rate("Cholesky", BLOCKS * BLOCK_WIDTH**3 / 3, lambda: torch.linalg.cholesky_ex(spd))
    triangle = torch.linalg.cholesky(_positive_definite(random_numbers(1, 2 * ROWS, ROWS, device=device)))
    right = random_numbers(1, ROWS, WIDTH, device=device)
    triangular = rate(
        "triangular solve", ROWS**2 * WIDTH, lambda: torch.linalg.solve_triangular(triangle, right, upper=False)
    )
    inverse_width = _product_inverse_width(device, seconds)
    with rates_in_force(dataclasses.replace(rates_of(device), product_inverse_width=inverse_width), device.type):
        inverse_s = seconds("inverses", lambda: inverses_of_triangles(torch.linalg.cholesky_ex(spd)[0]))

    # Memory, launches, and what a quarter of a Gram matrix is worth.
    numbers = torch.zeros(2**24, device=device)
    memory = rate("memory", 2 * numbers.numel() * numbers.itemsize, lambda: numbers.add_(1))
    narrow = random_numbers(2, LONG_ROWS, NARROW_WIDTH, device=device)
    one = torch.zeros(1, 1, device=device)
    launch_s = seconds("launches", lambda: _small_operations(one)) / SMALL_OPERATIONS
    kernel_s = _kernel_seconds(one, launch_s, seconds)
    return DeviceRates(
        source=f"{environment(device.type).device_name or device.type}, torch {torch.__version__}, measured",
        product=product,
        split_product=split if device.type == "cuda" else 0.0,  # a CPU only emulates them
        cholesky=cholesky,
        triangular=triangular,
        inverse=BLOCKS * BLOCK_WIDTH**3 / inverse_s,
        memory=memory,
        kernel_s=kernel_s,
        launch_s=launch_s,
        parallel=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
        tile_row_s=seconds("narrow Gram matrices", functools.partial(torch.bmm, narrow.mT, narrow)) / LONG_ROWS,
        symmetric_width=_symmetric_width(device, seconds),
        product_inverse_width=inverse_width,
    )


def _product_inverse_width(device: torch.device, seconds: Seconds) -> int:
    """Return the least width from which inverses by products are faster, at this width and at all larger ones."""
    found = NEVER
    for num_blocks, width in reversed(INVERSES):
        rows = random_numbers(num_blocks, 2 * width, width, device=device)
        triangles = torch.linalg.cholesky(_positive_definite(rows))
        invert = functools.partial(inverses_of_triangles, triangles)
        if not _is_worth(device, {"product_inverse_width": width}, functools.partial(seconds, "inverses", invert)):
            break
        found = width
    return found


def _symmetric_width(device: torch.device, seconds: Seconds) -> int:
    """Return the least width from which half-width Gram matrices and one product are faster than a whole one."""
    for width in SYMMETRIC_WIDTHS:
        form = functools.partial(gram, random_numbers(1, ROWS, width, device=device))
        if _is_worth(device, {"symmetric_width": width}, functools.partial(seconds, "Gram matrices", form)):
            return width
    return NEVER


def _is_worth(device: torch.device, from_width: dict[str, Any], measure: Callable[[], float]) -> bool:
    """Whether work takes less time from a width on in the way that begins there than in the other."""
    times = []
    for widths in (from_width, dict.fromkeys(from_width, NEVER)):
        with rates_in_force(dataclasses.replace(rates_of(device), **widths), device.type):
            times.append(measure())
    return times[0] < times[1]


def _small_operations(one: Tensor) -> None:
    for _ in range(SMALL_OPERATIONS):
        one.view(-1).unsqueeze(0).add_(1)  # [1, 1]; about as many views as come with an operation


def _kernel_seconds(one: Tensor, launch_s: float, seconds: Seconds) -> float:
    """Return the seconds of the smallest operation inside a CUDA graph; 0 on a CPU, which has no graphs."""
    if not one.is_cuda:
        return launch_s
    graph = torch.cuda.CUDAGraph()
    _small_operations(one)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        _small_operations(one)
    return seconds("kernels", graph.replay) / SMALL_OPERATIONS


def _positive_definite(rows: Tensor) -> Tensor:
    return rows.mT @ rows / rows.shape[1]  # [blocks, d, d]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out the command line and return the exit code: 0, 1 for failure, 2 for bad input, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.bench.device_rates", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON file, replaced if it is there")
    parser.add_argument("--device", type=Device, choices=list(Device), default=Device.auto, help="(%(default)s)")
    parser.add_argument("--threads", type=count, default=1, metavar="N", help="on a CPU (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
        torch.set_num_threads(options.threads)
        refuse_unwritable(options.out)
        announcer = Announcer()
        rates = measure_device_rates(device, announcer)
        announcer.clear()
        with written_beside(options.out) as temporary:
            rates.write(temporary)
            temporary.replace(options.out)
    except ConfigError as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error, options.out), FAILED)
    except RuntimeError as error:
        return say(" ".join(str(error).split()), FAILED)
    except KeyboardInterrupt:
        return say("interrupted; nothing was written.", INTERRUPTED)
    print(rates_comparison(rates, rates_of(device)))
    print(f"Wrote {options.out}; device_rates={options.out} puts them in force.")
    return 0


def rates_comparison(measured: DeviceRates, in_force: DeviceRates) -> str:
    """Return both as a table."""
    names = [field.name for field in dataclasses.fields(DeviceRates) if field.name != "source"]
    rows = [[name, *(_number(getattr(one, name)) for one in (measured, in_force))] for name in names]
    title = f"measured: {measured.source}; so far: {in_force.source}"
    return table(title, ["rate", "measured", "so far"], rows)


def _number(value: float) -> str:
    return "never" if value == NEVER else f"{value:.3g}"


if __name__ == "__main__":
    run_command(main)
