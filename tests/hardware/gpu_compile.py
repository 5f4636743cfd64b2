"""The GPU kernels through NVIDIA's compiler, without a GPU: `PYTHONPATH=. python tests/hardware/gpu_compile.py`.

Lowering, which the tests do, ends before registers are given out. Here XLA compiles for a Hopper GPU that it only hears
of, and `ptxas` says how many registers each kernel takes and what it spills. Needs JAX's CUDA plugin and `ptxas`
(`pip install jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc`, of JAX's version); nothing runs.
"""

import os
import re
import sys
import tempfile
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

import pallas_kernels as ops
from pallas_kernels.mosaic_gpu.common import targeting

HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 150000000000 shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
# What only the device knows: nothing, which rows are dense, how many heads there are, or both.
KNOWN, DENSE_ROWS, PADDED, BOTH = (False, False), (True, False), (False, True), (True, True)
CASES = [
    # batch, query heads a KV head, head_dim, page size, pages of a row, retrieval heads of eight, dtype, cache
    ((1, 4, 128, 64, 2048, 1, "bfloat16", None), KNOWN),
    ((1, 4, 128, 64, 2048, 8, "bfloat16", None), KNOWN),
    ((1, 4, 128, 64, 2048, 0, "bfloat16", None), KNOWN),
    ((8, 4, 128, 64, 2048, 1, "bfloat16", None), KNOWN),
    ((4, 7, 128, 16, 2048, 2, "float16", None), KNOWN),
    ((2, 8, 64, 32, 32768, 8, "bfloat16", None), KNOWN),
    ((6, 1, 64, 128, 8192, 0, "float16", None), KNOWN),
    ((2, 8, 128, 128, 1024, 3, "bfloat16", None), KNOWN),
    ((1, 4, 128, 64, 2048, 1, "bfloat16", None), DENSE_ROWS),
    ((16, 4, 128, 64, 2048, 1, "bfloat16", None), DENSE_ROWS),
    ((16, 4, 128, 64, 2048, 2, "bfloat16", None), PADDED),
    ((16, 8, 128, 16, 2048, 2, "bfloat16", None), BOTH),
    ((1, 4, 128, 64, 8192, 1, "bfloat16", "fp8"), KNOWN),
    ((6, 4, 128, 64, 2048, 1, "bfloat16", "int8"), KNOWN),
    ((1, 4, 128, 64, 2048, 8, "bfloat16", "fp8"), KNOWN),
    ((16, 4, 128, 64, 2048, 2, "bfloat16", "fp8"), BOTH),
    ((16, 8, 128, 64, 2048, 2, "bfloat16", "int8"), BOTH),
    ((20, 7, 64, 16, 512, 2, "float16", "fp8"), KNOWN),
    ((2, 8, 128, 128, 1024, 3, "bfloat16", "fp8"), KNOWN),
    ((2, 8, 128, 128, 1024, 3, "bfloat16", "int8"), KNOWN),
]


def report(device: Any, case: tuple[int, int, int, int, int, int, str, str | None], unknown: tuple[bool, bool]) -> str:
    """What ptxas says of the kernels of a layer."""
    batch, groups, head_dim, page_size, pages, dense, dtype, kv = case
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, kind: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, kind, sharding=place)

    flagged, padded = unknown

    def layer(q: Any, pool: Any, table: Any, lengths: Any, chosen: Any, counts: Any, heads: Any, flags: Any) -> Any:
        return ops.hybrid_decode(
            q, pool, table, lengths, ops.Selection(chosen, counts),
            heads if padded else np.arange(dense, dtype=np.int32), ops.SelectionSpec(64, 2, 4),
            scale=head_dim**-0.5, dense=flags if flagged else None, implementation="mosaic_gpu",
        )  # fmt: skip

    kind, count = jnp.dtype(dtype), batch * pages + 1
    pool = ops.KVPages(array(count, 8, page_size, 2 * head_dim, kind=kind))
    if kv is not None:
        scales = array(count, 8, 2 * page_size, kind=jnp.float32) if kv == "int8" else None
        pool = ops.KVPages(array(count, 8, page_size, head_dim, kind=jnp.uint16), scales)
    arrays = (
        array(batch, 8, groups, head_dim, kind=kind), pool,
        array(batch, pages), array(batch), array(batch, 8, 64), array(batch, 8), array(dense),
        array(batch, kind=jnp.bool_),
    )  # fmt: skip
    jax.clear_caches()
    with tempfile.TemporaryFile("w+") as said:
        kept = os.dup(2), os.dup(1)
        for stream in (2, 1):  # the compiler writes past Python
            os.dup2(said.fileno(), stream)
        try:
            with targeting("cuda"):
                jax.jit(layer).trace(*arrays).lower().compile()
        finally:
            for stream, before in zip((2, 1), kept, strict=True):
                os.dup2(before, stream)
                os.close(before)
        said.seek(0)
        return said.read()


def main() -> int:
    """Print a row for every kernel; 0 if `attend`, which must not, spills nothing."""
    try:
        device = topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology="1x1x1").devices[0]
    except NotImplementedError:
        print("error: JAX's CUDA plugin is missing: pip install jax-cuda13-plugin jax-cuda13-pjrt", file=sys.stderr)
        return 2
    pattern = re.compile(
        r"Compiling entry function '(\w+?)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores.*?Used (\d+) registers",
        re.DOTALL,
    )
    spilled = False
    print(
        f"{'kernel':8} {'registers':>9} {'spilled':>7}   batch, G, head_dim, page, pages, retrieval heads, dtype, cache"
    )
    for case, unknown in CASES:
        found = pattern.findall(report(device, case, unknown))
        if not found:
            print("error: ptxas said nothing; is it installed? (pip install nvidia-cuda-nvcc)", file=sys.stderr)
            return 2
        for name, spills, registers in found:
            more = [kind for kind, held in zip(("dense rows", "padded heads"), unknown, strict=True) if held]
            print(f"{name:8} {registers:>9} {spills:>7}   {', '.join([*map(str, case), *more])}", flush=True)
            spilled |= name == "attend" and int(spills) > 0
    return int(spilled)


if __name__ == "__main__":
    sys.exit(main())
