"""Prompts of an exact length for any tokenizer: a number is hidden in a haystack, and asked for in RULER's words.

All prompts of a task and a length have the same number of tokens, so that they can be scored and answered in batches.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

from lychee_jax.errors import UserError
from lychee_jax.evaluation import ruler_data
from lychee_jax.evaluation.prompts import NEEDLE, NOISE, RULER
from lychee_jax.files import digest_of, read_text
from lychee_jax.text.tokenizer import Tokenizer

TASKS = {"niah_single_1": 1, "passkey_prose": 1, "lookup_prose": 4}
"""How many numbers are hidden: one in RULER's noise, one in English prose, or several in prose, of which one is asked
for by its key."""
PERPLEXITY = "perplexity"
ANSWER_TOKENS = 8
SCORED = 128
"""Tokens of text that follow a window and are scored."""
HELD_OUT, VALIDATION = 0x51ED270B, 0x2545F491
_DIGITS = (10**6, 10**7)
_LEAST_HAYSTACK = 256


@dataclasses.dataclass(frozen=True)
class Asked:
    """`tokens [T]` of a prompt, its right answer `answer [A]`, padded with −1, and that answer as text."""

    tokens: np.ndarray
    answer: np.ndarray
    text: str


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Makes the prompts; each is a function of stream, task, length and index alone.

    `prose`: an English text of some hundred thousand words.
    """

    tokenizer: Tokenizer
    prose: Path

    @functools.cached_property
    def text(self) -> str:
        """The prose."""
        return read_text(self.prose).replace("\r\n", "\n")

    @property
    def digest(self) -> str:
        """Of the prose."""
        return digest_of(self.text)

    @functools.cached_property
    def _sentences(self) -> list[list[int]]:
        """Tokens of every sentence of the prose, with the space before it."""
        found = re.split(r"(?<=[.!?]) (?=[A-Z\"])|\n+", self.text)
        sentences = [self.tokenizer.encode_plain(" " + each.strip()) for each in found if each.strip()]
        if len(sentences) < 1000:
            raise UserError(f"{self.prose} has {len(sentences)} sentences; a book of 1,000 or more is needed")
        return sentences

    @functools.cached_property
    def _noise(self) -> list[int]:
        return self.tokenizer.encode_plain("\n" + NOISE)

    @functools.cached_property
    def _tokens(self) -> list[int]:
        return self.tokenizer.encode_plain(self.text)

    def width(self, task: str) -> int:
        """Tokens of the longest answer."""
        return SCORED if task == PERPLEXITY else ANSWER_TOKENS

    def make(self, stream: int, task: str, length: int, index: int, seed: int = 0) -> Asked:
        """The prompt of this index.

        Raises:
            UserError: a length without room for it, or a text that is too short.
        """
        if task == PERPLEXITY:
            return self._window(length, index)
        rng = np.random.default_rng([stream, list(TASKS).index(task), length, index, seed])
        numbers = [str(rng.integers(*_DIGITS)) for _ in range(TASKS[task])]
        keys: dict[str, None] = {}
        while len(keys) < len(numbers):
            keys[f"{rng.choice(ruler_data.adjectives())}-{rng.choice(ruler_data.nouns())}"] = None
        needles = [
            NEEDLE.format(values="numbers", key=key, value=number) for key, number in zip(keys, numbers, strict=True)
        ]
        names = {"value": "number", "query": next(iter(keys))}
        wording = RULER["niah-one"]
        before, after = wording.body.format(context="\0", **names).split("\0")
        after += wording.answer.format(**names)
        noise = task == "niah_single_1"
        tokens = self._fit(rng, length, before.strip(), after, needles, noise=noise)
        answer = np.full(ANSWER_TOKENS, -1, np.int32)
        ids = self.tokenizer.encode_plain(" " + numbers[0])
        if len(ids) > ANSWER_TOKENS:
            raise UserError(f"the answer {numbers[0]} has {len(ids)} tokens; at most {ANSWER_TOKENS} are scored")
        answer[: len(ids)] = ids
        return Asked(np.asarray(tokens, np.int32), answer, numbers[0])

    def _fit(
        self, rng: np.random.Generator, length: int, before: str, after: str, needles: list[str], *, noise: bool
    ) -> list[int]:  # fmt: skip
        """Haystack and needles between `before` and `after`, `length` tokens together; the haystack's front is cut."""
        encode = self.tokenizer.encode_plain
        front, back = self.tokenizer.encode(before), encode(after)
        hidden = [encode(("\n" if noise else " ") + needle) for needle in needles]
        wanted = length - len(front) - len(back) - sum(map(len, hidden))
        if wanted < _LEAST_HAYSTACK:
            raise UserError(f"length {length} is too short for {len(needles)} hidden numbers and the question")
        hay, surplus = self._haystack(rng, wanted, noise=noise)
        while surplus >= len(hay[0]):
            surplus -= len(hay.pop(0))
        hay[0] = hay[0][surplus:]
        for place, needle in zip(sorted(rng.integers(1, len(hay) + 1, len(needles)))[::-1], hidden, strict=True):
            hay.insert(int(place), needle)
        return [*front, *(token for piece in hay for token in piece), *back]

    def _haystack(self, rng: np.random.Generator, wanted: int, *, noise: bool) -> tuple[list[list[int]], int]:
        """Lines of noise, or sentences of the prose from a random one on, and how many tokens more than wanted."""
        hay: list[list[int]] = []
        total, at = 0, 0 if noise else int(rng.integers(len(self._sentences)))
        while total < wanted:
            hay.append(self._noise if noise else self._sentences[at % len(self._sentences)])
            total, at = total + len(hay[-1]), at + 1
        return hay, total - wanted

    def _window(self, length: int, index: int) -> Asked:
        """A window of the text and the tokens that follow it; windows are spread by a golden ratio over the text."""
        front, body = self.tokenizer.prefix_ids, self._tokens
        need = length - len(front) + SCORED
        if len(body) < need:
            raise UserError(f"{self.prose} has {len(body)} tokens; {need} are needed")
        start = int((index * 0.6180339887498949) % 1.0 * (len(body) - need))
        window = [*front, *body[start : start + need]]
        return Asked(np.asarray(window[:length], np.int32), np.asarray(window[length:], np.int32), "")

    def batch(self, stream: int, task: str, length: int, indices: range, *, rows: int, seed: int = 0) -> list[Asked]:
        """Those of these indices; rows past them repeat the first, without an answer."""
        made = [self.make(stream, task, length, index, seed) for index in indices]
        empty = dataclasses.replace(made[0], answer=np.full_like(made[0].answer, -1))
        return [*made, *[empty] * (rows - len(made))]
