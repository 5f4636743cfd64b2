"""Ask about a long document with dense and with hybrid attention, and draw which heads retrieve (heads.png)."""

import argparse

import numpy as np

import lychee_jax
from lychee_jax.data import facts, language
from lychee_jax.plotting.attention import plot_heads

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--tokens", type=int, default=4096, help="length of the document")
parser.add_argument("--budget", type=int, default=512, help="tokens that a sparse head may read")
parser.add_argument("--output", default="heads.png", help="where the picture goes")
arguments = parser.parse_args()

rng = np.random.default_rng(7)
hidden = facts.passkeys(rng, 8)
document, _ = facts.hide(rng, hidden, arguments.tokens)
text = language.text_of(document[1:])  # without the BOS token, which the tokenizer adds
asked = hidden[:3]
prompts = [text + language.text_of(facts.ask(rng, fact)) for fact in asked]

model = lychee_jax.load()
answers = {
    mode: model.generate(prompts, attention=mode, budget=arguments.budget, max_new_tokens=24)
    for mode in ("dense", "hybrid")
}
for row, fact in enumerate(asked):
    print(f"{language.text_of(fact.key).strip()}: expected {language.text_of(fact.answer).strip()!r}")
    for mode, answer in answers.items():
        print(f"  {mode:>6}: {answer.text[row].strip()!r}")
for mode, answer in answers.items():
    print(f"{mode}: {answer.attention.kv_read_share:.0%} of the KV cache read for each token")

plot_heads(model.choose_heads(), arguments.output)
