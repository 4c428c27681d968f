"""Grids of runs: from a question to the differences that the numbers allow to be stated."""
