"""An adapter folder, or a model, and nothing else -> answers."""
