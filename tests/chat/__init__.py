"""A conversation, in the terminal or on a page."""
