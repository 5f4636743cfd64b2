"""How often a model finds what is hidden in a long text, by length and by depth.

Every prompt is fresh: prose of a given number of tokens with facts hidden in it, and one question at the end. Text goes
in, text comes out, and an answer counts if it is exactly the hidden one. The text is of the language that the bundled
model was trained on; any other model reads it as plain English.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from lychee_jax.data import facts as data
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case
from lychee_jax.evaluation.report import Style
from lychee_jax.text.chat import ChatOptions
from lychee_jax.text.tokenizer import Tokenizer

STYLE = Style("passkey", "% exact match", "depth")

_TRIES = 12  # to meet a length with a tokenizer that is not the generators' own


@dataclasses.dataclass(frozen=True)
class Passkey:
    """Prompts with `facts` hidden facts of a kind (a key of `data.KINDS`), of which one is asked for.

    Raises:
        UserError: an unknown kind, or no facts.
    """

    tokenizer: Tokenizer
    name: str = "passkey"
    facts: int = 16
    seed: int = 0
    max_new_tokens: int = 48
    chat: ChatOptions | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be made."""
        if self.name not in data.KINDS:
            raise UserError(f"task {self.name!r} is unknown; use some of {', '.join(data.KINDS)}")
        if self.facts < 1:
            raise UserError(f"facts is {self.facts}; at least 1 must be hidden")

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """A prompt of `length` tokens; with another tokenizer than the bundled one, hardly fewer.

        Without a depth, what is asked for stands anywhere.

        Raises:
            UserError: a length that has no room for the facts, or a depth for facts that refer to one another.
        """
        best: tuple[list[int], data.Prompt] | None = None
        pieces = length
        for _ in range(_TRIES):
            rng = np.random.default_rng([self.seed, length, self.facts, index])
            try:
                prompt = data.prompt(rng, self.name, pieces, self.facts, depth=depth)
            except ValueError as error:
                raise UserError(f"{self.name} at length {length}: {error}") from error
            tokens = self._encode(prompt.text)
            if len(tokens) <= length and (best is None or len(tokens) > len(best[0])):
                best = tokens, prompt
            if len(tokens) == length:
                break
            pieces += length - len(tokens)
        if best is None:
            raise UserError(f"no prompt of {length} tokens found; this tokenizer needs more for {self.facts} facts")
        tokens, prompt = best
        return Case(prompt.text, tokens, [prompt.answer], self.max_new_tokens)

    def _encode(self, text: str) -> list[int]:
        if self.chat is None:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_messages(self.chat.conversation(text), self.chat.template_kwargs)

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """1 for the hidden answer, else 0."""
        return float(is_right(answer, case.references[0]))


def is_right(text: str, answer: str) -> bool:
    """Whether a generated text is the answer: its first line, without white space around it and a closing full stop."""
    first_line = text.strip().split("\n", 1)[0]
    return first_line.strip().removesuffix(".") == answer
