"""How much a model with gates departs from itself with full attention, on the answers (arXiv 2602.04541)."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from lychee_jax.attention.gated import Gated, Remember
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.models.decoder import Decoder

Loss = Literal["hidden", "logits"]


def departures(
    model: Decoder,
    tokens: Int[Array, "B S"],
    starts: Int[Array, " B"],
    answers: Int[Array, "B A"],
    z: Float[Array, "B L K"],
    tables: tuple[Float[Array, "one S half"], Float[Array, "one S half"]],
    *,
    policy: SelectionPolicy,
    page_size: int,
    loss: Loss,
) -> tuple[Float32[Array, " B"], Float32[Array, " B"]]:
    """Per row: the mean loss of its answer tokens against dense attention, and the share whose argmax is kept.

    `tokens` is a prompt up to `starts[b]`, then answers and further questions, then anything. `answers[b, i]` marks the
    token at `starts[b] + i`: 0 for questions and what comes after the end, else the number of its answer. The prompt
    and the questions are read densely; tokens of answers go by the gates, as decoded tokens do. What counts is what
    these predict: the next token of the same answer. (Its first token is predicted by the question before it.)

    "hidden" is the mean square of the difference of the last (normed) hidden states over that of the teacher's;
    "logits" is KL(teacher ‖ student) in nats.
    """
    cos, sin = tables
    places = starts[:, None] + jnp.arange(answers.shape[1], dtype=jnp.int32)
    teacher, remembered = model(tokens, cos, sin, Remember(), ())
    backend = Gated(z, starts, answers > 0, policy, page_size, remembered)
    student, _ = model(jnp.take_along_axis(tokens, places, axis=1), cos[0][places], sin[0][places], backend, None)
    teacher = jnp.take_along_axis(teacher, places[..., None], axis=1)
    following = jnp.pad(answers[:, 1:], ((0, 0), (0, 1)))
    counted = (answers > 0) & (following == answers)

    def mean(each: Float32[Array, "B A"] | Bool[Array, "B A"]) -> Float32[Array, " B"]:
        total = jnp.sum(jnp.where(counted, each.astype(jnp.float32), 0.0), axis=1)
        return total / jnp.maximum(jnp.sum(counted, axis=1), 1).astype(jnp.float32)

    wanted, given = model.logits(teacher), model.logits(student)
    kept = mean(jnp.argmax(wanted, axis=-1) == jnp.argmax(given, axis=-1))
    if loss == "logits":
        wanted, given = jax.nn.log_softmax(wanted), jax.nn.log_softmax(given)
        return mean(jnp.sum(jnp.exp(wanted) * (wanted - given), axis=-1)), kept
    teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)
    return mean(jnp.sum((student - teacher) ** 2, axis=-1) / jnp.sum(teacher**2, axis=-1)), kept
