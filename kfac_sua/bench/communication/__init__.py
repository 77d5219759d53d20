"""What processes that share a mini-batch send each other, keep and invert: counted, measured, and extrapolated."""
