"""How the bundled model and its head maps were made."""
