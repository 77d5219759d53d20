"""Figures of the paper: a table of runs in, an image and the plotted numbers out; nothing here trains."""
