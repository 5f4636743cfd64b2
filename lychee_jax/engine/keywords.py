"""The options of a generation as keywords: what `LLM.generate` takes, in one flat list, and where each belongs."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.engine.options import AttentionMode
from lychee_jax.engine.sampling_params import SamplingParams
from pallas_kernels.types import KVDtype, Rule


class GenerateKeywords(TypedDict, total=False):
    """Keywords of `LLM.generate`, `LLM.stream` and `LLM.options`; the same as the options of `lychee generate`.

    None is the default, for numbers too.

    Attributes:
        max_new_tokens: tokens to generate at most (128).
        ignore_eos: end-of-text tokens do not end a text.
        temperature: 0, the default, is greedy: always the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: of those, keep the fewest likeliest that hold this probability.
        min_p: of those, keep tokens at least this many times as likely as the likeliest.
        repetition_penalty: above 1, tokens of the prompt and of the text so far become less likely.
        presence_penalty: taken off the logits of tokens in the text so far, not of the prompt; −2 to 2.
        frequency_penalty: the same, as often as the token is in it.
        logit_bias: token id → a number from −100 to 100 that is added to its logit.
        seed: of the random choice.
        attention: "hybrid": retrieval heads read the whole cache, the others the pages that these pick; "dense": every
            head reads all; "auto" (the default): hybrid, but dense while the text is too short for it to pay.
        heads: which KV heads retrieve: "all", "none", a head map or its file; by default the folder's, else all.
        page_size: tokens of a cache page (64).
        budget: tokens that a sparse head reads at most, a multiple of the page size (4096).
        sink: first tokens that are always read (128).
        recent: last tokens that are always read (256).
        rule: how many pages are picked: as many as the budget holds ("budget"), or fewer by "ratio", "top_p",
            "threshold"; "forced": only sink and recent pages.
        ratio: share of all pages, for the rule "ratio".
        top_p_mass: share of the attention, for the rule "top_p".
        threshold: a page's least share of the attention, for the rule "threshold".
        page_score: a page counts by its best token ("max") or by its attention mass ("lse", "mass").
        correct_every: new tokens after which the cache of these is computed again densely; 0: never.
        implementation: of the attention kernels: "xla", "mosaic_tpu", "mosaic_gpu"; by default what suits the device.
        kv_dtype: of the cache, 8 bits a number: "int8" or "fp8"; by default the dtype of the activations.
    """

    max_new_tokens: int | None
    ignore_eos: bool
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None
    seed: int | None
    attention: AttentionMode
    heads: str | Path | HeadMap | None
    page_size: int | None
    budget: int | None
    sink: int | None
    recent: int | None
    rule: Rule
    ratio: float | None
    top_p_mass: float | None
    threshold: float | None
    page_score: Literal["max", "lse", "mass"]
    correct_every: int | None
    implementation: str | None
    kv_dtype: KVDtype | None


# Both have a top_p; the shorter name is sampling's.
_POLICY = {
    "top_p_mass" if field.name == "top_p" else field.name: field.name for field in dataclasses.fields(SelectionPolicy)
}
_SAMPLING = {field.name: field.name for field in dataclasses.fields(SamplingParams)}


def sort_keywords(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Keywords as fields of `SelectionPolicy`, of `SamplingParams`, and of `GenerateOptions`, the heads left out.

    Raises:
        TypeError: a keyword that does not exist, with the one that may be meant.
    """
    known = GenerateKeywords.__annotations__
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"there is no option {name!r}; {meant}")
    policy = {field: keywords[name] for name, field in _POLICY.items() if name in keywords}
    sampling = {field: keywords[name] for name, field in _SAMPLING.items() if name in keywords}
    rest = keywords.keys() - _POLICY.keys() - _SAMPLING.keys() - {"heads"}
    return policy, sampling, {name: keywords[name] for name in keywords if name in rest}
