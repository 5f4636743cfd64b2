"""Models whose shapes benchmarks and compile tests share; no weights."""

from lychee_jax.config import ModelConfig

MODELS = {
    "llama-3-8b": ModelConfig("llama", 128256, 4096, 14336, 32, 32, 8, 128, 131072),
    "qwen3-8b": ModelConfig("qwen3", 151936, 4096, 12288, 36, 32, 8, 128, 131072, qk_norm=True),
    "qwen2.5-7b": ModelConfig("qwen2", 152064, 3584, 18944, 28, 28, 4, 128, 131072, qkv_bias=True),
    "qwen2.5-3b": ModelConfig(
        "qwen2", 151936, 2048, 11008, 36, 16, 2, 128, 131072, qkv_bias=True, tie_word_embeddings=True
    ),
    "bundled": ModelConfig("llama", 1024, 256, 768, 8, 8, 4, 64, 65536, tie_word_embeddings=True),
}
