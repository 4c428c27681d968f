"""What runs beside the training loop: folders, checkpoints, measurements and records."""
