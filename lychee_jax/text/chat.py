"""Conversations for a chat template: messages, what stands before a user's text, keywords of the template."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lychee_jax.arguments import shown
from lychee_jax.errors import UserError
from lychee_jax.files import parse_json

type Message = dict[str, Any]

RESERVED = frozenset(
    {
        # What a template gets besides the user's keywords.
        "messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now",
        # Parameters of transformers' apply_chat_template and of what it calls.
        "self", "conversation", "conversations", "chat_template", "continue_final_message", "tokenize", "padding",
        "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
        "tokenizer_kwargs", "sanitize_control_tokens", "kwargs",
        # Special tokens, which belong to the checkpoint.
        "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
        "additional_special_tokens", "extra_special_tokens",
    }
)  # fmt: skip
"""Names that no keyword of a template may have."""

_OPEN_THINKING = re.compile(r"<((?:\w+:)?think(?:ing)?)>\s*$")


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """How a text becomes a conversation.

    Attributes:
        before: messages that stand before the user's text: a system message, earlier turns.
        template_kwargs: keywords for the chat template, such as `{"enable_thinking": False}`.

    Raises:
        UserError: messages or keywords that no template can take, by name.
    """

    before: Sequence[Message] = ()
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check both, and keep them in one form."""
        object.__setattr__(self, "before", tuple(check_messages(self.before)) if self.before else ())
        object.__setattr__(self, "template_kwargs", check_template_kwargs(self.template_kwargs))

    def conversation(self, text: str) -> list[Message]:
        """The messages, with the user's text as the last one."""
        return [*self.before, {"role": "user", "content": text}]

    def to_json(self) -> dict[str, Any]:
        """As plain data: what tells two runs apart. Null where nothing was given."""
        return {
            "chat": True,
            "chat_before": [dict(message) for message in self.before] or None,
            "template_kwargs": dict(self.template_kwargs) or None,
        }


def make_chat_options(
    *,
    chat: bool,
    system: str | None = None,
    messages: Sequence[Message] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> ChatOptions | None:
    """The chat options that these arguments mean; None: texts go to the model as they are.

    Args:
        chat: put texts through the chat template.
        system: the system message in front.
        messages: a conversation, which implies `chat`.
        template_kwargs: keywords for the template.

    Raises:
        UserError: a system message or keywords without a chat, two system messages, or what `ChatOptions` refuses.
    """
    if not chat and messages is None:
        for name, value in (("a system message", system), ("template keywords", template_kwargs)):
            if value is not None:
                raise UserError(f"{name} without a chat: only --chat or --messages (chat=True, messages=…) use one")
        return None
    before = [] if messages is None else check_messages(messages)
    if system is not None:
        if not isinstance(system, str):
            raise UserError(f"the system message is {system!r}; it must be a text")
        if any(message["role"] == "system" for message in before):
            raise UserError("there are two system messages: the conversation has one of its own")
        before = [{"role": "system", "content": system}, *before]
    return ChatOptions(before, {} if template_kwargs is None else template_kwargs)


def check_messages(messages: Any) -> list[Message]:
    """Messages with their contents as text.

    A content is a text or a list of `{"type": "text", "text": …}`, whose texts are joined by newlines, as vLLM joins
    them. Other keys of a message go to the template as they are.

    Raises:
        UserError: no list of messages, or one without role or text, by its number.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise UserError('messages must be a list of {"role": …, "content": …} with at least one of them')
    return [_message(message, number) for number, message in enumerate(messages)]


def parse_messages(text: str, name: object) -> list[Message]:
    """The messages of a JSON text.

    Raises:
        UserError: no JSON, or no list of messages; `name` says of what.
    """
    raw = parse_json(text, name)
    try:
        return check_messages(raw)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def _message(message: Any, number: int) -> Message:
    if not isinstance(message, Mapping):
        raise UserError(f'message {number} is {shown(message)}; each is {{"role": …, "content": …}}')
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise UserError(f"message {number} has role {shown(message.get('role'))}; a role is a text such as user")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UserError(
                    f'message {number} has a part {shown(part)}; parts are {{"type": "text", "text": …}}, nothing else'
                )
        content = "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError(f"message {number} has content {shown(content)}; a content is a text or a list of text parts")
    return {**message, "content": content}


def check_template_kwargs(keywords: Any) -> dict[str, Any]:
    """Keywords for a chat template.

    Raises:
        UserError: no names with values, or a name that is not the user's to set.
    """
    if not isinstance(keywords, Mapping) or not all(isinstance(name, str) for name in keywords):
        raise UserError(f'template keywords are {shown(keywords)}; give an object such as {{"enable_thinking": false}}')
    refuse_reserved(keywords, RESERVED)
    return dict(keywords)


def refuse_reserved(keywords: Mapping[str, Any], reserved: frozenset[str]) -> None:
    """Raise UserError for keywords whose names are not the user's to set."""
    if taken := [name for name in keywords if name in reserved]:
        raise UserError(f"template keyword {taken[0]!r} is not the user's to set: the template gets it from elsewhere")


def close_thinking(rendered: str) -> str:
    """A rendered chat whose answer has begun: where the template opened `<think>`, it is closed, with no thought in it.

    Else words put into the assistant's mouth would be read as its thoughts. The form is that of Qwen3's template with
    `enable_thinking=False`.
    """
    opened = _OPEN_THINKING.search(rendered)
    return f"{rendered.rstrip()}\n\n</{opened[1]}>\n\n" if opened else rendered
