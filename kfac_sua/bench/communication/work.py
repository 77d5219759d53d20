"""FLOPs of a mini-batch on one of N processes, counted from the operators that run on shapes."""

from collections.abc import Callable

from torch.utils.flop_counter import FlopCounterMode

from kfac_sua.bench.communication.counted import Costs, ShapeModel
from kfac_sua.bench.flops import FORMULAS


class Work:
    """Counts FLOPs of one network under one setting, each kind of mini-batch once.

    Args:
        shapes: The network.
    """

    def __init__(self, shapes: ShapeModel) -> None:
        self._shapes = shapes
        self._known: dict[tuple[object, ...], int] = {}

    def training(self, num_examples: int) -> int:
        """Return the FLOPs of the forward and backward pass alone."""

        def run() -> None:
            with self._shapes.preconditioner.paused():
                self._shapes.run(num_examples)

        return self._counted(("training", num_examples), run)

    def statistics(self, num_examples: int) -> int:
        """Return the FLOPs of measuring the statistics, before they are exchanged."""

        def run() -> None:
            shapes = self._shapes
            with shapes.preconditioner.capture():
                shapes.run(num_examples)
            for layer in shapes.layers:
                layer.statistics.factors(grads_of_mean_loss=True)
            shapes.preconditioner.discard()

        return self._counted(("statistics", num_examples), run) - self.training(num_examples)

    def application(self, num_examples: int, costs: Costs) -> int:
        """Return the FLOPs of applying the inverses that ``count_costs`` has just given the network.

        Args:
            num_examples: Of this process.
            costs: Its result, which tells inverses of one form from those of another.
        """

        def run() -> None:
            preconditioner = self._shapes.preconditioner
            preconditioner.num_steps = 1  # a mini-batch without statistics, which may apply inverses in the backward
            preconditioner._begin_step()
            self._shapes.run(num_examples)
            preconditioner.precondition_()
            preconditioner.num_steps = 0

        key = ("application", num_examples, costs.num_low_rank, costs.kept_bytes)
        return self._counted(key, run) - self.training(num_examples)

    def _counted(self, key: tuple[object, ...], run: Callable[[], None]) -> int:
        if key not in self._known:
            with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                run()
            self._known[key] = int(counter.get_total_flops())
        return self._known[key]
