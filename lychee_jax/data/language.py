"""The small written language of the bundled model: its words, its sentence templates and its vocabulary.

A text is a sequence of *pieces*: a word with the space before it (` falcon`), a single digit, a punctuation mark with
the space before it, or one white-space character. Every piece of this language is one token, and a cut between two
pieces depends on nothing further away, so tokenising a text equals concatenating the tokens of its parts.

In a template `{name}` stands for a random word of that list, a run of `#` for a random number of so many digits, and
`{key}`, `{value}` for the slots of a fact.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

VOCAB_SIZE = 1024

WORDS: dict[str, tuple[str, ...]] = {
    name: tuple(words.split())
    for name, words in {
        "adjective": """
            amber ancient azure bitter bold brave brief bright broken bronze calm careful cheerful clever cold copper
            crimson curious dark deep distant dusty eager early empty faint famous fancy fierce final flat foggy fresh
            frozen gentle giant glad golden grand green grey happy heavy hidden hollow honest humble icy idle indigo
            ivory jolly keen kind large lazy little lonely loud loyal lucky lunar mellow merry mighty misty modern
            narrow noble odd olive orange pale patient plain polite proud purple quick quiet rapid rare red round
            royal rusty scarlet shy silent silver simple sleepy smooth solar steady stormy strange swift tall tender
            tidy violet warm wild windy wise wooden yellow young
        """,
        "noun": """
            acorn anchor apple arrow badger banner barrel basket beacon bell bottle bridge button camel candle canyon
            castle cedar cobra comet compass coral crane crow crown dagger dolphin donkey dragon drum eagle engine
            falcon feather ferret fiddle flute fountain fox gecko glacier goose guitar hammer hawk hedgehog helmet heron
            horse island jaguar kettle kite ladder lantern lemon leopard lion lizard llama lobster lynx magnet mango
            maple marble meadow mirror moose moth mountain needle oak ocean orchid otter owl panther parrot pearl pebble
            pelican pencil penguin pepper piano pigeon pillow planet pony puffin rabbit raven river robin rocket saddle
            salmon seal shark shell spider squirrel swan tiger tortoise trumpet turtle valley violin walnut whale willow
            wolf zebra
        """,
        "name": """
            Ada Arlo Basil Bruno Clara Daria Edgar Elsa Felix Greta Hugo Ines Ivo Jonas Karin Lena Leo Mara Milo Nadia
            Nils Olga Oscar Petra Quinn Rosa Rufus Sana Sven Tessa Theo Uma Vera Viktor Wanda Yusuf
        """,
        "place": """
            airport archive bakery bank beach cabin cafe chapel cinema city clinic coast college factory farm forest
            garden gate hall harbour hotel kitchen lake library market mill museum office orchard palace park port
            school square stable station studio temple theatre tower tunnel village warehouse workshop
        """,
        "things": """
            apples barrels bells boats books boxes bricks candles cards chairs coins cups drawings envelopes flags
            flowers keys lamps lanterns letters maps notes oranges paintings papers parcels pencils pictures plates
            ropes seeds shirts stamps stones tickets tools
        """,
        "did": """
            bought brought carried cleaned collected counted described drew examined found gathered hid lost mended
            moved needed noticed ordered packed painted placed repaired returned saw sold sorted studied took wanted
            watched
        """,
        "went": "came climbed drove hurried moved ran returned sailed walked wandered went",
        "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
        "month": "January February March April May June July August September October November December",
        "time": "autumn breakfast dawn dinner dusk lunch midnight morning night noon spring summer sunset winter",
        "material": "brass clay cotton glass gold iron leather paper silk steel stone wax wood wool",
    }.items()
}

PROSE = (
    "It was {adjective} and {adjective}.",
    "{name} {went} to the {place}.",
    "Nobody saw the {adjective} {noun}.",
    "{name} never came back.",
    "On {day} it rained in the {place}.",
    "The {noun} was made of {material}.",
    "The {place} opened at ## on {day}.",
    "{name} and {name} {went} to the {place} together.",
    "In the {place} there was one {adjective} {noun}.",
    "Before {time} the {place} was {adjective} and very {adjective}.",
    "The {adjective} {noun} slept behind the {place} until {time}.",
    "{name} {did} ## {things} in the {place}.",
    "There were ### {things} in the {adjective} {place}.",
    "On {day} {name} {did} the {adjective} {noun} again.",
    "The road from the {place} to the {place} was long and {adjective}.",
    "In {month} #### the old {place} was closed for ## days.",
    "{name} said that the {place} had always been {adjective}, even in {time}.",
    "A man from the {place} {did} # {things} made of {material}.",
    "Every {day} the {adjective} {noun} {went} along the river to the {place}.",
    "When {time} came, {name} {did} the {things} and {went} home.",
    "The letter of {name} was about the {adjective} {noun} and the {place}.",
    "They paid ### coins for ## {things} of {material} and left.",
    "The ticket number was ######, and the train to the {place} was late.",
    "People in the {place} still talk about the {adjective} {noun} of {name}.",
    "After {time} {name} {went} past the {place}, where ## {things} were kept.",
    "The {noun} and the {noun} are both {adjective}, but only one is {adjective}.",
    "It is ### miles from the {place} to the {place}, or # days on foot.",
    "{name} wrote the number ##### on the wall of the {place} in {month}.",
    "If the {noun} is {adjective}, then {name} will stay in the {place} until {time}.",
    "The population of the {adjective} {place} grew from #### to ##### in ## years.",
    "For ## years {name} had kept the {material} {noun} under the floor of the {place}.",
    "Some say the {adjective} {noun} lives near the {place}, others that it is only a story.",
    "In the year #### a {adjective} {noun} and ## {things} were found below the {place}.",
    "{name} asked {name} for the {adjective} {noun}, and they {went} to the {place} on {day}.",
    "The {place} had ## rooms, and in every room there was a {noun} made of {material}.",
    "No one in the {place} knew why {name} {did} so many {things} before the {adjective} {time}.",
    "Order ######: ## {things}, # {things} and one {adjective} {noun}, to be sent to the {place}.",
)

INTRODUCTIONS = (
    "Read the text and remember the numbers in it.",
    "Some facts are hidden in the following text.",
    "Please read this document. There will be a question at the end.",
    "There is important information hidden in this text. Find it and remember it.",
)


@dataclasses.dataclass(frozen=True)
class Phrases:
    """How one kind of fact is stated, and how it is asked for."""

    statements: tuple[str, ...]
    questions: tuple[str, ...]


FACTS: dict[str, Phrases] = {
    "passkey": Phrases(
        (
            "The passkey of {key} is {value}.",
            "Remember that the passkey of {key} is {value}.",
            "The secret passkey of {key} is {value}.",
            "For {key} the passkey is {value}.",
            "One more thing: the passkey of {key} is {value}.",
            "The passkey for {key} was set to {value}.",
        ),
        (
            "What is the passkey of {key}?",
            "What is the passkey for {key}?",
            "What is the secret passkey of {key}?",
            "Which passkey belongs to {key}?",
            "Tell me the passkey of {key}.",
            "Do you remember the passkey of {key}?",
        ),
    ),
    "only": Phrases(
        (
            "The passkey is {value}.",
            "The secret passkey is {value}. Remember it.",
            "Remember this: the passkey is {value}.",
        ),
        (
            "What is the passkey?",
            "What is the secret passkey?",
            "Which passkey is in the text?",
            "Tell me the passkey.",
        ),
    ),
    "lookup": Phrases(
        (
            "The value of {key} is {value}.",
            "Record {key}: {value}.",
            "The entry for {key} says {value}.",
            "The code of {key} is {value}.",
        ),
        (
            "What is the value of {key}?",
            "What does the entry for {key} say?",
            "What is the code of {key}?",
            "Look up {key}.",
        ),
    ),
    "variable": Phrases(
        ("VAR {key} = {value}.",),
        ("What is the value of VAR {key}?", "Which value has VAR {key}?"),
    ),
}

# What stands around a question; the answer follows directly, then the end-of-text token.
ASKING = (
    "\nQuestion: {question}\nAnswer:",
    "\nQuestion: {question}\nAnswer:",
    "\n\nQuestion: {question}\nAnswer:",
    "\nQuestion: {question} Answer:",
    "\n{question}\nAnswer:",
)
# The same, with the beginning of the answering sentence given.
RESTATING = {
    "passkey": "\nQuestion: {question}\nAnswer: The passkey of {key} is",
    "only": "\nQuestion: {question}\nAnswer: The passkey is",
    "lookup": "\nQuestion: {question}\nAnswer: The value of {key} is",
}

SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|reserved|>")
PAD, BOS, EOS = 0, 1, 2
FIRST_BYTE = len(SPECIAL)
FIRST_WORD = FIRST_BYTE + 256

# Frequent English words, most frequent first: those that no template uses fill the vocabulary, for a user's own text.
_COMMON = """
    the be to of and a in that have it for not on with he as you do at this but his by from they we say her she or an
    will my one all would there their what so up out if about who get which go me when make can like time no just him
    know take people into year your good some could them see other than then now look only come its over think also
    back after use two how our work first well way even new want because any these give day most us is are was were
    been has had did more many much very where why each between under last great own same tell does three small large
    such here thing things part place case week company system program question number world house man woman child
    life hand eye every should through still while long high right old big next young important public able local
    great state city data model context memory attention head layer page key value answer token tokens text word
    sentence line list name end start begin
