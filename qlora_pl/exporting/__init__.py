"""What was trained -> the formats of other engines."""
