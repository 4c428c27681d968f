"""Adapters and their base behind the HTTP interface that OpenAI's clients speak."""
