"""Which KV heads of which layer are retrieval heads, and the JSON file that says so."""

import dataclasses
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.files import json_text, parse_json, read_json, write_text

FORMAT = "lychee-heads/1"


@dataclasses.dataclass(frozen=True)
class HeadMap:
    """The retrieval KV heads of every layer, ascending; all other KV heads are sparse. Layer 0 retrieves with all."""

    num_layers: int
    num_kv_heads: int
    retrieval: tuple[tuple[int, ...], ...]
    model: str = ""
    # Hashable (the map is static under jit) and compared: what the maker of the map wants to say about it, as JSON.
    meta: str = "{}"

    def __post_init__(self):
        roles = _check_roles(self.num_layers, self.num_kv_heads, self.retrieval)
        object.__setattr__(self, "retrieval", roles)  # hashable, also where lists came

    @classmethod
    def all(cls, config: ModelConfig) -> "HeadMap":
        """Every head retrieves: the dense result."""
        every = tuple(range(config.num_kv_heads))
        return cls(config.num_layers, config.num_kv_heads, (every,) * config.num_layers, model="all")

    @classmethod
    def none(cls, config: ModelConfig) -> "HeadMap":
        """Only layer 0 retrieves."""
        first = (tuple(range(config.num_kv_heads)),)
        return cls(config.num_layers, config.num_kv_heads, first + ((),) * (config.num_layers - 1), model="none")

    @classmethod
    def from_roles(cls, roles: Bool[np.ndarray, "L K"], *, model: str, meta: dict[str, Any]) -> "HeadMap":
        """The map in which the heads that are true in `roles` retrieve.

        Raises:
            UserError: a head of layer 0 does not.
        """
        retrieval = tuple(tuple(int(head) for head in np.flatnonzero(layer)) for layer in roles)
        layers, kv_heads = roles.shape
        return cls(layers, kv_heads, retrieval, model=model, meta=json_text(meta, sort_keys=True))

    @property
    def fingerprint(self) -> str | None:
        """The `ModelConfig.fingerprint` of the model that the map was made for, if the map tells it."""
        return parse_json(self.meta, "the head map's meta").get("fingerprint")

    @property
    def num_retrieval(self) -> int:
        """Retrieval heads of the whole model, layer 0 included."""
        return sum(len(heads) for heads in self.retrieval)

    @property
    def roles(self) -> Bool[np.ndarray, "L K"]:
        """Which heads retrieve."""
        roles = np.zeros((self.num_layers, self.num_kv_heads), bool)
        for layer, heads in enumerate(self.retrieval):
            roles[layer, list(heads)] = True
        return roles

    @property
    def is_dense(self) -> bool:
        """Whether every head retrieves, so that attention is dense at any length."""
        return self.num_retrieval == self.num_layers * self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "format": FORMAT,
            "model": self.model,
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "retrieval": [list(heads) for heads in self.retrieval],
            "meta": parse_json(self.meta, "the head map's meta"),
        }

    def save(self, path: str | Path) -> None:
        """Write the map as JSON."""
        write_text(path, json_text(self.to_json()) + "\n")

    @classmethod
    def from_json(cls, raw: Any) -> "HeadMap":
        """Check and read a file's content; errors say which entry is wrong."""
        if not isinstance(raw, dict):
            raise UserError("head map: the file must hold a JSON object")
        if raw.get("format") != FORMAT:
            raise UserError(f"head map: format is {raw.get('format')!r}; this version reads {FORMAT!r}")
        meta = raw.get("meta", {})
        if not isinstance(meta, dict):
            raise UserError("head map: 'meta' must be a JSON object")
        label = raw.get("model", "")
        num_layers, num_kv_heads = raw.get("num_layers"), raw.get("num_kv_heads")
        retrieval = _check_roles(num_layers, num_kv_heads, raw.get("retrieval"))
        return cls(
            len(retrieval),
            len(retrieval[0]),
            retrieval,
            model=label if isinstance(label, str) else str(label),
            meta=json_text(meta, sort_keys=True),
        )

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig | None = None) -> "HeadMap":
        """Read a map; with `config`, refuse one that was made for another model."""
        try:
            raw = read_json(path)
        except UserError as error:
            raise UserError(f"head map {error}") from error
        try:
            head_map = cls.from_json(raw)
        except UserError as error:
            raise UserError(str(error).replace("head map:", f"head map {path}:", 1)) from error
        if config is not None:
            head_map.check(config, str(path))
        return head_map

    def check(self, config: ModelConfig, name: str = "") -> None:
        """Raise UserError unless the map's shape, and its fingerprint where it has one, are the model's."""
        label = f"head map {name}".rstrip()
        if (self.num_layers, self.num_kv_heads) != (config.num_layers, config.num_kv_heads):
            raise UserError(
                f"{label}: made for {self.num_layers} layers × {self.num_kv_heads} KV heads, "
                f"but the model has {config.num_layers} × {config.num_kv_heads}"
            )
        if self.fingerprint is not None and self.fingerprint != config.fingerprint():
            raise UserError(f"{label}: made for another model (its fingerprint differs from this model's)")


