"""Answers from an adapter folder and nothing else."""
