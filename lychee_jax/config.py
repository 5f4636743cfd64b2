"""The architecture of a model as frozen, hashable data, read from a Hugging Face `config.json`.

Both dialects are read: transformers 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) and 5 (`rope_parameters`, `dtype`).
What the decoder cannot compute exactly is refused by name: a model that is almost right is worse than none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any, Literal, get_args

from lychee_jax.errors import UserError
from lychee_jax.files import read_json
from lychee_jax.quantization_config import Quantization, stored_quantization

RopeKind = Literal["default", "linear", "dynamic", "yarn", "llama3", "longrope"]
Family = Literal["llama", "qwen2", "qwen3"]

ROPE_KINDS: tuple[str, ...] = get_args(RopeKind)
FAMILIES: tuple[str, ...] = get_args(Family)
DTYPES = ("float32", "bfloat16", "float16")

_log = logging.getLogger(__name__)


def _positive(name: str, value: int | float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} must be positive, not {value}")


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: which frequencies, and how they are stretched for long contexts.

    Raises:
        UserError: an unknown kind, or a number with which no frequencies exist.
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 2048
    # llama3
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    # yarn
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    # longrope: each frequency is divided by its own
    factors: tuple[float, ...] | None = None

    def __post_init__(self):
        if self.kind not in ROPE_KINDS:
            raise UserError(f"rope type {self.kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
        for name in ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            _positive(name if name != "theta" else "rope_theta", getattr(self, name))
        if self.attention_factor is not None:
            _positive("attention_factor", self.attention_factor)
        _positive("original_max_position_embeddings", self.original_max_position_embeddings)
        if self.theta <= 1:
            raise UserError(f"rope_theta must be greater than 1, not {self.theta}")
        for factor in self.factors or ():
            _positive("a longrope factor", factor)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor ({self.high_freq_factor}) must be greater than low_freq_factor "
                f"({self.low_freq_factor})"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder of the Llama, Qwen2 or Qwen3 family; `family` is a label, the fields decide the arithmetic.

    `dtype` is that of activations, cache, embedding and norms; `quantize` that of all other kernels, the output head's
    only with `quantize_head`. Of config files only those of converted folders say the last two.

    Raises:
        UserError: sizes that fit no decoder (not positive, heads not divisible, odd head_dim).
    """

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig = RopeConfig()
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    dtype: str = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    quantize: Quantization | None = None
    quantize_head: bool = False

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise UserError(f"model_type {self.family!r} is not supported; supported are {', '.join(FAMILIES)}")
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_position_embeddings",
            "rms_norm_eps",
        ):
            _positive(name, getattr(self, name))
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"the number of attention heads ({self.num_heads}) must be a multiple of the number of key-value heads "
                f"({self.num_kv_heads})"
            )
        if self.head_dim % 2:
            raise UserError(f"head_dim must be even, as rotary embedding turns pairs, not {self.head_dim}")
        if self.rope.kind == "dynamic" and self.head_dim == 2:
            raise UserError("dynamic rope needs a head_dim of at least 4: its base grows by the power H / (H - 2)")
        if self.rope.factors is not None and len(self.rope.factors) != self.head_dim // 2:
            wanted = self.head_dim // 2
            raise UserError(f"longrope needs a factor for each of {wanted} frequencies, not {len(self.rope.factors)}")
        if self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not supported; supported are {', '.join(DTYPES)}")

    @property
    def groups(self) -> int:
        """G: query heads for each KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def max_tokens(self) -> int:
        """The most tokens, prompt and new ones together, that a sequence may have."""
        if self.rope.kind not in ("linear", "dynamic", "yarn"):
            return self.max_position_embeddings
        # Rounded first, as 1.1 × 1000 is not to be 1100.0000000000002 nor 4.35 × 100 to be 434.
        stretched = math.floor(round(self.rope.factor * self.rope.original_max_position_embeddings, 6))
        return max(self.max_position_embeddings, stretched)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON of everything that decides what the heads compute.

        How weights are stored and the bos and eos ids are left out: a head map learned on a model fits its float32
        copy too.
        """
        fields = dataclasses.asdict(self)
        for name in ("dtype", "bos_token_id", "eos_token_ids", "quantize", "quantize_head"):
            del fields[name]
        if self.rope.factors is None:
            del fields["rope"]["factors"]  # configs without it keep the fingerprint that maps were learned with
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Reads `config.json` in a checkpoint's folder; what it asks for and does not get is logged as a warning.

        Raises:
            UserError: no such folder, no config.json, no JSON object in it, or a config that `from_hf` refuses.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
        file = folder / "config.json"
        if not file.is_file():
            raise UserError(f"not a checkpoint: {folder} has no config.json")
        raw = read_json(file)
        try:
            config = cls.from_hf(raw)
            exact = _exact_tokens(raw)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        if exact is not None and exact < config.max_tokens:
            _log.warning(
                "%s asks for dual chunk attention, which is not supported: attention is full, and the model exact up "
                "to %d tokens",
                file,
                exact,
            )
        return config

    @classmethod
    def from_hf(cls, raw: Any) -> ModelConfig:
        """The config of a parsed Hugging Face `config.json`; absent keys take the defaults of its model class.

        Raises:
            UserError: a missing or misshapen key, or anything that the decoder does not compute, by its name.
        """
        if not isinstance(raw, dict):
            raise UserError(f"a model config must be a JSON object, not {type(raw).__name__}")
        family = _family(raw)
        _refuse_unsupported(raw)
        stored = stored_quantization(raw)

        hidden_size = _integer(raw, "hidden_size")
        num_layers = _integer(raw, "num_hidden_layers")
        num_heads = _integer(raw, "num_attention_heads")
        max_position_embeddings = _integer(raw, "max_position_embeddings", 2048 if family == "llama" else 32768)
        _refuse_sliding_layers(raw, num_layers)
        attention_bias = _flag(raw, "attention_bias") and family != "qwen2"  # Qwen2 has a rule of its own, below
        bos, eos = (1, 2) if family == "llama" else (None, None)
        # An absent id takes the model class's default, but null says that there is none.
        bos_ids = token_ids(raw.get("bos_token_id", bos), "bos_token_id")
        return cls(
            family=family,
            vocab_size=_integer(raw, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_integer(raw, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=_integer(raw, "num_key_value_heads", num_heads),
            head_dim=_head_dim(raw, family, hidden_size, num_heads),
            max_position_embeddings=max_position_embeddings,
            rope=_rope(raw, max_position_embeddings),
            rms_norm_eps=_number(raw, "rms_norm_eps", 1e-6),
            tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
            qkv_bias=attention_bias or family == "qwen2",
            o_bias=attention_bias,
            mlp_bias=_flag(raw, "mlp_bias") and family == "llama",
            qk_norm=family == "qwen3",
            dtype=_dtype(raw),
            bos_token_id=bos_ids[0] if bos_ids else None,
            eos_token_ids=token_ids(raw.get("eos_token_id", eos), "eos_token_id"),
            quantize=stored.quantize if stored else None,
            quantize_head=stored is not None and stored.quantize_head,
        )


def token_ids(value: Any, key: str) -> tuple[int, ...]:
    """A token id, a list of them or null, as a tuple without repeats; negative ids, which stand for none, are dropped.

    Raises:
        UserError: anything else.
    """
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(_is_integer(token) for token in ids):
        raise UserError(f"{key} must be an integer, a list of integers or null, not {value!r}")
    return tuple(dict.fromkeys(token for token in ids if token >= 0))


def _family(raw: dict[str, Any]) -> Family:
    model_type = raw.get("model_type")
    supported = f"supported are {', '.join(FAMILIES)}"
    if not isinstance(model_type, str):
        raise UserError(f"model_type must be a string, not {model_type!r}; {supported}")
    if "moe" in model_type or model_type == "mixtral":
        raise UserError(f"mixture-of-experts models (model_type {model_type!r}) are not supported; {supported}")
    for family in get_args(Family):
        if model_type == family:
            return family
    raise UserError(f"model_type {model_type!r} is not supported; {supported}")


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    activation = raw.get("hidden_act")
    if activation not in (None, "silu"):
        raise UserError(f"hidden_act {activation!r} is not supported; only silu is")
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(key):
            raise UserError(f"mixture-of-experts models ({key} = {raw[key]!r}) are not supported")


def _exact_tokens(raw: dict[str, Any]) -> int | None:
    """Up to which length full attention is what the config asks for; None: at every length.

    Dual chunk attention (Qwen2.5-1M; An et al. 2024, arXiv 2402.17463) folds positions from chunk_size on, and Qwen
    scales attention by the length beyond original_max_position_embeddings.
    """
    dual = _object(raw, "dual_chunk_attention_config")
    if not dual:
        return None
    chunk = _integer(dual, "chunk_size")
    return min(chunk, _integer(dual, "original_max_position_embeddings", chunk))


def _refuse_sliding_layers(raw: dict[str, Any], num_layers: int) -> None:
    layer_types = raw.get("layer_types")
    if layer_types is not None:
        if not isinstance(layer_types, list) or len(layer_types) != num_layers:
            raise UserError(f"layer_types must be a list with one entry for each of the {num_layers} layers")
        for kind in layer_types:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(f"layer type {kind!r} is not supported; only full_attention is")
    # A null window is none; an absent one is the 4096 of Qwen's config classes.
    if not _flag(raw, "use_sliding_window") or raw.get("sliding_window", 4096) is None:
        return
    window = _integer(raw, "sliding_window", 4096)
    first = _integer(raw, "max_window_layers", 28, minimum=0)
    sliding = [
        layer
        for layer in range(num_layers)
        if (layer_types[layer] == "sliding_attention" if layer_types is not None else layer >= first)
    ]
    if sliding:
        raise UserError(
            f"sliding-window attention (sliding_window {window} in {len(sliding)} of {num_layers} layers, "
            f"from layer {sliding[0]}) is not supported"
        )


def _head_dim(raw: dict[str, Any], family: Family, hidden_size: int, num_heads: int) -> int:
    if raw.get("head_dim") is not None:
        return _integer(raw, "head_dim")
    if family == "qwen3":
        return 128
    if hidden_size % num_heads:
        raise UserError(
            f"hidden_size ({hidden_size}) must be a multiple of num_attention_heads ({num_heads}) "
            "when head_dim is not given"
        )
    return hidden_size // num_heads


def _rope(raw: dict[str, Any], max_position_embeddings: int) -> RopeConfig:
    scaling = _object(raw, "rope_scaling")
    parameters = _object(raw, "rope_parameters")
    # A config that was saved by transformers 5 and edited by hand may hold both; the edit is what is meant.
    rope = scaling or parameters
    for key, value in rope.items():
        if isinstance(value, dict):
            raise UserError(f"rope parameters for each layer type ({key!r}) are not supported")
    for source in (rope, raw):
        if _number(source, "partial_rotary_factor", 1.0) != 1.0:
            raise UserError(f"partial_rotary_factor {source['partial_rotary_factor']} is not supported; only 1 is")

    theta = next(
        (source for source in (rope, raw, parameters) if source.get("rope_theta") is not None), {"rope_theta": 10000.0}
    )
    kind = next((rope[key] for key in ("rope_type", "type") if rope.get(key) is not None), "default")
    if kind not in ROPE_KINDS:
        raise UserError(f"rope type {kind!r} is not supported; supported are {', '.join(ROPE_KINDS)}")
    # Only what the kind uses is taken, so that configs of the same meaning are equal and have one fingerprint.
    used: dict[str, Any] = {"kind": kind, "theta": _number(theta, "rope_theta")}
    if kind == "longrope":
        return RopeConfig(kind=kind, theta=used["theta"], factors=_longrope_factors(rope))
    if kind != "default":
        original = next((source for source in (raw, rope) if source.get("original_max_position_embeddings")), {})
        used["factor"] = _number(rope, "factor", owner=f"{kind} rope")
        used["original_max_position_embeddings"] = _integer(
            original, "original_max_position_embeddings", max_position_embeddings
        )
    if kind == "llama3":
        for key in ("low_freq_factor", "high_freq_factor"):
            used[key] = _number(rope, key, owner="llama3 rope")
    if kind == "yarn":
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            used[key] = _number(rope, key) if rope.get(key) is not None else None
        # Zero counts as not given, as it does in transformers.
        used["beta_fast"] = _number(rope, "beta_fast", 32.0) or 32.0
        used["beta_slow"] = _number(rope, "beta_slow", 1.0) or 1.0
        used["truncate"] = _flag(rope, "truncate", default=True)
    return RopeConfig(**used)


def _longrope_factors(rope: dict[str, Any]) -> tuple[float, ...]:
    """The factors of the frequencies; where short and long texts have their own, no one cache would serve both."""
    short, long = rope.get("short_factor"), rope.get("long_factor")
    if not isinstance(long, list) or not long or short != long or rope.get("attention_factor") != 1:
        raise UserError(
            "rope type 'longrope' is supported only with one list of factors (short_factor equal to long_factor) and "
            "an attention_factor of 1"
        )
    return tuple(_number({"longrope factor": value}, "longrope factor") for value in long)


def _dtype(raw: dict[str, Any]) -> str:
    """The dtype in which the checkpoint was saved; a config that names none means float32, which loses nothing."""
    name = next((raw[key] for key in ("dtype", "torch_dtype") if raw.get(key) is not None), "float32")
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not supported; supported are {', '.join(DTYPES)}")
    return name


def _is_integer(value: Any) -> bool:
    # JSON's integers have no bound, but one past 64 bits is no size and no token.
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def _integer(raw: dict[str, Any], key: str, default: int | None = None, *, minimum: int = 1) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{key} is missing")
    if not _is_integer(value) or value < minimum:
        raise UserError(f"{key} must be an integer of at least {minimum}, not {value!r}")
    return value


def _number(raw: dict[str, Any], key: str, default: float | None = None, *, owner: str | None = None) -> float:
    value = raw.get(key)
    value = default if value is None else value
    if value is None:
        raise UserError(f"{key} is missing" + (f" ({owner} needs it)" if owner else ""))
    if not (_is_integer(value) or isinstance(value, float)) or not math.isfinite(value):
        raise UserError(f"{key} must be a number, not {value!r}")
    return float(value)


def _flag(raw: dict[str, Any], key: str, *, default: bool = False) -> bool:
    value = raw.get(key)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise UserError(f"{key} must be true or false, not {value!r}")
    return value


def _object(raw: dict[str, Any], key: str) -> dict[str, Any]:
    value = raw.get(key)
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise UserError(f"{key} must be an object or null, not {value!r}")
    return value
