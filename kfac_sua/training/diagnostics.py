"""The columns of a row beside losses and seconds: norms of gradient and update, their cosine, and counts of events.

Norms, cosine and scale are measured at some steps of an epoch, on the device, and read at the end of the epoch:

- With a preconditioner, at the steps that refresh the inverses. These are eager even if plain steps are captured, and
  ``.grad`` holds the plain gradient before ``preconditioner.step()``. An epoch without a refresh has no values.
- Without a preconditioner, after the first step of an epoch and then after every ``BASELINE_PERIOD``-th step, captured
  or not. Update and gradient are the same there, and no optimizer writes into ``.grad``.

Norms are over all parameters together. Gradients are already averages over processes, so all processes measure the
same. Nothing here changes a gradient.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kfac_sua.preconditioner import KroneckerPreconditioner
from kfac_sua.preconditioner.checkpoint.checks import is_count, outlined

BASELINE_PERIOD = 50
"""Steps between two measurements of the baseline: as many as between two refreshes in the paper."""

MEANS = ("gradient_norm", "update_norm", "update_cosine", "kl_scale")
"""Columns that are means over the measured steps."""

NUMERICAL_FAULTS = {"failed_inverse", "raised_damping", "non_finite_statistics"}
"""Events after which a layer uses another inverse than was asked for."""


class Diagnostics:
    """Measures some steps of an epoch without waiting for the device.

    Args:
        model: The network.
        preconditioner: Its preconditioner; ``None`` for the baseline.
        device: Where it is trained.
    """

    def __init__(self, model: nn.Module, preconditioner: KroneckerPreconditioner | None, device: torch.device) -> None:
        self._parameters = list(model.parameters())
        self._preconditioner = preconditioner
        self._num_looks = 0
        # One tensor, changed in place: an eager step must not keep tensors in the memory pool of a captured step.
        self._sums = torch.zeros(len(MEANS), dtype=torch.float64, device=device)

    @contextlib.contextmanager
    def around_preconditioning(self) -> Iterator[None]:
        """Measure the gradients before and after the preconditioner's step inside, if it refreshes the inverses."""
        preconditioner = self._preconditioner
        if preconditioner is None or not preconditioner.inverses_due:
            yield
            return
        plain = [gradient.clone() for gradient in self._gradients()]
        yield
        with torch.no_grad():
            update = self._gradients()
            norm, update_norm = _norm(plain), _norm(update)
            product = torch.stack([g.mul_(u).sum() for g, u in zip(plain, update, strict=True)]).double().sum()
            cosine = (product / (norm * update_norm)).clamp(-1, 1)  # rounding may exceed the range
            scale = preconditioner.kl_scale
            self._add(norm, update_norm, cosine, torch.ones_like(norm) if scale is None else scale.double())

    @torch.no_grad()
    def after_step(self, batch: int) -> None:
        """Measure the baseline's gradient, if a measurement is due.

        Args:
            batch: Index in the epoch of the mini-batch whose step has been taken.
        """
        if self._preconditioner is None and batch % BASELINE_PERIOD == 0 and (gradients := self._gradients()):
            norm = _norm(gradients)
            self._add(norm, norm, torch.ones_like(norm), torch.ones_like(norm))

    def means(self) -> dict[str, float]:
        """Return the columns of ``MEANS`` for the epoch so far; waits for the device.

        Norms are of gradients of a mean loss. A value is NaN if it was not measured; so is a cosine with a zero vector.
        """
        values = (self._sums / self._num_looks).tolist() if self._num_looks else [math.nan] * len(MEANS)
        means = dict(zip(MEANS, values, strict=True))
        is_clipped = self._preconditioner is not None and self._preconditioner.settings.kl_clip is not None
        return means if is_clipped else means | {"kl_scale": math.nan}

    def counts(self) -> dict[str, int]:
        """Return how many events the preconditioner has counted since the run's start: numerical faults, and others."""
        events = {} if self._preconditioner is None else self._preconditioner.events
        faults = sum(count for name, count in events.items() if name.partition(":")[0] in NUMERICAL_FAULTS)
        return {"numerical_faults": faults, "other_events": sum(events.values()) - faults}

    @property
    def damping(self) -> float:
        """Tikhonov ε of the next refresh, NaN for the baseline."""
        return math.nan if self._preconditioner is None else self._preconditioner.damping

    def reset(self) -> None:
        """Begin an epoch."""
        self._num_looks = 0
        self._sums.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of an epoch in progress, for a checkpoint."""
        return {"num_looks": self._num_looks, "sums": self._sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned, after :func:`check_diagnostics` has accepted it."""
        self._num_looks = state["num_looks"]
        self._sums.copy_(state["sums"])

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _add(self, *values: Tensor) -> None:
        self._sums += torch.stack(values)
        self._num_looks += 1


def check_diagnostics(state: Any, num_batches: int) -> None:
    """Refuse a state that :meth:`Diagnostics.state_dict` cannot return after so many mini-batches of an epoch.

    Raises:
        ValueError: Naming the entry, and what was expected.
    """
    if not isinstance(state, Mapping) or set(state) != {"num_looks", "sums"}:
        raise ValueError(f"diagnostics is {outlined(state)}, expected a mapping of num_looks, sums")
    count, sums = state["num_looks"], state["sums"]
    if not is_count(count) or count > num_batches:
        raise ValueError(f"diagnostics.num_looks is {outlined(count)}, expected a whole number in [0, {num_batches}]")
    is_own = isinstance(sums, Tensor) and sums.shape == (len(MEANS),) and sums.dtype == torch.float64
    if not is_own or sums.is_meta or sums.layout is not torch.strided:
        raise ValueError(f"diagnostics.sums is {outlined(sums)}, expected {len(MEANS)} numbers in float64")
    norm, update_norm, cosine, scale = sums.tolist()
    if min(norm, update_norm, scale) < 0 or max(abs(cosine), scale) > count or (count == 0 and sums.any()):
        raise ValueError(f"diagnostics.sums is {sums.tolist()}, expected sums of {count} norms, cosines and scales")


def _norm(tensors: list[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, ``[]`` in float64."""
    return nn.utils.get_total_norm(tensors).double()
