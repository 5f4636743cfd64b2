"""What a step of training minimises: against float64 NumPy, against the decode path, and in how much memory."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import pages_for
from lychee_jax.engine.options import AttentionOptions, EngineConfig, EngineOptions
from lychee_jax.engine.request import Request
from lychee_jax.engine.runner import Runner
from lychee_jax.engine.scheduler import Chunk, DecodeRow, DecodeWork, PrefillWork
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.rope import rotary_tables
from lychee_jax.training.distill import departures
from tests.support import oracle, tiny_models

PAGE, ROOM, LENGTH = 4, 14, 64
POLICY = SelectionPolicy(5 * PAGE, PAGE, PAGE, rule="ratio", ratio=0.3)
RULE = oracle.Rule(5, 1, 1, "ratio", 0.3)
LOADED = tiny_models.make()
CONFIG = LOADED.config
# Two answers with a question between them; the rows start at different places and end before their room does.
STARTS = np.array([37, 46], np.int32)
ANSWERS = np.array([[1, 1, 1, 1, 0, 0, 0, 2, 2, 2, 2, 2, 0, 0], [1, 1, 0, 0, 2, 2, 2, 0, 3, 3, 3, 3, 3, 3]], np.int32)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (2, LENGTH)).astype(np.int32)


def tables(length: int, config: Any = CONFIG) -> tuple[jax.Array, jax.Array]:
    at = np.arange(length)[None]
    found = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, at, np.array([length]))
    return jnp.asarray(found[0]), jnp.asarray(found[1])


def compiled(loss: Any) -> Any:
    """`z [B, L, K] → (loss [B], kept [B])`, compiled."""
    graph, weights = nnx.split(LOADED.model)

    @jax.jit
    def program(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        return departures(
            nnx.merge(graph, weights), jnp.asarray(TOKENS), jnp.asarray(STARTS), jnp.asarray(ANSWERS), z,
            tables(LENGTH), policy=POLICY, page_size=PAGE, loss=loss,
        )  # fmt: skip

    return program


hidden, logits = (functools.cache(compiled)(loss) for loss in ("hidden", "logits"))


# NumPy ----------------------------------------------------------------------------------------------------------------


class Judge(oracle.Oracle):
    """The oracle, token by token, whose heads mix what both roles read."""

    def follow(self, tokens: Sequence[int], gates: Sequence[np.ndarray | None]) -> np.ndarray:
        """Final-normed hidden states `[T, E]`; `gates[t] [L, K]`, None where a token is read densely."""
        c = self.config
        inverse = oracle.frequencies(c.rope, c.head_dim, len(tokens))
        keys: list[list[np.ndarray]] = [[] for _ in range(c.num_layers)]
        values: list[list[np.ndarray]] = [[] for _ in range(c.num_layers)]
        states, self.margin = [], np.inf
        for t, token in enumerate(tokens):
            x = self.w["embed.embedding"][token]
            handed: list[list[int]] = [[] for _ in range(c.num_kv_heads)]
            for layer in range(c.num_layers):
                q, k_new, v_new = self._project(layer, x, t, inverse)
                keys[layer].append(k_new)
                values[layer].append(v_new)
                k, v, z = np.stack(keys[layer]), np.stack(values[layer]), gates[t]
                mixed = np.zeros_like(q)
                for head in range(c.num_kv_heads):
                    share = 1.0 if z is None or layer == 0 else z[layer, head]
                    full = oracle.attend(q[head], k[:, head], v[:, head], self.scale)
                    mixed[head] = share * full
                    if share < 1.0:
                        below = handed[head]
                        sparse = oracle.attend_pages(q[head], k[:, head], v[:, head], below, PAGE, self.scale)
                        mixed[head] += (1.0 - share) * sparse
                    if share > 0.5 and z is not None:
                        scores = oracle.token_scores(q[head], k[:, head], self.scale)
                        picked = oracle.pick(oracle.page_scores(scores, PAGE, RULE.page_score), RULE)
                        self.margin = min(self.margin, picked.margin)
                        handed[head] = picked.pages
                x = self._finish_layer(layer, x, mixed)
            states.append(oracle._norm(x, self.w["norm.scale"], c.rms_norm_eps))
        return np.stack(states)

    def logits(self, states: np.ndarray) -> np.ndarray:
        return states @ self.w["lm_head.kernel"].T


@functools.cache
def judge() -> Judge:
    flat = nnx.to_flat_state(nnx.state(LOADED.model))
    return Judge({".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in flat}, CONFIG, PAGE)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@functools.cache
def by_numpy(row: int) -> tuple[float, float, float]:
    """Hidden loss, KL, and the share of kept tokens of one row under `GATES`."""
    end = STARTS[row] + ROOM
    decoded = [t >= STARTS[row] and ANSWERS[row, t - STARTS[row]] > 0 for t in range(end)]
    tokens = TOKENS[row, :end].tolist()
    teacher = judge().follow(tokens, [None] * end)
    student = judge().follow(tokens, [GATES[row] if now else None for now in decoded])
    assert judge().margin > 1e-4, "another seed: rounding may decide a page"
    counted = [
        t for t in range(STARTS[row], end - 1)
        if ANSWERS[row, t - STARTS[row]] and ANSWERS[row, t - STARTS[row]] == ANSWERS[row, t + 1 - STARTS[row]]
    ]  # fmt: skip
    far = [((student[t] - teacher[t]) ** 2).sum() / (teacher[t] ** 2).sum() for t in counted]
    want, got = log_softmax(judge().logits(teacher[counted])), log_softmax(judge().logits(student[counted]))
    kept = (want.argmax(-1) == got.argmax(-1)).mean()
    return float(np.mean(far)), float((np.exp(want) * (want - got)).sum(-1).mean()), float(kept)


GATES = np.random.default_rng(6).uniform(0.0, 1.0, (2, CONFIG.num_layers, CONFIG.num_kv_heads)).astype(np.float32)
GATES[:, 1, 0] = (0.0, 1.0)


@pytest.mark.parametrize(("program", "part"), [(hidden, 0), (logits, 1)], ids=["hidden", "logits"])
def test_losses_are_numpys(program, part):
    losses, kept = program(jnp.asarray(GATES))
    for row in range(2):
        want = by_numpy(row)
        assert want[part] > 1e-3
        assert float(losses[row]) == pytest.approx(want[part], rel=2e-3)
        assert float(kept[row]) == pytest.approx(want[2], abs=1e-6)


@pytest.mark.parametrize("program", [hidden, logits], ids=["hidden", "logits"])
def test_open_gates_are_the_teacher(program):
    losses, kept = program(jnp.ones_like(GATES))
    np.testing.assert_allclose(losses, 0.0, atol=1e-6)
    np.testing.assert_array_equal(kept, 1.0)


def test_answers_of_one_token_count_for_nothing():
    graph, weights = nnx.split(LOADED.model)
    single = np.zeros_like(ANSWERS)
    single[:, [0, 3, 7]] = [1, 2, 3]
    losses, kept = jax.jit(lambda z: departures(
        nnx.merge(graph, weights), jnp.asarray(TOKENS), jnp.asarray(STARTS), jnp.asarray(single), z, tables(LENGTH),
        policy=POLICY, page_size=PAGE, loss="hidden",
    ))(jnp.zeros_like(GATES))  # fmt: skip
    np.testing.assert_array_equal(losses, 0.0)
    np.testing.assert_array_equal(kept, 0.0)


# The decode path ------------------------------------------------------------------------------------------------------


def test_hard_gates_are_hybrid_decoding(monkeypatch):
    """Answers through hybrid decode steps, questions through dense ones: the same log-probabilities, row by row."""
    head_map = HeadMap(3, 2, ((0, 1), (1,), (0,)))
    z = np.zeros((2, 3, 2), np.float32)
    for layer, heads in enumerate(head_map.retrieval):
        z[:, layer, list(heads)] = 1.0
    seen: list[jax.Array] = []
    original = Decoder.logits

    def watched(self: Decoder, hidden: jax.Array) -> jax.Array:
        seen.append(original(self, hidden))
        return seen[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "logits", watched)
        departures(
            LOADED.model, jnp.asarray(TOKENS), jnp.asarray(STARTS), jnp.asarray(ANSWERS), jnp.asarray(z),
            tables(LENGTH), policy=POLICY, page_size=PAGE, loss="logits",
        )  # fmt: skip
    teacher, student = (log_softmax(np.asarray(each, np.float64)) for each in seen)

    # One step a program: each feeds a token in the way of its own mark.
    config = EngineConfig(min_rows=2, correct_rows=1, block_steps=1)
    each = pages_for(LENGTH, PAGE)
    runner = Runner(
        LOADED.spec, LOADED.weights, EngineOptions(PAGE, max_num_seqs=2), config, num_pages=2 * each + 2,
        max_model_len=LENGTH,
    )  # fmt: skip
    pages = [tuple(range(row * each, (row + 1) * each)) for row in range(2)]
    requests = []
    for row in range(2):
        given = TOKENS[row, STARTS[row] :][:ROOM].tolist()
        requests.append(Request(str(row), tuple(TOKENS[row, : STARTS[row]].tolist()), ROOM, forced=tuple(given)))
        chunk = Chunk(requests[row], row, pages[row], 0, int(STARTS[row]), last=True)
        runner.prefill(PrefillWork((chunk,), each * PAGE))
    ways = {True: AttentionOptions("hybrid", head_map, POLICY), False: AttentionOptions("dense", head_map, POLICY)}
    compared = 0
    for step in range(1, ROOM):  # the very first token is predicted by the prompt
        for is_answer, attention in ways.items():
            chosen = [row for row in range(2) if bool(ANSWERS[row, step - 1]) == is_answer]
            if not chosen:
                continue
            rows = [DecodeRow(requests[row], row, pages[row], int(STARTS[row]) + step - 1, step) for row in chosen]
            found = np.asarray(runner.decode(DecodeWork(attention, tuple(rows))).block.logprobs)[0]
            for column, row in enumerate(chosen):
                token = TOKENS[row, STARTS[row] + step]
                assert student[row, step - 1, token] == pytest.approx(found[column], abs=3e-4), (row, step)
                compared += 1
    assert compared == 2 * (ROOM - 1)
    assert np.abs(teacher - student).max() > 0.1


# Memory ---------------------------------------------------------------------------------------------------------------


def temporary_bytes(length: int) -> int:
    """What the compiled gradient needs beside its arguments, for rows of which a quarter are answers."""
    config = tiny_models.CONFIG
    config = type(config)(**{**vars(config), "max_position_embeddings": length, "num_layers": 2})
    graph, weights = nnx.split(nnx.eval_shape(lambda: Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(0))))
    policy = SelectionPolicy(length // 4, 64, 64)

    def total(z: jax.Array, weights: Any, tokens: jax.Array, starts: jax.Array, answers: jax.Array, *angles: jax.Array):
        losses, _ = departures(
            nnx.merge(graph, weights), tokens, starts, answers, z, (angles[0], angles[1]), policy=policy, page_size=64,
            loss="hidden",
        )  # fmt: skip
        return jnp.sum(losses)

    def whole(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    angle = jax.ShapeDtypeStruct((1, length, config.head_dim // 2), jnp.float32)
    z = jax.ShapeDtypeStruct((1, 2, 2), jnp.float32)
    program = jax.jit(jax.grad(total)).lower(
        z, weights, whole(1, length), whole(1), whole(1, length // 4), angle, angle
    )
    analysis = program.compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


@pytest.mark.slow
def test_memory_grows_with_the_length_and_not_with_its_square():
    short, long = temporary_bytes(2048), temporary_bytes(8192)
    assert 1.5 * short < long < 6.0 * short  # in proportion: 4; with its square: 16
