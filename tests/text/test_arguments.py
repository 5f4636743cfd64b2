"""What callers pass from Python is taken as they mean it, or refused in one line; never a raw TypeError."""

import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.arguments import as_prompts, as_stops
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.sampling import SamplingParams
from lychee_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("without_type_checks")


@pytest.mark.parametrize(
    ("prompts", "rows"),
    [
        ("the dog", ["the dog"]),
        (["the", "dog"], ["the", "dog"]),
        (("the", [1, 2]), ["the", [1, 2]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ((1, 2), [[1, 2]]),
        (range(3), [[0, 1, 2]]),
        ([[1, 2], (3,)], [[1, 2], [3]]),
        (np.arange(3, dtype=np.int16), [[0, 1, 2]]),
        (np.ones((2, 2), np.uint8), [[1, 1], [1, 1]]),
        (jnp.arange(3), [[0, 1, 2]]),
        ([np.int32(4), 5], [[4, 5]]),
        ([np.arange(2), jnp.arange(1)], [[0, 1], [0]]),
        pytest.param(iter(["a", "b"]), ["a", "b"], id="an iterator"),
    ],
    ids=repr,
)
def test_prompts_as_they_are_meant(prompts, rows):
    found = as_prompts(prompts)
    assert found == rows
    assert all(type(token) is int for row in found if not isinstance(row, str) for token in row)


@pytest.mark.parametrize(
    ("prompts", "culprit"),
    [
        (5, "prompt is 5"),
        (b"bytes", "prompt is b'bytes'"),
        (None, "prompt is None"),
        ([], "no prompt"),
        (np.int32(3), "prompt is"),
        ([1, "a"], "prompt 0 is 1"),
        ([1.0, 2.0], r"prompt 0 has 1\.0; token ids are whole numbers"),
        ([[1], [True]], "prompt 1 has True"),
        ([[1], [2, None]], "prompt 1 has None"),
        ([[[1]]], r"prompt 0 has \[1\]"),
        ([b"a"], "prompt 0 has b'a'"),
        ([{"role": "user", "content": "a"}], "given as messages"),
        ({"role": "user", "content": "a"}, "prompt is"),
    ],
    ids=repr,
)
def test_prompts_that_mean_nothing_are_refused(prompts, culprit):
    with pytest.raises(UserError, match=culprit):
        as_prompts(prompts)


def test_stops_as_they_are_meant():
    assert as_stops("Az") == ("Az",)
    assert as_stops(None) == as_stops([]) == ()
    assert as_stops(["A", "z"]) == as_stops(iter(("A", "z"))) == ("A", "z")
    for bad in (5, b"Az", ["a", 5], [["a"]], {"a": 1}, [None]):
        with pytest.raises(UserError, match="stop is"):
            as_stops(bad)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="must not be empty"):
        as_stops("")


@pytest.mark.parametrize(
    ("options", "fields", "meant"),
    [
        (SamplingParams, dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "seed")), {}),
        (SamplingParams, {"temperature": 1, "top_k": 4.0}, {"temperature": 1.0, "top_k": 4}),
        (SamplingParams, {"seed": np.uint32(7), "top_p": np.float32(0.5)}, {"seed": 7, "top_p": 0.5}),
        (GenerateOptions, {"max_new_tokens": 4.0, "page_size": None}, {"max_new_tokens": 4, "page_size": 64}),
        (GenerateOptions, {"correct_every": np.float32(2)}, {"correct_every": 2}),
        (SamplingParams, {"logit_bias": None}, {}),
        (SamplingParams, {"logit_bias": {3: 1}}, {"logit_bias": ((3, 1.0),)}),
        (GenerateOptions, {"ignore_eos": np.True_}, {"ignore_eos": True}),
        (SelectionPolicy, {"budget": 4096.0, "sink": None}, {}),
        (HeadMap, {"num_layers": 2, "num_kv_heads": 2, "retrieval": [[0, 1], [1]]},
         {"num_layers": 2, "num_kv_heads": 2, "retrieval": ((0, 1), (1,))}),
    ],
)  # fmt: skip
def test_none_is_the_default_and_whole_floats_are_whole_numbers(options, fields, meant):
    made, wanted = options(**fields), options(**meant)
    assert made == wanted
    assert hash(made) == hash(wanted)
    assert [*map(type, vars(made).values())] == [*map(type, vars(wanted).values())]


@pytest.mark.parametrize(
    ("options", "fields", "culprit"),
    [
        (SamplingParams, {"top_k": "5"}, "top_k is '5'"),
        (SamplingParams, {"top_k": 2.5}, r"top_k is 2\.5"),
        (SamplingParams, {"seed": True}, "seed is True"),
        (SamplingParams, {"seed": float("nan")}, "seed is nan"),
        (SamplingParams, {"temperature": "warm"}, "temperature is 'warm'"),
        (SamplingParams, {"top_p": 1j}, "top_p is 1j"),
        (SamplingParams, {"top_p": [0.9]}, "top_p is"),
        (SamplingParams, {"logit_bias": 5}, "logit_bias is 5"),
        (SamplingParams, {"logit_bias": [5, 6]}, r"logit_bias is \[5, 6\]"),
        (SamplingParams, {"logit_bias": {"a": 1}}, "a token id of logit_bias is 'a'"),
        (GenerateOptions, {"ignore_eos": "no"}, "ignore_eos is 'no'; it must be True or False"),
        (GenerateOptions, {"max_new_tokens": 4.5}, r"max_new_tokens is 4\.5"),
        (GenerateOptions, {"max_new_tokens": "4"}, "max_new_tokens is '4'"),
        (GenerateOptions, {"max_new_tokens": 2**31}, "max_new_tokens is 2147483648"),
        (GenerateOptions, {"page_size": 2**40}, "page_size is 1099511627776"),
        (SelectionPolicy, {"budget": 2**31}, "budget is 2147483648"),
        (SelectionPolicy, {"recent": 2**31}, "recent is 2147483648"),
        (SelectionPolicy, {"budget": None, "sink": "1"}, "sink is '1'"),
        (HeadMap, {"num_layers": 0, "num_kv_heads": 2, "retrieval": ()}, "num_layers is 0"),
        (HeadMap, {"num_layers": 2, "num_kv_heads": 0, "retrieval": ((), ())}, "num_kv_heads is 0"),
        (HeadMap, {"num_layers": 1, "num_kv_heads": 2, "retrieval": None}, "'retrieval'"),
        (HeadMap, {"num_layers": 1, "num_kv_heads": 2, "retrieval": (0, 1)}, "'retrieval'"),
        (HeadMap, {"num_layers": 1, "num_kv_heads": 2, "retrieval": ((0, True),)}, "layer 0"),
        (HeadMap, {"num_layers": 2.0, "num_kv_heads": 2, "retrieval": ((0, 1), ())}, r"num_layers is 2\.0"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_by_name(options, fields, culprit):
    with pytest.raises(UserError, match=culprit):
        options(**fields)
