"""Several processes that share a mini-batch: collectives, statistics of all of them, and inverses shared out."""
