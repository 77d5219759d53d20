"""Put CIFAR archives into the data folder: ``python -m kfac_sua.data.download cifar10 cifar100``."""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

import argparse
import sys
from collections.abc import Sequence

from kfac_sua.command_line import INTERRUPTED, say
from kfac_sua.data import DataError, archive_path, fetch_cifar, load_archive
from kfac_sua.startup import run_command


def main(arguments: Sequence[str] | None = None) -> None:
    """Fetch what is missing and check every archive, whether just written or found.

    Args:
        arguments: Command line without the program's name; ``None`` takes the process's own.

    Raises:
        SystemExit: With one sentence and exit code 1 if a data set cannot be had, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kfac_sua.data.download",
        description="Download CIFAR through torchvision into one .npz per data set.",
    )
    parser.add_argument("names", nargs="*", help="cifar10, cifar100 (default: both)")
    parser.add_argument("--data-dir", default="data", help="folder of all data sets (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        for name in options.names or ["cifar10", "cifar100"]:
            path = archive_path(name, options.data_dir)
            if not path.exists():
                fetch_cifar(name, options.data_dir)
            train, test, class_names = load_archive(name, options.data_dir)
            print(f"{path}: {len(train)} training and {len(test)} test images, {len(class_names)} classes")
    except DataError as error:
        sys.exit(f"Error: {error}")
    except KeyboardInterrupt as interrupt:
        sys.exit(say(str(interrupt) or "interrupted.", INTERRUPTED))


if __name__ == "__main__":
    run_command(main)
