"""The host's state around a step."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn

from kfac_sua.preconditioner.captured.optimizers import StepOptimizers
from kfac_sua.preconditioner.captured.values import is_at, plain_attributes
from kfac_sua.preconditioner.kfac import KroneckerPreconditioner


class HostState:
    """What the Python code of a step changes on the host, saved, so that a capture that fails can be undone.

    Args:
        model: The bare model.
        parameters: The parameters of the model and of the optimizers.
        optimizers: Their optimizers.
        preconditioner: The preconditioner of their gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        optimizers: StepOptimizers,
        preconditioner: KroneckerPreconditioner | None,
    ) -> None:
        self._parameters = parameters
        self._optimizers = optimizers
        self._preconditioner = preconditioner
        self.grads = [parameter.grad for parameter in parameters]
        self._restore_optimizers = optimizers.save()
        self._modules = [
            (module, dict(module._parameters), dict(module._buffers), plain_attributes(module))
            for module in model.modules()
        ]
        self._num_steps = 0 if preconditioner is None else preconditioner.num_steps
        self._events = Counter() if preconditioner is None else preconditioner.events.copy()

    def kept_grads(self) -> list[Tensor]:
        """Return the gradients that are still the same tensors, as the step has written into them in place."""
        pairs = zip(self.grads, (parameter.grad for parameter in self._parameters), strict=True)
        return [after for before, after in pairs if before is not None and after is not None and is_at(before, after)]

    @property
    def num_steps_since(self) -> int:
        """Steps that the preconditioner has counted since."""
        return 0 if self._preconditioner is None else self._preconditioner.num_steps - self._num_steps

    @property
    def events_since(self) -> Counter[str]:
        """Events that the preconditioner has counted since."""
        return Counter() if self._preconditioner is None else self._preconditioner.events - self._events

    def restore(self) -> None:
        """Restore the saved state."""
        for parameter, grad in zip(self._parameters, self.grads, strict=True):
            parameter.grad = grad
        self._restore_optimizers()
        for module, parameters, buffers, attributes in self._modules:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
            vars(module).update(attributes)
        if self._preconditioner is not None:
            self._preconditioner.discard()
            self._preconditioner.go_to_step(self._num_steps)
            events = self._preconditioner.events
            events.clear()
            events.update(self._events)
