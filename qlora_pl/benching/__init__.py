"""Speed and memory of training, measured: of a user's run, or of a shape with random weights."""
