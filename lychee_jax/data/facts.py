"""Random documents with hidden facts and questions about them, as tokens and as text, made with NumPy on the host.

Everything is a function of the random generator that comes in, so a resumed training sees the same data, whichever
process makes it. Facts are hidden between sentences of a prose-like haystack that is full of other numbers and of the
words that keys are made of, so an answer can only be found by its key.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lychee_jax.data import language
from lychee_jax.data.language import BOS, EOS, FIRST_BYTE, TOKEN_OF, VOCAB_SIZE, tokens_of

type Tokens = list[int]
type Value = Callable[[np.random.Generator], Tokens]

_NEWLINE, _SPACE = TOKEN_OF["\n"], TOKEN_OF[" "]
_DIGITS = np.array([TOKEN_OF[digit] for digit in "0123456789"])


def _list(*names: str) -> np.ndarray:
    return np.array([TOKEN_OF[f" {word}"] for name in names for word in language.WORDS[name]])


_ADJECTIVES, _NOUNS = _list("adjective"), _list("noun")
_VALUE_WORDS = _list("noun", "things", "place", "material")
_PARAGRAPH_RATE = 0.12  # share of the sentences that open a new paragraph
_MARGIN = 96  # tokens that a document has for BOS, an introduction and some prose, whatever is hidden in it


@dataclasses.dataclass(frozen=True)
class Fact:
    """A statement to hide (a whole sentence), and how it is asked for and answered (both without special tokens)."""

    kind: str
    statement: Tokens
    key: Tokens
    answer: Tokens


@dataclasses.dataclass(frozen=True)
class Example:
    """One training row: `tokens [T]`; `answers [T]` is i at the tokens of the i-th answer (EOS included), else 0."""

    tokens: np.ndarray
    answers: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question about one document. `tokens` starts with BOS, `text` is the same without it.

    `needle`: the tokens (first, end) of the statement that is asked for.
    """

    tokens: Tokens
    text: str
    answer: str
    needle: tuple[int, int]


# --- prose ------------------------------------------------------------------------------------------------------------


class _Prose:
    """The prose templates as one table, so that the sentences of a document are drawn and filled together.

    A row is `[newline, first piece, …]` padded with −1; the newline stands only where a paragraph begins.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self.choices = [*(_list(name) for name in language.WORDS), _DIGITS, _DIGITS[1:]]
        rows = [self._parse(template) for template in templates]
        self.lengths = np.array([len(row) for row in rows])
        width = int(self.lengths.max())
        self.tokens = np.full((len(rows), 1 + width), -1, np.int32)
        self.slots = np.full((len(rows), 1 + width), -1, np.int32)
        for i, row in enumerate(rows):
            self.tokens[i, 1 : 1 + len(row)] = [token for token, _ in row]
            self.slots[i, 1 : 1 + len(row)] = [slot for _, slot in row]
        self.by_length = {int(n): np.flatnonzero(self.lengths == n) for n in np.unique(self.lengths)}
        self.shortest = int(self.lengths.min())
        # The longest sentence up to which every length exists: the last two sentences must fill any gap exactly.
        self.closing = next(n for n in range(self.shortest, width + 1) if n + 1 not in self.by_length)
        self.bare = np.arange(VOCAB_SIZE)
        for piece, token in TOKEN_OF.items():
            self.bare[token] = TOKEN_OF.get(piece.removeprefix(" ") or piece, token)

    def _parse(self, template: str) -> list[tuple[int, int]]:
        """Pairs (token, slot); the first piece as it stands after another sentence, with a space."""
        names = list(language.WORDS)
        row: list[tuple[int, int]] = []
        after_digit = False
        for piece in language.split(" " + template):
            if piece == "#":
                row.append((0, len(names) if after_digit else len(names) + 1))  # a number does not begin with 0
            elif "{" in piece:
                row.append((0, names.index(piece.strip(" {}"))))
            else:
                row.append((TOKEN_OF[piece], -1))
            after_digit = piece == "#"
        return row

    def sentences(self, rng: np.random.Generator, total: int) -> np.ndarray:
        """Random sentences `[sentences, width]`, −1 where nothing stands, of exactly `total` tokens."""
        room = total - 2 * self.shortest
        drawn = rng.integers(len(self.lengths), size=max(room, 0) // self.shortest + 1)
        paragraph = rng.random(len(drawn)) < _PARAGRAPH_RATE
        ends = np.cumsum(self.lengths[drawn] + paragraph)
        count = int(np.searchsorted(ends, room, side="right"))
        gap = total - (int(ends[count - 1]) if count else 0)
        while gap > 2 * self.closing:  # a long sentence did not fit any more: fill up with shorter ones
            drawn[count], paragraph[count] = _pick(rng, self.by_length[self.closing]), False
            count, gap = count + 1, gap - self.closing
        first = int(rng.integers(max(self.shortest, gap - self.closing), min(self.closing, gap - self.shortest) + 1))
        last = [_pick(rng, self.by_length[length]) for length in (first, gap - first)]
        ids = np.concatenate([drawn[:count], last])
        paragraph = np.concatenate([paragraph[:count], [False, False]])
        tokens, slots = self.tokens[ids], self.slots[ids]
        for slot, choice in enumerate(self.choices):
            places = slots == slot
            tokens[places] = choice[rng.integers(len(choice), size=int(places.sum()))]
        tokens[:, 0] = np.where(paragraph, _NEWLINE, -1)
        tokens[:, 1] = np.where(paragraph, self.bare[tokens[:, 1]], tokens[:, 1])
        return tokens


_PROSE = _Prose(language.PROSE)


def prose(rng: np.random.Generator, total: int) -> list[Tokens]:
    """Random sentences of exactly `total` tokens together."""
    return [row[row >= 0].tolist() for row in _PROSE.sentences(rng, total)]


# --- facts ------------------------------------------------------------------------------------------------------------


@functools.cache
def _parsed(template: str) -> tuple[str | Tokens, ...]:
    """A template as slot names and the tokens of its other pieces."""
    parts: list[str | Tokens] = []
    for piece in language.split(template):
        parts.append(piece.strip(" {}") if "{" in piece else tokens_of(piece))
    return tuple(parts)


def _render(template: str, **slots: Tokens) -> Tokens:
    """Tokens of a template; a slot's tokens bring the space before them along."""
    tokens: Tokens = []
    for part in _parsed(template):
        tokens += slots[part] if isinstance(part, str) else part
    return tokens


