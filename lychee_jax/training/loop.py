"""What every training run needs: batches made ahead, losses of answers, exact checkpoints.

Parameters are a flat dictionary, `path → float32 array`, with the paths of the module tree; the model computes in the
dtype it is asked to.
"""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable, Generator, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import Array, Float, Float32, Int


def answer_losses(
    logits: Float32[Array, "B T V"], tokens: Int[Array, "B T"], answers: Int[Array, "B T"], max_answers: int
) -> dict[str, Float32[Array, ""]]:
    """Teacher-forced next-token losses and scores of sequences with marked answers (0: none, i: the i-th).

    Returns the mean cross-entropy (nats) of answer tokens and of all others, the share of answer tokens that are the
    argmax, and the share of answers all of whose tokens are (greedy decoding would give them exactly).
    """
    rows, length = tokens.shape
    target, marks = tokens[:, 1:], answers[:, 1:]
    logits = logits[:, :-1]
    picked = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - picked
    asked = (marks > 0).astype(jnp.float32)
    right = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
    asked_count = jnp.maximum(jnp.sum(asked), 1.0)
    # Per answer: how many of its tokens are wrong; column 0 collects what is no answer.
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], (rows, length - 1))
    wrong = jnp.zeros((rows, max_answers + 1)).at[row, marks].add(1.0 - right)[:, 1:]
    present = jnp.zeros((rows, max_answers + 1)).at[row, marks].max(asked)[:, 1:]
    return {
        "answer_loss": jnp.sum(losses * asked) / asked_count,
        "prose_loss": jnp.sum(losses * (1.0 - asked)) / jnp.maximum(jnp.sum(1.0 - asked), 1.0),
        "accuracy": jnp.sum(right * asked) / asked_count,
        "exact": jnp.sum(present * (wrong == 0).astype(jnp.float32)) / jnp.maximum(jnp.sum(present), 1.0),
    }


def prefetch[T](make: Callable[[int], T], steps: Iterable[int], workers: int) -> Generator[T]:
    """`make(step)` of every step, in order, computed ahead in `workers` processes (0: here, when asked for)."""
    if workers == 0:
        yield from map(make, steps)
        return
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        upcoming = iter(steps)
        ahead = collections.deque(pool.submit(make, step) for step in itertools.islice(upcoming, 3 * workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(make, step) for step in itertools.islice(upcoming, 1))
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)


class Checkpoints:
    """The newest training states in a folder, each written whole or not at all."""

    def __init__(self, folder: Path, keep: int = 1) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest(self) -> int | None:
        """Steps done in the newest state, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any) -> None:
        """Save the state after `step` steps, unless it is there already; returns when it is on disk."""
        self._manager.wait_until_finished()  # an earlier call that was interrupted
        if step in self._manager.all_steps():
            return
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._manager.wait_until_finished()

    def restore(self, like: Any) -> tuple[int, Any] | None:
        """(steps done, state) of the newest checkpoint, or None. `like` gives shapes and dtypes."""
        step = self._manager.latest_step()
        if step is None:
            return None
        return step, self._manager.restore(step, args=ocp.args.StandardRestore(like))

    def close(self) -> None:
        """Let go of the folder."""
        self._manager.close()


class Patience:
    """Ctrl-C within the block waits until `heed` is called; a second one does not.

    Where an exception falls into a foreign callback it is printed and lost, and in the midst of saving it does harm.
    """

    def __enter__(self) -> Patience:
        self._pressed, self._before = False, signal.getsignal(signal.SIGINT)
        # Only the main thread may ask for this, and a handler of somebody else's is to stay.
        self._ours = self._before is signal.default_int_handler
        self._ours = self._ours and threading.current_thread() is threading.main_thread()
        if self._ours:
            signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._before)

    def _press(self, *_: object) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True

    def heed(self) -> None:
        """Raise the KeyboardInterrupt that has waited, if there is one."""
        if self._pressed:
            raise KeyboardInterrupt


def mean_metrics(window: list[dict[str, Float[Array, ""]]]) -> dict[str, float]:
    """The mean of each metric over some steps (waits for the device)."""
    values = jax.device_get(window)
    return {name: float(np.mean([value[name] for value in values])) for name in values[0]}
