"""Requests whose tokens a grammar restricts, among others: neither changes anything else about the other."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionOptions, EngineOptions
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.models.decoder import Decoder
from tests.support.company import collect
from tests.support.grammars import EvenThenEnd
from tests.support.hybrid_models import small_chunks

VOCABULARY, END = 40, 6
CONFIG = ModelConfig("llama", VOCABULARY, 32, 48, 2, 4, 2, 16, 512)
ATTENTION = AttentionOptions("hybrid", HeadMap(2, 2, ((0, 1), (1,))), SelectionPolicy(budget=32, sink=8, recent=8))
SAMPLING = (SamplingParams(), SamplingParams(1.2, top_p=0.9, seed=3, frequency_penalty=0.5))


def prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(0, VOCABULARY, length).tolist())


PLAIN = [Request(f"plain{row}", prompt(30 + 17 * row), 30, SAMPLING[row % 2], ATTENTION) for row in range(3)]


def guided(name: str, count: int, *, new: int = 30, stops: bool = False, sampling: int = 0) -> Request:
    return Request(
        name, prompt(21), new, SAMPLING[sampling], ATTENTION, (END,), top_logprobs=3,
        grammar=EvenThenEnd(VOCABULARY, count, END, stops=stops),
    )  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LLM:
    return LLM(Path("tiny"), CONFIG, Decoder(CONFIG, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)), None, ())


@pytest.fixture(scope="module")
def engine(model: LLM) -> Engine:
    options = EngineOptions(8, max_num_seqs=8, max_model_len=128)
    return Engine(model.spec, model.weights, options, small_chunks(32, batch_factor=8))


@pytest.fixture(scope="module")
def alone(engine: Engine) -> dict[str, RequestOutput]:
    """The plain ones, without guided company."""
    found: dict[str, RequestOutput] = {}
    for request in PLAIN:
        engine.add_request(request)
    collect(engine, found)
    return found


def test_guided_and_plain_rows_share_batches(engine: Engine, alone: dict[str, RequestOutput]) -> None:
    """Guided ones come while others decode, and end before them; one is alone at last."""
    found: dict[str, RequestOutput] = {}
    for request in PLAIN[:2]:
        engine.add_request(request)
    collect(engine, found, 3)
    made = [guided("greedy", 9), guided("drawn", 5, sampling=1), guided("stopped", 12, stops=True)]
    for request in (*made, PLAIN[2]):
        engine.add_request(request)
    collect(engine, found)
    for request in PLAIN:
        assert found[request.id].tokens == alone[request.id].tokens
        np.testing.assert_allclose(found[request.id].logprobs, alone[request.id].logprobs, atol=1e-5)
    for request in made:
        grammar, text = request.grammar, found[request.id]
        assert isinstance(grammar, EvenThenEnd)
        ended = request.id != "stopped"
        assert text.tokens == [*grammar.taken, END] if ended else text.tokens == grammar.taken
        assert len(grammar.taken) == {"greedy": 9, "drawn": 5, "stopped": 12}[request.id]
        assert all(token % 2 == 0 and token != END for token in grammar.taken)
        assert text.finish_reason == "stop"
    # Log-probabilities are those of the raw logits: what forcing the same tokens gives.
    text = found["greedy"]
    engine.add_request(Request("forced", prompt(21), 10, attention=ATTENTION, forced=tuple(text.tokens)))
    forced: dict[str, RequestOutput] = {}
    collect(engine, forced)
    np.testing.assert_allclose(text.logprobs, forced["forced"].logprobs, atol=1e-5)
    assert any(top[0][0] % 2 for top in text.top), "a forbidden token is the likeliest somewhere, or this tests nothing"
    # Company changes nothing for guided ones, either.
    for request in (guided("greedy", 9), guided("drawn", 5, sampling=1)):
        engine.add_request(request)
        once: dict[str, RequestOutput] = {}
        collect(engine, once)
        assert once[request.id].tokens == found[request.id].tokens


def test_while_a_guided_row_decodes_blocks_have_one_step_and_nothing_is_sent_ahead(engine: Engine) -> None:
    runner = engine.runner
    assert runner is not None
    engine.add_request(PLAIN[0])
    engine.add_request(guided("g", 9))
    found: dict[str, RequestOutput] = {}
    while len(found.get("g", RequestOutput("g")).tokens) < 3:
        collect(engine, found, 1)
    sent, had = runner.blocks_sent, {name: len(found[name].tokens) for name in ("g", PLAIN[0].id)}
    collect(engine, found, 4)
    assert runner.blocks_sent - sent == 4
    assert {name: len(found[name].tokens) - had[name] for name in had} == {"g": 4, PLAIN[0].id: 4}
    collect(engine, found)
    assert len(found[PLAIN[0].id].tokens) == 30
    assert runner.blocks_sent - sent < 15, "blocks are long again when the guided one has ended"


def test_limits_aborts_and_slots_that_come_after(engine: Engine, alone: dict[str, RequestOutput]) -> None:
    found: dict[str, RequestOutput] = {}
    for request in (guided("cut", 20, new=4), guided("single", 20, new=1), guided("gone", 20), PLAIN[1]):
        engine.add_request(request)
    while "gone" not in found:
        collect(engine, found, 1)
    engine.abort("gone")
    collect(engine, found)
    assert found["gone"].finish_reason == "abort"
    for name, count in (("cut", 4), ("single", 1)):
        assert (len(found[name].tokens), found[name].finish_reason) == (count, "length")
    assert found[PLAIN[1].id].tokens == alone[PLAIN[1].id].tokens
    # A guided request that is held after its end keeps nobody waiting.
    engine.add_request(guided("held", 2, stops=True), hold=True)
    engine.add_request(PLAIN[0])
    for _ in range(200):
        collect(engine, found, 1)
        if found.get(PLAIN[0].id, RequestOutput("")).finish_reason is not None:
            break
    assert found[PLAIN[0].id].tokens == alone[PLAIN[0].id].tokens
    engine.finish("held")
    collect(engine, found)
    assert engine.allocator is not None
    assert engine.allocator.num_owned == 0


class Refusing(EvenThenEnd):
    """Ends with an error after the first token, or has none to go on with."""

    def __init__(self, *, silent: bool) -> None:
        super().__init__(VOCABULARY, 9, END)
        self._silent = silent

    def mask(self) -> np.ndarray:
        """Nothing from the second token on."""
        return super().mask() & (not self.taken)

    def accept(self, token: int) -> None:
        """Say so, or not."""
        super().accept(token)
        if not self._silent:
            raise UserError("nothing can follow")


@pytest.mark.parametrize(("silent", "message"), [(True, "the grammar allows no token after 1"), (False, "can follow")])
def test_a_grammar_that_gets_stuck_ends_its_own_request_alone(
    engine: Engine, alone: dict[str, RequestOutput], silent: bool, message: str
) -> None:
    stuck = Request("stuck", prompt(21), 9, attention=ATTENTION, grammar=Refusing(silent=silent))
    engine.add_request(stuck)
    engine.add_request(PLAIN[0])
    found: dict[str, RequestOutput] = {}
    errors = []
    while engine.has_work:
        for output in engine.step():
            errors += [output.error] if output.error else []
            found.setdefault(output.request_id, RequestOutput("")).tokens += output.tokens
    assert len(errors) == 1
    assert message in errors[0]
    assert found[PLAIN[0].id].tokens == alone[PLAIN[0].id].tokens


def test_what_is_compiled_for_a_guided_request_is_known_before_it_comes(model: LLM) -> None:
    options = EngineOptions(8, max_num_seqs=8, max_model_len=128, cache_memory=1 << 20)
    engine = Engine(model.spec, model.weights, options, small_chunks(32, batch_factor=8))
    request = guided("g", 5)
    engine.prepare([request])
    assert isinstance(request.grammar, EvenThenEnd)
    assert request.grammar.taken == [], "a rehearsal tells a grammar nothing"


def test_what_cannot_be_guided_is_refused(engine: Engine, model: LLM) -> None:
    grammar = EvenThenEnd(VOCABULARY, 2, END)
    with pytest.raises(UserError, match="tokens are forced, and a grammar"):
        engine.add_request(Request("r", prompt(5), 3, attention=ATTENTION, forced=(1,), grammar=grammar))
    with pytest.raises(UserError, match=r"shape \(39,\); the vocabulary has 40 ids"):
        engine.add_request(Request("r", prompt(5), 3, attention=ATTENTION, grammar=EvenThenEnd(39, 2, END)))
    stuck = Refusing(silent=True)
    stuck.accept(0)
    with pytest.raises(UserError, match="allows no first token"):
        engine.add_request(Request("r", prompt(5), 3, attention=ATTENTION, grammar=stuck))
    corrected = Engine(model.spec, model.weights, EngineOptions(8, correct_every=4), small_chunks(32))
    with pytest.raises(UserError, match="correct_every must be 0"):
        corrected.add_request(Request("r", prompt(5), 3, attention=ATTENTION, grammar=grammar))
