"""The folder of a run, and what is written down in it."""
