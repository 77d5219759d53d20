"""Runs as files: what one leaves behind, how TensorBoard sees it, and how many become one table."""
