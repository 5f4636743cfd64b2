"""Learning which heads retrieve: a run may end at any moment and goes on to the same bits, and its map is exact."""

import dataclasses
import functools
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lychee_jax import run_folder
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.training import learn_heads, loop
from lychee_jax.training.learn_heads import Learned, Learner, TrainingPlan, make_batch
from tests.support import tiny_models
from tests.support.tiny_models import CONFIG, plan

pytestmark = pytest.mark.usefixtures("no_pictures")

learn = functools.partial(learn_heads.learn, log_every=1)  # numbers of every step
EVERY, KEEP = 3, 2
LONG = plan(steps=10, retrieval_heads=4)
SMALL = dataclasses.replace(CONFIG, num_layers=2)


@pytest.fixture(scope="module")
def loaded() -> LLM:
    return tiny_models.make()


@pytest.fixture
def compiled_once(learner, monkeypatch) -> None:
    """Runs share a compiled step, which holds nothing of a run."""
    monkeypatch.setattr(learn_heads, "Learner", lambda loaded, plan: learner)


@dataclasses.dataclass(frozen=True)
class Finished:
    folder: Path
    learned: Learned
    state: dict[str, Any]


@pytest.fixture(scope="module")
def learner(loaded) -> Learner:
    return Learner(loaded, LONG)


@pytest.fixture(scope="module")
def finished(loaded, learner, tmp_path_factory) -> Finished:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("learned") / "run"
    learned = learn(loaded, LONG, folder, checkpoint_every=EVERY, keep=KEEP)
    return Finished(folder, learned, last_state(folder, learner))


def last_state(folder: Path, learner: Learner) -> dict[str, Any]:
    checkpoints = loop.Checkpoints(folder / "checkpoints")
    found = checkpoints.restore(learner.initial())
    checkpoints.close()
    assert found is not None
    assert found[0] == LONG.steps
    return jax.device_get(found[1])


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def assert_same(folder: Path, learner: Learner, wanted: Finished) -> None:
    """Bit for bit: gates, optimizer, λ, all numbers, the map."""
    jax.tree.map(np.testing.assert_array_equal, last_state(folder, learner), wanted.state)
    for name in ("metrics.jsonl", "heads.json", "gates.json"):
        assert (folder / name).read_bytes() == (wanted.folder / name).read_bytes(), name


class Stop:
    """An `on_step` that ends a run after given steps, once each."""

    def __init__(self, *steps: int, error: type[BaseException] = KeyboardInterrupt) -> None:
        self.left, self.error = list(steps), error

    def __call__(self, done: int, metrics: dict[str, float]) -> None:
        if done in self.left:
            self.left.remove(done)
            raise self.error


@pytest.mark.parametrize("stops", [(1,), (3, 4, 8), (10,)], ids=str)
def test_an_interrupted_run_ends_as_one_that_was_not(loaded, learner, finished, tmp_path, stops, request):
    if len(stops) > 1:  # once, everything is made anew
        request.getfixturevalue("compiled_once")
    stop = Stop(*stops)
    for step in stops:
        with pytest.raises(KeyboardInterrupt):
            learn(loaded, LONG, tmp_path / "run", checkpoint_every=EVERY, keep=KEEP, on_step=stop)
        assert steps_of(tmp_path / "run")[-1] == step
        assert (tmp_path / "run" / "heads.json").exists() is False
    learn(loaded, LONG, tmp_path / "run", checkpoint_every=EVERY, keep=KEEP, on_step=stop)
    assert_same(tmp_path / "run", learner, finished)


