"""What was trained, as other engines read it."""