def _pick(rng: np.random.Generator, options: Any) -> Any:
    """A random member of a sequence or of a one-dimensional array."""
    return options[int(rng.integers(len(options)))]


def _number(rng: np.random.Generator, low: int = 5, high: int = 7) -> Tokens:
    """A number of `low` to `high` digits, the space before it included."""
    digits = _DIGITS[rng.integers(10, size=int(rng.integers(low, high + 1)))]
    digits[0] = _DIGITS[rng.integers(1, 10)]
    return [_SPACE, *digits.tolist()]


def _words(rng: np.random.Generator, low: int, high: int) -> Tokens:
    """Between `low` and `high` words."""
    count = int(rng.integers(low, high + 1))
    return _VALUE_WORDS[rng.integers(len(_VALUE_WORDS), size=count)].tolist()


def _any_value(rng: np.random.Generator) -> Tokens:
    """A number or words, short or long.

    With short values alone the model learns to read a whole value while it reads the question; long ones, up to the
    32-word passkeys of arXiv 2602.04541, can only be copied token by token, from where they stand, while answering.
    """
    draw = rng.random()
    if draw < 0.4:
        return _number(rng)
    if draw < 0.55:
        return _number(rng, 3, 24)
    return _words(rng, 1, 4) if draw < 0.75 else _words(rng, 5, 32)


def _word_keys(rng: np.random.Generator, count: int) -> list[Tokens]:
    """Distinct pairs of an adjective and a noun; in half of the documents of few words, so that keys share many."""
    pools = [_ADJECTIVES, _NOUNS]
    if rng.random() < 0.5:
        pools = [rng.choice(pool, size=2 + int((2 * count) ** 0.5), replace=False) for pool in pools]
    return _distinct(lambda: [int(_pick(rng, pool)) for pool in pools], count)


def _spelled_keys(rng: np.random.Generator, count: int) -> list[Tokens]:
    """Distinct made-up names of three syllables: hardly ever words of the vocabulary, so spelled in letters."""

    def name() -> Tokens:
        return tokens_of(" " + "".join(_pick(rng, letters) for letters in ("bdfgklmnprstvz", "aeiou") * 3))

    return _distinct(name, count)


def _variable_key(rng: np.random.Generator) -> Tokens:
    """Five capital letters, as in the variable tracking of RULER (arXiv 2404.06654)."""
    return [_SPACE, *(FIRST_BYTE + ord("A") + int(i) for i in rng.integers(26, size=5))]


