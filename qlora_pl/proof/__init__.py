"""Exact resume, shown on a user's own run."""
