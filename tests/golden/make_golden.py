"""Makes the golden files: tiny random models, and the logits that Hugging Face transformers computes from them.

Run in an environment with torch and transformers 5 (the project itself needs neither):

    python tests/golden/make_golden.py [CASE ...]

Each case is a Hugging Face folder, `config.json` in the dialect under test and `model.safetensors`, with `golden.npz`
beside them: for prompt i, `prompt_i [T]`, `logits_i [T, V]` of its prefill in one forward, `tokens_i [n]` chosen
greedily token by token with a cache, and `token_logits_i [n, V]` from which they were chosen (row 0 ends the prefill).
Everything is float32 on the CPU with eager attention.
"""
# pyright: reportMissingImports=false
# (torch is no dependency of the project, nor of its checks)

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

NEW_TOKENS = 12
SMALLEST_GAP = 5e-3
"""Between the best two logits of every greedy choice, so that no rounding can turn it."""

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
QWEN2: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "use_sliding_window": False,
    "sliding_window": 16,
    "max_window_layers": 1,
}
QWEN3: dict[str, Any] = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 16,
    "attention_bias": False,
}
V4 = {"torch_dtype": "float32", "transformers_version": "4.57.0"}
V5 = {"dtype": "float32", "transformers_version": "5.17.0"}

# The rope cases have a small base and 16 pairs, so that at a few dozen positions every pair has a say.
ROPE_LLAMA = LLAMA | {"head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}

CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    # name: (config.json, prompt lengths)
    # --- families and sizes
    "llama2-mha": (
        {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
        | V4
        | {"rope_scaling": None, "pretraining_tp": 1, "head_dim": None},
        (70,),
    ),
    "llama3-g4": (LLAMA | V4 | {"num_attention_heads": 8, "rope_theta": 500000.0, "eos_token_id": [2, 3]}, (70,)),
    "llama-all-biases": (
        LLAMA
        | V5
        | {
            "attention_bias": True,
            "mlp_bias": True,
            "num_hidden_layers": 3,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
        (70,),
    ),
    "qwen2-g7": (
        QWEN2
        | V4
        | {
            "hidden_size": 112,
            "intermediate_size": 32,
            "num_attention_heads": 14,
            "rope_theta": 1000000.0,
            "eos_token_id": None,
        },
        (70,),
    ),
    "qwen2.5-tied-g2": (
        QWEN2
        | V5
        | {
            "tie_word_embeddings": True,
            "sliding_window": None,
            "layer_types": ["full_attention", "full_attention"],
            "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        },
        (70,),
    ),
    "qwen3-g8": (
        QWEN3
        | V5
        | {
            "num_hidden_layers": 3,
            "num_attention_heads": 16,
            "head_dim": 8,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
        },
        (70,),
    ),
    "qwen3-g2-head-dim-absent": (
        {key: value for key, value in QWEN3.items() if key != "head_dim"}
        | V4
        | {
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 32,
            "rope_theta": 1000000,
            "tie_word_embeddings": True,
        },
        (70,),
    ),
    "qwen3-g1-attention-bias": (QWEN3 | V4 | {"num_key_value_heads": 4, "attention_bias": True}, (70,)),
    # --- rope types
    "linear-v4": (ROPE_LLAMA | V4 | {"rope_theta": 100.0, "rope_scaling": {"type": "linear", "factor": 3}}, (90,)),
    "linear-v5": (
        QWEN3 | V5 | {"rope_parameters": {"rope_theta": 1000.0, "rope_type": "linear", "factor": 2.5}},
        (70,),
    ),
    # Dynamic: one prompt beyond max_position_embeddings, and one that is passed it while decoding.
    "dynamic-v4": (
        ROPE_LLAMA
        | V4
        | {"max_position_embeddings": 32, "rope_theta": 100.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        (75, 27),
    ),
    "dynamic-v5": (
        QWEN2
        | V5
        | {
            "max_position_embeddings": 48,
            "rope_parameters": {"rope_theta": 1000.0, "rope_type": "dynamic", "factor": 2},
        },
        (80, 44),
    ),
    "yarn-v4": (
        ROPE_LLAMA
        | V4
        | {
            "rope_theta": 10000.0,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        },
        (90,),
    ),
    "yarn-attention-factor": (
        QWEN3
        | V5
        | {
            "head_dim": 32,
            "rope_parameters": {
                "rope_theta": 10000.0,
                "rope_type": "yarn",
                "factor": 4.0,
                "attention_factor": 1.5,
                "original_max_position_embeddings": 64,
            },
        },
        (90,),
    ),
    "yarn-mscale-betas": (
        ROPE_LLAMA
        | V4
        | {
            "max_position_embeddings": 4096,
            "rope_theta": 1000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 8.0,
                "mscale": 2.0,
                "mscale_all_dim": 0.5,
                "beta_fast": 8,
                "beta_slow": 2,
                "original_max_position_embeddings": 512,
            },
        },
        (90,),
    ),
    # The factor is not the ratio of the two lengths, here 1: the original length is absent.
    "yarn-no-truncate": (
        ROPE_LLAMA
        | V5
        | {
            "rope_parameters": {
                "rope_theta": 1000.0,
                "rope_type": "yarn",
                "factor": 6.0,
                "mscale": 0.7,
                "truncate": False,
            }
        },
        (90,),
    ),
    "yarn-original-at-top": (
        QWEN2
        | V4
        | {
            "hidden_size": 64,
            "intermediate_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 40,
            "rope_scaling": {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 128},
        },
        (90,),
    ),
    "llama3-v4": (
        ROPE_LLAMA
        | V4
        | {
            "rope_theta": 500.0,
            "tie_word_embeddings": True,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_type": "llama3",
            },
        },
        (90,),
    ),
    "llama3-v5": (
        QWEN3
        | V5
        | {
            "head_dim": 32,
            "rope_parameters": {
                "rope_theta": 1000.0,
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 2.0,
                "high_freq_factor": 5.0,
            },
        },
        (90,),
    ),
}


def random_model(folder: Path, seed: int) -> Any:
    """The model that transformers makes of the folder's config.json, its weights large enough for rope to matter."""
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            values = 1 + 0.2 * values
        elif "bias" in name or "embed" in name:
            values = 0.4 * values
        else:
            values = values * 1.5 / parameter.shape[1] ** 0.5
        parameter.data = values
    return model


@torch.no_grad()
def greedy(model: Any, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of the prompt, tokens chosen greedily with a cache, and the logits they were chosen from."""
    # A rotary module remembers the longest sequence that it has seen: each prompt begins with a new one.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    cache = DynamicCache(config=model.config)
    logits = model(torch.tensor(prompt[None]), past_key_values=cache, use_cache=True).logits[0]
    rows = [logits[-1]]
    tokens = [int(rows[0].argmax())]
    while len(tokens) < NEW_TOKENS:
        rows.append(model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True).logits[0, -1])
        tokens.append(int(rows[-1].argmax()))
    return logits.numpy(), np.array(tokens, np.int32), torch.stack(rows).numpy()


def make(case: str, out: Path) -> None:
    """Writes one case; takes the first seed whose greedy choices are clear and not all the same."""
    config, lengths = CASES[case]
    folder = out / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for seed in range(100):
        model = random_model(folder, seed)
        rng = np.random.default_rng(seed)
        arrays: dict[str, np.ndarray] = {}
        clear = True
        for index, length in enumerate(lengths):
            prompt = rng.integers(0, config["vocab_size"], length, dtype=np.int32)
            logits, tokens, token_logits = greedy(model, prompt)
            best = np.sort(token_logits, axis=-1)
            clear &= bool((best[:, -1] - best[:, -2]).min() > SMALLEST_GAP) and len(set(tokens.tolist())) > 4
            arrays |= {
                f"prompt_{index}": prompt,
                f"logits_{index}": logits,
                f"tokens_{index}": tokens,
                f"token_logits_{index}": token_logits,
            }
        if clear:
            break
    else:
        raise SystemExit(f"{case}: no seed gives clear greedy choices")
    tied = config["tie_word_embeddings"]
    tensors = {
        name: tensor.contiguous() for name, tensor in model.state_dict().items() if not (tied and "lm_head" in name)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez_compressed(folder / "golden.npz", allow_pickle=False, **arrays)
    print(f"{case}: seed {seed}, logits up to {np.abs(arrays['logits_0']).max():.1f}")


if __name__ == "__main__":
    here = Path(__file__).parent
    for name in sys.argv[1:] or CASES:
        make(name, here)
