"""The head maps that are compared, all with the same number of retrieval heads: learned, by layers, and random."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Bool

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import json_text
from lychee_jax.studies.head_maps.prompts import ANSWER_TOKENS, VALIDATION, prompts
from lychee_jax.studies.head_maps.rows import COMPARED, forced_tokens, tokens_of
from lychee_jax.studies.scorer import ProgramKey, Scorer

_PAGE = 64
_RANDOM = 0x27D4EB2F

type Roles = Bool[np.ndarray, "L K"]


def roles_of(head_map: HeadMap) -> Roles:
    """The map as an array."""
    roles = np.zeros((head_map.num_layers, head_map.num_kv_heads), bool)
    for layer, heads in enumerate(head_map.retrieval):
        roles[layer, list(heads)] = True
    return roles


def map_of(roles: Roles, config: ModelConfig, label: str, **meta: Any) -> HeadMap:
    """The array as a map of this model."""
    retrieval = tuple(tuple(int(head) for head in np.flatnonzero(layer)) for layer in roles)
    described = json_text({"fingerprint": config.fingerprint(), **meta})
    return HeadMap(config.num_layers, config.num_kv_heads, retrieval, model=label, meta=described)


def random_roles(config: ModelConfig, count: int, seed: int) -> Roles:
    """All heads of layer 0, and random ones above it, `count` together."""
    roles = np.zeros((config.num_layers, config.num_kv_heads), bool)
    roles[0] = True
    above = roles[1:].reshape(-1)
    rng = np.random.default_rng([_RANDOM, seed])
    above[rng.choice(above.size, size=count - config.num_kv_heads, replace=False)] = True
    return roles


def layer_roles(
    config: ModelConfig, count: int, loss: Callable[[Roles], float]
) -> tuple[Roles, list[dict[str, Any]]]:  # fmt: skip
    """All heads of layer 0 and of those other layers, `count` heads together, that have the lowest loss; every choice
    of layers is tried, and comes back with its loss. As in TidalDecode (arXiv 2410.05076), where layers have roles.

    Raises:
        UserError: `count` is not a number of whole layers.
    """
    if count % config.num_kv_heads:
        raise UserError(
            f"retrieval-heads is {count}; whole layers have multiples of {config.num_kv_heads} KV heads, "
            "and the layer-level choice is to have as many as the others"
        )
    tried: list[dict[str, Any]] = []
    best: tuple[float, Roles] | None = None
    for layers in itertools.combinations(range(1, config.num_layers), count // config.num_kv_heads - 1):
        roles = np.zeros((config.num_layers, config.num_kv_heads), bool)
        roles[[0, *layers]] = True
        value = loss(roles)
        tried.append({"layers": [0, *layers], "loss": round(value, 6)})
        if best is None or value < best[0]:
            best = value, roles
    assert best is not None
    return best[1], tried


def validation_loss(scorer: Scorer, context: int, samples: int, seed: int) -> Callable[[Roles], float]:
    """Mean nats a token of answers to the seed's own validation prompts, all tasks, at the compared budgets."""
    policies = [
        SelectionPolicy(budget, *forced_tokens(budget, _PAGE))
        for budget in {max(_PAGE, tokens_of(share, context, _PAGE)) for share in COMPARED}
    ]
    scorer.prepare(
        ProgramKey(samples, context, width, policy, _PAGE)
        for width in set(ANSWER_TOKENS.values())
        for policy in policies
    )
    batches = []
    for task, width in ANSWER_TOKENS.items():
        tokens, answers = prompts(VALIDATION, task, context, range(samples), seed=seed)
        batches.append((scorer.read(tokens, width), answers))

    def loss(roles: Roles) -> float:
        verdicts = [
            scorer.score(memory, answers, roles, policy, _PAGE) for memory, answers in batches for policy in policies
        ]
        return float(np.mean([verdict.losses for verdict in verdicts]))

    return loss
