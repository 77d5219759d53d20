"""Loss and error of a run's network: ``python -m kfac_sua.evaluate RUN [--weights last] [--split test]``."""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
from collections.abc import Sequence
from pathlib import Path

from kfac_sua.build import build_splits, memory_format
from kfac_sua.command_line import BAD_INPUT, say
from kfac_sua.config import ConfigError, Device
from kfac_sua.data import BatchLoader, DataError
from kfac_sua.device import choose_device, choose_precision
from kfac_sua.files.openers import cannot_use
from kfac_sua.load import LoadedRun, load_run
from kfac_sua.runs.run_info import RecordError
from kfac_sua.startup import run_command
from kfac_sua.training.checkpoint import CheckpointError
from kfac_sua.training.evaluate import Evaluation, evaluate
from kfac_sua.training.precision import computing_in

SPLITS = ("test", "val", "train")


def evaluate_run(run: LoadedRun, split: str = "test", device: Device = Device.auto) -> Evaluation:
    """Return loss and error of a run's network on its own data, in the precision that it was trained in.

    Args:
        run: What :func:`kfac_sua.load_run` returned; its network goes to the device.
        split: ``test``, ``val`` (the images held out for selection) or ``train``.
        device: Where to compute.

    Returns:
        Means over all images of the split.

    Raises:
        ConfigError: If there is no such device, or it does not have the precision.
        DataError: If the data set cannot be had or is damaged.
    """
    config, place = run.config, choose_device(device)
    precision = choose_precision(config.precision, place.type)
    splits = build_splits(config.dataset)
    images = {"test": splits.test, "val": splits.val, "train": splits.train}[split]
    layout = memory_format(config)
    loader = BatchLoader(images, splits.mean, splits.std, device=place, memory_format=layout)
    network = run.network.to(place).to(memory_format=layout)
    with computing_in(precision, place):
        return evaluate(network, loader.sequential(config.evaluation_batch_size), place, precision=precision)


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate a run's network and print one line.

    Args:
        arguments: Command line without the program's name; None reads it from the process.

    Returns:
        0, 2 for bad input, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(prog="python -m kfac_sua.evaluate", description=__doc__.partition(":")[0] + ".")
    parser.add_argument("run", type=Path, help="directory of the run")
    parser.add_argument(
        "--weights", choices=("best", "last"), default="best", help="of the best epoch (default) or the last"
    )
    parser.add_argument(
        "--split", choices=SPLITS, default="test", help="images: test (default), val (held out) or train"
    )
    parser.add_argument(
        "--device", choices=[device.value for device in Device], default="auto", help="where to compute"
    )
    options = parser.parse_args(arguments)
    try:
        run = load_run(options.run, options.weights)
        result = evaluate_run(run, options.split, Device(options.device))
    except (ConfigError, DataError, RecordError, CheckpointError) as error:
        return say(error, BAD_INPUT)
    except OSError as error:
        return say(cannot_use(error), BAD_INPUT)
    whose = f"{options.weights} weights, epoch {run.epoch}"
    whose += f" and {run.batch} mini-batches of the next" if run.batch else ""
    print(f"{options.split} error {result.error:.2%}, loss {result.loss:.4f}: {whose}")
    return 0


if __name__ == "__main__":
    run_command(main)
