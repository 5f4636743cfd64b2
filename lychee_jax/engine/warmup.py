"""Which programs requests will need, found by a rehearsal without weights or cache, so that these compile ahead."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from lychee_jax.engine.compile_timer import Programs
from lychee_jax.engine.options import EngineConfig, EngineOptions
from lychee_jax.engine.programs import (
    Block,
    copy_for_forks,
    decode_block,
    make_rows,
    prefill_chunk,
    score_chunk,
    start_row,
)
from lychee_jax.engine.request import MAX_EOS_IDS, Request
from lychee_jax.engine.runner import Runner
from lychee_jax.engine.scheduler import Scheduler
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import POOLS


class _Noted:
    """Stands for `Programs`: a call is noted, and gives back shapes."""

    def __init__(self, spec: ModelSpec):
        self._model = spec.config
        self.calls: dict[Hashable, tuple[Any, ...]] = {}

    def __call__(self, function: Any, key: Hashable, static: tuple[Any, ...], *args: Any) -> Any:
        self.calls.setdefault((function, key, static), (function, key, static, *args))
        if function in (prefill_chunk, score_chunk):
            last = jax.ShapeDtypeStruct((static[2], self._model.hidden_size), args[0][0].dtype)
            return (args[1], last) if function is prefill_chunk else (args[1], last, None)
        if function is start_row:
            return args[1], None
        if function is decode_block:
            slots, forced = args[3], args[7]
            block = jax.eval_shape(lambda: Block.empty(forced.shape[1], len(slots), self._model.vocab_size))
            return args[1], args[2], block, jax.ShapeDtypeStruct(slots.shape, slots.dtype)
        return args[0] if function is copy_for_forks else args[1]  # the pools


class Rehearsal(Runner):
    """A runner of shapes: what it is told to send is compiled in the background, and nothing is run."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: tuple[Any, ...],
        options: EngineOptions,
        config: EngineConfig,
        *,
        num_pages: int,
        max_model_len: int,
    ):
        self._set_up(spec, weights, options, config, num_pages=num_pages, max_model_len=max_model_len)
        model = spec.config
        self.pools = jax.eval_shape(self._make_pools)
        if self.layout is not None:
            self.pools = self.layout.shapes(self.pools, POOLS)
        self.rows = jax.eval_shape(lambda: make_rows(self.slots, model.vocab_size, MAX_EOS_IDS))
        self._empty_prompt = jax.ShapeDtypeStruct((model.vocab_size,), bool)
        self._compilers: Programs = self.programs
        self.programs = self._noted = _Noted(spec)

    def rotary(self, positions: np.ndarray, lengths: np.ndarray) -> tuple[Any, Any]:
        """Shapes: angles take longer than everything else here."""
        table = np.broadcast_to(np.float32(0), (*positions.shape, self.spec.config.head_dim // 2))
        return table, table

    def _allowed(self, requests: tuple[Request, ...], batch: int) -> np.ndarray:
        return np.broadcast_to(True, (batch, self.spec.config.vocab_size))

    def rehearse(self, scheduler: Scheduler, requests: Sequence[Request]) -> list[concurrent.futures.Future[Any]]:
        """Send everything that these requests need if they come together and none ends early; returns the compilers'
        futures.
        """
        for request in requests:
            scheduler.add(request)
        sent = dict.fromkeys((request.id for request in requests), 0)
        while work := scheduler.schedule():
            if work.prefill is not None:
                self.prefill(work.prefill)
                for chunk in work.prefill.chunks:
                    sent[chunk.request.id] = int(chunk.last)
                    sent.update({fork.request.id: 1 for fork in chunk.forks})
            self.copy(work.copies)
            for group in work.decode:
                self.decode(group)
                for row in group.rows:
                    sent[row.request.id] = row.step + self.steps_of(group)
            for request in requests:
                scheduler.received(request.id)
                if sent.get(request.id, 0) >= request.max_new_tokens:
                    scheduler.finish(request.id)
                    del sent[request.id]
        # Decode programs take the longest.
        ordered = sorted(self._noted.calls.values(), key=lambda call: call[0] is not decode_block)
        return list(dict.fromkeys(self._compilers.prepare(*call) for call in ordered))
