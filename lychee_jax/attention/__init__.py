"""How a layer's queries read its keys: attention backends, head maps, selection."""
