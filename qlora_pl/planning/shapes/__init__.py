"""A model's parameters and layers, from a few fields."""
