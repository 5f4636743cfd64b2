"""Sample several prompts at once, then stream one: sampled tokens depend on the seed, not on the other prompts."""

import lychee_jax

FACT = "The passkey of amber falcon is 48213. The passkey of silver otter is 90817.\n"
PROMPTS = [
    FACT + "Question: What is the passkey of amber falcon? Answer:",
    FACT + "Question: What is the passkey of silver otter? Answer:",
    "It rained in the valley, and the old fox",
]

model = lychee_jax.load()
batch = model.generate(PROMPTS, temperature=0.8, top_p=0.95, seed=1, max_new_tokens=16)
for prompt, text in zip(PROMPTS, batch.text, strict=True):
    print(f"{prompt.splitlines()[-1]} → {text!r}")

for piece in model.stream(PROMPTS[0], temperature=0.8, top_p=0.95, seed=1, max_new_tokens=16):
    print(piece, end="", flush=True)
print()
