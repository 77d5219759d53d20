"""Put CIFAR archives into the data folder: what ``python -m kfac_sua.data.download`` does."""

from kfac_sua.data.download import main

if __name__ == "__main__":
    main()
