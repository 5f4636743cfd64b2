"""Every op in plain JAX: what it means, and the implementation wherever no kernel exists."""
