"""A micro-batch -> its loss and gradients, in as many pieces as memory asks for."""