@pytest.mark.usefixtures("compiled_once")
def test_a_run_that_was_killed_ends_as_one_that_was_not(loaded, learner, finished, tmp_path):
    """Nothing is saved on the way out, and half a line of numbers stays behind."""
    with pytest.raises(ZeroDivisionError):
        learn(loaded, LONG, tmp_path, checkpoint_every=EVERY, keep=KEEP, on_step=Stop(8, error=ZeroDivisionError))
    assert steps_of(tmp_path) == [3, 6]
    metrics = tmp_path / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [*range(1, 8)]
    with metrics.open("a") as file:
        file.write('{"step": 8, "lo')
    learn(loaded, LONG, tmp_path, checkpoint_every=EVERY, keep=KEEP)
    assert_same(tmp_path, learner, finished)


@pytest.mark.parametrize(
    ("owner", "name", "after"),
    [
        (Learner, "step", False),  # while the device is busy with the step: its result is lost
        (Learner, "step", True),
        (run_folder.MetricsFile, "write", False),
        (run_folder.MetricsFile, "write", True),  # a line is on disk that the run does not know of
        (loop.Checkpoints, "save", False),
        (loop.Checkpoints, "save", True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
@pytest.mark.usefixtures("compiled_once")
def test_ctrl_c_may_come_anywhere(loaded, learner, finished, tmp_path, monkeypatch, owner, name, after):
    """In the midst of the third call of what a step consists of."""
    original, calls = getattr(owner, name), 0

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and not after:
            raise KeyboardInterrupt
        result = original(*args, **kwargs)
        if calls == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        learn(loaded, LONG, tmp_path, checkpoint_every=EVERY, keep=KEEP)
    monkeypatch.setattr(owner, name, original)
    done = steps_of(tmp_path)[-1]
    assert done >= 2
    learn(loaded, LONG, tmp_path, checkpoint_every=EVERY, keep=KEEP)
    assert_same(tmp_path, learner, finished)


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    """Sends this process the signal, under Python's own handler."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("compiled_once")
def test_the_signal_waits_for_the_step_in_hand(loaded, tmp_path, ctrl_c):
    """An exception in the midst of a step might be lost in somebody's callback."""
    after: list[int] = []

    def press(done: int, metrics: dict[str, float]) -> None:
        if done == 4:
            ctrl_c()
        after.append(done)

    with pytest.raises(KeyboardInterrupt):
        learn(loaded, LONG, tmp_path, on_step=press)
    assert after == [1, 2, 3, 4]
    assert steps_of(tmp_path) == [4]


def test_a_second_signal_does_not_wait(ctrl_c):
    waited = None
    with pytest.raises(KeyboardInterrupt), loop.Patience() as patience:  # noqa: PT012
        patience.heed()
        ctrl_c()
        waited = True
        ctrl_c()
        waited = False
    assert waited


def test_somebody_elses_handler_stays(ctrl_c):
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    with loop.Patience() as patience:
        ctrl_c()
        patience.heed()
    assert seen == [signal.SIGINT]
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_last_checkpoints_are_kept(finished):
    assert steps_of(finished.folder) == [9, 10]


@pytest.mark.usefixtures("compiled_once")
def test_a_finished_run_is_not_trained_again(loaded, finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    for name in ("heads.json", "gates.json"):
        (tmp_path / "run" / name).unlink()
    seen: list[int] = []
    again = learn(loaded, LONG, tmp_path / "run", on_step=lambda done, _: seen.append(done))
    assert seen == []
    np.testing.assert_array_equal(again.expected, finished.learned.expected)
    for name in ("heads.json", "gates.json"):
        assert (tmp_path / "run" / name).read_bytes() == (finished.folder / name).read_bytes()


@pytest.mark.usefixtures("compiled_once")
def test_what_is_reported_is_what_is_written(loaded, finished, tmp_path):
    seen: dict[int, dict[str, float]] = {}
    learn(loaded, LONG, tmp_path, on_step=lambda done, metrics: seen.__setitem__(done, metrics))
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    assert list(seen) == [line["step"] for line in lines] == list(range(1, 11))
    assert seen[1] == {}
    for step, known in [(5, 4), (10, 10)]:  # one step behind, but at a checkpoint
        line = {name: lines[known - 1][name] for name in ("loss", "kept", "density", "multiplier", "excess")}
        assert seen[step] == pytest.approx(line, rel=1e-5)


def test_exactly_so_many_heads_retrieve(loaded, finished):
    head_map, expected = finished.learned.head_map, finished.learned.expected
    assert head_map.num_retrieval == LONG.retrieval_heads
    assert head_map.retrieval[0] == (0, 1)
    order = sorted((-expected[layer, head], layer, head) for layer in (1, 2) for head in (0, 1))
    assert {(layer, head) for _, layer, head in order[:2]} == {
        (layer, head) for layer in (1, 2) for head in head_map.retrieval[layer]
    }
    np.testing.assert_array_equal(expected[0], 1.0)
    assert finished.learned.above_half == 2 + int((expected[1:] > 0.5).sum())
    assert HeadMap.load(finished.folder / "heads.json", loaded.config) == head_map
    written = json.loads((finished.folder / "gates.json").read_text())
    assert (written["retrieval_heads"], written["above_half"]) == (4, finished.learned.above_half)
    np.testing.assert_allclose(written["expected"], expected, atol=1e-6)
    with pytest.raises(UserError, match="another model"):
        HeadMap.load(finished.folder / "heads.json", dataclasses.replace(loaded.config, rms_norm_eps=0.1))


def test_only_gates_are_trained(loaded, finished, learner):
    """The weights are the bits that they were, the state holds nothing of their shapes, and every gate has moved."""
    fresh = nnx.state(tiny_models.make().model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded.model), fresh)
    assert {np.shape(leaf) for leaf in jax.tree.leaves(finished.state)} == {(), (2, 2)}
    for name, first in jax.device_get(learner.initial())["gates"].items():
        assert (finished.state["gates"][name] != first).all()


def test_the_price_presses_the_density_down(finished):
    lines = [json.loads(line) for line in (finished.folder / "metrics.jsonl").read_text().splitlines()]
    density = [line["density"] for line in lines]
    assert density[0] == pytest.approx((2 + 4 * 11 / 12) / 6, abs=1e-5)  # layer 0 counts as 1
    assert density[-1] < density[0]
    multiplier = [line["multiplier"] for line in lines]
    assert multiplier == sorted(multiplier)
    assert multiplier[0] > 2.0


def test_gates_are_drawn_anew_in_every_step(learner):
    batch = make_batch(LONG, learner.source, 0)
    one, again, other = (float(learner.step(learner.initial(), step, batch)[1]["loss"]) for step in (0, 0, 1))
    assert one == again
    assert one != pytest.approx(other, rel=1e-3)


# NaN ------------------------------------------------------------------------------------------------------------------


def poisoned(token: int) -> LLM:
    loaded = tiny_models.make()
    table = loaded.model.embed.embedding
    table[...] = table[...].at[token].set(jnp.nan)
    return loaded


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(learner, tmp_path):
    """A token that first comes up in the fifth step or later has NaN for a vector."""
    seen: dict[int, int] = {}
    for step in range(LONG.steps):
        for token in np.unique(make_batch(LONG, learner.source, step).tokens):
            seen.setdefault(int(token), step + 1)
    token, step = next((token, step) for token, step in seen.items() if 4 < step < 9)
    good = (step - 1) // EVERY * EVERY
    loaded = poisoned(token)
    for _ in range(2):  # once more: it goes on from the good checkpoint, and into the same wall
        with pytest.raises(UserError, match=rf"^step {step}: .* last good checkpoint: step {good} in {tmp_path}"):
            learn(loaded, LONG, tmp_path, checkpoint_every=EVERY, keep=KEEP)
        assert steps_of(tmp_path)[-1] == good
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(1, step))
        assert all(math.isfinite(line["loss"]) for line in lines)
    assert not (tmp_path / "heads.json").exists()


def test_nan_from_the_start(tmp_path):
    with pytest.raises(UserError, match=r"^step 1: .* none yet$"):
        learn(poisoned(1), LONG, tmp_path)  # BOS


# What is refused ------------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("change", [{"seed": 1}, {"steps": 11}, {"loss": "logits"}, {"retrieval_heads": 3}], ids=str)
def test_another_plan_does_not_go_on(loaded, finished, change):
    before = contents(finished.folder)
    with pytest.raises(UserError, match="other settings"):
        learn(loaded, dataclasses.replace(LONG, **change), finished.folder)
    assert contents(finished.folder) == before


@pytest.mark.parametrize("name", ["layers.2.mlp.down_proj.kernel", "layers.1.attention.qkv_proj.kernel"])
def test_other_weights_do_not_go_on(loaded, finished, name):
    """A single number far from those that a sample would take, too."""
    weights = dict(zip(loaded.spec.names, loaded.weights, strict=True))
    weights[name] = weights[name].at[-1, -1].add(1e-3)
    other = LLM(loaded.path, loaded.config, loaded.spec.merge(tuple(weights.values())), None, loaded.eos_ids)
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        learn(other, LONG, finished.folder)


def test_a_text_is_known_by_its_content(loaded, tmp_path):
    """Another text under the same name is another run; the same one elsewhere is not."""

    def about(file: Path) -> TrainingPlan:
        return dataclasses.replace(LONG, text=str(file))

    book, copy = tmp_path / "book.txt", tmp_path / "elsewhere" / "copy.txt"
    copy.parent.mkdir()
    for file in (book, copy):
        file.write_text("The old fox ran to the river. " * 30)
    with pytest.raises(KeyboardInterrupt):
        learn(loaded, about(book), tmp_path / "run", on_step=Stop(1))
    with pytest.raises(KeyboardInterrupt):
        learn(loaded, about(copy), tmp_path / "run", on_step=Stop(2))
    copy.write_text("The young fox ran to the river. " * 30)
    with pytest.raises(UserError, match="other settings"):
        learn(loaded, about(copy), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"retrieval_heads": 1}, "retrieval-heads is 1; layer 0 alone has 2"),
        ({"retrieval_heads": 7}, "the model has 6 KV heads"),
        ({"max_length": 500}, "positions for 512"),
        ({"data": "riddles"}, "riddles"),
        ({"text": "/nowhere/book.txt"}, "book.txt"),
        ({"file": "/nowhere/questions.json"}, "multi-hop"),
        ({"min_length": 24}, "raise --min-length"),
    ],
    ids=str,
)
def test_a_plan_that_does_not_fit_writes_nothing(loaded, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        learn(loaded, plan(**change), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "message"), [(b"a\\b", "backslash"), (b"a\xffb", "not UTF-8")], ids=str)
def test_a_folder_that_the_array_library_misreads_is_not_made(loaded, tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        learn(loaded, LONG, tmp_path / os.fsdecode(name))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"min_length": 300}, "min-length is 300, more than max-length, 256"),
        ({"family": "soft"}, "soft"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": math.nan}, "learning-rate is nan"),
        ({"multiplier": 0.0}, "multiplier is 0"),
        ({"multiplier_rate": -1.0}, "multiplier-rate is -1"),
        ({"page_size": 48}, "multiple of the page size"),
    ],
    ids=str,
)
def test_impossible_plans(change, message):
    with pytest.raises(UserError, match=message):
        plan(**change)


@pytest.mark.parametrize("name", ["checkpoint_every", "keep"])
def test_impossible_checkpoints(loaded, tmp_path, name):
    wrong: dict[str, Any] = {name: 0}
    with pytest.raises(UserError, match=f"{name.replace('_', '-')} is 0"):
        learn(loaded, LONG, tmp_path / "run", **wrong)
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_layer_has_nothing_to_learn(tmp_path):
    with pytest.raises(UserError, match="nothing to learn"):
        learn(tiny_models.make(dataclasses.replace(CONFIG, num_layers=1)), plan(retrieval_heads=2), tmp_path / "run")
