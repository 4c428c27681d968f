"""Whether products and gradients come out right, and what slows them."""
