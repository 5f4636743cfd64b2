"""Which KV heads lie on which device, so that none has more retrieval heads of a layer than it must.

A head keeps its device in all layers: its picks are handed up, and never travel. All devices have equally many heads,
and a layer takes as long as the device with most of the heads that read the whole cache.
"""

import numpy as np
from jaxtyping import Bool

_STARTS = 24  # orders from which exchanges of two heads are tried


def balanced(num_kv_heads: int, devices: int, roles: Bool[np.ndarray, "L K"] | None = None) -> tuple[int, ...]:
    """The KV head at every place, device after device and ascending on each; −1: a place of zeros.

    Minimises `slowest` by exchanges of two heads, from the order of the model and from random ones; the same roles give
    the same places.
    """
    share = -(-num_kv_heads // devices)
    # Zeros are dealt out evenly, so that no device is left with nothing else while another one is full.
    heads = np.full((devices, share), -1)
    for device, own in enumerate(np.array_split(np.arange(num_kv_heads), devices)):
        heads[device, : len(own)] = own
    if roles is not None and devices > 1:
        heads = _improve_from_many(heads, roles)
    rows = [sorted(row, key=_heads_first) for row in heads.tolist()]
    return tuple(head for row in sorted(rows, key=lambda row: _heads_first(row[0])) for head in row)


def _heads_first(head: int) -> tuple[bool, int]:
    return head < 0, head


def slowest(places: tuple[int, ...], devices: int, roles: Bool[np.ndarray, "L K"]) -> int:
    """Retrieval heads of the device that has most of them, summed over layers."""
    return int(_costs(np.asarray(places).reshape(devices, -1), roles).max(axis=0).sum())


def _costs(heads: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Retrieval heads `[devices, L]`."""
    return _by_head(roles)[heads].sum(axis=1)


def _by_head(roles: np.ndarray) -> np.ndarray:
    """In which layers each head retrieves `[K + 1, L]`; the last one is head −1, which never does."""
    return np.concatenate([roles, np.zeros((len(roles), 1), bool)], axis=1).T.astype(np.int64)


def _improve_from_many(heads: np.ndarray, roles: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(0)
    found, least = _improve(heads, roles)
    bound = -(-roles.sum(axis=1) // len(heads))  # no layer can do with fewer
    for _ in range(_STARTS):
        if least == bound.sum():
            break
        other, cost = _improve(rng.permutation(heads.reshape(-1)).reshape(heads.shape), roles)
        if cost < least:
            found, least = other, cost
    return found


def _improve(heads: np.ndarray, roles: np.ndarray) -> tuple[np.ndarray, int]:
    """Exchange two heads of different devices as long as that helps, the best pair first."""
    heads = heads.copy()
    devices, share = heads.shape
    by_head = _by_head(roles)
    while True:
        costs = by_head[heads].sum(axis=1)  # [devices, L]
        now = best = int(costs.max(axis=0).sum())
        pair = None
        for one in range(devices):
            for other in range(one + 1, devices):
                rest = np.delete(costs, (one, other), axis=0).max(axis=0, initial=0)
                moved = by_head[heads[other]][None] - by_head[heads[one]][:, None]  # [share, share, L]
                after = np.maximum(np.maximum(costs[one] + moved, costs[other] - moved), rest).sum(axis=-1)
                place = int(after.argmin())
                if after.flat[place] < best:
                    best, pair = int(after.flat[place]), (one, place // share, other, place % share)
        if pair is None:
            return heads, now
        one, first, other, second = pair
        heads[one, first], heads[other, second] = heads[other, second], heads[one, first]
