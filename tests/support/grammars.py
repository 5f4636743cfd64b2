"""Grammars small enough to check by eye."""

import numpy as np


class EvenThenEnd:
    """So many even tokens, and then the one that ends the text. `stops`: the text is finished without it."""

    def __init__(self, vocab_size: int, count: int, end: int, *, stops: bool = False) -> None:
        self._even = np.arange(vocab_size) % 2 == 0
        self._even[end] = False
        self._end = np.arange(vocab_size) == end
        self._count, self._stops = count, stops
        self.taken: list[int] = []

    def mask(self) -> np.ndarray:
        """Even ones, or the end."""
        return self._even if len(self.taken) < self._count else self._end

    def accept(self, token: int) -> None:
        """Count it."""
        self.taken.append(token)

    @property
    def finished(self) -> bool:
        """After the last even one, if the text stops there."""
        return self._stops and len(self.taken) >= self._count
