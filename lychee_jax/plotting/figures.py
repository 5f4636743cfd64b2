"""Figures become PNG files: names in them may be in any script, and no letter is drawn as an empty box."""

from __future__ import annotations

import functools
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

_BOXES = "Last Resort"  # a font that has a box for every letter
_DEFAULT = FontProperties(family=["sans-serif"])


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure, with what fonts this machine has for its letters; one that none has is written as its code."""
    for axes in figure.axes:  # what stands at ticks is made when it is asked for
        axes.get_xticklabels()
        axes.get_yticklabels()
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and not text.get_text().isascii()]
    families, lacking = fonts_for(frozenset("".join(text.get_text() for text in texts)))
    for text in texts:
        text.set_fontfamily([*text.get_fontfamily(), *families])
        if lacking.intersection(text.get_text()):
            text.set_text("".join(_escaped(letter) if letter in lacking else letter for letter in text.get_text()))
    figure.savefig(path, format="png")


@functools.lru_cache(maxsize=64)
def fonts_for(letters: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have what the default one lacks of these letters, and the letters that no font has."""
    lacking = {ord(letter) for letter in letters if not letter.isspace()} - _letters_of(findfont(_DEFAULT))
    fonts = [font for font in fontManager.ttflist if lacking and not font.name.startswith(_BOXES)]
    fonts.sort(key=lambda font: (font.style == "normal", font.weight == 400, font.name))  # a family's upright one last
    files = {font.name: font.fname for font in fonts}
    found = {family: lacking & _letters_of(file) for family, file in files.items()}
    families: list[str] = []
    while lacking and found:
        family = max(found, key=lambda family: len(found[family] & lacking))
        if not found[family] & lacking:
            break
        families.append(family)
        lacking -= found[family]
    return tuple(families), frozenset(map(chr, lacking))


def _letters_of(file: str) -> frozenset[int]:
    try:
        font = get_font(file)
    except (OSError, RuntimeError):  # a file that has gone, or is no font that can be drawn with
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()


def _escaped(letter: str) -> str:
    return letter.encode("ascii", "backslashreplace").decode()
