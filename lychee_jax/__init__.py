"""lychee-jax: long-context decoding in which attention heads have roles (LycheeDecode, arXiv 2602.04541)."""
