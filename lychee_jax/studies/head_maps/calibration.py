"""The numbers of the rules that have one, chosen so that sparse heads read as much under each as a budget lets them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cache.allocator import pages_for
from lychee_jax.studies.head_maps.prompts import ANSWER_TOKENS, CALIBRATION, TASKS, prompts
from lychee_jax.studies.head_maps.rows import Row
from lychee_jax.studies.scorer import ProgramKey, Scorer
from pallas_kernels.types import Rule
from pallas_kernels.xla.decode import forced_pages, page_limits

_STEPS = 40


def ratio_for(row: Row) -> float:
    """The ratio that takes as many pages as the row's budget holds, at the length where answers begin."""
    pages = pages_for(row.context + 1, row.page_size)
    # Rounded down: the rule takes ⌈ratio · pages⌉, and a little less than a whole number of pages rounds up to it.
    scale = 10 ** math.ceil(math.log10(pages) + 1)
    return max(1, math.floor(row.budget_tokens // row.page_size / pages * scale)) / scale


def readers(roles: Bool[np.ndarray, "L K"]) -> np.ndarray:
    """How many sparse heads read the pick of each head `[L, K]`: those of its index above, until one picks again."""
    count = np.zeros(roles.shape, int)
    for head in range(roles.shape[1]):
        picks = 0
        for layer in range(roles.shape[0]):
            if roles[layer, head]:
                picks = layer
            else:
                count[picks, head] += 1
    return count


def bisect(share: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Where a function that does not fall reaches `target`, between `low` and `high`."""
    for _ in range(_STEPS):
        middle = 0.5 * (low + high)
        if share(middle) < target:
            low = middle
        else:
            high = middle
    return high


def by_ratio(row: Row) -> SelectionPolicy:
    """The policy under which masses are looked at."""
    return dataclasses.replace(row, rule="ratio").policy(ratio_for(row))


def programs(row: Row, samples: int) -> set[ProgramKey]:
    """What `calibrate` runs."""
    return {
        ProgramKey(samples, row.context, width, by_ratio(row), row.page_size, True) for width in ANSWER_TOKENS.values()
    }


def calibrate(
    scorer: Scorer, roles: Bool[np.ndarray, "L K"], row: Row, *, samples: int, tasks: tuple[str, ...] = TASKS
) -> dict[Rule, float]:
    """The numbers of "ratio", "top_p" and "threshold" at the sparsity of the row's budget, for prompts of its context.

    What top_p and threshold would pick is computed from the attention masses of calibration prompts; picks decide what
    later layers see, so that these are those of decoding by ratio.
    """
    ratio, policy = ratio_for(row), by_ratio(row)
    count = readers(roles)
    layers, heads = np.nonzero(count)
    weights = count[layers, heads].astype(np.float64)
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for task in tasks:
        tokens, answers = prompts(CALIBRATION, task, row.context, range(samples))
        memory = scorer.read(tokens, ANSWER_TOKENS[task])
        fed = answers[:, 1:] >= 0
        used = np.broadcast_to(-(-(row.context + 1 + np.arange(fed.shape[1])) // row.page_size), fed.shape)[fed]
        masses = list(scorer.masses(memory, answers, roles, policy, row.page_size))
        # Only heads whose picks are read: [steps, heads, P].
        picked = np.stack([masses[l][:, k] for l, k in zip(layers, heads, strict=True)], axis=2)[fed]
        parts.append((picked, used))

    def share(rule: Rule, amount: float) -> float:
        """Of the pages that are there, those that sparse heads would read."""
        read = held = 0.0
        for masses, used in parts:
            limits = _limits(masses, used, policy, row.page_size, rule, amount)
            read += float(np.sum(limits * weights))
            held += float(np.sum(used)) * weights.sum()
        return read / held

    target = share("ratio", ratio)
    # On scales where the interesting numbers, near 1 and near 0, are not all at one end.
    top_p = bisect(lambda x: share("top_p", _logistic(x)), target, -12.0, 16.0)
    threshold = bisect(lambda x: share("threshold", math.exp(-x)), target, 1e-3, 40.0)
    return {"ratio": ratio, "top_p": _logistic(top_p), "threshold": math.exp(-threshold)}


def _limits(
    masses: Float32[np.ndarray, "steps R P"], used: np.ndarray, policy: SelectionPolicy, page_size: int, rule: Rule,
    amount: float,
) -> np.ndarray:  # fmt: skip
    """How many pages every head would pick at every step `[steps, R]`."""
    spec = dataclasses.replace(policy.spec(page_size), rule=rule, amount=amount)
    pages = jnp.asarray(used, jnp.int32)
    return np.asarray(page_limits(jnp.asarray(masses), pages, forced_pages(pages, masses.shape[-1], spec), spec))


def _logistic(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))
