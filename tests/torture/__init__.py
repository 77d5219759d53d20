"""Campaigns of faults against the training command: kills, corruption, injected faults, and long runs."""
