"""The numbers to tune of the XLA forms."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class XlaConfig:
    """How much a step of a loop covers: this bounds the temporaries, and no result depends on it but by rounding.

    `decode_block`: cached positions in a decode step; `key_block`: cached positions in a prefill; `query_block`:
    queries of a whole sequence.
    """

    decode_block: int = 1024
    key_block: int = 1024
    query_block: int = 512

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be at least 1")
