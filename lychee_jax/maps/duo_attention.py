"""DuoAttention's published head scores as head maps (Xiao et al., arXiv 2410.10819).

Their `full_attention_heads.tsv` has a line for each layer with a number for each KV head, between 0 and 1 and separated
by tabs: how much the head needs the whole cache.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from lychee_jax.attention.head_map import HeadMap, highest_roles
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import decode_text, read_bytes

THRESHOLD = 0.5


def import_map(
    path: str | Path,
    config: ModelConfig,
    label: str,
    *,
    threshold: float | None = None,
    retrieval_heads: int | None = None,
) -> HeadMap:
    """The head map of a file of scores: all of layer 0, and above it the heads that the rule takes.

    Args:
        path: the file.
        config: of the model that the scores belong to.
        label: what the map calls the model.
        threshold: heads with at least this score retrieve, from 0 to 1; by default 0.5.
        retrieval_heads: instead, so many heads retrieve, layer 0 counted: the highest, of equal ones the lower layer,
            then the lower head.

    Raises:
        UserError: both rules, a threshold or a number out of its range, a file that cannot be read, has another shape
            than the model, or holds anything but numbers from 0 to 1.
    """
    if threshold is not None and retrieval_heads is not None:
        raise UserError("give --threshold or --retrieval-heads, not both")
    data = read_bytes(path)
    scores = _parse(decode_text(data, path), path, config)
    if retrieval_heads is not None:
        roles, rule = highest_roles(scores, retrieval_heads), f"the {retrieval_heads} highest"
    else:
        least = THRESHOLD if threshold is None else threshold
        if not 0.0 <= least <= 1.0:
            raise UserError(f"--threshold is {least}; scores lie between 0 and 1")
        roles, rule = scores >= least, f"at least {least:g}"
        roles[0] = True
    meta = {
        "fingerprint": config.fingerprint(), "method": "duo-attention", "rule": rule,
        "source": Path(path).name, "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    return HeadMap.from_roles(roles, model=label, meta=meta)


def _parse(text: str, path: str | Path, config: ModelConfig) -> Float64[np.ndarray, "L K"]:
    """The scores, if there is one for every KV head of the model."""
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if len(lines) != config.num_layers:
        raise UserError(f"{path} has {len(lines)} lines, but the model has {config.num_layers} layers; one line each")
    rows = []
    for number, line in enumerate(lines, 1):
        cells = line.split("\t")
        if len(cells) != config.num_kv_heads:
            raise UserError(
                f"{path}, line {number} has {len(cells)} entries separated by tabs, but the model has "
                f"{config.num_kv_heads} KV heads in a layer"
            )
        rows.append([_score(cell, f"{path}, line {number}") for cell in cells])
    return np.array(rows, np.float64)


def _score(cell: str, place: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not 0.0 <= value <= 1.0:  # so that NaN is refused too
        raise UserError(f"{place} has {cell.strip()!r}; scores are numbers from 0 to 1")
    return value
