"""A conversation with an adapter or a model: in the terminal, or on a page."""
