"""Batches that fit: found before the first step, recorded after it."""
