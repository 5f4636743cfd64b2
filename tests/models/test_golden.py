"""The decoder against logits that Hugging Face transformers computed (`golden/make_golden.py`), for every case."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig, RopeConfig
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.llm import LLM
from lychee_jax.models.rope import rotary_tables
from tests.support.golden import CASES, GOLDEN, Prompt, golden_model, golden_prompts
from tests.support.hybrid_models import small_chunks

TOLERANCE = 2e-4


@functools.cache
def forward(case: str):
    """Compiled tokens, cos, sin → logits of the case's model; another rope needs no other program."""
    graphdef, state = nnx.split(golden_model(case))

    @jax.jit
    def run(state, tokens, cos, sin):
        model = nnx.merge(graphdef, state)
        return model.logits(model.hidden(tokens, cos, sin))

    return functools.partial(run, state)


def whole_sequence_logits(case: str, golden: Prompt, rope: RopeConfig) -> np.ndarray:
    """[T + n − 1, V] logits of prompt and new tokens in one forward, each position rotated as a cache would hold it."""
    config = ModelConfig.from_folder(GOLDEN / case)
    tokens = np.concatenate([golden.prompt, golden.tokens[:-1]])[None]
    positions = np.arange(tokens.shape[1])[None]
    # The whole prompt for its own positions, then a length that grows with every token.
    lengths = np.maximum(positions + 1, len(golden.prompt))
    cos, sin = rotary_tables(rope, config.head_dim, config.max_position_embeddings, positions, lengths)
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(case)(jnp.asarray(tokens), jnp.asarray(cos), jnp.asarray(sin)))[0]


@pytest.mark.parametrize("case", CASES)
def test_whole_sequence_logits(case):
    rope = ModelConfig.from_folder(GOLDEN / case).rope
    for golden in golden_prompts(case):
        logits = whole_sequence_logits(case, golden, rope)
        expected = np.concatenate([golden.logits, golden.token_logits[1:]])
        np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def other_ropes(case: str) -> list[RopeConfig]:
    """The case's rope with one field at a time put back to its default."""
    rope = ModelConfig.from_folder(GOLDEN / case).rope
    default = RopeConfig()
    names = {field.name for field in dataclasses.fields(rope)}
    if rope.kind in ("linear", "dynamic"):
        names.remove("original_max_position_embeddings")  # it only sets the limit on tokens
    if not rope.mscale_all_dim:
        names.remove("mscale")  # it counts in a pair only
    used = [name for name in sorted(names) if getattr(rope, name) != getattr(default, name)]
    return [dataclasses.replace(rope, **{name: getattr(default, name)}) for name in used]


@pytest.mark.parametrize("case", [case for case in CASES if other_ropes(case)])
def test_golden_files_notice_every_rope_option(case):
    """A golden file that does not notice a wrong option proves nothing about it."""
    for golden in golden_prompts(case):
        expected = np.concatenate([golden.logits, golden.token_logits[1:]])
        for rope in other_ropes(case):
            error = np.abs(whole_sequence_logits(case, golden, rope) - expected).max()
            assert error > 50 * TOLERANCE, rope


# Every family, biases and tied embeddings, and the ropes whose keys depend on more than their position. Programs are
# compiled for each case, which takes the time: group sizes and other ropes are for test_hybrid, against the oracle.
DENSE = ("llama-all-biases", "qwen3-g8", "dynamic-v4", "yarn-attention-factor")
HYBRID = ("llama3-g4", "qwen2.5-tied-g2", "dynamic-v5")


@pytest.mark.parametrize(
    ("case", "attention"), [(case, "dense") for case in DENSE] + [(case, "hybrid") for case in HYBRID]
)
def test_paged_decoding(case, attention):
    """Greedy tokens and their log-probabilities, all prompts of the case as one batch; hybrid: every head retrieves."""
    golden, config = golden_prompts(case), ModelConfig.from_folder(GOLDEN / case)
    options = GenerateOptions(
        attention=attention,
        heads=HeadMap.all(config) if attention == "hybrid" else None,
        policy=SelectionPolicy(budget=32, sink=16, recent=16),
        page_size=16,
        max_new_tokens=len(golden[0].tokens),
    )
    # Chunks of two pages: every prompt takes several.
    model = LLM(GOLDEN / case, config, golden_model(case), None, (), engine_config=small_chunks(32))
    result = model.generate_tokens([prompt.prompt.tolist() for prompt in golden], options)
    for row, prompt in enumerate(golden):
        assert result.tokens[row] == prompt.tokens.tolist()
        logprobs = prompt.token_logits - np.logaddexp.reduce(prompt.token_logits, axis=-1, keepdims=True)
        chosen = np.take_along_axis(logprobs, prompt.tokens[:, None], axis=-1)[:, 0]
        np.testing.assert_allclose(result.logprobs[row], chosen, rtol=0, atol=TOLERANCE)
