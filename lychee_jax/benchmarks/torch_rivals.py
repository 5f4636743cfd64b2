"""What torch offers for the same dense attention, where torch is installed with CUDA: cuDNN and FlashAttention-2."""

from typing import Any


def torch_attention(
    batch: int, context: int, kv_heads: int, groups: int, head_dim: int, dtype: str, *, calls: int, repeats: int
) -> dict[str, list[float]]:
    """Microseconds of one call, replayed from a CUDA graph of `calls` calls over caches that take turns."""
    try:
        import torch  # pyright: ignore[reportMissingImports]
        from torch.nn.attention import SDPBackend, sdpa_kernel  # pyright: ignore[reportMissingImports]
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    kind = getattr(torch, dtype)
    turns = max(2, -(-(1 << 30) // (2 * batch * context * kv_heads * head_dim * 2)))
    shape = (batch, kv_heads, context, head_dim)
    caches = [tuple(torch.randn(shape, device="cuda", dtype=kind) for _ in range(2)) for _ in range(turns)]
    queries = [torch.randn((batch, kv_heads * groups, 1, head_dim), device="cuda", dtype=kind) for _ in range(calls)]
    found: dict[str, list[float]] = {}
    for name, backend in (
        ("torch_cudnn", SDPBackend.CUDNN_ATTENTION),
        ("torch_fa2", SDPBackend.FLASH_ATTENTION),
    ):

        def run() -> Any:
            out = None
            for i, q in enumerate(queries):
                k, v = caches[i % turns]
                out = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
            return out

        try:
            with sdpa_kernel([backend]), torch.no_grad():
                side = torch.cuda.Stream()
                with torch.cuda.stream(side):
                    for _ in range(3):
                        run()
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    run()
        except RuntimeError:  # a backend that this build or this shape does not have
            torch.cuda.synchronize()
            continue
        samples = []
        for _ in range(repeats + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(1e3 * start.elapsed_time(end) / (4 * calls))
        found[name] = samples[2:]
    caches.clear()
    queries.clear()
    torch.cuda.empty_cache()
    return found
