"""LongBench v1 (Bai et al., arXiv 2308.14508): the eight English tasks that TidalDecode's public code runs.

LycheeDecode reports an average over eight tasks beside TidalDecode's, which are taken to be the same.

The data are the user's: one JSONL file a task, as in the archive `data.zip` of the dataset THUDM/LongBench on Hugging
Face. Prompts longer than the length lose their middle. To let sparse heads matter for short answers too, TidalDecode
(arXiv 2410.05076) reads the last part of the prompt, at most 100 characters, through the decode path: `decode_last` of
the runner does it by tokens.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lychee_jax.errors import UserError
from lychee_jax.evaluation import metrics
from lychee_jax.evaluation.cases import Case
from lychee_jax.evaluation.prompts import LONGBENCH
from lychee_jax.evaluation.report import Style
from lychee_jax.files import digest_of, parse_json_lines, read_text
from lychee_jax.text.chat import ChatOptions
from lychee_jax.text.tokenizer import Tokenizer

STYLE = Style("longbench", "% of the task's metric", "task", average=True)

TASKS = (
    "multifieldqa_en", "narrativeqa", "qasper", "2wikimqa", "hotpotqa", "qmsum", "triviaqa", "passage_retrieval_en",
)  # fmt: skip
"""The eight tasks."""

EXTRA_TASKS = ("trec",)
"""Further ones: question classification."""

# Few-shot prompts: LongBench takes the first line of their answers, and puts no chat template around them.
_FEW_SHOT = ("trec", "triviaqa")
_SOURCE = "https://huggingface.co/datasets/THUDM/LongBench/resolve/main/data.zip has it"

_METRICS: dict[str, Callable[[str, str], float]] = {
    "qmsum": metrics.rouge_l,
    "passage_retrieval_en": metrics.retrieval,
}


@dataclasses.dataclass(frozen=True)
class LongBench:
    """One of the tasks, from `<name>.jsonl` in a folder.

    Raises:
        UserError: an unknown task.
    """

    tokenizer: Tokenizer
    name: str
    data: Path
    chat: ChatOptions | None = None

    def __post_init__(self) -> None:
        """Refuse what there is not."""
        if self.name not in (*TASKS, *EXTRA_TASKS):
            raise UserError(f"task {self.name!r} is unknown; use some of {', '.join((*TASKS, *EXTRA_TASKS))}")

    @functools.cached_property
    def _text(self) -> str:
        try:
            return read_text(self.data / f"{self.name}.jsonl")
        except UserError as error:
            raise UserError(f"{error}; {_SOURCE}") from error

    @property
    def inputs(self) -> dict[str, str]:
        """The digest of its file."""
        return {f"{self.name}.jsonl": digest_of(self._text)}

    @functools.cached_property
    def lines(self) -> list[dict[str, Any]]:
        """The file's samples.

        Raises:
            UserError: it is missing, or not LongBench's.
        """
        path, text = self.data / f"{self.name}.jsonl", self._text
        try:
            found = parse_json_lines(text, path)
            for line in found:
                if not (isinstance(line["context"], str) and isinstance(line["input"], str) and line["answers"]):
                    raise TypeError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no LongBench file: each line needs context, input and answers") from error
        if not found:
            raise UserError(f"{path} is empty; {_SOURCE}")
        return found

    def case(self, length: int, depth: float | None, index: int) -> Case:
        """The prompt of a line, cut in the middle to `length` tokens.

        Raises:
            UserError: the file is missing or not LongBench's.
        """
        line, wording = self.lines[index], LONGBENCH[self.name]
        text = wording.body.format(context=line["context"], input=line["input"])
        prompt, tokens = self._cut(text, length)
        return Case(prompt, tokens, list(line["answers"]), wording.max_new_tokens)

    def score(self, case: Case, answer: str, logprobs: list[float]) -> float:
        """The best of the metric over all right answers."""
        if self.name in _FEW_SHOT:
            answer = answer.lstrip("\n").split("\n")[0]
        if self.name == "trec":
            classes = next((line.get("all_classes") for line in self.lines if line.get("all_classes")), None)
            if classes is None:
                raise UserError(f"{self.data / 'trec.jsonl'} has no all_classes")
            return max(metrics.classification(answer, reference, classes) for reference in case.references)
        metric = _METRICS.get(self.name, metrics.qa_f1)
        return max(metric(answer, reference) for reference in case.references)

    def _cut(self, text: str, length: int) -> tuple[str, list[int]]:
        """The text with its middle left out until what the model gets has at most `length` tokens, and these."""
        encoded = self._encode(text)
        if len(encoded) <= length:
            return text, encoded
        plain = self.tokenizer.encode(text)
        room = length
        while room > 1:
            half = room // 2
            cut = self.tokenizer.decode(plain[:half]) + self.tokenizer.decode(plain[-half:])
            encoded = self._encode(cut)
            if len(encoded) <= length:
                return cut, encoded
            # A chat template, or pieces that no longer merge at the cut, need some room of their own.
            room -= len(encoded) - length
        raise UserError(f"{self.name}: a length of {length} tokens has no room for a prompt")

    def _encode(self, text: str) -> list[int]:
        if self.chat is None or self.name in _FEW_SHOT:
            return self.tokenizer.encode(text)
        return self.tokenizer.encode_messages(self.chat.conversation(text), self.chat.template_kwargs)
