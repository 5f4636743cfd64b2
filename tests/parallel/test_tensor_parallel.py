"""Tensor parallel on virtual devices of a CPU: what one device says, from shares of the weights and of the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow

# Annotations are checked there, too, and promotions strict.
CHILD = """
import jaxtyping
from lychee_jax.tpu_environment import without_tpu
without_tpu()
jaxtyping.install_import_hook(["lychee_jax", "pallas_kernels"], "beartype.beartype")
import jax
jax.config.update("jax_numpy_dtype_promotion", "strict")
from tests.support import several_devices
several_devices.compare()
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = Path(__file__).parents[2]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHILD, str(tmp_path_factory.mktemp("checkpoints"))],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}, cwd=root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert one["tokens"] == other["tokens"]
    for mine, theirs in zip(one["logprobs"], other["logprobs"], strict=True):
        np.testing.assert_allclose(theirs, mine, atol=tolerance, rtol=0)


@pytest.mark.parametrize("devices", ["4", "8"])
def test_every_number_of_devices_says_what_one_does(found: dict[str, Any], devices: str) -> None:
    """Hybrid, ragged, NaN wherever nothing was written."""
    one, several = found["eight"]["1"], found["eight"][devices]
    same(one, several)
    assert several["pages_read"] == one["pages_read"]
    assert len({tuple(row) for row in one["tokens"]}) > 1, "or this compares nothing"


def test_what_does_not_divide_is_padded(found: dict[str, Any]) -> None:
    """3 KV heads of 3 query heads and 61 tokens on 2 devices; dense rows beside hybrid ones."""
    one, several = found["three"]["1"], found["three"]["2"]
    same(one, several)
    assert several["pages_read"] == one["pages_read"]


def test_sampling_gathers_what_it_needs(found: dict[str, Any]) -> None:
    """Filters, penalties, biases, likeliest tokens, a grammar and log-probabilities of a prompt."""
    one, several = found["sampled"]
    assert several["tokens"] == one["tokens"]
    assert all(token % 2 == 0 for token in one["tokens"]["guided"])
    for mine, theirs in zip(one["top"], several["top"], strict=True):
        np.testing.assert_allclose(theirs, mine, atol=1e-5, rtol=0)
    assert len(one["scored"]) == 11
    for (token, logprob, best), (its, other, others) in zip(one["scored"], several["scored"], strict=True):
        assert token == its
        assert other == pytest.approx(logprob, abs=1e-5)
        np.testing.assert_allclose(others, best, atol=1e-5, rtol=0)


def test_a_request_does_not_depend_on_its_company_nor_on_prefixes(found: dict[str, Any]) -> None:
    company = found["company"]
    alone, together, again = company["tokens"]
    assert alone == together == again
    for other in company["logprobs"][1:]:
        for mine, theirs in zip(company["logprobs"][0], other, strict=True):
            np.testing.assert_allclose(theirs, mine, atol=1e-5, rtol=0)
    assert company["cached"][0] == 0 < company["cached"][1]


def test_pages_are_told_in_the_order_of_the_heads(found: dict[str, Any]) -> None:
    one, several = found["pages"]
    assert several == one
    assert not np.all(one)


def test_a_digest_says_nothing_of_devices(found: dict[str, Any]) -> None:
    one, several, other = found["digests"]
    assert one == several != other


def test_every_device_has_its_share_and_no_more(found: dict[str, Any]) -> None:
    four, two = found["shares"]["four"], found["shares"]["two"]
    assert sorted(four["places"]) == list(range(8)) != four["places"], "shared out for the map"
    assert four["divided"] == 1 + 3 * 4, "the embedding, and four kernels a layer; norms are everywhere"
    assert four["pool_heads"] == [8] * 3
    assert two["pool_heads"] == [4] * 2, "one of zeros"
    for shares in (four["weights"], four["pools"], two["weights"], two["pools"]):
        assert len(set(shares)) == 1, "equal shares"
    whole = 61 * 24 + 3 * (24 * 8 * (16 + 16) + 16 * 8 * 24 + 3 * 24 * 40)
    padding = 3 * 24  # three tokens that are none
    assert sum(four["weights"]) == 4 * (whole + padding)


def test_two_sums_a_layer_travel_and_nothing_of_the_cache(found: dict[str, Any]) -> None:
    """Besides: the embedding's sum, a summary of the logits (all of them only where a row asks for more), and how many
    pages were read.
    """
    messages = found["messages"]
    assert messages == {
        "all_reduce": 3 * 2 + 1 + 1, "all_gather": 1 + 1, "all_to_all": 0, "collective_permute": 0, "reduce_scatter": 0,
    }  # fmt: skip


def test_weights_and_caches_of_8_bits_and_more_devices_than_kv_heads(found: dict[str, Any]) -> None:
    """The command, from a checkpoint's folder on: rounded as for one device, then shared out among 3 for 2 KV heads."""
    one, several = found["generated"]
    same(one, several)
    assert several["attention"] == one["attention"]
    assert found["restored"] == []
