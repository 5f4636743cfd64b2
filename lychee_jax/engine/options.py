"""What a caller may choose about a generation."""

import dataclasses
from typing import Literal, get_args

from lychee_jax.arguments import check_int32, settle_numbers
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.engine.sampling import SamplingParams
from lychee_jax.errors import UserError
from pallas_kernels.dispatch import available

AttentionMode = Literal["auto", "hybrid", "dense"]


@dataclasses.dataclass(frozen=True)
class GenerateOptions:
    """Everything a caller may choose; `heads=None` lets every head retrieve, `eos_ids` end a row."""

    attention: AttentionMode = "auto"
    heads: HeadMap | None = None
    policy: SelectionPolicy = dataclasses.field(default_factory=SelectionPolicy)
    page_size: int = 64
    max_new_tokens: int = 128
    sampling: SamplingParams = dataclasses.field(default_factory=SamplingParams)
    eos_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    correct_every: int = 0
    implementation: str | None = None

    def __post_init__(self):
        settle_numbers(self)
        check_int32(self, "page_size", "max_new_tokens", "correct_every")
        if self.attention not in get_args(AttentionMode):
            raise UserError(f"attention is {self.attention!r}; use one of {', '.join(get_args(AttentionMode))}")
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if self.correct_every < 0:
            raise UserError(f"correct_every is {self.correct_every}; it must be 0 (off) or a number of tokens")
        if self.implementation is not None and self.implementation not in available("hybrid_decode"):
            names = ", ".join(available("hybrid_decode"))
            raise UserError(f"implementation {self.implementation!r} is not available; this version has {names}")
        self.policy.validate(self.page_size)

    @property
    def extend_implementation(self) -> str | None:
        """What reads prompts and corrects caches: named kernels are for decoding, but "xla" keeps out all of them."""
        return "xla" if self.implementation == "xla" else None
