"""Checks in threads and processes that may crash or hang."""
