"""The command line of ``python -m kfac_sua.train``: its options, its help, and its sweeps."""
