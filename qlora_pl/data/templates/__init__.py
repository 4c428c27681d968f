"""Conversations -> text, and which of it the model is to write."""
