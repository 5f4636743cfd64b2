"""Answers that a grammar guides: which tokens may come next, by llguidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool
from llguidance import LLMatcher, LLTokenizer

from lychee_jax.errors import UserError
from lychee_jax.files import json_text
from lychee_jax.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A model that is not sure may otherwise write blanks until it runs out of tokens.
_JSON: JsonCompileOptions = {"whitespace_pattern": r"( |\n {0,16})?"}


class Guide:
    """Where one answer stands in its grammar (an engine's `Grammar`); the engine's thread asks and tells."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def mask(self) -> Bool[np.ndarray, " V"]:
        """The tokens that may come next."""
        return np.frombuffer(self._matcher.compute_logit_bias(), np.uint8)[: self._vocab_size] != 0

    def accept(self, token: int) -> None:
        """Take the next token.

        Raises:
            UserError: it was not allowed, or the grammar has become too complex.
        """
        if not self._matcher.consume_token(token):
            raise UserError(f"the grammar cannot go on: {' '.join(self._matcher.get_error().split())[:200]}")

    @property
    def finished(self) -> bool:
        """Whether nothing but an end may come."""
        return self._matcher.is_stopped()


class Grammars:
    """Makes the grammars of a model's answers.

    Args:
        tokenizer: of the model.
        vocab_size: of its logits.
        eos_ids: tokens that end a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]) -> None:
        description = tokenizer.to_json()
        if description is None:
            raise UserError("the model's tokenizer has no tokenizer.json, which guided answers need")
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(description, n_vocab=vocab_size, eos_token=list(eos_ids) or None)

    def start(self, grammar: str) -> Guide:
        """An answer at its beginning."""
        return Guide(LLMatcher(self._tokenizer, grammar), self._vocab_size)

    def json_schema(self, schema: Mapping[str, Any]) -> str:
        """JSON of a schema.

        Raises:
            UserError: a schema that is none, or asks for what cannot be guided.
        """
        try:
            grammar = LLMatcher.grammar_from_json_schema(json_text(schema), overrides=_JSON)
        except ValueError as error:  # nested too deeply
            raise UserError(f"the JSON schema cannot be read: {error}") from error
        return self._checked(grammar, "the JSON schema")

    def regex(self, pattern: str) -> str:
        """Text that matches a pattern as a whole.

        Raises:
            UserError: no pattern of the regular kind.
        """
        return self._checked(LLMatcher.grammar_from_regex(pattern), "the regex")

    def between(self, before: str, schema: Mapping[str, Any], after: str) -> str:
        """JSON of a schema between two texts.

        Raises:
            UserError: as for `json_schema`.
        """
        start = " ".join(part for part in (_quoted(before), "json", _quoted(after)) if part)
        json = json_text({**schema, "x-guidance": _JSON})
        return self._checked(LLMatcher.grammar_from_lark(f"start: {start}\njson: %json {json}\n"), "the tools' schema")

    def _checked(self, grammar: str, name: str) -> str:
        if complaint := LLMatcher.validate_grammar(grammar, self._tokenizer):
            raise UserError(f"{name} cannot be compiled: {' '.join(complaint.split())[:500]}")
        return grammar


def _quoted(text: str) -> str:
    return json_text(text) if text else ""


def response_grammar(grammars: Grammars, response_format: Mapping[str, Any]) -> str | None:
    """The grammar of a `response_format`; None for plain text.

    Raises:
        UserError: a format that is not known, or whose grammar cannot be compiled.
    """
    kind = response_format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return grammars.json_schema({"type": "object"})
    if kind == "json_schema":
        inner = response_format.get("json_schema")
        schema = inner.get("schema") if isinstance(inner, Mapping) else None
        if not isinstance(schema, Mapping):
            raise UserError('response_format must be {"type": "json_schema", "json_schema": {"schema": {…}}}')
        return grammars.json_schema(schema)
    if kind == "regex":
        if not isinstance(response_format.get("regex"), str):
            raise UserError('response_format must be {"type": "regex", "regex": "…"}')
        return grammars.regex(response_format["regex"])
    raise UserError("response_format has a type that is none of text, json_object, json_schema, regex")
