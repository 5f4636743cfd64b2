"""Small random models for hybrid decoding, whose weights the float64 oracle gets, too."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig, RopeConfig
from lychee_jax.engine.options import AttentionMode, EngineConfig, EngineOptions, GenerateOptions
from lychee_jax.engine.outputs import Result
from lychee_jax.llm import LLM, engine_options
from lychee_jax.models.spec import ModelSpec
from tests.support import first_format, oracle

VOCAB = 61
NEW = 14


DEFAULT_ROPE = RopeConfig()


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model, its head map, a policy and prompts: `lengths` in tokens."""

    name: str
    kv_heads: int
    group: int
    head_dim: int
    retrieval: tuple[tuple[int, ...], ...]
    page_size: int
    policy: SelectionPolicy
    lengths: tuple[int, ...]
    qwen3: bool = False
    rope: RopeConfig = DEFAULT_ROPE
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        return ModelConfig(
            family="qwen3" if self.qwen3 else "qwen2",
            vocab_size=VOCAB,
            hidden_size=24,
            intermediate_size=40,
            num_layers=len(self.retrieval),
            num_heads=self.kv_heads * self.group,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=128 if self.rope.kind == "default" else self.rope.original_max_position_embeddings,
            rope=self.rope,
            tie_word_embeddings=self.qwen3,
            qkv_bias=not self.qwen3,
            o_bias=not self.qwen3,
            mlp_bias=not self.qwen3,
            qk_norm=self.qwen3,
        )

    @property
    def heads(self) -> HeadMap:
        return HeadMap(len(self.retrieval), self.kv_heads, self.retrieval)

    @property
    def rule(self) -> oracle.Rule:
        by_mass = self.policy.page_score == "mass" or self.policy.rule in ("top_p", "threshold")
        amounts = {"ratio": self.policy.ratio, "top_p": self.policy.top_p, "threshold": self.policy.threshold}
        return oracle.Rule(
            budget=self.policy.budget // self.page_size,
            sink=oracle.page_count(self.policy.sink, self.page_size),
            recent=oracle.page_count(self.policy.recent, self.page_size),
            name=self.policy.rule,
            amount=amounts.get(self.policy.rule, 0.0),
            page_score="lse" if by_mass else "max",
        )

    @property
    def prompts(self) -> list[list[int]]:
        rng = np.random.default_rng(self.seed)
        return [rng.integers(0, VOCAB, length).tolist() for length in self.lengths]

    def options(self, attention: AttentionMode = "hybrid", **changes: Any) -> GenerateOptions:
        options = GenerateOptions(attention, self.heads, self.policy, self.page_size, NEW)
        return dataclasses.replace(options, **changes)


# Prompts just below, at and above the borders of pages; all but the longest start with P ≤ M and cross it on the way.
BUDGET = Case(
    name="budget",
    kv_heads=2,
    group=2,
    head_dim=16,
    retrieval=((0, 1), (1,), ()),
    page_size=4,
    policy=SelectionPolicy(12, 4, 4),
    lengths=(3, 4, 5, 11, 12, 29),
    qwen3=True,
    seed=2,
)


def small_chunks(tokens: int, *, dense_below: int = 0, **changes: Any) -> EngineConfig:
    """The CPU's numbers, but that chunks of prompts have `tokens` tokens, and so do the prefixes that are shared."""
    config = EngineConfig(
        ((1 << 40, tokens),), tokens, min_rows=2, correct_rows=1, dense_below=dense_below, table_factor=1 << 20
    )
    return dataclasses.replace(config, **changes)


def poison(model: LLM, options: GenerateOptions) -> None:
    """NaN in every page of the cache, scratch pages and those of earlier prompts included, which are forgotten."""
    engine = model.engine(engine_options(model.engine_options, options))
    if engine.runner is None:
        model.generate_tokens([[1]], dataclasses.replace(options, max_new_tokens=1))
    assert engine.runner is not None
    engine.reset_prefix_cache()
    # Words of which both bytes are NaN in e4m3; int8 has scales that are.
    engine.runner.pools = jax.tree.map(
        lambda pool: jnp.full_like(pool, 0x7F7F if pool.dtype == jnp.uint16 else np.nan), engine.runner.pools
    )


def run(model: LLM, prompts: list[list[int]], options: GenerateOptions, **more: Any) -> Result:
    """Generate over a cache that holds NaN wherever nothing was written."""
    poison(model, options)
    return model.generate_tokens(prompts, options, **more)


@functools.cache
def make_model(
    case: Case, dtype: str = "float32", engine_config: EngineConfig | None = None
) -> tuple[LLM, dict[str, np.ndarray]]:
    """Random weights under which attention is peaked, so that the choice of pages decides the tokens."""
    rng = np.random.default_rng(case.seed + 1)
    drawn: dict[str, np.ndarray] = {}
    for name, shape in first_format.shapes(case.config).items():
        value = rng.standard_normal(shape)
        if name.endswith("scale"):
            value = (2.0 if "attention" in name else 1.0) * (1 + 0.3 * value)
        elif name.endswith("bias"):
            value = 0.3 * value
        elif name.endswith("kernel"):
            value = (1.7 if "q_proj" in name or "k_proj" in name else 1.0) * value / np.sqrt(case.config.hidden_size)
        drawn[name] = value.astype(jnp.dtype(dtype))
    weights = first_format.fused(drawn)
    spec, _ = ModelSpec.abstract(case.config, dtype)
    model = spec.merge(tuple(jnp.asarray(weights[name]) for name in spec.names))
    config = engine_config or small_chunks(case.page_size)
    # Of one size whatever is asked first, so that no program is compiled for another one.
    options = EngineOptions(cache_memory=2 << 20, max_model_len=64)
    return LLM(Path("tiny"), case.config, model, None, (), engine_config=config, engine_options=options), weights
