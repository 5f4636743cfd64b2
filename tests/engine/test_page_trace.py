"""What a step is said to read is what it reads: NaN in every other page changes nothing."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.outputs import Prefilled
from lychee_jax.engine.page_trace import read_pages
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder
from lychee_jax.plotting.attention import plot_reading
from pallas_kernels import KVPages

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
OPTIONS = GenerateOptions(
    "hybrid", HeadMap(3, 2, ((0, 1), (1,), ())), SelectionPolicy(budget=32, sink=8, recent=8), page_size=8,
    max_new_tokens=2, ignore_eos=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    return Engine(Decoder(CONFIG, rngs=nnx.Rngs(0)))


def two_tokens(engine: Engine, filled: Prefilled):
    stream = engine.decode(filled, OPTIONS, keep=True)
    for _ in stream:
        pass
    return stream.result()


def test_pages_that_are_not_read_may_hold_anything(engine):
    rng = np.random.default_rng()
    filled = engine.prefill([rng.integers(64, size=213).tolist(), [3] * 20], max_new_tokens=2, page_size=8)
    reading = read_pages(engine, filled, OPTIONS)
    assert reading.pages.shape == (3, 2, 27)
    assert reading.length == 214
    assert reading.pages[0].all()
    assert reading.pages[1, 1].all()
    counts = reading.pages.sum(axis=-1)
    assert counts[1, 0] == counts[2, 0] == counts[2, 1] == 4
    assert (reading.pages[2, 0] == reading.pages[1, 0]).all()
    expected = two_tokens(engine, filled)
    assert reading.share < 1
    # Poison, in the last layer, whatever its two sparse heads are said not to read.
    assert filled.pools is not None
    table = np.asarray(filled.page_table)[0, :27]
    pool = np.array(filled.pools[2].data)
    for head in (0, 1):
        pool[table[~reading.pages[2, head]], head] = np.nan
    poisoned = dataclasses.replace(filled, pools=(*filled.pools[:2], KVPages(jnp.asarray(pool))))
    found = two_tokens(engine, poisoned)
    assert found.tokens[0] == expected.tokens[0]
    assert found.logprobs[0] == expected.logprobs[0]


def test_the_picture_is_a_png(engine, tmp_path):
    filled = engine.prefill([[1, 2, 3] * 40], max_new_tokens=2, page_size=8)
    plot_reading(read_pages(engine, filled, OPTIONS), tmp_path / "reading.png", marks={"answer": 30})
    assert (tmp_path / "reading.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="there are 1 prompts"):
        read_pages(engine, filled, OPTIONS, row=1)
    two_tokens(engine, filled)
    filled.pools = None
    with pytest.raises(UserError, match="decoded already"):
        read_pages(engine, filled, OPTIONS)
