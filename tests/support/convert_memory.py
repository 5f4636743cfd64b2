"""Measures the peak memory of a conversion: `python tests/support/convert_memory.py` (writes 4 GB to a folder).

The checkpoint is a synthetic one of 2 GB in bfloat16, shaped like Llama 3.2 1B with four layers fewer: its embedding
alone is a quarter of it.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

CONFIG = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def write_synthetic(folder: Path) -> int:
    """A shard for the embedding and one for each layer; returns the bytes of all tensors."""
    width, inner, kv = CONFIG["hidden_size"], CONFIG["intermediate_size"], 8 * 64
    shards = [{"model.embed_tokens.weight": (CONFIG["vocab_size"], width), "model.norm.weight": (width,)}]
    for layer in range(CONFIG["num_hidden_layers"]):
        block = f"model.layers.{layer}"
        shards.append(
            {
                f"{block}.input_layernorm.weight": (width,),
                f"{block}.post_attention_layernorm.weight": (width,),
                f"{block}.self_attn.q_proj.weight": (width, width),
                f"{block}.self_attn.k_proj.weight": (kv, width),
                f"{block}.self_attn.v_proj.weight": (kv, width),
                f"{block}.self_attn.o_proj.weight": (width, width),
                f"{block}.mlp.gate_proj.weight": (inner, width),
                f"{block}.mlp.up_proj.weight": (inner, width),
                f"{block}.mlp.down_proj.weight": (width, inner),
            }
        )
    noise = np.random.default_rng(0).standard_normal(1_000_003, dtype=np.float32).astype(ml_dtypes.bfloat16)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    weight_map, total = {}, 0
    for number, shapes in enumerate(shards):
        name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        tensors = {key: np.resize(noise, shape) for key, shape in shapes.items()}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return total


def peak_mb() -> float:
    """The most memory (MiB) that this process ever held, mapped files included.

    Not ru_maxrss: that starts at what the parent process held when it started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def convert_and_measure(src: str, dst: str) -> dict[str, float]:
    """Peak memory (MiB) after the imports and after a conversion that verifies itself; its seconds."""
    import jax

    from checkpoints_convert import convert

    jax.devices()
    before = peak_mb()
    started = time.perf_counter()
    report = convert(src, dst, verify=True)
    return {
        "import_mb": before,
        "above_import_mb": peak_mb() - before,
        "seconds": time.perf_counter() - started,
        "bytes": report.bytes,
    }


def measure() -> dict[str, float]:
    """Write the checkpoint, convert it in a process of its own, remove both; the figures of `convert_and_measure`."""
    with tempfile.TemporaryDirectory() as folder:
        src, dst = Path(folder, "hf"), Path(folder, "converted")
        src.mkdir()
        write_synthetic(src)
        command = [sys.executable, __file__, str(src), str(dst)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2])
        return json.loads(done.stdout)


if __name__ == "__main__":
    print(json.dumps(convert_and_measure(*sys.argv[1:]) if sys.argv[1:] else measure()))
