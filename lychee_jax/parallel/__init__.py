"""Which devices there are, and how weights lie on them."""
