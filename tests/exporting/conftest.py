"""The trained adapter that is exported."""

from trained import adapter, other_base, run, type_in

__all__ = ["adapter", "other_base", "run", "type_in"]
