"""Writes GGUF files of tiny models and tokenizers, with `gguf.GGUFWriter` and names of its own."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import sentencepiece
from gguf import GGMLQuantizationType, TokenType
from tokenizers import Tokenizer

TYPES = {type_.name: type_ for type_ in GGMLQuantizationType}
Values = Mapping[str, Any]

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`."""
    if name in _TOP:
        return _TOP[name]
    _, _, layer, *module, leaf = name.split(".")
    return f"blk.{layer}.{_MODULES['.'.join(module)]}.{leaf}"


def heads_of(name: str, raw: Values) -> int | None:
    """How many heads' rows are reordered in a llama file; None: rows stay."""
    if raw["model_type"] != "llama":
        return None
    if ".q_proj." in name:
        return raw["num_attention_heads"]
    return (raw.get("num_key_value_heads") or raw["num_attention_heads"]) if ".k_proj." in name else None


def to_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """Each head's row i and row i + H/2 become neighbours."""
    size = len(rows) // heads
    order = [head * size + half * size // 2 + i for head in range(heads) for i in range(size // 2) for half in (0, 1)]
    return rows[order]


def from_pairs(rows: np.ndarray, heads: int) -> np.ndarray:
    """The way back."""
    return rows[np.argsort(to_pairs(np.arange(len(rows)), heads))]


def random_blocks(shape: tuple[int, ...], kind: str, rng: np.random.Generator) -> np.ndarray:
    """A matrix of a type that gguf reads and does not write: any bits, with scales that are small numbers."""
    numbers, size = gguf.GGML_QUANT_SIZES[TYPES[kind]]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // numbers, size), dtype=np.uint8)
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind]
    for place in scales:
        scale = rng.uniform(1e-4, 1e-3, blocks.shape[:2]).astype(np.float16)
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    return blocks.reshape(shape[0], -1)


def write_gguf(
    path: Path,
    raw: Values,
    tensors: Mapping[str, np.ndarray],
    *,
    matrices: str | Callable[[str], str] = "F32",
    metadata: Values | None = None,
    more_tensors: Values | None = None,
    tokenizer: Values | None = None,
    split_max_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Write a model; returns the numbers that the file holds, in Hugging Face's order.

    Args:
        path: the file; the parts of a split one have numbered names.
        raw: Hugging Face's config.json of the model.
        tensors: its tensors, float32.
        matrices: the type of all matrices, or of each by its Hugging Face name.
        metadata: key → value beside those that every model has; None takes one away.
        more_tensors: GGUF's name → float32.
        tokenizer: key → value, as `bpe` and `spm` make them.
        split_max_tensors: tensors of a part.
    """
    arch = raw["model_type"]
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    values: dict[str, Any] = {
        f"{arch}.block_count": raw["num_hidden_layers"],
        f"{arch}.context_length": raw["max_position_embeddings"],
        f"{arch}.embedding_length": width,
        f"{arch}.feed_forward_length": raw["intermediate_size"],
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": raw.get("num_key_value_heads") or heads,
        f"{arch}.attention.layer_norm_rms_epsilon": float(raw.get("rms_norm_eps", 1e-6)),
        f"{arch}.rope.freq_base": float(raw.get("rope_theta", 10000.0)),
    }
    if raw.get("head_dim"):
        values |= dict.fromkeys((f"{arch}.attention.key_length", f"{arch}.attention.value_length"), raw["head_dim"])
    for key, value in (values | dict(tokenizer or {}) | dict(metadata or {})).items():
        if value is not None:
            _add(writer, key, value)
    held = {}
    rng = np.random.default_rng(0)
    for name, tensor in tensors.items():
        kind = matrices if isinstance(matrices, str) else matrices(name)
        kind = kind if tensor.ndim > 1 else "F32"
        count = heads_of(name, raw)
        rows = to_pairs(tensor, count) if count else tensor
        stored = random_blocks(rows.shape, kind, rng) if kind.endswith("_K") else gguf.quantize(rows, TYPES[kind])
        writer.add_tensor(gguf_name(name), stored, raw_dtype=TYPES[kind])
        rows = gguf.dequantize(stored, TYPES[kind])
        held[name] = from_pairs(rows, count) if count else rows
    for name, tensor in (more_tensors or {}).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def bpe(tokenizer: Tokenizer, pre: str, **settings: Any) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer; its special tokens are control tokens, other added ones the user's."""
    model = json.loads(tokenizer.to_str())
    added = {each["id"]: each for each in model["added_tokens"]}
    tokens = [tokenizer.id_to_token(index) for index in range(tokenizer.get_vocab_size())]
    types = [
        TokenType.NORMAL if index not in added
        else TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        for index in range(len(tokens))
    ]  # fmt: skip
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(each) for each in types],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["model"]["merges"]],
        **{f"tokenizer.ggml.{name}": value for name, value in settings.items()},
    }


def spm(processor: sentencepiece.SentencePieceProcessor, **settings: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece model."""
    kinds = (
        (processor.is_unknown, TokenType.UNKNOWN),
        (processor.is_control, TokenType.CONTROL),
        (processor.is_byte, TokenType.BYTE),
        (processor.is_unused, TokenType.UNUSED),
    )
    ids = range(processor.get_piece_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [processor.id_to_piece(index) for index in ids],
        "tokenizer.ggml.scores": [float(processor.get_score(index)) for index in ids],
        "tokenizer.ggml.token_type": [
            int(next((kind for applies, kind in kinds if applies(index)), TokenType.NORMAL)) for index in ids
        ],
        **{f"tokenizer.ggml.{name}": value for name, value in settings.items()},
    }
