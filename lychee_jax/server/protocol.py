"""Requests as clients write them: OpenAI's fields, the sampling fields that vLLM added, and `lychee`.

Fields that are not known are ignored, as OpenAI's clients grow new ones; some that would change the answer are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.server.errors import ApiError

_REFUSED = ("suffix", "functions", "audio", "modalities", "prediction", "logits_processors")

Count = Annotated[int, Field(ge=0, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    model: str | None = None


class LycheeFields(_Body):
    """What this server offers beyond the protocol: `"lychee": {"attention": "dense"}`."""

    attention: Literal["auto", "hybrid", "dense"] | None = None


class StreamOptions(_Body):
    """`include_usage`: one more chunk at the end tells what was used."""

    include_usage: bool | None = None


class GenerationRequest(_Body):
    """What completions and chats have in common."""

    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = None
    lychee: LycheeFields | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for name in _REFUSED:
                if value.get(name) is not None:
                    raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
            best_of = value.get("best_of")
            if best_of is not None and best_of != 1:
                raise ApiError(400, "best_of must be 1: nothing is generated that is not returned", param="best_of")
        return value

    @model_validator(mode="after")
    def _check_options(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options need stream: true", param="stream_options")
        return self

    @property
    def choices(self) -> int:
        """How many answers each prompt gets."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        """Texts before which an answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk about usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, seed: int) -> SamplingParams:
        """How tokens are chosen; `seed` counts where the client gives none.

        Raises:
            UserError: a number out of its range.
        """
        return SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=max(self.top_k or 0, 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            repetition_penalty=1.0 if self.repetition_penalty is None else self.repetition_penalty,
            seed=seed if self.seed is None else self.seed % 2**32,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=tuple((_token_id(token), bias) for token, bias in (self.logit_bias or {}).items()),
        )


def _token_id(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 10:
        raise ApiError(400, "the keys of logit_bias must be token ids", param="logit_bias")
    return int(text)


class CompletionRequest(GenerationRequest):
    """Of /v1/completions."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]]
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, each a text or a list of ids."""
        given: Any = self.prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return given


class ChatRequest(GenerationRequest):
    """Of /v1/chat/completions. Messages are checked where the template takes them."""

    messages: list[dict[str, Any]]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs need logprobs: true", param="top_logprobs")
        return self

    @property
    def limit(self) -> int | None:
        """New tokens at most, by the newer name if both are there."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class TokenizeRequest(_Body):
    """Of /tokenize: a prompt or messages."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_source(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "give a prompt or messages, and not both", param="prompt")
        return self


class DetokenizeRequest(_Body):
    """Of /detokenize."""

    tokens: list[TokenId]
