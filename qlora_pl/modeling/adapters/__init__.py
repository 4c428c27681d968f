"""A frozen base -> the same base with adapters, and where their training begins."""
