"""Memory, disk, and what the operating system allows."""
