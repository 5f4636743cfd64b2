"""A tiny random model that speaks the bundled model's language, and a plan that learns its heads in seconds."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.data import language
from lychee_jax.llm import LLM
from lychee_jax.models.spec import ModelSpec
from lychee_jax.training.learn_heads import TrainingPlan
from tests.support import first_format

CONFIG = ModelConfig("llama", language.VOCAB_SIZE, 32, 48, 3, 4, 2, 16, 512)
POLICY = SelectionPolicy(1 << 10, 8, 8, rule="ratio", ratio=0.3)
PLAN = TrainingPlan(
    retrieval_heads=3, steps=6, data="mixed", facts=3, questions=3, min_length=193, max_length=256, room=48,
    policy=POLICY, page_size=8,
)  # fmt: skip


def make(config: ModelConfig = CONFIG, *, seed: int = 0, folder: Path | None = None) -> LLM:
    """Random weights under which attention is peaked, so that the choice of pages matters."""
    rng = np.random.default_rng(seed)
    drawn = {}
    for name, shape in first_format.shapes(config).items():
        value = rng.standard_normal(shape)
        if name.endswith("scale"):
            value = 1 + 0.3 * value
        elif name.endswith("kernel"):
            value = (2.0 if "q_proj" in name or "k_proj" in name else 1.0) * value / np.sqrt(config.hidden_size)
        drawn[name] = value.astype(np.float32)
    weights = first_format.fused(drawn)
    spec, _ = ModelSpec.abstract(config, jnp.float32)
    model = spec.merge(tuple(jnp.asarray(weights[name]) for name in spec.names))
    return LLM(folder or Path("tiny"), config, model, None, (language.EOS,))


def plan(**changes: Any) -> TrainingPlan:
    """The plan, changed."""
    return dataclasses.replace(PLAN, **changes)
