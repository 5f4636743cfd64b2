"""Learning: data, losses and loops. The only room that knows optax."""
