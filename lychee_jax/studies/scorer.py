"""Right answers under hybrid decoding with any roles, without decoding: prompts are read once, densely, then all tokens
of their answers go through the layers at once, each as the decode step at its place (`Gated` with z of 0 and 1).

An answer counts if every token of it, its end included, is the likeliest after the right ones before it: exactly then
greedy decoding would write it.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from lychee_jax.attention.backend import attention_scale
from lychee_jax.attention.gated import Gated, KeysAndValues, Remember
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import pages_for
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.models.decoder import Decoder
from lychee_jax.models.rope import rotary_tables

type Tables = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class Memory:
    """Prompts of `length` tokens that were read: each layer's keys and values `[B, S, K, H]`, with room for all tokens
    of an answer but the last, and the last hidden states `[B, E]`.
    """

    layers: tuple[KeysAndValues, ...]
    last: Float[Array, "B E"]
    length: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of every answer, whether it is right and its mean loss in nats a token; and what its decode steps read.

    `sparse_read` counts pages over rows, steps and sparse heads; `held` those that one head has in the cache, over rows
    and steps: what it would read densely.
    """

    right: Bool[np.ndarray, " B"]
    losses: Float32[np.ndarray, " B"]
    sparse_read: int
    held: int


@dataclasses.dataclass(frozen=True)
class ProgramKey:
    """What decides which program scores: everything that is no array. `weighs`: it gives masses, not verdicts."""

    rows: int
    length: int
    answer: int
    policy: SelectionPolicy
    page_size: int
    weighs: bool = False


