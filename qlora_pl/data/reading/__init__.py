"""Files and datasets -> conversations, each with its place."""
