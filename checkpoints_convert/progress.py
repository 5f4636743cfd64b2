"""How far a conversion has come, for callers and for the terminal."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with the stage ("convert" or "verify"), the tensors that are done, and all tensors."""
