"""Logits that are not finite end a request with one clear error: from NaN weights, or by overflow in half precision."""

import dataclasses

import jax.numpy as jnp
import pytest

from lychee_jax.engine.keywords import GenerateKeywords
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from tests.support import tiny_models

PROMPT = [5, 6, 7, 8]
SMALL: GenerateKeywords = {"attention": "dense", "page_size": 8, "max_new_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def model() -> LLM:
    return tiny_models.make()


def changed(model: LLM, name: str, change) -> LLM:
    """The model with one other tensor."""
    weights = dict(zip(model.spec.names, model.weights, strict=True))
    weights[name] = change(weights[name])
    return dataclasses.replace(model, model=model.spec.merge(tuple(weights.values())))


def test_a_weight_that_is_nan(model):
    broken = changed(model, "norm.scale", lambda scale: scale.at[3].set(jnp.nan))
    told = r"logits are not finite after 0 new tokens: weights are \(convert --verify finds them\), .* float32$"
    with pytest.raises(UserError, match=told):
        broken.generate([PROMPT], **SMALL)


def test_a_token_that_is_reached_later(model):
    """What came before it is a text as ever; nothing of the loop after it is."""
    tokens = model.generate([PROMPT], **SMALL).tokens[0]
    count = next(n for n, token in enumerate(tokens) if n > 2 and token not in [*PROMPT, *tokens[:n]])
    broken = changed(model, "embed.embedding", lambda table: table.at[tokens[count]].set(jnp.nan))
    with pytest.raises(UserError, match=f"not finite after {count + 1} new tokens"):
        broken.generate([PROMPT], **SMALL)
    assert broken.generate([PROMPT], **SMALL | {"max_new_tokens": count + 1}).tokens == [tokens[: count + 1]]


def test_overflow_in_half_precision(model):
    half = dataclasses.replace(
        model,
        config=dataclasses.replace(model.config, dtype="float16"),
        model=model.spec.merge(tuple((array * 300).astype(jnp.float16) for array in model.weights)),
    )
    with pytest.raises(UserError, match="overflow in float16; try bfloat16 or float32"):
        half.generate([PROMPT], **SMALL)
