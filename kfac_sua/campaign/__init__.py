"""Campaigns: the grid, the selection, the final runs and the verdicts behind one figure."""