class Scorer:
    """A model that scores given answers; `workers` threads compile ahead what `prepare` announces."""

    def __init__(self, config: ModelConfig, model: Decoder, *, workers: int = 1) -> None:
        self.config = config
        self._graph, self._weights = nnx.split(model)
        layers = [nnx.split(layer) for layer in model.layers]
        self._layer_graph, self._layers = layers[0][0], [weights for _, weights in layers]
        self._dtype = jax.tree.leaves(self._weights)[0].dtype
        self._workers = concurrent.futures.ThreadPoolExecutor(workers)
        self._programs: dict[ProgramKey, concurrent.futures.Future[Any]] = {}

    def close(self) -> None:
        """Let go of the threads; what they have not begun is not compiled."""
        self._workers.shutdown(cancel_futures=True)

    def prepare(self, kinds: Iterable[ProgramKey]) -> None:
        """Compile programs in the background, in this order."""
        for kind in kinds:
            if kind not in self._programs:
                self._programs[kind] = self._workers.submit(self._compile, kind)

    def read(self, prompts: Int[np.ndarray, "B T"], answer: int) -> Memory:
        """Read prompts densely, with room for answers of `answer` tokens.

        Raises:
            UserError: more tokens than the model has positions for.
        """
        length = prompts.shape[1]
        if length + answer > self.config.max_tokens:
            raise UserError(
                f"prompts of {length} tokens and answers of {answer} exceed the model's limit, {self.config.max_tokens}"
            )
        with self._precision():
            # Row by row: one program for every number of rows, and what it needs in between does not grow with them.
            angles = self._angles(0, length)
            read = [_read(self._graph, self._weights, row[None], *angles) for row in prompts]
        layers, last = _gather(tuple(row for row, _ in read), tuple(row for _, row in read), answer - 1)
        return Memory(layers, last, length)

    def score(
        self, memory: Memory, answers: Int[np.ndarray, "B A"], roles: Bool[np.ndarray, "L K"], policy: SelectionPolicy,
        page_size: int,
    ) -> Verdict:  # fmt: skip
        """Score `answers`, padded with −1, in hybrid decoding with these roles (layer 0 all True)."""
        layer = self._program(ProgramKey(memory.last.shape[0], memory.length, answers.shape[1], policy, page_size))
        fed = jnp.asarray(answers[:, 1:] >= 0)
        with self._precision():
            x, below, reads = self._start(memory, answers, page_size)
            for index, weights in enumerate(self._layers):
                x, below, read = layer(
                    weights, x, *self._angles(memory.length, answers.shape[1] - 1), self._gates(roles, index, len(x)),
                    fed, memory.layers[index], below,
                )  # fmt: skip
                reads.append(read)
            verdict = _judge(self._graph, self._weights, memory.last, x, answers, tuple(reads))
        right, losses, sparse_read = jax.device_get(verdict)
        # Token i of an answer is fed at the end of S + i others.
        held = sum(
            int(np.sum(answers[:, i + 1] >= 0)) * pages_for(memory.length + i + 1, page_size)
            for i in range(answers.shape[1] - 1)
        )
        return Verdict(right, losses, int(sparse_read), held)

    def masses(
        self, memory: Memory, answers: Int[np.ndarray, "B A"], roles: Bool[np.ndarray, "L K"], policy: SelectionPolicy,
        page_size: int,
    ) -> Iterator[Float32[np.ndarray, "B K T P"]]:  # fmt: skip
        """Layer by layer, every head's log of the attention mass of each page (up to a constant), at every step.

        Positions after the one that is fed count as −∞.
        """
        layer = self._program(
            ProgramKey(memory.last.shape[0], memory.length, answers.shape[1], policy, page_size, True)
        )
        with self._precision():
            x, below, _ = self._start(memory, answers, page_size)
        for index, weights in enumerate(self._layers):
            x, below, masses = layer(
                weights, x, *self._angles(memory.length, answers.shape[1] - 1), self._gates(roles, index, len(x)),
                memory.layers[index], below,
            )  # fmt: skip
            yield np.asarray(masses)

    def _start(self, memory: Memory, answers: np.ndarray, page_size: int) -> tuple[jax.Array, jax.Array, list[Any]]:
        """What enters layer 0: the answers' tokens but the last, and no pages.

        Raises:
            ValueError: the prompts were read with room for other answers.
        """
        rows, steps = answers.shape[0], answers.shape[1] - 1
        room = memory.layers[0][0].shape[1] - memory.length
        if (rows, steps) != (memory.last.shape[0], room):
            raise ValueError(f"answers {answers.shape} for {memory.last.shape[0]} prompts with room for {room} tokens")
        x = _embed(self._graph, self._weights, np.maximum(answers[:, :-1], 0))
        pages = pages_for(memory.length + steps, page_size)
        return x, jnp.zeros((rows, self.config.num_kv_heads, steps, pages), bool), []

    def _gates(self, roles: np.ndarray, index: int, rows: int) -> jax.Array:
        return jnp.asarray(np.broadcast_to(roles[index], (rows, roles.shape[1])), jnp.float32)

    def _angles(self, first: int, count: int) -> Tables:
        config, at = self.config, first + np.arange(count)[None]
        tables = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, at, at[:, -1] + 1)
        return jnp.asarray(tables[0]), jnp.asarray(tables[1])

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        # As in decoding: accelerators would round the factors of float32 products.
        return jax.default_matmul_precision("highest") if self._dtype == jnp.float32 else contextlib.nullcontext()

    def _program(self, kind: ProgramKey) -> Any:
        self.prepare([kind])
        return self._programs[kind].result()

    def _compile(self, kind: ProgramKey) -> Any:
        config, steps = self.config, kind.answer - 1
        rows, kv_heads, total = kind.rows, config.num_kv_heads, kind.length + steps

        def array(*shape: int, dtype: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        weights = jax.tree.map(lambda leaf: array(*leaf.shape, dtype=leaf.dtype), self._layers[0])
        angles = array(1, steps, config.head_dim // 2, dtype=jnp.float32)
        kv = array(rows, total, kv_heads, config.head_dim, dtype=self._dtype)
        fed = () if kind.weighs else (array(rows, steps, dtype=bool),)
        program = _weigh_layer if kind.weighs else _score_layer
        with self._precision():
            return program.lower(
                self._layer_graph, kind.policy, kind.page_size, weights,
                array(rows, steps, config.hidden_size, dtype=self._dtype), angles, angles,
                array(rows, kv_heads, dtype=jnp.float32), *fed, (kv, kv),
                array(rows, kv_heads, steps, pages_for(total, kind.page_size), dtype=bool),
            ).compile()  # fmt: skip


@functools.partial(jax.jit, static_argnames=("graph",))
def _read(graph: Any, weights: Any, tokens: Int[Array, "B T"], cos: jax.Array, sin: jax.Array) -> Any:
    hidden, layers = nnx.merge(graph, weights)(tokens, cos, sin, Remember(), ())
    return layers, hidden[:, -1]


@functools.partial(jax.jit, static_argnames=("room",))
def _gather(layers: tuple[Any, ...], lasts: tuple[jax.Array, ...], room: int) -> tuple[Any, Float[Array, "B E"]]:
    """All rows' keys and values, layer by layer, with room after them; and their last hidden states."""

    def rows(*parts: jax.Array) -> jax.Array:
        return jnp.pad(jnp.concatenate(parts), ((0, 0), (0, room), (0, 0), (0, 0)))

    return jax.tree.map(rows, *layers), jnp.concatenate(lasts)


@functools.partial(jax.jit, static_argnames=("graph",))
def _embed(graph: Any, weights: Any, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    return nnx.merge(graph, weights).embed(tokens)


def _gated(
    z: Float[Array, "B K"], kv: KeysAndValues, steps: int, policy: SelectionPolicy, page_size: int
) -> tuple[Gated, int]:
    """A layer's attention and the index that it goes by: one program serves all layers, which differ in arrays alone.

    Layer 0 needs no other, as its z are 1: nothing is inherited there, and nothing of that is mixed in.
    """
    rows = z.shape[0]
    starts = jnp.full(rows, kv[0].shape[1] - steps, jnp.int32)
    return Gated(
        jnp.stack([z, z], axis=1), starts, jnp.ones((rows, steps), bool), policy, page_size, (kv, kv)
    ), 1  # fmt: skip


@functools.partial(jax.jit, static_argnames=("graph", "policy", "page_size"))
def _score_layer(
    graph: Any,
    policy: SelectionPolicy,
    page_size: int,
    weights: Any,
    x: Float[Array, "B T E"],
    cos: Float32[Array, "1 T half"],
    sin: Float32[Array, "1 T half"],
    z: Float32[Array, "B K"],
    fed: Bool[Array, "B T"],
    kv: KeysAndValues,
    below: Bool[Array, "B K T P"],
) -> tuple[Float[Array, "B T E"], Bool[Array, "B K T P"], Int32[Array, ""]]:
    """One layer: what goes up, and how many pages its sparse heads read for tokens that are really `fed`."""
    backend, index = _gated(z, kv, x.shape[1], policy, page_size)
    out, picked = nnx.merge(graph, weights)(x, cos, sin, backend, index, below)
    sparse = (z == 0.0)[:, :, None] & fed[:, None]
    read = jnp.sum(jnp.where(sparse, jnp.sum(below, axis=-1, dtype=jnp.int32), 0))
    return out, picked, read


@dataclasses.dataclass(frozen=True)
class _Weighed:
    """Gated attention that also hands out how much attention each page has by its group's mean query."""

    gated: Gated

    def __call__(self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """As the gated layer does it; the state that comes out has the masses beside it."""
        out, picked = self.gated(index, q, k, v, state)
        assert self.gated.remembered is not None
        past = self.gated.remembered[index][0]
        keys = jax.lax.dynamic_update_slice_in_dim(past, k.astype(past.dtype), past.shape[1] - k.shape[1], axis=1)
        scores = attention_scale(q.shape[-1]) * jnp.einsum(
            "btkh,bskh->bkts", jnp.mean(q.astype(jnp.float32), axis=3), keys.astype(jnp.float32)
        )
        total, steps = keys.shape[1], k.shape[1]
        at = total - steps + jnp.arange(steps, dtype=jnp.int32)
        scores = jnp.where(jnp.arange(total, dtype=jnp.int32) <= at[:, None], scores, -jnp.inf)
        size, pages = self.gated.page_size, picked.shape[-1]
        padding = ((0, 0), (0, 0), (0, 0), (0, pages * size - total))
        tiles = jnp.pad(scores, padding, constant_values=-jnp.inf).reshape(*scores.shape[:3], pages, size)
        return out, (picked, jax.nn.logsumexp(tiles, axis=-1))


@functools.partial(jax.jit, static_argnames=("graph", "policy", "page_size"))
def _weigh_layer(
    graph: Any,
    policy: SelectionPolicy,
    page_size: int,
    weights: Any,
    x: Float[Array, "B T E"],
    cos: Float32[Array, "1 T half"],
    sin: Float32[Array, "1 T half"],
    z: Float32[Array, "B K"],
    kv: KeysAndValues,
    below: Bool[Array, "B K T P"],
) -> tuple[Float[Array, "B T E"], Bool[Array, "B K T P"], Float32[Array, "B K T P"]]:
    backend, index = _gated(z, kv, x.shape[1], policy, page_size)
    out, (picked, masses) = nnx.merge(graph, weights)(x, cos, sin, _Weighed(backend), index, below)
    return out, picked, masses


@functools.partial(jax.jit, static_argnames=("graph",))
def _judge(
    graph: Any,
    weights: Any,
    last: Float[Array, "B E"],
    x: Float[Array, "B T E"],
    answers: Int[Array, "B A"],
    reads: tuple[Int32[Array, ""], ...],
) -> tuple[Bool[Array, " B"], Float32[Array, " B"], Int32[Array, ""]]:
    """The first token by the prompt's last hidden state, all others by those of the tokens before them."""
    model = nnx.merge(graph, weights)
    logits = model.logits(jnp.concatenate([last[:, None], model.norm(x)], axis=1))
    asked = answers >= 0
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(answers, 0)[..., None], axis=-1)[..., 0]
    losses = -jnp.sum(jnp.where(asked, picked, 0.0), axis=1) / jnp.sum(asked, axis=1).astype(jnp.float32)
    right = jnp.all((jnp.argmax(logits, axis=-1) == answers) | ~asked, axis=1)
    return right, losses, jnp.sum(jnp.stack(reads))