"""

_PIECE = re.compile(r" ?\{\w+\}|#|\s(?=#)| ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]|\s")


def split(text: str) -> list[str]:
    """The pieces of a text or template; a slot `{name}` is a piece of its own and takes the space before it along."""
    return [match.group() for match in _PIECE.finditer(text)]


def _pieces() -> tuple[str, ...]:
    """The string of every token id: specials, the 256 bytes (outside ASCII they have no string of their own), words."""
    literal = [piece for text in _texts() for piece in split(text) if "{" not in piece and "#" not in piece]
    spaced = [f" {word}" for words in WORDS.values() for word in words]
    # A sentence may open a paragraph, where its first word has no space before it.
    bare = list(WORDS["name"]) + [split(text)[0] for text in _texts()]
    bare = [word for word in bare if "{" not in word]
    opening = [f" {word}" for word in bare if word[0].isalpha()]
    needed = sorted({piece for piece in literal + spaced + bare + opening if len(piece) > 1})
    common = dict.fromkeys(f" {word}" for word in _COMMON.split() if f" {word}" not in needed and len(word) > 1)
    words = [*needed, *common][: VOCAB_SIZE - FIRST_WORD]
    return (*SPECIAL, *(chr(byte) if byte < 128 else "" for byte in range(256)), *words)


def _texts() -> list[str]:
    facts = [text for phrases in FACTS.values() for text in (*phrases.statements, *phrases.questions)]
    return [*PROSE, *INTRODUCTIONS, *facts, *ASKING, *RESTATING.values()]


PIECES: tuple[str, ...] = _pieces()
TOKEN_OF: dict[str, int] = {piece: token for token, piece in enumerate(PIECES) if piece}


def tokens_of(text: str) -> list[int]:
    """Token ids of an ASCII text of this language, without special tokens.

    A word outside the vocabulary is spelled in bytes, as the tokenizer does.
    """
    tokens: list[int] = []
    for piece in split(text):
        known = TOKEN_OF.get(piece)
        tokens.extend([known] if known is not None else (FIRST_BYTE + byte for byte in piece.encode("ascii")))
    return tokens


def text_of(tokens: list[int] | np.ndarray) -> str:
    """The text of token ids of this language (ASCII); special tokens are written as their names."""
    return "".join(PIECES[token] for token in tokens)
