"""Runs of a grid as processes: on this machine, on Ray, as a SLURM array; each may die alone."""
