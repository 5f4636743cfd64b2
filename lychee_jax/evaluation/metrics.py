"""The metrics of LongBench v1 (Bai et al., arXiv 2308.14508) for its English tasks: scores from 0 to 1.

ROUGE-L comes from the package `rouge`, as LongBench's own does: other implementations split words otherwise and give
other figures.
"""

from __future__ import annotations

import functools
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def qa_f1(answer: str, reference: str) -> float:
    """F1 over words, without case, punctuation and articles (the measure of SQuAD)."""
    found, wanted = _words(answer), _words(reference)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION)).split()


@functools.cache
def _rouge():
    from rouge import Rouge

    return Rouge(metrics=["rouge-l"])


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; an answer without a word scores 0."""
    try:
        scores: Any = _rouge().get_scores([answer], [reference], avg=True)
        return scores["rouge-l"]["f"]
    except (ValueError, RecursionError):  # nothing but white space and full stops; a text without end
        return 0.0


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 shared by all classes that are named, if the right one is among them.

    Names that are parts of the right name do not count as named beside it.
    """
    named = [name for name in classes if name in answer]
    named = [name for name in named if name == reference or name not in reference]
    return 1 / len(named) if reference in named else 0.0


def retrieval(answer: str, reference: str) -> float:
    """The share of the numbers in the answer that are the paragraph's ("Paragraph 7")."""
    paragraph = re.findall(r"Paragraph (\d+)", reference)[0]
    numbers = re.findall(r"\d+", answer)
    return numbers.count(paragraph) / len(numbers) if numbers else 0.0