def _distinct(make: Callable[[], Tokens], count: int) -> list[Tokens]:
    keys: dict[tuple[int, ...], None] = {}
    while len(keys) < count:
        keys[tuple(make())] = None
    return [list(key) for key in keys]


def _state(rng: np.random.Generator, kind: str, key: Tokens, value: Tokens) -> Fact:
    statement = _pick(rng, language.FACTS[kind].statements)
    return Fact(kind, _render(" " + statement, key=key, value=value), key, value)


def passkeys(rng: np.random.Generator, count: int, value: Value = _number) -> list[Fact]:
    """Passkeys, by default of five to seven digits, under different keys: most of them an adjective and a noun."""
    keys = _spelled_keys(rng, count) if rng.random() < 0.15 else _word_keys(rng, count)
    return [_state(rng, "passkey", key, value(rng)) for key in keys]


def long_passkeys(rng: np.random.Generator, count: int) -> list[Fact]:
    """Passkeys of 32 words."""
    return passkeys(rng, count, lambda rng: _words(rng, 32, 32))


def only_passkey(rng: np.random.Generator, count: int) -> list[Fact]:
    """One passkey of five to seven digits without a key, whatever the count."""
    return [_state(rng, "only", [], _number(rng))]


def lookups(rng: np.random.Generator, count: int, value: Value = _number) -> list[Fact]:
    """Records under keys of both kinds, by default with numbers of five to seven digits."""
    pairs = zip(_word_keys(rng, count), _spelled_keys(rng, count), strict=True)
    return [_state(rng, "lookup", pair[int(rng.random() < 0.3)], value(rng)) for pair in pairs]


def variables(rng: np.random.Generator, count: int) -> list[Fact]:
    """Chains of assignments: `VAR A = 12345.`, `VAR B = VAR A.`, …, up to three steps from a number.

    The answer about B writes its way: ` VAR B = VAR A = 12345`.
    """
    facts: list[Fact] = []
    name, equals = [TOKEN_OF[" VAR"]], [TOKEN_OF[" ="]]
    chain: Tokens = []
    steps = 0
    for key in _distinct(lambda: _variable_key(rng), count):
        if steps == 0:
            steps, chain = int(rng.integers(1, 5)), _number(rng, 5, 5)
            value = chain
        else:
            value = chain[: len(name) + len(key)]
        chain = name + key + equals + chain
        facts.append(dataclasses.replace(_state(rng, "variable", key, value), answer=chain))
        steps -= 1
    return facts


KINDS: dict[str, Callable[[np.random.Generator, int], list[Fact]]] = {
    "passkey": passkeys,
    "long-passkey": long_passkeys,
    "only-passkey": only_passkey,
    "lookup": lookups,
    "variable": variables,
}
_TRAINED: dict[Callable[[np.random.Generator, int], list[Fact]], float] = {
    lambda rng, count: passkeys(rng, count, _any_value): 0.5,
    lambda rng, count: lookups(rng, count, _any_value): 0.25,
    variables: 0.2,
    only_passkey: 0.05,
}


