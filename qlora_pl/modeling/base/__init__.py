"""What a base is, what becomes of each of its weights, and whether that came out so."""
