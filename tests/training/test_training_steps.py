"""What a step of training is made of: batches, programs of few shapes, the learning rate, other families of gates."""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lychee_jax.llm import LLM
from lychee_jax.training import gates, learn_heads
from lychee_jax.training.learn_heads import Learner, learn, make_batch
from tests.support import tiny_models
from tests.support.tiny_models import CONFIG, plan

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def small() -> LLM:
    """Two layers: little to compile."""
    return tiny_models.make(dataclasses.replace(CONFIG, num_layers=2))


@pytest.fixture(scope="module")
def learner(small) -> Learner:
    return Learner(small, plan(retrieval_heads=2))


def test_a_batch_is_a_function_of_the_plan_and_the_step(learner):
    short = plan(batch=3)
    one, again, other = (make_batch(short, learner.source, step) for step in (4, 4, 5))
    for name in ("tokens", "starts", "answers"):
        np.testing.assert_array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.tokens[:, :100], other.tokens[:, :100])
    assert not np.array_equal(one.tokens[0], one.tokens[1])
    assert (one.starts <= short.max_length).all()
    for row in range(3):
        assert one.answers[row, 0] == 1  # the first answer begins where the prompt ends
        assert one.tokens[row, one.starts[row]] != 0


def test_a_run_compiles_all_that_its_steps_need_and_nothing_else(small, learner):
    two = plan(steps=3, retrieval_heads=2, min_length=100)
    lengths = {step: make_batch(two, learner.source, step).tokens.shape[1] for step in range(two.steps)}
    assert len(set(lengths.values())) == 2, "one length shows nothing"
    one = Learner(small, two, learner.source)
    assert one.programs == ()
    one.prepare(range(two.steps))
    assert list(one.programs) == sorted(set(lengths.values()))
    one.step(one.initial(), 0, make_batch(two, learner.source, 0))
    assert list(one.programs) == sorted(set(lengths.values()))


@pytest.mark.parametrize(("longest", "room"), [(10240, 768), (256, 48), (3, 1), (1000, 100)])
def test_few_shapes_hold_all_lengths(longest, room):
    one = plan(min_length=1, max_length=longest, room=room)
    capacities = [one.capacity(length) for length in range(1, longest + 1)]
    assert len(set(capacities)) <= 4
    assert capacities == sorted(capacities)
    assert all(capacity % 64 == 0 for capacity in capacities)
    assert all(capacity >= length + room for length, capacity in enumerate(capacities, 1))
    assert capacities[-1] < longest + room + 64 + 4  # the longest rows are hardly padded


def test_one_program_a_shape(small, tmp_path, monkeypatch):
    traced: list[int] = []
    original = learn_heads.departures

    def counted(model: Any, tokens: jax.Array, *args: Any, **kwargs: Any) -> Any:
        traced.append(tokens.shape[1])
        return original(model, tokens, *args, **kwargs)

    monkeypatch.setattr(learn_heads, "departures", counted)
    two = plan(min_length=150, steps=12, data="multi-hop", retrieval_heads=2)  # lengths in two of the four buckets
    made: list[int] = []
    monkeypatch.setattr(
        learn_heads, "make_batch",
        lambda *args: (lambda batch: (made.append(batch.tokens.shape[1]), batch)[1])(make_batch(*args)),
    )  # fmt: skip
    learn(small, two, tmp_path)
    assert len(set(made)) == 2
    assert sorted(traced) == sorted(set(made))
    assert len(made) == two.steps


@pytest.mark.parametrize("steps", [10, 3000])
def test_the_learning_rate_ramps_up_and_down(steps):
    rate, ramp = learn_heads.schedule(plan(steps=steps)), steps // 5

    def wanted(step: int) -> float:
        up, down = 0.1 + 0.9 * step / ramp, 0.1 + 0.9 * (steps - step) / ramp
        return 0.01 * min(1.0, up, down)

    for step in {0, 1, ramp - 1, ramp, steps // 2, steps - ramp, steps - ramp + 1, steps - 1}:
        assert float(jnp.asarray(rate(step))) == pytest.approx(wanted(step), rel=1e-5), step


def test_one_step_has_a_rate():
    assert float(jnp.asarray(learn_heads.schedule(plan(steps=1))(0))) > 0.0


@pytest.mark.parametrize("family", ["hardconcrete", "plain"])
def test_other_gates_learn_too(small, tmp_path, family):
    learned = learn(small, plan(family=family, steps=2, loss="logits"), tmp_path)
    assert json.loads(learned.head_map.meta)["method"] == family
    start = np.asarray(gates.FAMILIES[family].expected(gates.FAMILIES[family].initial((1, 2))))
    assert (learned.expected[1:] != start).all()
