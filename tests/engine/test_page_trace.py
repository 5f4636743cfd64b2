"""What a step is said to read is what it reads: NaN in every other page changes nothing."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.request import Request
from lychee_jax.engine.runner import Runner
from lychee_jax.engine.scheduler import Chunk, DecodeRow, DecodeWork, PrefillWork
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from lychee_jax.plotting.attention import plot_reading
from pallas_kernels import KVPages
from tests.support.hybrid_models import small_chunks

CONFIG = ModelConfig("llama", 64, 32, 48, 3, 4, 2, 16, 4096)
OPTIONS = GenerateOptions(
    "hybrid", HeadMap(3, 2, ((0, 1), (1,), ())), SelectionPolicy(budget=32, sink=8, recent=8), page_size=8,
    max_new_tokens=2, ignore_eos=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = small_chunks(64, block_steps=1)
    return LLM(Path("tiny"), CONFIG, Decoder(CONFIG, rngs=nnx.Rngs(0)), None, (), engine_config=config)


PAGES = tuple(range(27))


def read(runner: Runner, prompt: list[int]) -> Request:
    """The prompt, page by page in the pool's first pages, its first token chosen."""
    request = Request("read", tuple(prompt), 2, attention=OPTIONS.attention_options)
    for start in range(0, len(prompt), 64):
        count = min(64, len(prompt) - start)
        chunk = Chunk(request, 0, PAGES, start, count, last=start + count == len(prompt))
        runner.prefill(PrefillWork((chunk,), 64))
    return request


def step(runner: Runner, request: Request) -> tuple[int, float, int]:
    """Token, log-probability and pages read of the first decode step."""
    row = DecodeRow(request, 0, PAGES, len(request.prompt), 1)
    block = runner.decode(DecodeWork(request.attention, (row,))).block
    return int(block.tokens[0, 0]), float(block.logprobs[0, 0]), int(block.pages_read[0, 0])


def test_pages_that_are_not_read_may_hold_anything(model):
    prompt = np.random.default_rng().integers(64, size=213).tolist()
    reading = model.read_pages(prompt, OPTIONS)
    assert reading.pages.shape == (3, 2, 27)
    assert reading.length == 214
    assert reading.pages[0].all()
    assert reading.pages[1, 1].all()
    counts = reading.pages.sum(axis=-1)
    assert counts[1, 0] == counts[2, 0] == counts[2, 1] == 4
    assert (reading.pages[2, 0] == reading.pages[1, 0]).all()
    assert reading.share < 1
    runner = model.engine(OPTIONS.engine).runner
    assert runner is not None
    expected = step(runner, read(runner, prompt))
    assert expected[2] == reading.pages.sum()
    # Poison, in the last layer, whatever its two sparse heads are said not to read.
    request = read(runner, prompt)
    pool = np.array(runner.pools[2].data)
    for head in (0, 1):
        pool[np.asarray(PAGES)[~reading.pages[2, head]], head] = np.nan
    runner.pools = (*runner.pools[:2], KVPages(jnp.asarray(pool)))
    assert step(runner, request) == expected
    model.engine(OPTIONS.engine).reset_prefix_cache()  # its pages were written to


def test_watching_a_step_changes_nothing(model):
    prompt = np.random.default_rng().integers(64, size=213).tolist()
    expected = model.generate_tokens([prompt], OPTIONS)
    first = model.read_pages(prompt, OPTIONS)
    assert (first.pages == model.read_pages(prompt, OPTIONS).pages).all()
    found = model.generate_tokens([prompt], OPTIONS)
    assert found.cached_tokens == [192]
    assert (found.tokens, found.logprobs) == (expected.tokens, expected.logprobs)
    assert first.pages.sum() == expected.pages_read[0]


def test_a_busy_engine_is_not_watched(model):
    stream = model.stream_tokens([[1, 2, 3]], OPTIONS)
    with pytest.raises(UserError, match="busy"):
        model.read_pages([1, 2, 3], OPTIONS)
    stream.close()
    with pytest.raises(UserError, match="empty"):
        model.read_pages([], OPTIONS)
    assert not model.engine(OPTIONS.engine).has_work


def test_the_picture_is_a_png(model, tmp_path):
    plot_reading(model.read_pages([1, 2, 3] * 40, OPTIONS), tmp_path / "reading.png", marks={"answer": 30})
    assert (tmp_path / "reading.png").read_bytes()[:4] == b"\x89PNG"
