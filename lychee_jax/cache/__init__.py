"""The paged KV cache: pages on the device, and who owns them."""
