"""Whether it fits, and what would let it."""
