"""Text in, text out: the checkpoint's own tokenizer and chat template, text streamed token by token, stop strings."""

from __future__ import annotations

import codecs
import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(128, 256)}
_NO_LIMIT = 10**30  # transformers warns about texts longer than model_max_length; here the engine knows the limit


class Tokenizer:
    """The tokenizer of a checkpoint, as `transformers.AutoTokenizer` reads it."""

    def __init__(self, backend: Any) -> None:
        """Wrap a loaded `transformers` tokenizer."""
        self._backend = backend
        self._backend.model_max_length = _NO_LIMIT

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer | None:
        """Load the tokenizer of a checkpoint's folder; None if the folder has none.

        Raises:
            UserError: tokenizer files are there, but cannot be loaded.
        """
        if not any((Path(path) / name).is_file() for name in VOCABULARY_FILES):
            return None
        with _quietly():
            auto = _auto_tokenizer()
            try:
                # Never from the network, and never code that lies in the folder.
                return cls(auto.from_pretrained(str(path), local_files_only=True, trust_remote_code=False))
            except Exception as error:  # the Rust library raises plain Exception
                raise UserError(f"the tokenizer in {path} cannot be loaded: {_first_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them by default (with BOS, if it adds one)."""
        return self._encode(text, add_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids without special tokens: a part of a longer text."""
        return self._encode(text, add_special_tokens=False)

    def encode_chat(self, messages: str | Sequence[Mapping[str, str]], *, answer: str = "") -> list[int]:
        """Token ids of a chat, up to where the assistant's answer begins, or goes on after `answer`.

        The template writes BOS itself where the model wants one, so the tokenizer adds none.

        Args:
            messages: `[{"role": "user", "content": …}, …]`, or the text of one message of the user.
            answer: words that are put into the assistant's mouth.

        Raises:
            UserError: the checkpoint has no chat template, or its template refuses the messages.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        if not self._backend.chat_template:
            raise UserError("the checkpoint has no chat template; give the prompt without --chat")
        try:
            text = self._backend.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates are programs: they fail in their own ways
            raise UserError(f"the chat template refused the messages: {_first_line(error)}") from error
        return self._encode(text + answer, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        return self._backend.decode(
            [int(index) for index in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def token_bytes(self, index: int) -> bytes | None:
        """The UTF-8 bytes that a token stands for, where its neighbours may complete them; None: it is whole text."""
        token = self._backend.convert_ids_to_tokens(index)
        if self._byte_level:
            try:
                return bytes(_byte_alphabet()[char] for char in token)
            except KeyError:  # an added token: written as it is
                return token.encode()
        return _BYTE_TOKENS.get(token)

    def is_silent(self, index: int) -> bool:
        """Whether a token never shows in text: special ones, and ids that the model has but the tokenizer lacks."""
        return index in self._special or self._backend.convert_ids_to_tokens(index) is None

    @functools.cached_property
    def anchor(self) -> int:
        """Some token of plain text: decoded in front of another, it shows how that one looks inside a text."""
        for index in range(len(self._backend)):
            if not self.is_silent(index) and self.token_bytes(index) is None and self.decode([index]).strip():
                return index
        raise UserError("the tokenizer has no token with visible text")

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens))

    @functools.cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(index for index, token in self._backend.added_tokens_decoder.items() if token.special)

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether each character of a token's name stands for a byte (GPT-2's way), so that letters may be split."""
        decoder = self._backend.backend_tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        return "ByteLevel" in {part.get("type") for part in (state, *state.get("decoders", ()))}


class StreamDecoder:
    """Turns token ids into text as they come: a character that is spread over tokens appears with its last byte.

    The pieces of a whole stream join to `tokenizer.decode` of all its ids. (One exception: where byte tokens of a
    byte-fallback tokenizer are no valid UTF-8, that decodes their whole run to U+FFFD, also characters that were
    complete and have already been streamed.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._begun = False

    def push(self, index: int) -> str:
        """Take the next token; returns the text that is now final, which may be empty."""
        if self._tokenizer.is_silent(index):
            return ""
        data = self._tokenizer.token_bytes(index)
        text = self._utf8.decode(data) if data is not None else self.flush() + self._whole(index)
        self._begun = True
        return text

    def flush(self) -> str:
        """The end of the stream: U+FFFD for a character that was never completed."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _whole(self, index: int) -> str:
        # Decoders of the sentencepiece kind drop the space in front of a text's first token, and only there.
        if not self._begun:
            return self._tokenizer.decode([index])
        anchor = self._tokenizer.anchor
        return self._tokenizer.decode([anchor, index]).removeprefix(self._tokenizer.decode([anchor]))


class StopStrings:
    """Ends a stream of text where one of several strings is complete, and holds text back while one may be coming.

    The result does not depend on how the text is cut into pieces: the string that is complete first stops; of several
    complete at the same character, the longest.

    Raises:
        UserError: an empty stop string.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stops)
        if "" in self._stops:
            raise UserError("a stop string must not be empty")
        self._held = ""
        self.hit = False

    def push(self, text: str) -> str:
        """Take more text; returns what surely comes before any stop string. After a hit: nothing."""
        if self.hit:
            return ""
        self._held += text
        found = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if found:
            self.hit = True
            keep = min(found)[1]
        else:
            keep = len(self._held) - self._undecided()
        final, self._held = self._held[:keep], "" if self.hit else self._held[keep:]
        return final

    def flush(self) -> str:
        """The end of the stream: the text held back that became no stop string."""
        final, self._held = self._held, ""
        return final

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins some stop string."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of one generated row: ids in, text out, ended by the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stops: Iterable[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stops)
        self._ids: list[int] = []
        self._pieces: list[str] = []

    def push(self, index: int) -> str:
        """Take the next token; returns the text that is now final."""
        self._ids.append(index)
        return self._keep(self._stops.push(self._decoder.push(index)))

    def flush(self) -> str:
        """The end of the row: the text that was held back until now."""
        return self._keep(self._stops.push(self._decoder.flush()) + self._stops.flush())

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been seen: the row is over."""
        return self._stops.hit

    @property
    def text(self) -> str:
        """The whole row: what the tokenizer makes of all its ids, or what comes before the stop string."""
        return "".join(self._pieces) if self.stopped else self._tokenizer.decode(self._ids)

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Which byte a character stands for in byte-level BPE: printable Latin-1 is itself, the others follow from U+0100.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners" (the released encoder).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _auto_tokenizer() -> Any:
    """`transformers.AutoTokenizer`, imported at first use; without torch if USE_TORCH=0 (it would cost seconds)."""
    hide = os.environ.get("USE_TORCH") == "0" and not {"torch", "transformers"} & sys.modules.keys()
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's own sign for "not to be found"
    try:
        from transformers import AutoTokenizer
    finally:
        if hide:
            del sys.modules["torch"]
    return AutoTokenizer


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No advice and warnings from transformers: that torch is missing, say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
