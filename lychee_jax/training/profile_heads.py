"""A head map from an attention profile: `python -m lychee_jax.training.profile_heads --model DIR`.

While the model answers, which KV heads look at the statement that holds the answer? Those must read the whole cache;
for the others the pages that the heads below them pick will do.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jaxtyping import Array, Bool, Float, Int
from rich.console import Console
from rich.progress import track

from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.heads import HeadMap
from lychee_jax.layers import attention_scale
from lychee_jax.model import Decoder
from lychee_jax.prefill import causal_attention
from lychee_jax.rope import rotary_tables
from lychee_jax.training import data, language

_ANSWER_TOKENS = 48


@dataclasses.dataclass(frozen=True)
class NeedleMass:
    """A dense way to attend that carries, for every layer, the attention of some queries on some keys.

    `queries [A]` are positions; `asking [B, A]` says which of them count in a row; `needle [B, T]` marks the keys.
    The state grows by one `[B, K]` a layer: the mean mass, of a KV head's query heads the one with the most.
    """

    queries: Int[Array, "A"]
    asking: Bool[Array, "B A"]
    needle: Bool[Array, "B T"]

    def __call__(
        self, index: int, q: jax.Array, k: jax.Array, v: jax.Array, state: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Attend, and note the mass."""
        scale = attention_scale(q.shape[-1])
        asked = q[:, self.queries].astype(jnp.float32)
        scores = scale * jnp.einsum("bakgh,bskh->bkgas", asked, k.astype(jnp.float32))
        past = jnp.arange(k.shape[1])[None, :] <= self.queries[:, None]
        weights = jax.nn.softmax(jnp.where(past, scores, -1e30), axis=-1)
        mass = jnp.einsum("bkgas,bs->bkga", weights, self.needle.astype(jnp.float32))
        asking = self.asking[:, None, None, :].astype(jnp.float32)
        mean = jnp.sum(mass * asking, axis=-1) / jnp.sum(asking, axis=-1)
        return causal_attention(q, k, v, scale=scale), (*state, jnp.max(mean, axis=-1))


def profile(
    config: ModelConfig, model: Decoder, *, length: int, samples: int, facts: int, seed: int
) -> Float[np.ndarray, "L K"]:
    """Mean attention of every KV head on the needle while short and long passkeys are answered (teacher-forced).

    Raises:
        UserError: a model with another vocabulary than the generators', or a length without room for the facts.
    """
    if config.vocab_size != language.VOCAB_SIZE:
        raise UserError("profiles are taken with the bundled model's tokens; this model has another vocabulary")
    padded = -(-(length + _ANSWER_TOKENS) // 64) * 64
    positions, lengths = np.arange(padded)[None], np.array([padded])
    angles = rotary_tables(config.rope, config.head_dim, config.max_position_embeddings, positions, lengths)
    queries = jnp.arange(length, length + _ANSWER_TOKENS)

    @jax.jit
    def masses(tokens: jax.Array, asking: jax.Array, needle: jax.Array) -> jax.Array:
        way = NeedleMass(queries, asking, needle)
        return jnp.stack(model(tokens, jnp.asarray(angles[0]), jnp.asarray(angles[1]), way, ())[1], axis=1)

    rng = np.random.default_rng(seed)
    found = []
    for index in track(range(samples), "attention profile", console=Console(stderr=True)):
        try:
            prompt = data.prompt(rng, ("passkey", "long-passkey")[index % 2], length, facts)
        except ValueError as error:
            raise UserError(str(error)) from error
        answer = language.tokens_of(" " + prompt.answer)
        tokens = np.full((1, padded), language.PAD, np.int32)
        tokens[0, : length + len(answer)] = [*prompt.tokens, *answer]
        needle = np.zeros((1, padded), bool)
        needle[0, slice(*prompt.needle)] = True
        found.append(masses(tokens, np.arange(_ANSWER_TOKENS)[None] < len(answer), needle))
    return np.mean(np.concatenate(jax.device_get(found)), axis=0)


def choose(config: ModelConfig, mass: Float[np.ndarray, "L K"], least: float) -> HeadMap:
    """The map in which, above layer 0, the heads with at least `least` of their attention on the needle retrieve."""
    above = tuple(tuple(int(k) for k in np.flatnonzero(layer >= least)) for layer in mass[1:])
    meta = {
        "fingerprint": config.fingerprint(),
        "method": "attention profile",
        "least_mass": least,
        "mass": [[round(float(value), 4) for value in layer] for layer in mass],
    }
    retrieval = (tuple(range(config.num_kv_heads)), *above)
    return HeadMap(config.num_layers, config.num_kv_heads, retrieval, model="bundled", meta=json.dumps(meta))


def run(
    model: Annotated[str | None, typer.Option(help="Folder of the model (default: the bundled one).")] = None,
    output: Annotated[Path | None, typer.Option(help="Head map to write (default: heads.json in that folder).")] = None,
    least: Annotated[float, typer.Option(help="Attention on the needle from which a head retrieves.")] = 0.05,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2048,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 32,
    facts: Annotated[int, typer.Option(help="Passkeys hidden in each prompt.")] = 16,
    seed: Annotated[int, typer.Option(help="Another seed gives other prompts.")] = 0,
) -> None:
    """Find the KV heads that look a passkey up while it is answered, and write them as a head map."""
    from lychee_jax.loading import load

    loaded = load(model)
    mass = profile(loaded.config, loaded.model, length=length, samples=samples, facts=facts, seed=seed)
    head_map = choose(loaded.config, mass, least)
    output = output or loaded.path / "heads.json"
    head_map.save(output)
    total = head_map.num_layers * head_map.num_kv_heads
    typer.echo(f"{output}: {head_map.num_retrieval} of {total} KV heads retrieve, layer 0 included")


if __name__ == "__main__":
    try:
        typer.run(run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
