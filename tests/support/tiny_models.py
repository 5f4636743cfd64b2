"""A tiny random model that speaks the bundled model's language, and a plan that learns its heads in seconds."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.data import language
from lychee_jax.llm import LoadedModel
from lychee_jax.models.spec import ModelSpec
from lychee_jax.training.learn_heads import Plan

CONFIG = ModelConfig("llama", language.VOCAB_SIZE, 32, 48, 3, 4, 2, 16, 512)
POLICY = SelectionPolicy(1 << 10, 8, 8, rule="ratio", ratio=0.3)
PLAN = Plan(
    retrieval_heads=3, steps=6, data="mixed", facts=3, questions=3, min_length=193, max_length=256, room=48,
    policy=POLICY, page_size=8,
)  # fmt: skip


def make(config: ModelConfig = CONFIG, *, seed: int = 0, folder: Path | None = None) -> LoadedModel:
    """Random weights under which attention is peaked, so that the choice of pages matters."""
    rng = np.random.default_rng(seed)
    spec, shapes = ModelSpec.abstract(config, jnp.float32)
    scores = (config.num_heads + config.num_kv_heads) * config.head_dim  # rows of queries and keys
    weights = []
    for name, leaf in zip(spec.names, shapes, strict=True):
        value = rng.standard_normal(leaf.shape)
        if name.endswith("scale"):
            value = 1 + 0.3 * value
        elif name.endswith("kernel"):
            value /= np.sqrt(config.hidden_size)
            if "qkv_proj" in name:
                value[:scores] *= 2.0
        weights.append(jnp.asarray(value, jnp.float32))
    model = spec.merge(tuple(weights))
    return LoadedModel(folder or Path("tiny"), config, model, None, (language.EOS,))


def plan(**changes: Any) -> Plan:
    """The plan, changed."""
    return dataclasses.replace(PLAN, **changes)
