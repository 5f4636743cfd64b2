"""How a checkpoint's `config.json` says that its weights are quantised; what is not read is refused by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, cast, get_args

from lychee_jax.errors import UserError

Quantization = Literal["int8", "fp8"]

CONVERTED = "lychee"
"""The method that a converted folder names."""

# The last is MLX's, which has no method but bits; it writes quantization_config, too, of the same content.
_KEYS = ("quantization_config", "compression_config", "quantization")
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", "mixed-precision", None)  # of compressed-tensors
_STRATEGIES = ("tensor", "channel", "block", None)


@dataclasses.dataclass(frozen=True)
class StoredQuantization:
    """What a config says of weights that are stored in 8 bits; which ones, and how many share a scale, files say.

    Attributes:
        block: rows and columns of the blocks that may share a scale; None: there are no blocks.
        quantize: of a converted folder: what its kernels are stored as.
        quantize_head: of a converted folder: whether the output head's is, too.
    """

    block: tuple[int, int] | None = None
    quantize: Quantization | None = None
    quantize_head: bool = False


def stored_quantization(raw: dict[str, Any]) -> StoredQuantization | None:
    """What a parsed `config.json` says of quantised weights; None: there are none.

    Raises:
        UserError: a method that is not read, by its name, or a misshapen entry.
    """
    key = next((key for key in _KEYS if raw.get(key)), None)
    if key is None:
        return None
    value = raw[key]
    method = value.get("quant_method") if isinstance(value, dict) else None
    if method == CONVERTED:
        return _converted(value)
    if method == "fp8":
        return _fp8(key, value)
    if method == "compressed-tensors":
        return _compressed_tensors(key, value)
    raise _refused(key, _name(value))


def converted_quantization(quantize: Quantization, quantize_head: bool) -> dict[str, Any]:
    """What a converted folder's `quantization_config` says."""
    return {"quant_method": CONVERTED, "quantize": quantize, "quantize_head": quantize_head}


def without_quantization(raw: dict[str, Any]) -> dict[str, Any]:
    """A parsed `config.json` that says nothing of quantised weights."""
    return {key: value for key, value in raw.items() if key not in _KEYS}


def _converted(value: dict[str, Any]) -> StoredQuantization:
    quantize, head = value.get("quantize"), value.get("quantize_head", False)
    if quantize not in get_args(Quantization) or not isinstance(head, bool):
        raise UserError(f"quantization_config of a converted folder is {value}, which this version does not read")
    return StoredQuantization(None, cast(Quantization, quantize), head)


def _fp8(key: str, value: dict[str, Any]) -> StoredQuantization:
    """Blocks of e4m3 that share a scale, as Qwen and DeepSeek publish; without blocks a scale for each tensor."""
    if value.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn", None):
        raise _refused(key, f"fp8, {value['fmt']}")
    size = value.get("weight_block_size", [128, 128])
    return StoredQuantization(None if size is None else _block(size, "weight_block_size"))


def _compressed_tensors(key: str, value: dict[str, Any]) -> StoredQuantization:
    """Groups of weights; those that are not of 8 bits, or not a number times a scale alone, are refused."""
    groups = value.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise UserError(f"{key}: config_groups must be an object of objects, not {groups!r}")
    sparsity = value.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("format") not in ("dense", None):
        raise _refused(key, f"compressed-tensors, {sparsity['format']}")
    if value.get("transform_config"):
        raise _refused(key, "compressed-tensors, with transforms")
    blocks: set[tuple[int, int]] = set()
    for group in groups.values():
        weights = group.get("weights")
        if weights is None:
            continue
        if not isinstance(weights, dict):
            raise UserError(f"{key}: weights must be an object or null, not {weights!r}")
        stored_as = group.get("format") or value.get("format")
        bits, kind, strategy = (weights.get(name) for name in ("num_bits", "type", "strategy"))
        eight = bits == 8 and kind in ("float", "int") and strategy in _STRATEGIES and stored_as in _FORMATS
        if not eight or weights.get("symmetric") is False:
            shift = ", not symmetric" if weights.get("symmetric") is False else ""
            raise _refused(key, f"compressed-tensors, {stored_as}, {bits} bits of {kind}, strategy {strategy}{shift}")
        if strategy == "block":
            blocks.add(_block(weights.get("block_structure"), "block_structure"))
    if len(blocks) > 1:
        raise _refused(key, f"compressed-tensors, blocks of {len(blocks)} sizes")
    return StoredQuantization(next(iter(blocks), None))


def _block(value: Any, key: str) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(size) is int and size > 0 for size in value):
        return value[0], value[1]
    raise UserError(f"{key} must be two positive integers, not {value!r}")


def _name(value: Any) -> str:
    """The method's name, or what else tells how a checkpoint is quantised."""
    if not isinstance(value, dict):
        return str(value)
    for key in ("quant_method", "quant_algo", "mode"):
        if isinstance(value.get(key), str):
            return value[key]
    return f"{value['bits']} bits" if "bits" in value else "unnamed"


def _refused(key: str, what: str) -> UserError:
    return UserError(
        f"quantised checkpoints ({key}: {what}) are not supported, but for fp8 and 8 bits of compressed-tensors; use "
        "the unquantised one"
    )
