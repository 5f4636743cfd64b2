"""Every test runs with jaxtyping shapes checked by beartype, strict dtype promotion and warnings as errors."""

import gc
import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from lychee_jax.tpu_environment import has_tpu, without_tpu

# libtpu is here to compile with: where there is no TPU it must not be tried as a backend. Before JAX is imported.
if importlib.util.find_spec("libtpu") and not has_tpu():
    without_tpu()
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")

# Tests compile much and run little: programs for the CPU that LLVM spends no time on are ready sooner than they lose.
if os.environ.get("JAX_PLATFORMS") == "cpu":
    _quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{_quick} {os.environ.get('XLA_FLAGS', '')}".strip()

# As many workers as cores get in each other's way where each spreads its threads over all of them.
_worker, _workers = os.environ.get("PYTEST_XDIST_WORKER"), os.environ.get("PYTEST_XDIST_WORKER_COUNT")
if _worker and _workers and hasattr(os, "sched_setaffinity"):
    _cores = sorted(os.sched_getaffinity(0))
    if len(_cores) == int(_workers):
        os.sched_setaffinity(0, {_cores[int(_worker.removeprefix("gw")) % len(_cores)]})

# XLA has as many threads as there are cores, and a simulated warpgroup that waits for another one keeps its thread:
# where there are few, all could wait for each other forever.
os.environ.setdefault("NPROC", "8")

# Where the tests run in the background Ctrl-C may be ignored, and the commands that they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import jaxtyping  # noqa: E402

# Before the first import of the packages: annotations are checked at every call of every public array function.
jaxtyping.install_import_hook(["lychee_jax", "pallas_kernels", "checkpoints_convert"], "beartype.beartype")

# Compiling is most of what the tests do: the workers, and commands that tests start, share what one has compiled.
_programs = Path(__file__).parent.parent / ".pytest_cache" / "programs"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_programs))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402

from lychee_jax.engine import compile_timer  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="module", autouse=True)
def programs_are_dropped() -> Iterator[None]:
    """JAX keeps every program, and what was traced for it, until the process ends: a worker would grow to gigabytes.

    The next module finds what it shares with this one in the persistent cache.
    """
    yield
    compile_timer.forget_programs()
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def without_type_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users call it: nothing checks annotations, so that values of any type arrive."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
