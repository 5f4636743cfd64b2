"""Which KV heads of which layer are retrieval heads, and the JSON file that says so."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError

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
        if len(self.retrieval) != self.num_layers:
            raise UserError(
                f"head map: 'retrieval' has {len(self.retrieval)} layers, but num_layers is {self.num_layers}"
            )
        for layer, heads in enumerate(self.retrieval):
            if any(not 0 <= head < self.num_kv_heads for head in heads):
                raise _wrong_ids(layer, heads, self.num_kv_heads)
            if list(heads) != sorted(set(heads)):
                raise UserError(f"head map: layer {layer} has {list(heads)}; head ids must be unique and ascending")
        if len(self.retrieval[0]) != self.num_kv_heads:
            raise UserError(
                f"head map: layer 0 has {list(self.retrieval[0])}; "
                f"all {self.num_kv_heads} KV heads of layer 0 must retrieve"
            )

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

    @property
    def num_retrieval(self) -> int:
        """Retrieval heads of the whole model, layer 0 included."""
        return sum(len(heads) for heads in self.retrieval)

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
            "meta": json.loads(self.meta),
        }

    def save(self, path: str | Path) -> None:
        """Write the map as JSON."""
        Path(path).write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, raw: Any) -> "HeadMap":
        """Check and read a file's content; errors say which entry is wrong."""
        if not isinstance(raw, dict):
            raise UserError("head map: the file must hold a JSON object")
        if raw.get("format") != FORMAT:
            raise UserError(f"head map: format is {raw.get('format')!r}; this version reads {FORMAT!r}")
        for key in ("num_layers", "num_kv_heads"):
            if not isinstance(raw.get(key), int) or isinstance(raw.get(key), bool) or raw[key] < 1:
                raise UserError(f"head map: {key} is {raw.get(key)!r}; it must be a positive whole number")
        retrieval = raw.get("retrieval")
        if not isinstance(retrieval, list) or not all(isinstance(heads, list) for heads in retrieval):
            raise UserError("head map: 'retrieval' must be a list with one list of head ids for every layer")
        for layer, heads in enumerate(retrieval):
            if not all(type(head) is int for head in heads):  # true is an int to Python
                raise _wrong_ids(layer, heads, raw["num_kv_heads"])
        meta = raw.get("meta", {})
        if not isinstance(meta, dict):
            raise UserError("head map: 'meta' must be a JSON object")
        label = raw.get("model", "")
        return cls(
            raw["num_layers"],
            raw["num_kv_heads"],
            tuple(tuple(heads) for heads in retrieval),
            model=label if isinstance(label, str) else str(label),
            meta=json.dumps(meta, sort_keys=True),
        )

    @classmethod
    def load(cls, path: str | Path, config: ModelConfig | None = None) -> "HeadMap":
        """Read a map; with `config`, refuse one that was made for another model."""
        path = Path(path)
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"head map {path}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise UserError(f"head map {path}: not valid JSON ({error})") from error
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
        fingerprint = json.loads(self.meta).get("fingerprint")
        if fingerprint is not None and fingerprint != config.fingerprint():
            raise UserError(f"{label}: made for another model (its fingerprint differs from this model's)")


def _wrong_ids(layer: int, heads: Sequence[Any], kv_heads: int) -> UserError:
    return UserError(f"head map: layer {layer} has {list(heads)}; head ids are whole numbers from 0 to {kv_heads - 1}")
