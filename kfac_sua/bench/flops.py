"""FLOPs of a training step and its phases, counted from the operators that run; a multiply-add counts as two.

Counting what runs follows every choice the preconditioner makes by itself: the Woodbury identity, sides applied in the
backward pass, statistics kept as rows. Only matrix operators count: elementwise work has next to no FLOPs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from kfac_sua.bench.contender import PHASES
from kfac_sua.training.timing import Stopwatch

Shape = torch.Size


def _blocks(shape: Shape) -> int:
    return shape[:-2].numel()


def _added_product_flop(added: Shape, left: Shape, right: Shape, *args: object, **kwargs: object) -> int:
    """Multiply and add in place."""
    return 2 * left.numel() * right[-1]


def _cholesky_flop(matrix: Shape, *args: object, **kwargs: object) -> int:
    """Factorise: d³/3 per block."""
    return _blocks(matrix) * (matrix[-1] ** 3 // 3)


def _cholesky_inverse_flop(matrix: Shape, *args: object, **kwargs: object) -> int:
    """Invert from the factorisation: 2 d³/3 per block, rounded so that both together are d³."""
    return _blocks(matrix) * (matrix[-1] ** 3 - matrix[-1] ** 3 // 3)


def _solve_triangular_flop(matrix: Shape, right: Shape, *args: object, **kwargs: object) -> int:
    """Substitute: d² per column and block."""
    return matrix[-1] * right.numel()


def _eigh_flop(matrix: Shape, *args: object, **kwargs: object) -> int:
    """Decompose with vectors: about 9 d³ per block (Golub & Van Loan, symmetric QR)."""
    return _blocks(matrix) * 9 * matrix[-1] ** 3


def _attention_flop(queries: Shape, keys: Shape, values: Shape, *args: object, **kwargs: object) -> int:
    """Multiply queries by keys, and the scores by values."""
    return 2 * queries[:-1].numel() * keys[-2] * (queries[-1] + values[-1])


def _attention_backward_flop(
    grad: Shape, queries: Shape, keys: Shape, values: Shape, *args: object, **kwargs: object
) -> int:
    """Compute the scores again, then the gradients of scores, values, queries and keys: five products."""
    return 2 * queries[:-1].numel() * keys[-2] * (3 * queries[-1] + 2 * values[-1])


aten = torch.ops.aten
# Beyond those that PyTorch counts by itself.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten.linalg_cholesky_ex: _cholesky_flop,
    aten.cholesky_inverse: _cholesky_inverse_flop,
    aten.linalg_solve_triangular: _solve_triangular_flop,
    aten._linalg_eigh: _eigh_flop,
    aten.addmm_: _added_product_flop,
    aten.baddbmm_: _added_product_flop,
    # As PyTorch counts attention on a GPU.
    aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flop,
}


def count_flops(step: Callable[[Stopwatch], object]) -> dict[str, int]:
    """Run a piece of work and return the FLOPs of its phases.

    Args:
        step: Called with a stopwatch to attribute its phases with, such as :meth:`Contender.step`.

    Returns:
        FLOPs per phase (see ``contender.PHASES``).
    """
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        # A stopwatch whose clock shows FLOPs instead of seconds keeps phases inside phases apart in the same way.
        watch = Stopwatch("cpu", clock=lambda: float(counter.get_total_flops()))
        step(watch)
    totals = watch.totals()
    return {phase: int(totals[phase]) for phase in PHASES}
