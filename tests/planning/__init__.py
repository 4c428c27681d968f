"""What a plan says, and how."""
