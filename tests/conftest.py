"""Every test runs with jaxtyping shapes checked by beartype, strict dtype promotion and warnings as errors."""

import jaxtyping

# Before the first import of the packages: annotations are checked at every call of every public array function.
jaxtyping.install_import_hook(["lychee_jax", "pallas_kernels", "checkpoints_convert"], "beartype.beartype")

import jax  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
