"""RULER (Hsieh et al., arXiv 2404.06654): its 13 tasks with the published parameters, for any tokenizer.

Prompts have the published wording and structure, and end with the beginning of the answer. A length counts the prompt,
special tokens and chat template included, and the tokens to be generated; the haystack is the largest that fits.
Published figures use 500 samples of each task.

What differs from the published scripts: random draws are a function of seed, task, length and index, so that any sample
can be made without those before it; sentences of essays end by a rule of punctuation instead of NLTK's model (needles
stand between other sentences, that is all); needles of one prompt have different keys.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Mapping
from typing import Literal, Protocol, runtime_checkable

from lychee_jax.errors import UserError
from lychee_jax.evaluation import ruler_data as texts
from lychee_jax.evaluation.cases import Case
from lychee_jax.evaluation.prompts import DOCUMENT, NEEDLE, NOISE, RULER, Wording
from lychee_jax.evaluation.report import Style
from lychee_jax.text.chat import ChatOptions
from lychee_jax.text.tokenizer import Tokenizer

STYLE = Style("ruler", "% of the answers found", "task", average=True)

_FEW_SHOT_FROM = 4096  # below this length, cwe has smaller lists, in its example too
_EXAMPLE_TOKENS = 500  # of the worked example in front of vt
_DEPTHS = [round(100 * i / 39) for i in range(40)]  # per cent of the sentences of an essay behind which needles stand

type Random = random.Random


@dataclasses.dataclass(frozen=True)
class Draft:
    """One prompt before it is tokens: what the user says, how the answer begins, and what it should contain."""

    body: str
    answer: str
    references: list[str]


@runtime_checkable
class Recipe(Protocol):
    """Writes drafts with a haystack of a given size; `least` is the smallest."""

    @property
    def wording(self) -> Wording:
        """What stands around the haystack."""
        ...

    @property
    def least(self) -> int:
        """In units of the haystack."""
        ...

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """A draft; the size is in units of the haystack, and more of them are more tokens."""
        ...


# --- needles ----------------------------------------------------------------------------------------------------------

type Kind = Literal["words", "numbers", "uuids"]


def _word(rng: Random) -> str:
    return f"{rng.choice(texts.adjectives())}-{rng.choice(texts.nouns())}"


_RANDOM: Mapping[str, Callable[[Random], str]] = {
    "words": _word,
    "numbers": lambda rng: str(rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


@dataclasses.dataclass(frozen=True)
class Needles:
    """Needle in a haystack: `keys` keys with `values` values each, `queries` of the keys asked for.

    Haystacks: "noise" (one sentence group again and again), "essay", "needle" (lines like the needle itself).
    """

    haystack: Literal["noise", "essay", "needle"]
    key: Kind
    value: Kind
    essays: Callable[[], list[str]]
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def wording(self) -> Wording:
        """Singular for one answer."""
        return RULER["niah-one" if self.queries * self.values == 1 else "niah"]

    @property
    def least(self) -> int:
        """Lines; words of an essay."""
        return 40 if self.haystack == "essay" else self.keys * self.values

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """As published: needles shuffled, then put between sentences or lines in that order."""
        found: dict[str, list[str]] = {}
        while len(found) < self.keys:
            found[_RANDOM[self.key](rng)] = [_RANDOM[self.value](rng) for _ in range(self.values)]
        needles = [NEEDLE.format(values=self.value, key=key, value=value) for key in found for value in found[key]]
        rng.shuffle(needles)
        asked = rng.sample(list(found), self.queries)
        query = f"{', '.join(asked[:-1])}, and {asked[-1]}" if len(asked) > 1 else asked[0]
        names = {"values": self.value, "value": self.value.removesuffix("s"), "query": query}
        context = self._essay(rng, size, needles) if self.haystack == "essay" else self._lines(rng, size, needles)
        return Draft(
            self.wording.body.format(context=context, **names),
            self.wording.answer.format(**names),
            [value for key in asked for value in found[key]],
        )

    def _essay(self, rng: Random, size: int, needles: list[str]) -> str:
        words = self.essays()
        text = " ".join((words * -(-size // len(words)))[:size]).strip()
        sentences = re.split(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]])) (?=[\"'(\[]?[A-Z])", text)
        depths = sorted(rng.sample(_DEPTHS, len(needles)))
        places = [0, *(int(len(sentences) * depth / 100) for depth in depths), len(sentences)]
        parts = [" ".join(sentences[places[0] : places[1]])]
        for needle, (start, end) in zip(needles, itertools.pairwise(places[1:]), strict=True):
            parts += [needle, " ".join(sentences[start:end])]
        return " ".join(parts)

    def _lines(self, rng: Random, size: int, needles: list[str]) -> str:
        lines = [NOISE] * size
        if self.haystack == "needle":
            lines = [
                NEEDLE.format(values=self.value, key=_RANDOM[self.key](rng), value=_RANDOM[self.value](rng))
                for _ in range(size)
            ]
        for place, needle in zip(sorted(rng.sample(range(size), len(needles)), reverse=True), needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines)


# --- variable tracking ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variables:
    """One chain of assignments over four hops in noise, behind a worked example with names of three letters."""

    count: Callable[[str], int]
    hops: int = 4

    wording: Wording = RULER["vt"]

    @property
    def least(self) -> int:
        """Lines of noise."""
        return self.hops + 1

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """The example, solved, and the question."""
        example = self._chain(rng, self._example_size, 3)
        main = self._chain(rng, size, 5)
        solved = f"{example.body}{example.answer} {' '.join(example.references)}\n\n"
        return Draft(solved + main.body, main.answer, main.references)

    @functools.cached_property
    def _example_size(self) -> int:
        def tokens(size: int) -> int:
            example = self._chain(random.Random(0), size, 3)
            return self.count(example.body + example.answer)

        return fit(tokens, _EXAMPLE_TOKENS, self.least)

    def _chain(self, rng: Random, size: int, letters: int) -> Draft:
        names: dict[str, None] = {}
        while len(names) <= self.hops:
            names["".join(rng.choices(string.ascii_uppercase, k=letters))] = None
        order, value = list(names), str(rng.randint(10000, 99998))
        chain = [f"VAR {order[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in itertools.pairwise(order))]
        lines = [NOISE] * size
        for shift, (place, statement) in enumerate(
            zip(sorted(rng.sample(range(size), len(chain))), chain, strict=True)
        ):
            lines.insert(place + shift, statement)
        names_of = {"query": value, "count": len(order)}
        return Draft(
            self.wording.body.format(context="\n".join(lines), **names_of),
            self.wording.answer.format(**names_of),
            order,
        )


# --- words ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CommonWords:
    """A numbered list in which ten words come more often than all others, behind a solved shorter list."""

    short: bool
    english: Callable[[], list[str]]

    wording: Wording = RULER["cwe"]
    least: int = 11

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """`size` different words: ten come 30 times and the others 3 times (6 and 1 in short prompts)."""
        example, common = self._list(rng, *((20, 3, 1) if self.short else (40, 10, 3)))
        context, answer = self._list(rng, size, *((6, 1) if self.short else (30, 3)))
        solved = " ".join(f"{number}. {word}" for number, word in enumerate(common, 1))
        first, second = (self.wording.body.format(context=each) for each in (example, context))
        return Draft(f"{first}{self.wording.answer} {solved}\n{second}", self.wording.answer, answer)

    def _list(self, rng: Random, count: int, often: int, seldom: int) -> tuple[str, list[str]]:
        pool = texts.words()
        if count > len(pool):
            pool = self.english()
            if count > len(pool):
                raise UserError(f"cwe needs {count} different words at this length; {texts.ENGLISH[0]} has {len(pool)}")
        chosen = rng.sample(pool, count)
        common = chosen[:10]
        words = common * often + chosen[10:] * seldom
        rng.shuffle(words)
        return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1)), common


@dataclasses.dataclass(frozen=True)
class FrequentWords:
    """Coded words with frequencies of a zeta distribution (α = 2); the most frequent is noise, the next three are asked
    for. `vocabulary` counts the different words.
    """

    vocabulary: int

    wording: Wording = RULER["fwe"]
    # So many that the third of the three comes once, and less often than the second.
    least: int = 60

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """About `size` words in random order."""
        coded: dict[str, None] = {}
        while len(coded) < self.vocabulary:
            coded["".join(rng.choices(string.ascii_lowercase, k=6))] = None
        words = ["...", *list(coded)[1:]]
        total = 1.6449340668482264  # ζ(2) = π²/6
        drawn = [word for rank, word in enumerate(words, 1) for _ in range(int(size / rank**2 / total))]
        rng.shuffle(drawn)
        return Draft(self.wording.body.format(context=" ".join(drawn)), self.wording.answer, words[1:4])


# --- questions --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Questions:
    """A question about one or more of many documents; sample i asks the i-th question of the file."""

    sources: Callable[[], texts.Questionnaire]

    wording: Wording = RULER["qa"]
    least: int = 1

    def draft(self, rng: Random, size: int, index: int) -> Draft:
        """`size` documents, those that are asked about among them, related ones before any others."""
        sources = self.sources()
        if index >= len(sources.questions):
            raise UserError(f"there are {len(sources.questions)} questions; fewer samples must do")
        question = sources.questions[index]
        size = max(size, len(question.documents))
        more = size - len(question.documents)
        if size >= len(sources.documents):
            documents = (sources.documents * -(-size // len(sources.documents)))[:size]
        else:
            if more > len(question.related):
                used = {*question.documents, *question.related}
                others = [i for i in range(len(sources.documents)) if i not in used]
                extra = question.related + rng.sample(others, more - len(question.related))
            else:
                extra = rng.sample(question.related, more)
            documents = [sources.documents[i] for i in [*question.documents, *extra]]
        rng.shuffle(documents)
        context = "\n\n".join(DOCUMENT.format(number=i, text=text) for i, text in enumerate(documents, 1))
        body = self.wording.body.format(context=context, query=question.text)
        return Draft(body, self.wording.answer, question.answers)


# --- tasks ------------------------------------------------------------------------------------------------------------


def fit(tokens: Callable[[int], int], room: int, least: int) -> int:
    """The largest size ≥ `least` with at most `room` tokens, by doubling and then by halving what is left.

    The guesses between follow the tokens of both ends, so that few texts are made.

    Raises:
        UserError: even the least size has more.
    """
    low, high = least, 2 * least
    at_low = tokens(low)
    if at_low > room:
        raise UserError(f"the smallest prompt has {at_low} tokens, and there is room for {room}")
    while (at_high := tokens(high)) <= room:
        low, at_low, high = high, at_high, 2 * high
    halve = False
    while high - low > 1:
        middle = (low + high) // 2
        if not halve:
            middle = low + int((room - at_low) / max(1, at_high - at_low) * (high - low))
            middle = min(max(middle, low + 1), high - 1)
        span, at_middle = high - low, tokens(middle)
        if at_middle <= room:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
        halve = 2 * (high - low) > span
    return low


def _needles(files: texts.Files) -> dict[str, Needles]:
    def essays() -> list[str]:
        return files.essays

    return {
        "niah_single_1": Needles("noise", "words", "numbers", essays),
        "niah_single_2": Needles("essay", "words", "numbers", essays),
        "niah_single_3": Needles("essay", "words", "uuids", essays),
        "niah_multikey_1": Needles("essay", "words", "numbers", essays, keys=4),
        "niah_multikey_2": Needles("needle", "words", "numbers", essays),
        "niah_multikey_3": Needles("needle", "uuids", "uuids", essays),
        "niah_multivalue": Needles("essay", "words", "numbers", essays, values=4),
        "niah_multiquery": Needles("essay", "words", "numbers", essays, keys=4, queries=4),
    }


TASKS = (*_needles(texts.Files(None)), "vt", "cwe", "fwe", "qa_1", "qa_2")
"""Names in the published order."""

NEED_NO_DATA = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""Those that read no files (cwe up to about 128 K tokens: there are not enough words for more)."""


