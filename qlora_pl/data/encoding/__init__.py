"""Text -> token ids, and which of them are trained."""
