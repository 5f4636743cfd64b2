"""The bundled model's tokenizer in Hugging Face format: one token per piece of its language, bytes for everything else.

It is a byte-level BPE without merges: a piece that the vocabulary holds is one token, any other is spelled in bytes, so
every text comes back exactly.
"""

from __future__ import annotations

from pathlib import Path

from lychee_jax.data.language import BOS, EOS, FIRST_WORD, PAD, PIECES, SPECIAL
from lychee_jax.files import json_text, write_text

# Words and other signs with the space before them, single digits, single white-space characters.
_PATTERN = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s"

# A user's turn, then the answer as training wrote it: after `Answer:`, closed by the end-of-text token.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ 'Answer: ' + message['content'] + eos_token + '\\n' }}{% else %}{{ message['content'] + '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)


def _byte_characters() -> list[str]:
    """The printable character that stands for each byte in byte-level vocabularies (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    spare = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(spare)) for byte in range(256)]


def save_tokenizer(folder: Path, max_length: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`; `max_length` is the longest input in tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    characters = _byte_characters()
    strings = [*SPECIAL, *characters]
    strings += ["".join(characters[byte] for byte in piece.encode()) for piece in PIECES[FIRST_WORD:]]
    model = models.BPE(vocab={string: token for token, string in enumerate(strings)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{SPECIAL[BOS]} $A", special_tokens=[(SPECIAL[BOS], BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[EOS],
        "pad_token": SPECIAL[PAD],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
        "chat_template": _CHAT_TEMPLATE,
    }
    write_text(folder / "tokenizer_config.json", json_text(settings, indent=2) + "\n")
