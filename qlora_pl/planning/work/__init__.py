"""A shape and a setting -> operations, hours, money, disk."""
