"""From what a caller asks, text, token ids or conversations, to the token ids that the model reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lychee_jax.arguments import as_prompts
from lychee_jax.errors import UserError
from lychee_jax.text.chat import Message, make_chat_options
from lychee_jax.text.tokenizer import Tokenizer

type Prompts = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]]
type Conversations = Sequence[Message] | Sequence[Sequence[Message]]


def encode_prompts(
    tokenizer: Tokenizer | None,
    prompts: Prompts | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    messages: Conversations | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    model: object = "the model",
) -> list[list[int]]:
    """Token ids, a row for each prompt or conversation.

    Args:
        tokenizer: of the model, if it has one.
        prompts: a text or several, or a row of ids or several, which are used as they are.
        chat: put texts through the chat template, each as a user's message.
        system: the system message of every chat.
        messages: a conversation or several, instead of prompts; they imply `chat`.
        template_kwargs: keywords for the chat template.
        model: how errors call the model.

    Raises:
        UserError: no prompts or both kinds, text without a tokenizer, ids that are to be a chat, or what the chat
            template refuses.
    """
    if (prompts is None) == (messages is None):
        raise UserError("give prompts or messages, not both" if messages else "there is no prompt; give at least one")
    if messages is not None:
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise UserError('messages must be a list of {"role": …, "content": …}, or a list of such lists')
        several = bool(messages) and all(isinstance(each, Sequence) and not isinstance(each, str) for each in messages)
        rows = []
        for conversation in messages if several else [messages]:
            options = make_chat_options(
                chat=True,
                system=system,
                messages=conversation,  # pyright: ignore[reportArgumentType]  # one conversation, as was looked up
                template_kwargs=template_kwargs,
            )
            assert options is not None
            rows.append(_needed(tokenizer, model).encode_messages(options.before, options.template_kwargs))
        return rows
    options = make_chat_options(chat=chat, system=system, template_kwargs=template_kwargs)
    rows = []
    for prompt in as_prompts(prompts):
        if not isinstance(prompt, str):
            if chat:
                raise UserError("a chat needs text: token ids are used as they are")
            rows.append(prompt)
        elif options is None:
            rows.append(_needed(tokenizer, model).encode(prompt))
        else:
            found = _needed(tokenizer, model)
            rows.append(found.encode_messages(options.conversation(prompt), options.template_kwargs))
    return rows


def _needed(tokenizer: Tokenizer | None, model: object) -> Tokenizer:
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer; give token ids")
    return tokenizer
