"""Gradients -> changed weights, on one device or cut over several."""
