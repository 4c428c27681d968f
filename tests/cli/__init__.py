"""Commands of a run as a user types them."""
