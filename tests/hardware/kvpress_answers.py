"""What people would use instead answers prompts at the same share of the KV cache read.

Run in an environment with torch, transformers (≥ 4.57; seen with 5.17) and kvpress 0.5.5 (the project needs none):

    python tests/hardware/kvpress_answers.py --model DIR [--gguf FILE] --prompts prompts.jsonl --output answers.jsonl \
        --shares 0.15,0.23 --rivals dense,snapkv,streaming,expected,duo,quest64,quest16 [--heads heads.json]

`--lengths N,N` answers prompts of these lengths alone: the share that is read at the same budget depends on the length.
A line of the prompts: {"task", "length", "index", "tokens": [ids], "max_new_tokens", …}. A line of the answers:
{"task", "length", "index", "rival", "share", "answer", "kv_read_share"}, appended batch by batch; what is there already
is not answered again. `kv_read_share` is measured: KV entries read ÷ entries that dense attention reads, over all
layers, KV heads and decode steps of the answer (null where the first token ended it).

Several processes share a GPU: start one for each `--shard i/n`, with one output file or several. Decoding waits for
Python, so large batches are fast ones: `--batch-tokens` as high as memory allows (about 60 KB a token and process for
a model of SmolLM2-135M's shape and two shares).

All rivals share one dense prefill, so the first token is dense attention's, and keep every generated token:

- `snapkv`, `streaming`, `expected`: kvpress's SnapKVPress, StreamingLLMPress and ExpectedAttentionPress, with their
  defaults, drop all but `share` of every head's prompt. The question is part of the prompt, so SnapKV's window sees it.
- `duo`: DuoAttention's split with the map in `--heads`, because DuoAttention publishes none for this model. Retrieval
  heads read everything, the others as many first and last tokens of the prompt as make `share` the whole model's
  (one in five, and at most 64, are the first: the method's own 64 and 256).
- `quest64`, `quest16`: Quest's bounds over pages of 64 or 16 tokens. At every step a KV head reads the ⌈share · pages⌉
  pages of the highest upper bound, among them always the first and the last one. A page's bound is the highest of its
  group's query heads; with `-mean` behind the name it is the bound of the group's mean query, with `-dense2` the first
  two layers read everything, as in the paper, and the others so much less. Reading the boxes is not counted: they
  are as large as 1/64 or 1/16 of the cache.
"""
# pyright: reportMissingImports=false
# (torch is no dependency of the project, nor of its checks)

import argparse
import dataclasses
import importlib
import importlib.util
import itertools
import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ALIGNMENT = 64  # of a cache's length: whole pages, and what fused kernels ask of masks
PRESSES = {
    "snapkv": ("snapkv_press", "SnapKVPress"),
    "streaming": ("streaming_llm_press", "StreamingLLMPress"),
    "expected": ("expected_attention_press", "ExpectedAttentionPress"),
}


@dataclasses.dataclass(frozen=True)
class PageBounds:
    """One form of Quest."""

    page_size: int
    group: str
    dense_layers: int


QUESTS = {
    f"quest{page_size}{suffix}": PageBounds(page_size, group, dense_layers)
    for page_size in (64, 16)
    for suffix, group, dense_layers in (("", "max", 0), ("-mean", "mean", 0), ("-dense2", "max", 2))
}
RIVALS = ("dense", *PRESSES, "duo", *QUESTS)