def highest_roles(scores: Float[np.ndarray, "L K"], count: int) -> Bool[np.ndarray, "L K"]:
    """Which heads retrieve: all of layer 0, and those with the highest scores until there are `count`.

    Ties go to the lower layer, then to the lower head. What stands in row 0 does not matter.

    Raises:
        UserError: fewer than layer 0 has, or more than there are.
    """
    _check_count(scores, count)
    layers, kv_heads = scores.shape
    order = np.argsort(-scores[1:].flatten(), kind="stable")
    layer, head = np.divmod(order[: count - kv_heads], kv_heads)
    roles = np.zeros((layers, kv_heads), bool)
    roles[0] = True
    roles[1 + layer, head] = True
    return roles


def even_roles(scores: Float[np.ndarray, "L K"], count: int, devices: int) -> Bool[np.ndarray, "L K"]:
    """Which heads retrieve, where `devices` are to share those of a layer evenly: a multiple of them, none, or all.

    Among such maps of `count` heads the one with the highest sum of scores; one layer may have what is left over.

    Raises:
        UserError: as `highest_roles`.
    """
    _check_count(scores, count)
    layers, kv_heads = scores.shape
    wanted = count - kv_heads
    order = np.argsort(-scores, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(scores, order, axis=1), axis=1, dtype=np.float64)
    sums = np.concatenate([np.zeros((layers, 1)), sums], axis=1)  # of a layer's best heads, by how many they are
    # The highest sum of n heads in the layers so far [uneven, n]; uneven: one of these has what is left over.
    best = np.full((2, wanted + 1), -np.inf)
    best[0, 0] = 0.0
    taken = np.zeros((layers, 2, wanted + 1), np.int64)  # how many of them are in the last of these layers
    for layer in range(1, layers):
        before, best = best, np.full_like(best, -np.inf)
        for size in range(min(kv_heads, wanted) + 1):
            for uneven, was in _steps(size, kv_heads, devices):
                total = before[was, : wanted + 1 - size] + sums[layer, size]
                better = total > best[uneven, size:]
                best[uneven, size:][better] = total[better]
                taken[layer, uneven, size:][better] = size
    roles = np.zeros((layers, kv_heads), bool)
    roles[0] = True
    uneven = int(best[1, wanted] > best[0, wanted])
    for layer in range(layers - 1, 0, -1):
        size = int(taken[layer, uneven, wanted])
        roles[layer, order[layer, :size]] = True
        uneven, wanted = dict(_steps(size, kv_heads, devices))[uneven], wanted - size
    return roles


def _steps(size: int, kv_heads: int, devices: int) -> list[tuple[int, int]]:
    """Whether there is an uneven layer after one with `size` retrieval heads, and whether there was before."""
    return [(0, 0), (1, 1)] if size % devices == 0 or size == kv_heads else [(1, 0)]


def _check_count(scores: Float[np.ndarray, "L K"], count: int) -> None:
    layers, kv_heads = scores.shape
    if not kv_heads <= count <= layers * kv_heads:
        raise UserError(
            f"{count} retrieval heads: layer 0 alone has {kv_heads}, and the model has {layers * kv_heads} KV heads"
        )


def _check_roles(num_layers: Any, num_kv_heads: Any, retrieval: Any) -> tuple[tuple[int, ...], ...]:
    """The retrieval heads of every layer, as a map may have them; errors say which entry is wrong."""
    for name, value in (("num_layers", num_layers), ("num_kv_heads", num_kv_heads)):
        if not _is_whole(value) or value < 1:
            raise UserError(f"head map: {name} is {value!r}; it must be a positive whole number")
    if not isinstance(retrieval, Sequence) or not all(isinstance(heads, Sequence) for heads in retrieval):
        raise UserError("head map: 'retrieval' must be a list with one list of head ids for every layer")
    if len(retrieval) != num_layers:
        raise UserError(f"head map: 'retrieval' has {len(retrieval)} layers, but num_layers is {num_layers}")
    for layer, heads in enumerate(retrieval):
        if any(not _is_whole(head) or not 0 <= head < num_kv_heads for head in heads):
            raise UserError(
                f"head map: layer {layer} has {list(heads)}; head ids are whole numbers from 0 to {num_kv_heads - 1}"
            )
        if list(heads) != sorted(set(heads)):
            raise UserError(f"head map: layer {layer} has {list(heads)}; head ids must be unique and ascending")
    if len(retrieval[0]) != num_kv_heads:
        raise UserError(
            f"head map: layer 0 has {list(retrieval[0])}; all {num_kv_heads} KV heads of layer 0 must retrieve"
        )
    return tuple(tuple(heads) for heads in retrieval)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)  # true is an int to Python
