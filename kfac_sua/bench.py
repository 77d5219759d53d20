"""Cost of every setting as a ratio to plain SGD in the same process.

Command line: ``python -m kfac_sua.bench [--model vgg11] [--width 1] [--rounds 9] [--json OUT]``.

The settings take turns, one step each, so that a machine that slows down slows all of them. A plain step applies the
inverses at hand; a refresh step also measures statistics and inverts. The amortised cost is that of one refresh step
and ``inverse_period - 1`` plain ones. Times are medians of process CPU seconds on a CPU (what other processes do
then counts little) and of synchronised wall seconds on a GPU.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kfac_sua.build import build_model, build_optimizer, build_preconditioner, choose_device, memory_format
from kfac_sua.compose import compose_config
from kfac_sua.config import Config, ConfigError, KroneckerConfig, PreconditionerName

NUM_CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Cost:
    """Measured cost of one setting.

    Args:
        name: Name of the preconditioner.
        step_s: Median seconds of a step without statistics.
        refresh_s: Median seconds of a step with statistics and inversion.
        step_ratio: ``step_s`` over plain SGD's.
        refresh_ratio: ``refresh_s`` over plain SGD's step.
        amortised_ratio: Mean cost over a refresh period, over plain SGD's step.
    """

    name: str
    step_s: float
    refresh_s: float
    step_ratio: float
    refresh_ratio: float
    amortised_ratio: float


class Contender:
    """One setting with a network of its own.

    Args:
        config: Its configuration.
        inputs: Images of the mini-batch, on the device.
        labels: Their classes.
    """

    def __init__(self, config: Config, inputs: Tensor, labels: Tensor) -> None:
        torch.manual_seed(config.seed)
        self._inputs = inputs.to(memory_format=memory_format(config))
        self._labels = labels
        self._model = build_model(config, NUM_CLASSES, inputs.device)
        self._preconditioner = build_preconditioner(config.preconditioner, self._model, config.seed)
        self._optimizer = build_optimizer(config.optimizer, self._model)

    def make_refresh_due(self) -> None:
        """Make the next step one with statistics and inversion."""
        if self._preconditioner is not None:
            self._preconditioner.load_state_dict({**self._preconditioner.state_dict(), "num_steps": 0})

    def step(self) -> float:
        """Take one training step and return its seconds."""
        started = _clock(self._inputs.device)
        self._optimizer.zero_grad(set_to_none=True)
        logits = self._model(self._inputs)
        if self._preconditioner is not None:
            self._preconditioner.fisher_backward(logits)
        F.cross_entropy(logits, self._labels).backward()
        if self._preconditioner is not None:
            self._preconditioner.step()
        self._optimizer.step()
        return _clock(self._inputs.device) - started


def measure(configs: Sequence[Config], *, rounds: int, refresh_rounds: int) -> list[Cost]:
    """Measure settings against the first one, which must be the baseline.

    Args:
        configs: One configuration per setting, alike but for the preconditioner.
        rounds: Plain steps per setting.
        refresh_rounds: Refresh steps per setting.

    Returns:
        One cost per setting, in order.
    """
    if configs[0].num_threads is not None:
        torch.set_num_threads(configs[0].num_threads)
    device = choose_device(configs[0].device)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(configs[0].batch_size, 3, 32, 32, generator=generator).to(device)
    labels = torch.randint(NUM_CLASSES, (configs[0].batch_size,), generator=generator).to(device)
    contenders = [Contender(config, inputs, labels) for config in configs]
    for contender in contenders:  # warm-up, and the first refresh
        contender.step()
        contender.step()
    steps = [statistics.median(times) for times in zip(*(_round(contenders) for _ in range(rounds)), strict=True)]
    refreshes = []
    for _ in range(refresh_rounds):
        for contender in contenders:
            contender.make_refresh_due()
        refreshes.append(_round(contenders))
    return [
        _cost(config, step, statistics.median(refresh), steps[0])
        for config, step, refresh in zip(configs, steps, zip(*refreshes, strict=True), strict=True)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print a table.

    Args:
        arguments: Command line without the program's name; ``None`` takes the process's own.

    Raises:
        SystemExit: With one sentence if the options make no configuration.
    """
    options = _parser().parse_args(arguments)
    if options.rounds < 1 or options.refresh_rounds < 1:
        sys.exit("--rounds and --refresh-rounds must be ≥ 1.")
    overrides = [f"model={options.model}", f"model.width={options.width}", f"batch_size={options.batch_size}"]
    overrides += [f"device={options.device}", *options.overrides]
    try:
        configs = [compose_config([*overrides, f"preconditioner={name}"]) for name in PreconditionerName]
        if options.json:
            options.json.touch()
        costs = measure(configs, rounds=options.rounds, refresh_rounds=options.refresh_rounds)
    except ConfigError as error:
        sys.exit(str(error))
    except OSError as error:
        sys.exit(f"Cannot write {options.json}: {error.strerror}.")
    print(f"{'preconditioner':<15} {'step s':>8} {'refresh s':>10} {'step':>7} {'refresh':>8} {'amortised':>10}")
    for cost in costs:
        print(
            f"{cost.name:<15} {cost.step_s:8.4f} {cost.refresh_s:10.4f} {cost.step_ratio:6.3f}× "
            f"{cost.refresh_ratio:7.3f}× {cost.amortised_ratio:9.3f}×"
        )
    if options.json:
        record = {
            "arguments": vars(options) | {"json": str(options.json)},
            "torch": torch.__version__,
            "num_threads": torch.get_num_threads(),
            "costs": [dataclasses.asdict(cost) for cost in costs],
        }
        text = json.dumps(record, indent=2)
        options.json.write_text(text + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Cost of every setting as a ratio to plain SGD in the same process.")
    parser.add_argument("overrides", nargs="*", help="further keys of configs/config.yaml, as key=value")
    parser.add_argument("--model", default="vgg11", help="default: %(default)s")
    parser.add_argument("--width", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument("--batch-size", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="plain steps per setting (default: %(default)s)")
    parser.add_argument("--refresh-rounds", type=int, default=3, help="refresh steps per setting (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers here")
    return parser


def _round(contenders: Sequence[Contender]) -> list[float]:
    return [contender.step() for contender in contenders]


def _cost(config: Config, step: float, refresh: float, baseline: float) -> Cost:
    preconditioner = config.preconditioner
    period = preconditioner.inverse_period if isinstance(preconditioner, KroneckerConfig) else 1
    is_baseline = not isinstance(preconditioner, KroneckerConfig)
    amortised = step if is_baseline else (refresh + (period - 1) * step) / period
    return Cost(preconditioner.name.value, step, refresh, step / baseline, refresh / baseline, amortised / baseline)


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    main()
