"""Text in, text out: the checkpoint's own tokenizer and chat template, text streamed token by token, stop strings."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.files import digest_of, json_text, read_json_object
from lychee_jax.text.chat import Message, check_messages, check_template_kwargs, close_thinking, refuse_reserved
from lychee_jax.text.marked_files import without_marks
from lychee_jax.text.sentence_pieces import with_pipeline

VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_BYTE_TOKENS = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(128, 256)}
_NO_LIMIT = 10**30  # transformers warns about texts longer than model_max_length; here the engine knows the limit


class Tokenizer:
    """The tokenizer of a checkpoint, as `transformers.AutoTokenizer` reads it."""

    def __init__(self, backend: Any) -> None:
        """Wrap a loaded `transformers` tokenizer."""
        self._backend = backend
        self._backend.model_max_length = _NO_LIMIT

    @classmethod
    def from_folder(cls, path: str | os.PathLike[str]) -> Tokenizer | None:
        """Load the tokenizer of a checkpoint's folder; None if the folder has none.

        Raises:
            UserError: tokenizer files are there, but cannot be loaded.
        """
        folder = Path(path)
        if not any((folder / name).is_file() for name in VOCABULARY_FILES):
            return None
        with _quietly(), without_marks(folder) as unmarked, with_pipeline(unmarked) as whole:
            auto = _auto_tokenizer()
            try:
                # Never from the network, and never code that lies in the folder.
                backend = auto.from_pretrained(str(whole), local_files_only=True, trust_remote_code=False)
                _restore_pipeline(backend, whole)
                return cls(backend)
            except Exception as error:  # the Rust library raises plain Exception
                raise UserError(f"the tokenizer in {path} cannot be loaded: {_first_line(error)}") from error

    def encode(self, text: str) -> list[int]:
        """Token ids as the tokenizer makes them by default (with BOS, if it adds one)."""
        return self._encode(text, add_special_tokens=True)

    def encode_plain(self, text: str) -> list[int]:
        """Token ids without special tokens: a part of a longer text."""
        return self._encode(text, add_special_tokens=False)

    def encode_messages(
        self,
        messages: str | Sequence[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        answer: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Token ids of the text that `render_messages` makes.

        The template writes BOS itself where the model wants one, so the tokenizer adds none.
        """
        return self.encode_plain(self.render_messages(messages, template_kwargs, answer=answer, tools=tools))

    def render_messages(
        self,
        messages: str | Sequence[Message],
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        answer: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation, up to where the assistant's answer begins, or goes on after `answer`.

        Args:
            messages: `[{"role": "user", "content": …}, …]`, or the text of one message of the user.
            template_kwargs: keywords for the template, such as `{"enable_thinking": False}`.
            answer: words that are put into the assistant's mouth; thoughts that the template opened are closed first.
            tools: JSON schemas of functions that the assistant may call.

        Raises:
            UserError: the checkpoint has no chat template, its template refuses the messages, or a keyword is not the
                user's to set.
        """
        messages = check_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
        keywords = check_template_kwargs(template_kwargs or {})
        if not self._backend.chat_template:
            raise UserError("the checkpoint has no chat template; give the prompt without --chat")
        refuse_reserved(keywords, frozenset(self._backend.special_tokens_map))
        try:
            text = self._backend.apply_chat_template(
                messages, tools=list(tools) if tools else None, add_generation_prompt=True, tokenize=False, **keywords
            )
        except Exception as error:  # templates are programs: they fail in their own ways
            raise UserError(f"the chat template refused the messages: {_first_line(error)}") from error
        return close_thinking(text) + answer if answer else text

    @property
    def tool_template(self) -> str:
        """The chat template that conversations with tools go through; empty if there is none."""
        if not self._backend.chat_template:
            return ""
        return self._backend.get_chat_template(tools=[{}])

    def to_json(self) -> str | None:
        """The tokenizer.json that does what this tokenizer does; None for one that is written in Python."""
        backend = getattr(self._backend, "backend_tokenizer", None)
        return None if backend is None else backend.to_str()

    def decode(self, ids: Iterable[int]) -> str:
        """Text of token ids without special tokens; bytes that are no UTF-8 become U+FFFD."""
        shown = [int(index) for index in ids]
        if self._byte_level:
            # The library's decoder takes the letters of added tokens for bytes too.
            parts = [self.token_bytes(index) or b"" for index in shown if not self.is_silent(index)]
            return b"".join(parts).decode("utf-8", "replace")
        return self._backend.decode(shown, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def token_bytes(self, index: int) -> bytes | None:
        """The UTF-8 bytes that a token stands for, where its neighbours may complete them; None: it is whole text."""
        token = self._backend.convert_ids_to_tokens(index)
        if self._byte_level:
            alphabet = _byte_alphabet()
            if index in self._added or not all(char in alphabet for char in token):
                return token.encode()  # an added token is written as it is
            return bytes(alphabet[char] for char in token)
        return _BYTE_TOKENS.get(token)

    def is_silent(self, index: int) -> bool:
        """Whether a token never shows in text: special ones, and ids that the model has but the tokenizer lacks."""
        return index in self.special_ids or self._backend.convert_ids_to_tokens(index) is None

    def token_text(self, index: int) -> str:
        """The text of a single token; of a special one, which makes none in a text, its name, such as `<|im_end|>`."""
        return self._backend.convert_ids_to_tokens(index) if index in self.special_ids else self.decode([index])

    @functools.cached_property
    def prefix_ids(self) -> list[int]:
        """What is put in front of every text, such as BOS; what is put behind it is not among them."""
        text, whole = self.encode_plain("a"), self.encode("a")
        return next((whole[:front] for front in range(len(whole)) if whole[front : front + len(text)] == text), [])

    def digest(self) -> str:
        """What tells the tokenizer from others, its chat template aside."""
        pipeline = getattr(self._backend, "backend_tokenizer", None)
        return digest_of(
            json_text(self._backend.get_vocab(), sort_keys=True) if pipeline is None else pipeline.to_str()
        )

    @property
    def bos_id(self) -> int | None:
        """The token that begins a text, whether or not the tokenizer adds it; None if it has none."""
        return self._backend.bos_token_id

    @property
    def chat_template(self) -> str | dict[str, str] | None:
        """The checkpoint's, or several by name."""
        return self._backend.chat_template

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that are marked as special, and never show in text."""
        return frozenset(index for index, token in self._added.items() if token.special)

    @functools.cached_property
    def _added(self) -> Mapping[int, Any]:
        return self._backend.added_tokens_decoder

    @functools.cached_property
    def anchor(self) -> int:
        """Some token of plain text: decoded in front of another, it shows how that one looks inside a text."""
        for index in range(len(self._backend)):
            if not self.is_silent(index) and self.token_bytes(index) is None and self.decode([index]).strip():
                return index
        raise UserError("the tokenizer has no token with visible text")

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid Unicode: {error.reason} at character {error.start}") from error
        return list(self._backend.encode(text, add_special_tokens=add_special_tokens))

    @functools.cached_property
    def _byte_level(self) -> bool:
        """Whether each character of a token's name stands for a byte (GPT-2's way), so that letters may be split."""
        decoder = getattr(getattr(self._backend, "backend_tokenizer", None), "decoder", None)
        state = json.loads(decoder.__getstate__()) if decoder is not None else {}
        return "ByteLevel" in {part.get("type") for part in (state, *state.get("decoders", ()))}


def read_eos_id(folder: Path) -> int | None:
    """The id of the token that tokenizer_config.json calls the end, from the files alone; None if they do not say.

    Raises:
        UserError: a file that is no JSON object.
    """
    files = (folder / "tokenizer_config.json", folder / "tokenizer.json")
    config, pipeline = (read_json_object(file) if file.is_file() else {} for file in files)
    end = config.get("eos_token")
    name = end.get("content") if isinstance(end, dict) else end
    listed = [(token.get("content"), token.get("id")) for token in pipeline.get("added_tokens", ())]
    return next((index for content, index in listed if content == name and isinstance(index, int)), None)


def check_tokenizer(folder: Path) -> None:
    """Raise UserError for a folder whose tokenizer has to be put together from older files, and cannot be."""
    if not (folder / "tokenizer.json").is_file():
        Tokenizer.from_folder(folder)


def _restore_pipeline(backend: Any, folder: Path) -> None:
    """Let tokenizer.json, where there is one, say how text is split: some classes of transformers build it anew.

    Their LlamaTokenizer, say, puts no space in front of " hi", and none behind a special token, where the file does.
    """
    file = folder / "tokenizer.json"
    theirs = getattr(backend, "backend_tokenizer", None)
    if theirs is None or not file.is_file():
        return
    from tokenizers import Tokenizer as Pipeline

    own = Pipeline.from_file(str(file))
    for part in ("model", "normalizer", "pre_tokenizer", "decoder", "post_processor"):
        setattr(theirs, part, getattr(own, part))


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Which byte a character stands for in byte-level BPE: printable Latin-1 is itself, the others follow from U+0100.

    Source: Radford et al. 2019, "Language models are unsupervised multitask learners" (the released encoder).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _auto_tokenizer() -> Any:
    """`transformers.AutoTokenizer`, imported at first use; without torch if USE_TORCH=0 (it would cost seconds)."""
    hide = os.environ.get("USE_TORCH") == "0" and not {"torch", "transformers"} & sys.modules.keys()
    if hide:
        sys.modules["torch"] = None  # type: ignore[assignment]  # the import system's own sign for "not to be found"
    try:
        from transformers import AutoTokenizer
    finally:
        if hide:
            del sys.modules["torch"]
    return AutoTokenizer


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """No advice and warnings from transformers: that torch is missing, say."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