def mixed(rng: np.random.Generator, count: int) -> list[Fact]:
    """Facts as training sees them: of one kind, or, in one document of four, of two kinds."""
    chosen = rng.choice(len(_TRAINED), size=2, replace=False, p=list(_TRAINED.values()))
    first, second = (list(_TRAINED)[int(i)] for i in chosen)
    if count < 2 or rng.random() < 0.75:
        return first(rng, count)
    return first(rng, count - count // 2) + second(rng, count // 2)


# --- documents --------------------------------------------------------------------------------------------------------


def ask(rng: np.random.Generator, fact: Fact, *, restate: bool = False) -> Tokens:
    """A question about a fact, up to where its answer begins; `restate` has the answer begin as the fact does."""
    question = _pick(rng, language.FACTS[fact.kind].questions)
    asking = language.RESTATING[fact.kind] if restate else _pick(rng, language.ASKING)
    return _render(asking.replace("{question}", question), key=fact.key)


def hide(
    rng: np.random.Generator, facts: list[Fact], total: int, *, pin: tuple[int, float] | None = None
) -> tuple[np.ndarray, list[int]]:
    """BOS, perhaps an introduction, and prose with the facts' statements between its sentences: `total` tokens.

    Also where each statement begins. Facts stand in their order; `pin` puts one of them (its index) behind a share of
    the prose, whatever the order.
    """
    opening = [BOS, *(_render(_pick(rng, language.INTRODUCTIONS)) if rng.random() < 0.5 else [])]
    statements = sum(len(fact.statement) for fact in facts)
    prose = _PROSE.sentences(rng, total - len(opening) - statements)
    gaps = np.sort(rng.integers(len(prose) + 1, size=len(facts)))
    order = list(range(len(facts)))
    if pin is not None:
        pinned, depth = pin
        ends = np.concatenate([[0], np.cumsum((prose >= 0).sum(axis=1))])
        gap = int(np.abs(ends - depth * ends[-1]).argmin())
        gaps = np.delete(gaps, pinned)
        place = int(np.searchsorted(gaps, gap))
        gaps = np.insert(gaps, place, gap)
        order.remove(pinned)
        order.insert(place, pinned)
    parts: list[np.ndarray] = [np.array(opening)]
    starts = [0] * len(facts)
    length = len(opening)
    for block, index in itertools.zip_longest(np.split(prose, gaps), order):
        parts.append(block[block >= 0])
        length += len(parts[-1])
        if index is not None:
            starts[index] = length
            parts.append(np.array(facts[index].statement))
            length += len(facts[index].statement)
    document = np.concatenate(parts)
    document[1] = _PROSE.bare[document[1]]
    return document, starts


def documents(rng: np.random.Generator, length: int, facts: tuple[int, int], questions: int) -> Example:
    """A document with between `facts[0]` and `facts[1]` facts, and after it up to `questions` questions, drawn with
    replacement (without it, a model may learn to pick a value not asked for yet instead of matching keys), answered.

    Raises ValueError if the document has no room for its facts and one question.
    """
    hidden = mixed(rng, int(rng.integers(facts[0], facts[1] + 1)))
    room = length - sum(len(fact.statement) for fact in hidden) - _MARGIN
    tokens: Tokens = []
    answers: list[int] = []
    for i in range(1, questions + 1):
        fact = _pick(rng, hidden)
        question = ask(rng, fact, restate=fact.kind in language.RESTATING and rng.random() < 0.2)
        answer = [*fact.answer, EOS]
        if len(tokens) + len(question) + len(answer) > room:
            break
        tokens += question + answer
        answers += [0] * len(question) + [i] * len(answer)
    if not tokens:
        raise ValueError(f"{len(hidden)} facts and a question do not fit into {length} tokens")
    document, _ = hide(rng, hidden, length - len(tokens))
    return Example(np.concatenate([document, tokens]), np.concatenate([np.zeros_like(document), answers]))


def copying(rng: np.random.Generator, length: int, segment: int = 48) -> Example:
    """Random tokens in which a segment comes back at a later place; the answer is its return but the first token."""
    tokens = rng.integers(FIRST_BYTE, VOCAB_SIZE, size=length)
    answers = np.zeros_like(tokens)
    source = int(rng.integers(length - 2 * segment + 1))
    target = int(rng.integers(source + segment, length - segment + 1))
    tokens[target : target + segment] = tokens[source : source + segment]
    answers[target + 1 : target + segment] = 1
    return Example(tokens, answers)


def prompt(rng: np.random.Generator, kind: str, length: int, facts: int, *, depth: float | None = None) -> Prompt:
    """A document with so many facts of one kind and one question at its end: exactly `length` tokens, BOS included.

    What is asked for stands anywhere, or behind a share of the text, `depth`.

    Raises ValueError if that many facts do not fit, for a depth outside [0, 1], or one for variables: each of them must
    stand behind the one that it refers to.
    """
    if depth is not None and not 0.0 <= depth <= 1.0:
        raise ValueError(f"depth {depth:g} is not between 0 and 1")
    if depth is not None and kind == "variable":
        raise ValueError("variables refer to one another, so none of them can be put at a depth")
    hidden = KINDS[kind](rng, facts)
    asked = int(rng.integers(len(hidden)))
    fact = hidden[asked]
    question = ask(rng, fact)
    if sum(len(fact.statement) for fact in hidden) + len(question) + _MARGIN > length:
        raise ValueError(f"{facts} facts and a question do not fit into {length} tokens")
    document, starts = hide(rng, hidden, length - len(question), pin=None if depth is None else (asked, depth))
    tokens = [*document.tolist(), *question]
    needle = (starts[asked], starts[asked] + len(fact.statement))
    return Prompt(tokens, language.text_of(tokens[1:]), language.text_of(fact.answer).strip(), needle)
