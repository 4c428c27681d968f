"""Plans to read and to look at."""
