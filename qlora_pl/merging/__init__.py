"""An adapter and its base -> one model, and what that changed."""
