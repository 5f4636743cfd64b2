"""Perplexity through the decode path: a stretch of text is read densely, and what follows is fed token by token.

Only so do sparse heads matter: reading is dense in every variant. The score of a window is its mean negative
log-likelihood in nats, and the table shows the exponential of the mean over all windows.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Case
from lychee_jax.evaluation.report import Style
from lychee_jax.files import digest_of, read_text
from lychee_jax.text.tokenizer import Tokenizer

STYLE = Style("perplexity", "token perplexity, lower is better", "length", shown=math.exp, digits=4)

_OWN_FACTS = (8, 16)
_OWN_QUESTIONS = 16  # few, so that facts are asked for that no earlier answer repeats


@dataclasses.dataclass(frozen=True)
class FilePerplexity:
    """Windows of a text file, spread evenly over it; `scored` tokens follow each length.

    `label` is its name in the table; by default, the file's.
    """

    tokenizer: Tokenizer
    path: Path
    scored: int
    windows: int
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the file's name."""
        return self.label or self.path.name

    @functools.cached_property
    def text(self) -> str:
        """The whole file.

        Raises:
            UserError: it cannot be read, or is no UTF-8 text.
        """
        return read_text(self.path).replace("\r\n", "\n")

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Those of the whole text, without what the tokenizer puts before and behind every text."""
        return self.tokenizer.encode_plain(self.text)

    @property
    def inputs(self) -> dict[str, str]:
        """The digest of the text."""
        return {self.name: digest_of(self.text)}

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """The window of this index; what the tokenizer puts in front of every text stands in front of it too.

        Raises:
            UserError: the text is too short.
        """
        front, body = self.tokenizer.prefix_ids, self.tokens
        need = length + self.scored - len(front)
        if len(body) < need:
            raise UserError(f"{self.path} has {len(body)} tokens; {length} and {self.scored} to score are more")
        start = (len(body) - need) * index // max(1, self.windows - 1)
        window = [*front, *body[start : start + need]]
        return Case(self.tokenizer.decode(window), window[:length], [], 0, forced=window[length:])

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """Mean negative log-likelihood of the scored tokens, in nats."""
        return mean_nll(logprobs)


def file_tasks(tokenizer: Tokenizer, paths: Sequence[Path], scored: int, windows: int) -> list[FilePerplexity]:
    """A task for each text, called by the end of its path that tells it from the others: mostly the file's name.

    Raises:
        UserError: a file that is given twice.
    """
    whole = [path.resolve() for path in paths]
    if repeated := [path for path, count in collections.Counter(whole).items() if count > 1]:
        raise UserError(f"the text {repeated[0]} is given twice")

    def label(path: Path) -> str:
        others = [other.parts for other in whole if other != path]
        parts = path.parts
        count = next(n for n in range(1, len(parts) + 1) if all(other[-n:] != parts[-n:] for other in others))
        return "/".join(parts[-count:])

    return [
        FilePerplexity(tokenizer, path, scored, windows, label(resolved))
        for path, resolved in zip(paths, whole, strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class OwnPerplexity:
    """Fresh documents of the bundled model's language; their questions and answers are what is scored."""

    tokenizer: Tokenizer
    scored: int
    seed: int

    name = "questions"

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """A document of `length` + `scored` tokens with its questions at the end, answered.

        Raises:
            UserError: a model with other tokens, or too short a length.
        """
        rng = np.random.default_rng([self.seed, length, self.scored, index])
        try:
            document = data.documents(rng, length + self.scored, _OWN_FACTS, _OWN_QUESTIONS)
        except ValueError as error:
            raise UserError(f"length {length}: {error}") from error
        tokens = document.tokens.tolist()
        text = language.text_of(tokens[1:])
        if self.tokenizer.encode(text) != tokens:
            raise UserError("only the bundled model has tokens of its own language; give a text with --text FILE")
        return Case(text, tokens[:length], [], 0, forced=tokens[length:])

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """Mean negative log-likelihood of the scored tokens, in nats."""
        return mean_nll(logprobs)


def mean_nll(logprobs: list[float]) -> float:
    """Mean negative log-likelihood, in nats a token."""
    return -float(np.mean(logprobs))
