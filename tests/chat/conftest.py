"""The trained adapter that is asked."""

from trained import adapter, model, other_base, run, type_in

__all__ = ["adapter", "model", "other_base", "run", "type_in"]