@dataclasses.dataclass(frozen=True)
class Ruler:
    """One of the tasks.

    Raises:
        UserError: an unknown task.
    """

    tokenizer: Tokenizer
    name: str
    files: texts.Files
    seed: int = 42
    chat: ChatOptions | None = None

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        if self.name not in TASKS:
            raise UserError(f"task {self.name!r} is unknown; use some of {', '.join(TASKS)}")

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of the data files that were read."""
        return self.files.digests

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """The prompt of this index: as long as fits.

        Raises:
            UserError: a data file is missing, or the length has no room for the task.
        """
        recipe = self._recipe(length)
        drafts: dict[int, tuple[Draft, list[int]]] = {}

        def tokens(size: int) -> int:
            rng = random.Random(f"{self.seed}/{self.name}/{length}/{index}")
            draft = recipe.draft(rng, size, index)
            if self.chat is None:
                encoded = self.tokenizer.encode(draft.body + draft.answer)
            else:
                conversation, keywords = self.chat.conversation(draft.body), self.chat.template_kwargs
                encoded = self.tokenizer.encode_messages(conversation, keywords, answer=draft.answer)
            drafts[size] = draft, encoded
            return len(encoded)

        new = recipe.wording.max_new_tokens
        try:
            size = fit(tokens, length - new, recipe.least)
        except UserError as error:
            raise UserError(f"{self.name} at length {length} ({new} of it for the answer): {error}") from error
        draft, encoded = drafts[size]
        return Case(draft.body + draft.answer, encoded, draft.references, new)

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """RULER's string match: the share of references found, or for questions whether any is; case does not count."""
        answer = re.sub(r"[\x00-\x1f]", "\n", answer).lower()
        found = [reference.lower() in answer for reference in case.references]
        return float(any(found)) if self.name.startswith("qa_") else sum(found) / len(found)

    def _recipe(self, length: int) -> Recipe:
        files = self.files
        if self.name.startswith("niah_"):
            return _needles(files)[self.name]
        recipes: dict[str, Callable[[], Recipe]] = {
            "vt": lambda: Variables(lambda text: len(self.tokenizer.encode(text))),
            "cwe": lambda: CommonWords(length < _FEW_SHOT_FROM, lambda: files.english),
            "fwe": lambda: FrequentWords(max(4, (length - RULER["fwe"].max_new_tokens) // 50)),
            "qa_1": lambda: Questions(lambda: files.squad),
            "qa_2": lambda: Questions(lambda: files.hotpotqa),
        }
        return recipes[self.name]()