class Cache:
    """The KV of B rows, by layer [B, K, N, H]; row b has `lengths[b]` entries, and the rest means nothing."""

    def __init__(self, config: Any, rows: int, capacity: int, like: torch.Tensor):
        capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
        shape = (rows, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [like.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.rows = torch.arange(rows, device=like.device)
        self.slots = torch.arange(capacity, device=like.device)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Write one entry [B, K, 1, H] behind each row; the caller moves `lengths` on after the last layer."""
        self.keys[layer][self.rows, :, self.lengths] = key[:, :, 0]
        self.values[layer][self.rows, :, self.lengths] = value[:, :, 0]

    def real(self) -> torch.Tensor:
        """[B, 1, N]: the entries that exist, the one just appended included."""
        return (self.slots <= self.lengths[:, None])[:, None]


class Everything:
    """A decode step reads the whole cache."""

    def mask(self, layer: int, query: torch.Tensor, cache: Cache) -> torch.Tensor:
        """[B, 1 or K, N]: what a step of `query` [B, K, G, H] reads."""
        return cache.real()


class Split(Everything):
    """DuoAttention's: `retrieval` heads read everything, the others the prompt's ends and what came after it."""

    def __init__(self, retrieval: torch.Tensor, share: float, cache: Cache):
        whole = retrieval.double().mean().item()
        prompt = cache.lengths.double()
        size = torch.floor((share - whole) / (1 - whole) * prompt + 1e-6) if whole < 1 else prompt
        sink = torch.floor(size / 5).clamp(max=64)
        ends = (cache.slots < sink[:, None]) | (cache.slots >= (prompt - size + sink)[:, None])
        self.allowed = retrieval[:, None, :, None] | ends[None, :, None]  # [L, B, K, N]

    def mask(self, layer: int, query: torch.Tensor, cache: Cache) -> torch.Tensor:
        return cache.real() & self.allowed[layer]


class Quest(Everything):
    """Pages of the highest upper bound: q · k of no key in a page's box is above it."""

    def __init__(self, kind: PageBounds, share: float, cache: Cache):
        layers = len(cache.keys)
        self.kind = kind
        self.share = (share * layers - kind.dense_layers) / (layers - kind.dense_layers)
        self.bounds = [self._boxes(keys, cache) for keys in cache.keys]

    def _boxes(self, keys: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, torch.Tensor]:
        """The lowest and highest key [B, K, P, H] of each page; ±inf where it has none yet."""
        missing = ~(cache.slots < cache.lengths[:, None])[:, None, :, None]
        low, high = (keys.float().masked_fill(missing, sign * float("inf")) for sign in (1, -1))
        pages = (-1, self.kind.page_size)
        return low.unflatten(2, pages).amin(3), high.unflatten(2, pages).amax(3)

    def mask(self, layer: int, query: torch.Tensor, cache: Cache) -> torch.Tensor:
        last = torch.div(cache.lengths, self.kind.page_size, rounding_mode="floor")  # the page written last [B]
        low, high = self.bounds[layer]
        key = cache.keys[layer][cache.rows, :, cache.lengths].float()
        low[cache.rows, :, last] = torch.minimum(low[cache.rows, :, last], key)
        high[cache.rows, :, last] = torch.maximum(high[cache.rows, :, last], key)
        if layer < self.kind.dense_layers:
            return cache.real()
        query = query.float()
        if self.kind.group == "mean":
            query = query.mean(2, keepdim=True)
        scores = (query.clamp(min=0) @ high.mT + query.clamp(max=0) @ low.mT).amax(2)  # [B, K, P]
        page, last = torch.arange(scores.shape[-1], device=scores.device), last[:, None, None]
        scores = scores.masked_fill((page == 0) | (page == last), float("inf")).masked_fill(page > last, -float("inf"))
        count = torch.ceil(self.share * (last + 1).double() - 1e-6).clamp(min=2)
        order = scores.argsort(-1, descending=True)
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, (page < count).expand_as(order))
        return cache.real() & picked.repeat_interleave(self.kind.page_size, -1)


class Attention:
    """The model's attention function: causal over a prompt, which fills `cache`; then one token of each row a call."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.policy: Everything | None = None  # None: a prompt is read
        self.read: Any = None  # [B]: entries read by the last step, summed over layers, of an average KV head

    def __call__(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, None]:
        layer, scale = module.layer_idx, kwargs["scaling"]
        if self.policy is None:
            self.cache.keys[layer][:, :, : key.shape[2]] = key
            self.cache.values[layer][:, :, : key.shape[2]] = value
            out = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
            return out.transpose(1, 2), None
        self.cache.append(layer, key, value)
        grouped = query.view(query.shape[0], key.shape[1], -1, query.shape[-1])
        mask = self.policy.mask(layer, grouped, self.cache)
        self.read += mask.float().mean(1).sum(-1)
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask[:, :, None], scale=scale)
        return out.reshape(query.shape[0], 1, query.shape[1], -1), None


def import_press(module: str, name: str) -> Any:
    """A press of kvpress, without what the package imports for the others (datasets, fire, …)."""
    if "kvpress" not in sys.modules:
        spec = importlib.util.find_spec("kvpress")
        if spec is None or spec.submodule_search_locations is None:
            raise SystemExit("kvpress is not installed: pip install --no-deps kvpress==0.5.5")
        package = types.ModuleType("kvpress")
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules["kvpress"] = package
    return getattr(importlib.import_module(f"kvpress.presses.{module}"), name)


class Answerer:
    """A model, and the rivals' ways to read its cache."""

    def __init__(self, args: argparse.Namespace):
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for every shape
        self.attention = Attention()
        ALL_ATTENTION_FUNCTIONS.register("rival", self.attention)
        source = {"gguf_file": args.gguf.name} if args.gguf else {}
        self.model = AutoModelForCausalLM.from_pretrained(
            args.gguf.parent if args.gguf else args.model,
            dtype=getattr(torch, args.dtype),
            attn_implementation="rival",
            **source,
        )
        self.model.eval().to(args.device)
        self.head = self.model.lm_head.weight.float()  # logits in float32: no ties that bfloat16 makes
        config = self.config = self.model.config
        config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
        self.ends = torch.tensor(end_tokens(args.model), device=args.device)
        self.retrieval = torch.zeros(config.num_hidden_layers, config.num_key_value_heads, dtype=torch.bool)
        if args.heads:
            for layer, heads in enumerate(json.loads(args.heads.read_text(encoding="utf-8"))["retrieval"]):
                self.retrieval[layer, heads] = True
        self.retrieval = self.retrieval.to(args.device)
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb  # as kvpress gives it to its presses

    def possible(self, rival: str, share: float) -> bool:
        """Whether what the rival always reads leaves anything of the share."""
        always = 0.0
        if rival == "duo":
            always = self.retrieval.double().mean().item()
        elif rival in QUESTS:
            always = QUESTS[rival].dense_layers / self.config.num_hidden_layers
        if always >= share and share < 1:
            print(f"{rival} is left out at share {share}: it reads {always:.3f} anyway", file=sys.stderr)
        return always < share or share == 1

    def answer(self, prompts: list[dict[str, Any]], wanted: list[tuple[str, float]]) -> Any:
        """Yield (rival, share, answers, shares read), for prompts in the order of their lengths."""
        new = prompts[0]["max_new_tokens"]
        lengths = [len(prompt["tokens"]) for prompt in prompts]
        longest = max(lengths)
        rows, like = len(prompts), self.model.lm_head.weight
        dense = Cache(self.config, rows, longest + new, like)
        kept = {
            (rival, share): Cache(self.config, rows, int(longest * share) + new + 1, like)
            for rival, share in wanted
            if rival in PRESSES
        }
        # Padding on the right is invisible to causal attention, and the presses never see it.
        ids = torch.zeros(rows, longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, : lengths[row]] = torch.tensor(prompt["tokens"])
        self.attention.cache, self.attention.policy = dense, None
        with compressing(self.model, dense, lengths, kept):
            hidden = self.model.model(input_ids=ids.to(like.device), use_cache=False).last_hidden_state
        dense.lengths += torch.tensor(lengths, device=like.device)
        first = self.choose(hidden[dense.rows, dense.lengths - 1])
        del hidden
        prompt_lengths = dense.lengths
        for rival, share in wanted:
            cache = kept.pop((rival, share), dense)
            if cache is dense:
                dense.lengths = prompt_lengths.clone()
            policy = Everything()
            if rival == "duo":
                policy = Split(self.retrieval, share, cache)
            elif rival in QUESTS:
                policy = Quest(QUESTS[rival], share, cache)
            yield (rival, share, *self.decode(first, prompt_lengths, cache, policy, new))

    def choose(self, hidden: torch.Tensor) -> torch.Tensor:
        """The most likely tokens [B] after hidden states [B, D]."""
        return (hidden.float() @ self.head.mT).argmax(-1)

    def decode(
        self, first: torch.Tensor, positions: torch.Tensor, cache: Cache, policy: Everything, new: int
    ) -> tuple[list[str], list[float | None]]:
        """Greedy answers from the first tokens [B], and the share of the cache that each of them read."""
        self.attention.cache, self.attention.policy = cache, policy
        tokens = [first]
        ended = torch.isin(first, self.ends)
        read, whole = (torch.zeros(len(first), dtype=torch.double, device=first.device) for _ in range(2))
        for step in range(new - 1):
            if step % 8 == 0 and bool(ended.all()):  # not at every step: the question waits for the device
                break
            self.attention.read = torch.zeros(len(first), device=first.device)
            position = (positions + step)[:, None]
            hidden = self.model.model(
                input_ids=tokens[-1][:, None], position_ids=position, use_cache=False
            ).last_hidden_state
            cache.lengths += 1
            read += self.attention.read * ~ended
            whole += (position[:, 0] + 1) * self.config.num_hidden_layers * ~ended
            tokens.append(self.choose(hidden[:, -1]))
            ended |= torch.isin(tokens[-1], self.ends)
        ends = set(self.ends.tolist())
        answers = [
            self.tokenizer.decode(
                list(itertools.takewhile(lambda token: token not in ends, row)), skip_special_tokens=True
            )
            for row in torch.stack(tokens, 1).tolist()
        ]
        shares = [one / every if every else None for one, every in zip(read.tolist(), whole.tolist(), strict=True)]
        return answers, shares


class compressing:
    """While the prompt is read, what each press keeps of every layer goes to its cache.

    kvpress's own hook asks the layer's arguments for `cache_position`, which transformers has no more; this one calls
    the same `compress` with the same arguments, for the rows of one length at a time: the presses know no padding.
    """

    def __init__(self, model: Any, dense: Cache, lengths: list[int], kept: dict[tuple[str, float], Cache]):
        self.model, self.dense, self.lengths = model, dense, lengths
        self.presses = [
            (import_press(*PRESSES[rival])(compression_ratio=1 - share), cache)
            for (rival, share), cache in kept.items()
        ]

    def __enter__(self) -> None:
        self.hooks = [
            layer.self_attn.register_forward_hook(self.compress, with_kwargs=True) for layer in self.model.model.layers
        ]

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def compress(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        """What kvpress's hook does after a layer's attention."""
        layer = module.layer_idx
        for length, group in itertools.groupby(range(len(self.lengths)), self.lengths.__getitem__):
            members = list(group)
            rows = slice(members[0], members[-1] + 1)
            seen = kwargs | {"position_embeddings": tuple(each[:, :length] for each in kwargs["position_embeddings"])}
            hidden = kwargs["hidden_states"][rows, :length]
            keys, values = (each[layer][rows, :, :length] for each in (self.dense.keys, self.dense.values))
            for press, cache in self.presses:
                some_keys, some_values = press.compress(module, hidden, keys, values, None, seen)
                cache.keys[layer][rows, :, : some_keys.shape[2]] = some_keys
                cache.values[layer][rows, :, : some_keys.shape[2]] = some_values
                cache.lengths[rows] = some_keys.shape[2]


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end an answer, as the model's folder says."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).exists():
            ends = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if ends is not None:
                return ends if isinstance(ends, list) else [ends]
    raise SystemExit(f"{folder} does not say which token ends an answer")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file; none if there is no file."""
    text = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in text.split(b"\n") if line.strip()]


def batches(prompts: list[dict[str, Any]], tokens: int) -> Any:
    """Prompts of one task and length, shortest first, so many that their KV has `tokens` entries at most."""
    ordered = sorted(prompts, key=lambda prompt: (*place(prompt)[:2], prompt["max_new_tokens"], len(prompt["tokens"])))
    kind = lambda prompt: (*place(prompt)[:2], prompt["max_new_tokens"])
    for _, group in itertools.groupby(ordered, kind):
        members = list(group)
        size = max(1, tokens // (len(members[-1]["tokens"]) + members[-1]["max_new_tokens"]))
        yield from itertools.batched(members, size)


def place(line: dict[str, Any]) -> tuple[str, int, int]:
    """Which prompt a line of either file is about."""
    return line["task"], line["length"], line["index"]


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Answer what is missing."""
    drop_cut_line(args.output)
    shard, shards = map(int, args.shard.split("/"))
    prompts = [p for p in read_lines(args.prompts) if args.lengths is None or p["length"] in args.lengths]
    prompts = prompts[shard::shards]
    done = {(*place(line), line["rival"], line["share"]) for line in read_lines(args.output)}
    answerer = Answerer(args)
    asked = [(rival, share) for rival in args.rivals for share in ([1.0] if rival == "dense" else args.shares)]
    asked = [pair for pair in asked if answerer.possible(*pair)]
    missing = [p for p in prompts if any((*place(p), *pair) not in done for pair in asked)]
    print(f"{len(missing)} of {len(prompts)} prompts to answer in {len(asked)} ways", file=sys.stderr, flush=True)
    started, finished = time.perf_counter(), 0
    for batch in batches(missing, args.batch_tokens):
        wanted = [pair for pair in asked if any((*place(p), *pair) not in done for p in batch)]
        for rival, share, answers, shares in answerer.answer(list(batch), wanted):
            lines = [
                dict(zip(("task", "length", "index"), place(prompt), strict=True))
                | {"rival": rival, "share": share, "answer": answer, "kv_read_share": read}
                for prompt, answer, read in zip(batch, answers, shares, strict=True)
                if (*place(prompt), rival, share) not in done
            ]
            write(args.output, lines)
        finished += len(batch)
        seconds = time.perf_counter() - started
        print(f"{finished}/{len(missing)} prompts, {seconds:.0f} s", file=sys.stderr, flush=True)


def drop_cut_line(path: Path) -> None:
    """Take away a last line that was cut off, before anything is written behind it."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append in one call of the system, so that processes can share the file."""
    with path.open("ab", buffering=0) as file:
        file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder in Hugging Face's format")
    parser.add_argument("--gguf", type=Path, help="take config and weights from this file, the rest from the folder")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shares", type=lambda text: [float(each) for each in text.split(",")], required=True)
    parser.add_argument(
        "--rivals", type=lambda text: text.split(","), default=["dense", *PRESSES, "quest64", "quest16"]
    )
    parser.add_argument("--lengths", type=lambda text: [int(each) for each in text.split(",")], help="of the prompts")
    parser.add_argument("--heads", type=Path, help="the head map of `duo`")
    parser.add_argument("--shard", default="0/1", help="i/n: only the prompts whose number leaves i when divided by n")
    parser.add_argument("--batch-tokens", type=int, default=600_000, help="tokens of a batch, prompts and answers")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if unknown := set(args.rivals) - set(RIVALS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(RIVALS)}")
    if "duo" in args.rivals and not args.heads:
        parser.error("duo needs --heads")
    if not all(0 < share <= 1 for share in args.shares):
        parser.error("shares are above 0 and at most 1")
    return args


if __name__ == "__main__":
    run(parse())
