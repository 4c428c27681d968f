"""A shape and a setting -> bytes, component by component."""
