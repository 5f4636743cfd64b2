"""What constrains the text of one request; host only, no JAX. Libraries for grammars live where these are made."""

from typing import Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Grammar(Protocol):
    """A text's state, moved on by its tokens. One object belongs to one request.

    As long as `finished` is false at least one token may come next, perhaps only one that ends the text.
    """

    def mask(self) -> np.ndarray:
        """Which tokens may come next: bool, an entry for each id of the model's vocabulary. It changes nothing."""
        ...

    def accept(self, token: int) -> None:
        """A token has come; never one that ended the text by itself.

        Raises:
            UserError: the text cannot go on; it ends the request with this as its error.
        """
        ...

    @property
    def finished(self) -> bool:
        """Whether the text is complete, so that it ends here."""
        ...


class Anything:
    """A grammar that allows every token: what guided requests cost beside their grammar's own work."""

    finished = False

    def __init__(self, vocab_size: int) -> None:
        self._allowed = np.ones(vocab_size, bool)

    def mask(self) -> np.ndarray:
        """All of them."""
        return self._allowed

    def accept(self, token: int) -> None:
        """Nothing changes."""
