"""Scaling study: what a refresh and an application cost as width, kernel, channel groups and mini-batch grow."""
