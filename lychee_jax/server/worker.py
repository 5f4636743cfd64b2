"""The engine's thread, which alone touches the device, and how the event loop speaks with it.

The loop puts commands into a queue; the thread takes them between two steps, and hands all outputs of a step to the
loop at once. It never waits for the loop or for a client.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import Literal

from lychee_jax.engine.engine import Engine
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.errors import UserError
from lychee_jax.server.model import ServedModel

_log = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead"]

_COMPILER_SECONDS = 0.05  # after which the thread looks again whether programs are compiled, where it has nothing to do


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """What the engine's books say between two steps."""

    running: int = 0
    waiting: int = 0
    pages_free: int = 0
    pages_cached: int = 0
    pages_owned: int = 0
    prompt_tokens: int = 0
    page_bytes: int = 0

    @classmethod
    def of(cls, engine: Engine, held: int = 0) -> EngineStats:
        """The engine's numbers now; `held`: requests that wait before it."""
        scheduler, allocator = engine.scheduler, engine.allocator
        if scheduler is None or allocator is None:
            return cls(waiting=held)
        return cls(
            scheduler.num_running, scheduler.num_waiting + held, allocator.num_free, allocator.num_cached,
            allocator.num_owned, engine.prompt_tokens_read, engine.page_bytes,
        )  # fmt: skip


class Worker:
    """Runs an engine in a thread of its own. All methods but `_run` and what it calls belong to the event loop.

    Attributes:
        state: "starting" until the engine is warm, "dead" after an error or `stop`.
        ready: set when the engine is warm.
        model: None before that.
        stats: as of the last step.
        ended: done when the thread is about to end; its exception is the reason, None after `stop`.
    """

    def __init__(self, start: Callable[[], ServedModel]) -> None:
        """`start` loads the model and warms its engine up; it is called in the engine's thread."""
        self._start = start
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[Callable[[ServedModel], None] | None] = queue.SimpleQueue()
        self._receivers: dict[str, Callable[[RequestOutput], None]] = {}
        self._held: list[Request] = []  # the thread's: their programs are being compiled
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._step_began: float | None = None
        self.state: State = "starting"
        self.ready = asyncio.Event()
        self.model: ServedModel | None = None
        self.stats = EngineStats()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._thread.start()

    def add(self, request: Request, receive: Callable[[RequestOutput], None]) -> None:
        """Queue a request that the engine has checked; `receive` gets its outputs, in the loop.

        Where the engine ends first, the last output has the finish reason "abort".
        """
        self._receivers[request.id] = receive
        if self.state == "dead":
            self._deliver([RequestOutput(request.id, finish_reason="abort")])
            return
        self._commands.put(lambda model: self._add(model, request))

    def finish(self, request_id: str) -> None:
        """Nobody wants more of this request; what it did is forgotten, and its pages are free after the step."""
        if self._receivers.pop(request_id, None) is not None:
            self._commands.put(lambda model: self._finish(model, request_id))

    def stop(self, seconds: float = 5.0) -> bool:
        """End the thread after its step; False if it has not ended in time."""
        self._commands.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def hangs_since(self, seconds: float) -> float | None:
        """How long the step under way has taken, if that is more than `seconds`."""
        began = self._step_began
        passed = time.monotonic() - began if began is not None else 0.0
        return passed if passed > seconds else None

    def place(self) -> str:
        """Where in the code the engine's thread is: the innermost function of the package."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        while frame is not None:
            module = frame.f_globals.get("__name__", "")
            if module.startswith("lychee_jax"):
                return f"{module}.{frame.f_code.co_name}"
            frame = frame.f_back
        return "nowhere"

    def _run(self) -> None:
        """The thread: commands and steps, until it is stopped or something fails."""
        error: BaseException | None = None
        try:
            model = self._start()
            engine = model.engine
            self._call(self._set_ready, model, EngineStats.of(engine))
            while self._take_commands(model):
                self._step_began = time.monotonic()
                outputs = engine.step()
                self._step_began = None
                self._call(self._deliver, outputs, EngineStats.of(engine, len(self._held)))
        except BaseException as raised:
            _log.debug("the engine has ended", exc_info=True)
            error = raised
        self._step_began = None
        self._call(self._end, error)

    def _take_commands(self, model: ServedModel) -> bool:
        """Do what the loop asks for; waits where there is nothing else to do. False at the end."""
        engine = model.engine
        while True:
            held, self._held = self._held, []
            for request in held:
                self._add(model, request)
            try:
                command = self._commands.get(not engine.has_work, _COMPILER_SECONDS if self._held else None)
            except queue.Empty:
                if engine.has_work:
                    return True
                continue
            if command is None:
                return False
            command(model)
            if not engine.has_work:  # a request was forgotten or is held, and nothing is on its way
                self._call(self._deliver, [], EngineStats.of(engine, len(self._held)))

    def _add(self, model: ServedModel, request: Request) -> None:
        """Give a request to the engine, or hold it until its programs are compiled."""
        try:
            if model.readiness is not None and not model.readiness.is_ready(request):
                self._held.append(request)
                return
            model.engine.add_request(request)
            return
        except (UserError, NotImplementedError) as error:
            told = first_line(error)
        except Exception:
            _log.exception("programs for %s cannot be compiled", request.id)
            told = "what this request needs cannot be compiled; the server's log says more"
        output = RequestOutput(request.id, finish_reason="error", error=told)
        self._call(self._deliver, [output], EngineStats.of(model.engine, len(self._held)))

    def _finish(self, model: ServedModel, request_id: str) -> None:
        self._held = [request for request in self._held if request.id != request_id]
        model.engine.finish(request_id)

    def _call(self, function: Callable[..., None], *args: object) -> None:
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed: the process is about to end
            _log.debug("nobody hears the engine any more")

    def _set_ready(self, model: ServedModel, stats: EngineStats) -> None:
        self.model, self.stats = model, stats
        self.state = "ready"
        self.ready.set()

    def _deliver(self, outputs: list[RequestOutput], stats: EngineStats | None = None) -> None:
        self.stats = stats or self.stats
        for output in outputs:
            receive = self._receivers.get(output.request_id)
            if output.finish_reason is not None:
                self._receivers.pop(output.request_id, None)
            if receive is not None:
                receive(output)

    def _end(self, error: BaseException | None) -> None:
        self.state = "dead"
        self.stats = EngineStats()
        if error is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(error)
        self._deliver([RequestOutput(each, finish_reason="abort") for each in self._receivers])


def first_line(error: BaseException) -> str:
    """An error in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
