"""Penalties, biases and many ends of a text, from the request to its tokens: no row touches another."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineOptions
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import MAX_EOS_IDS, Request
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from tests.support.company import collect
from tests.support.hybrid_models import small_chunks

VOCABULARY = 20  # as many as top log-probabilities are reported: these tell all logits
CONFIG = ModelConfig("llama", VOCABULARY, 32, 48, 2, 4, 2, 16, 512)
ATTENTION = AttentionOptions("dense", None, SelectionPolicy())
PROMPT = tuple(np.random.default_rng(0).integers(0, VOCABULARY, 13).tolist())
PARAMS = {
    "plain": SamplingParams(),
    "presence": SamplingParams(presence_penalty=2.0),
    "frequency": SamplingParams(frequency_penalty=1.1),
    "wanted": SamplingParams(frequency_penalty=-2.0),
    "biased": SamplingParams(logit_bias=((3, 1.5), (19, 2.0)), frequency_penalty=0.5, presence_penalty=0.3),
    "forbidden": SamplingParams(logit_bias=tuple((token, -100.0) for token in range(0, VOCABULARY, 2))),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    model = LLM(Path("tiny"), CONFIG, Decoder(CONFIG, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)), None, ())
    options = EngineOptions(8, max_num_seqs=8, max_model_len=128)
    return Engine(model.spec, model.weights, options, small_chunks(32, batch_factor=8))


def run(engine: Engine, *requests: Request) -> dict[str, RequestOutput]:
    found: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add_request(request)
    collect(engine, found)
    return found


def test_counts_are_of_the_text_so_far_and_rows_are_what_they_are_alone(engine: Engine) -> None:
    made = [Request(name, PROMPT, 20, params, ATTENTION, top_logprobs=VOCABULARY) for name, params in PARAMS.items()]
    together = run(engine, *made)
    for request in made:
        counts, found = np.zeros(VOCABULARY), together[request.id]
        bias = np.zeros(VOCABULARY)
        for token, value in request.sampling.logit_bias:
            bias[token] = value
        for token, top in zip(found.tokens, found.top, strict=True):
            scores = np.zeros(VOCABULARY)
            scores[[each for each, _ in top]] = [logprob for _, logprob in top]
            scores += bias - request.sampling.frequency_penalty * counts
            scores -= request.sampling.presence_penalty * (counts > 0)
            assert token == scores.argmax(), request.id
            counts[token] += 1
        assert len(found.tokens) == 20
    assert len({tuple(found.tokens) for found in together.values()}) >= 5, "or this compares nothing"
    for request in made[:2]:
        assert run(engine, request)[request.id].tokens == together[request.id].tokens


def test_a_slot_forgets_what_its_last_row_asked_for(engine: Engine) -> None:
    request = Request("again", PROMPT, 12, attention=ATTENTION)
    before = run(engine, request)["again"].tokens
    run(engine, *(Request(name, PROMPT, 12, params, ATTENTION) for name, params in PARAMS.items()))
    again = run(engine, *(Request(str(slot), PROMPT, 12, attention=ATTENTION) for slot in range(8)))
    assert [found.tokens for found in again.values()] == [before] * 8
    repeated = Request("presence", PROMPT, 20, PARAMS["presence"], ATTENTION)
    assert run(engine, repeated)["presence"].tokens == run(engine, repeated)["presence"].tokens


def test_a_text_may_have_many_ends(engine: Engine) -> None:
    tokens = run(engine, Request("free", PROMPT, 12, attention=ATTENTION))["free"].tokens
    ends = (*(1000 + np.arange(MAX_EOS_IDS - 1)).tolist(), tokens[4])
    found = run(engine, Request("ended", PROMPT, 12, attention=ATTENTION, eos_ids=ends))["ended"]
    assert (found.tokens, found.finish_reason) == (tokens[: tokens.index(tokens[4]) + 1], "stop")
    with pytest.raises(UserError, match="25 token ids end the text; at most 24 may"):
        engine.add_request(Request("many", PROMPT, 12, attention=ATTENTION, eos_ids=(*ends, 7)))


def test_a_bias_for_what_is_no_token_is_refused(engine: Engine) -> None:
    with pytest.raises(UserError, match=f"token id {VOCABULARY}; the vocabulary has ids 0 to {VOCABULARY - 1}"):
        engine.add_request(Request("r", PROMPT, 1, SamplingParams(logit_bias=((VOCABULARY, 1.0),)), ATTENTION))
