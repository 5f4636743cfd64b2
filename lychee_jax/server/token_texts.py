"""How single tokens look in answers about log-probabilities, in both of the protocol's dialects."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from lychee_jax.text.tokenizer import Tokenizer

type Likeliest = Sequence[tuple[int, float]]
"""Token ids and their log-probabilities."""


class TokenTexts:
    """The text of a token as it is inside a text: its bytes where these are no whole characters, a special one's name.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.of = functools.lru_cache(maxsize=1 << 16)(self._of)

    def _of(self, index: int) -> tuple[str, bytes]:
        """The text and the bytes of a token; bytes that are no whole characters are written as numbers: `bytes:…`."""
        data = self._tokenizer.token_bytes(index) if not self._tokenizer.is_silent(index) else None
        if data is None:
            text = self._whole(index)
            return text, text.encode()
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data

    def _whole(self, index: int) -> str:
        tokenizer = self._tokenizer
        if tokenizer.is_silent(index):
            return tokenizer.token_text(index)
        # Decoders of the sentencepiece kind drop the space in front of a text's first token.
        return tokenizer.decode([tokenizer.anchor, index]).removeprefix(tokenizer.decode([tokenizer.anchor]))

    def completion(
        self,
        tokens: Sequence[int],
        logprobs: Sequence[float | None],
        top: Sequence[Likeliest | None],
        offsets: Sequence[int],
    ) -> dict[str, Any]:
        """As completions have it: four lists. A prompt's first token has no log-probability."""
        return {
            "tokens": [self.of(token)[0] for token in tokens],
            "token_logprobs": list(logprobs),
            "top_logprobs": [
                None if likeliest is None else {self.of(token)[0]: logprob for token, logprob in likeliest}
                for likeliest in top
            ],
            "text_offset": list(offsets),
        }

    def chat(self, tokens: Sequence[int], logprobs: Sequence[float], top: Sequence[Likeliest]) -> dict[str, Any]:
        """As chats have it: an object for each token."""
        entries = [
            self._entry(token, logprob) | {"top_logprobs": [self._entry(*each) for each in likeliest]}
            for token, logprob, likeliest in zip(tokens, logprobs, top, strict=True)
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, data = self.of(token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}
