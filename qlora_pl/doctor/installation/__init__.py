"""What is installed, and whether it imports."""
