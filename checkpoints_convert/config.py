"""How a conversion uses memory; nothing here changes what is written."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Sizes of what is read and written at once.

    Attributes:
        block_numbers: numbers of a tensor that are read at once. A safetensors file is mapped into memory, and its
            touched pages count as the process's own.
        chunk_bytes: tensors are stored in pieces of this size, uncompressed: writing takes no memory beside the
            tensor's, reading little.
    """

    block_numbers: int = 2**23
    chunk_bytes: int = 64 * 2**20


DEFAULT = ConvertConfig()
