"""A user's own run, shrunken, so that a laptop finds what would fail on the rented GPU."""
