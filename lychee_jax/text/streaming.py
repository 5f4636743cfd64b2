"""Token ids to text as they come: incremental detokenisation and stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from lychee_jax.arguments import as_stops
from lychee_jax.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns token ids into text as they come: a character that is spread over tokens appears with its last byte.

    The pieces of a whole stream join to `tokenizer.decode` of all its ids. (One exception: where byte tokens of a
    byte-fallback tokenizer are no valid UTF-8, that decodes their whole run to U+FFFD, also characters that were
    complete and have already been streamed.)

    The stream of the `tokenizers` library does not do: it raises at bytes that are no UTF-8, loses a character that the
    end cuts off, and takes letters of added tokens for bytes.
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

    Special tokens make no text, but people name them as stops: `"<|im_end|>"`. So their names may be pushed as *hidden*
    text. Stop strings with such a name in them are looked for in all of the text, the others in what shows.

    Raises:
        UserError: stops that are no texts, or an empty one.
    """

    def __init__(self, stops: str | Iterable[str] | None = (), hidden: Iterable[str] = ()) -> None:
        """Look for `stops`; `hidden` are the names of tokens that do not show."""
        self._stops = as_stops(stops)
        names = tuple(name for name in hidden if name) if self._stops else ()
        self._with_hidden = tuple(stop for stop in self._stops if any(name in stop for name in names))
        self._held = ""  # with hidden text
        self._shown: list[int] = []  # which characters of it show
        self.hit = False

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Take more text; returns what shows of it and surely comes before any stop string. After a hit: nothing."""
        if self.hit:
            return ""
        if not hidden:
            self._shown += range(len(self._held), len(self._held) + len(text))
        self._held += text
        visible = self._visible(len(self._held))
        # Where a stop ends and where it starts, in the held text.
        found = [(start + len(stop), start) for stop in self._with_hidden if (start := self._held.find(stop)) >= 0] + [
            (self._shown[start + len(stop) - 1] + 1, self._shown[start])
            for stop in self._stops
            if (start := visible.find(stop)) >= 0
        ]
        if found:
            self.hit = True
            keep = min(found)[1]
        else:
            keep = len(self._held) - _begun(self._held, self._with_hidden)
            if begun := _begun(visible, self._stops):
                keep = min(keep, self._shown[-begun])
        final = self._visible(keep)
        self._held = "" if self.hit else self._held[keep:]
        self._shown = [place - keep for place in self._shown if place >= keep] if self._held else []
        return final

    def flush(self) -> str:
        """The end of the stream: the text held back that became no stop string."""
        final = self._visible(len(self._held))
        self._held, self._shown = "", []
        return final

    def _visible(self, end: int) -> str:
        """What shows of the held text before a place."""
        return "".join(self._held[place] for place in self._shown if place < end)


def _begun(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins some stop string."""
    longest = max(map(len, stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


class TextStream:
    """The text of one generated row as it comes: token ids in, text out, ended by an eos or by the first stop string.

    What was streamed is the row's text: `text` is all pieces that `push` and `finish` returned. A token in `eos_ids`
    ends the row and is never text, whether or not the tokenizer calls it special.
    """

    def __init__(
        self, tokenizer: Tokenizer, stops: str | Iterable[str] | None = (), eos_ids: Iterable[int] = ()
    ) -> None:
        """Follow a row that ends at `stops` or `eos_ids`; give no eos ids where they do not end it (`ignore_eos`)."""
        self._tokenizer = tokenizer
        self._decoder = StreamDecoder(tokenizer)
        self._eos_ids = frozenset(map(int, eos_ids))
        hidden = map(tokenizer.token_text, tokenizer.special_ids | self._eos_ids)
        self._stops = StopStrings(stops, hidden)
        self._ended = False
        self._pieces: list[str] = []

    def push(self, index: int) -> str:
        """Take the next token; returns the text that is now final. After the end: nothing."""
        if self.stopped:
            return ""
        self._ended = index in self._eos_ids
        if self._ended or index in self._tokenizer.special_ids:
            return self._keep(self._stops.push(self._tokenizer.token_text(index), hidden=True))
        return self._keep(self._stops.push(self._decoder.push(index)))

    def finish(self) -> str:
        """The end of the row, also where it ended by its length: the text that was held back until now."""
        return self._keep(self._stops.push(self._decoder.flush()) + self._stops.flush())

    @property
    def stopped(self) -> bool:
        """Whether an eos or a stop string has been seen: the row is over."""
        return self._ended or self._stops.hit

    @property
    def text(self) -> str:
        """What has been streamed: after `finish`, the text of the whole row."""
        return "".join(self._pieces)

    def _keep(self, piece: str) -> str:
        self._pieces.append(piece)
        return piece


def text_of(
    tokenizer: Tokenizer,
    tokens: Iterable[int],
    *,
    stops: str | Iterable[str] | None = (),
    eos_ids: Iterable[int] = (),
) -> str:
    """The text of a whole row: what `TextStream` makes of its tokens."""
    stream = TextStream(tokenizer, stops, eos_ids)
    for token in tokens:
        stream.push(token)
    stream.finish()
    return stream.text
