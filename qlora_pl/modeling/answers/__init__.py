"""Prompts -> answers of a model: how they are drawn, a batch at a time."""
