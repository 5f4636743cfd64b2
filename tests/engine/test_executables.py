"""Programs on disk: what is loaded computes what was compiled, and damage or another key means absent."""

from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.engine.executables import ExecutableCache


class Pair(NamedTuple):
    """A pytree of a class of its own, as programs take and give them."""

    first: jax.Array
    second: jax.Array | None


def add(pair: Pair, number: jax.Array) -> tuple[Pair, jax.Array]:
    return pair._replace(first=pair.first + number), number * 2.0


def test_a_program_comes_back_and_nothing_else_does(tmp_path: Path) -> None:
    cache = ExecutableCache(tmp_path / "kept")
    args = (Pair(jnp.arange(4.0), None), jnp.float32(2))
    assert cache.load("key", args) is None
    cache.save("key", args, jax.jit(add, donate_argnums=0).lower(*args).compile())
    loaded = cache.load("key", args)
    pair, double = loaded(Pair(jnp.arange(4.0), None), np.float32(3))
    assert pair.first.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert float(double) == 6.0
    assert cache.load("other", args) is None
    assert cache.load("key", (Pair(jnp.arange(5.0), None), args[1])) is None
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert cache.load("key", args) is None


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a file is in the way")
    args = (Pair(jnp.arange(4.0), None), jnp.float32(2))
    cache = ExecutableCache(tmp_path / "kept")
    cache.save("key", args, jax.jit(add).lower(*args).compile())
    assert cache.load("key", args) is None
