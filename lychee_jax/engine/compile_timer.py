"""Compiled programs, each compiled once, several side by side if they are known before they are needed; and how long
callers had to wait for compilers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import logging
import os
import threading
import time
from collections.abc import Hashable
from typing import Any

import jax
import numpy as np

from lychee_jax.engine.executables import of_this_machine
from lychee_jax.parallel.layouts import Layout

_log = logging.getLogger(__name__)

# Programs outlive the engine that asked for them: models of one configuration share them.
_compiled: dict[Hashable, concurrent.futures.Future[Any]] = {}
_lock = threading.Lock()
_workers = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile")


def count_programs() -> tuple[int, int]:
    """How many programs are compiled, and how many were asked for so far."""
    with _lock:
        return sum(future.done() for future in _compiled.values()), len(_compiled)


def forget_programs() -> None:
    """Drop every compiled program; the next call of one compiles anew."""
    with _lock:
        _compiled.clear()


class Programs:
    """Calls jitted functions through executables that are kept, and adds up the time that calls waited for compilers.

    `base`: what all programs of this caller have in common (configuration, dtype, sizes of the cache), so that a key
    names shapes only. Float32 models multiply in full float32: accelerators would round factors to bfloat16 or TF32.
    `layout`: the devices that run them, and on all of which arguments lie that say nothing else; None: the first one.
    """

    def __init__(self, dtype: np.dtype, base: Hashable, layout: Layout | None = None):
        self._precision = "highest" if dtype == np.float32 else None
        self._base = base
        self._layout = layout
        self.seconds = 0.0
        self._called: set[Hashable] = set()

    @property
    def count(self) -> int:
        """How many different programs were called."""
        return len(self._called)

    def prepare(
        self, function: Any, key: Hashable, static: tuple[Any, ...], *args: Any
    ) -> concurrent.futures.Future[Any]:
        """Start compiling `function(*static, *args)` in the background; `args` may be shapes."""
        return self._future(function, key, static, args, background=True)

    def __call__(self, function: Any, key: Hashable, static: tuple[Any, ...], *args: Any) -> Any:
        """What the function returns; its arrays may still be computed.

        Args:
            function: jitted; its first arguments are the `static` ones.
            key: the shapes of `args`, as far as `base` does not say them already.
            static: the static arguments.
            args: all others.
        """
        started = time.perf_counter()
        self._called.add((function, key, static))
        future = self._future(function, key, static, args, background=False)
        if not future.done():
            future.result()
            self.seconds += time.perf_counter() - started
        elif future.exception() is not None:
            with _lock:
                _compiled.pop((function, self._base, key, static), None)
        return future.result()(*args)

    def _future(
        self, function: Any, key: Hashable, static: tuple[Any, ...], args: tuple[Any, ...], *, background: bool
    ) -> concurrent.futures.Future[Any]:
        full = (function, self._base, key, static)
        with _lock:
            known = _compiled.get(full)
            if known is not None:
                return known
            future: concurrent.futures.Future[Any] = concurrent.futures.Future()
            _compiled[full] = future
        shapes = jax.tree.map(_shape if self._layout is None else self._layout.shape_of, args)
        if background:
            # What is set for this context, an interpreter of kernels say, is set for the compiler's thread, too.
            context = contextvars.copy_context()
            _workers.submit(context.run, self._compile, future, full, function, static, shapes)
        else:
            started = time.perf_counter()
            self._compile(future, full, function, static, shapes)
            self.seconds += time.perf_counter() - started
        return future

    def _compile(
        self,
        future: concurrent.futures.Future[Any],
        full: tuple[Any, ...],
        function: Any,
        static: tuple[Any, ...],
        shapes: Any,
    ) -> None:
        precision = jax.default_matmul_precision(self._precision) if self._precision else contextlib.nullcontext()
        name = (f"{function.__module__}.{function.__name__}", *full[1:], self._precision)
        try:
            kept = of_this_machine()
            devices = None if self._layout is None else self._layout.devices
            compiled = kept.load(name, shapes, devices) if kept is not None else None
            if compiled is None:
                started = time.perf_counter()
                with precision:
                    lowered = function.lower(*static, *shapes)
                    traced = time.perf_counter()
                    compiled = lowered.compile()
                _log.debug(
                    "%s %s: %.1f s to trace, %.1f s to compile",
                    function.__name__, full[2], traced - started, time.perf_counter() - traced,
                )  # fmt: skip
                if kept is not None:
                    kept.save(name, shapes, compiled)
            future.set_result(compiled)
        except BaseException as error:
            with _lock:
                _compiled.pop(full, None)
            future.set_exception(error)


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
