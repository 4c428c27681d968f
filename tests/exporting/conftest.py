"""The trained adapter that is exported."""

from __future__ import annotations

from trained import adapter, model, run, type_in

__all__ = ["adapter", "model", "run", "type_in"]
