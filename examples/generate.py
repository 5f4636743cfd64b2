"""Load a model and let it continue a text. Without --model, the small one that the package brings along."""

import argparse

import lychee_jax

PROMPT = "The passkey of amber falcon is 48213.\nQuestion: What is the passkey of amber falcon?"

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a converted or a Hugging Face folder")
parser.add_argument(
    "--prompt", default="The passkey of amber falcon is 48213.\nQuestion: What is the passkey of amber falcon?"
)
arguments = parser.parse_args()

model = lychee_jax.load(arguments.model)
answer = model.generate(arguments.prompt, chat=True, max_new_tokens=24)
print(answer.text[0])
print(f"{answer.timing.tokens_per_s:.0f} tokens/s, {answer.attention.kv_read_share:.0%} of the cache read")
