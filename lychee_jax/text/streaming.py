"""Token ids to text as they come: incremental detokenisation and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from lychee_jax.errors import UserError
from lychee_jax.text.tokenizer import Tokenizer


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
