"""The keywords of `generate`: all options of its parts, once each, and a wrong one is told with the right one."""

import dataclasses
import inspect

import pytest

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli.generate import generate
from lychee_jax.engine.keywords import GenerateKeywords, sort_keywords
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.sampling_params import SamplingParams

KEYWORDS = GenerateKeywords.__annotations__


def names(options: type) -> set[str]:
    return {field.name for field in dataclasses.fields(options)}


def test_every_option_is_a_keyword_and_described():
    policy, sampling, others = sort_keywords(dict.fromkeys(KEYWORDS))
    assert policy.keys() == names(SelectionPolicy)
    assert sampling.keys() == names(SamplingParams)
    assert others.keys() == names(GenerateOptions) - {"heads", "policy", "sampling", "eos_ids"}
    assert len(policy) + len(sampling) + len(others) + 1 == len(KEYWORDS)  # and the heads
    described = inspect.getdoc(GenerateKeywords) or ""
    assert all(f"\n    {name}: " in described for name in KEYWORDS)
    assert KEYWORDS.keys() <= inspect.signature(generate).parameters.keys()


def test_both_top_p_reach_their_place():
    assert sort_keywords({"top_p": 0.5, "top_p_mass": 0.25, "page_size": 8}) == (
        {"top_p": 0.25},
        {"top_p": 0.5},
        {"page_size": 8},
    )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("max_tokens", "no option 'max_tokens'; did you mean max_new_tokens"),
        ("temprature", "did you mean temperature"),
        ("pagesize", "did you mean page_size"),
        ("policy", "no option 'policy'; there are max_new_tokens, ignore_eos, "),
        ("eos_ids", "no option 'eos_ids'"),
    ],
)
def test_a_wrong_keyword_is_told_with_the_right_one(wrong, told):
    with pytest.raises(TypeError, match=told):
        sort_keywords({wrong: 1})
