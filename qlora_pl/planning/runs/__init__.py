"""What is planned: a training file, or a few flags."""
