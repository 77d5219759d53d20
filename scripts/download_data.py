"""Put CIFAR archives into the data folder: what ``python -m kfac_sua.data.download`` does."""

if __name__ == "__main__":  # before the imports that take seconds
    from kfac_sua.startup import begin

    begin()

from kfac_sua.data.download import main
from kfac_sua.startup import run_command

if __name__ == "__main__":
    run_command(main)
