"""One model on one device and on several, in a process of its own: the other tests have one device.

`compare` prints, as JSON, what came out of each layout; the folder that it is told is for checkpoints.
"""

import contextlib
import dataclasses
import io
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli.main import main
from lychee_jax.engine import programs
from lychee_jax.engine.engine import Engine
from lychee_jax.engine.options import AttentionMode, AttentionOptions, GenerateOptions
from lychee_jax.engine.request import Request
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.llm import LLM
from lychee_jax.models.spec import ModelSpec
from lychee_jax.parallel.layouts import layout_for
from tests.support import hybrid_models, tiny_checkpoints
from tests.support.company import collect
from tests.support.grammars import EvenThenEnd
from tests.support.hybrid_models import BUDGET, Case, small_chunks

jax.config.update("jax_numpy_dtype_promotion", "strict")

PAGE, NEW = 4, 10
POLICY = SelectionPolicy(12, 4, 4)
# Layers in which all KV heads retrieve, one, and some; picks are handed up through each. A compiler's time is most of
# what this takes: no layer and no program is here twice.
EIGHT = dataclasses.replace(
    BUDGET, kv_heads=8, head_dim=8, retrieval=(tuple(range(8)), (5,), (0, 1, 4, 6)), lengths=(3, 4, 5, 12, 29)
)
# 3 KV heads of 3 query heads, 61 tokens, and biases: two devices divide neither. A layer in which none retrieves.
THREE = dataclasses.replace(
    BUDGET, kv_heads=3, group=3, head_dim=8, retrieval=((0, 1, 2), ()), lengths=(5, 16), qwen3=False
)


def compare() -> None:
    """Compare."""
    results: dict[str, Any] = {"devices": jax.device_count()}
    results["eight"] = {str(count): _answers(EIGHT, divide(EIGHT, count), "hybrid") for count in (1, 4, 8)}
    # Dense and hybrid rows side by side.
    results["three"] = {str(count): _answers(THREE, divide(THREE, count), "auto") for count in (1, 2)}
    one, four = divide(EIGHT, 1), divide(EIGHT, 4)
    results["sampled"] = [_sampled(one), _sampled(four)]
    results["company"] = _company(four)
    results["pages"] = [_pages(one), _pages(four)]
    results["digests"] = [model.weights_digest() for model in (one, four, divide(THREE, 2))]
    results["shares"] = {"four": _shares(four), "two": _shares(divide(THREE, 2))}
    results["messages"] = _messages(four)
    results["generated"] = [_generated(Path(sys.argv[1]), count) for count in (1, 3)]
    results["restored"] = _restored()
    print(json.dumps(results))


def divide(case: Case, devices: int) -> LLM:
    """The model of a case on so many devices; shared out for the case's head map."""
    single, weights = hybrid_models.make_model(case, engine_config=small_chunks(PAGE))
    # Logits as small as a real model's: rounding grows with them.
    weights = weights | {"norm.scale": weights["norm.scale"] / 4}
    layout = layout_for(case.config, devices, case.heads.roles)
    if layout is None:
        arrays = tuple(jnp.asarray(weights[name]) for name in single.spec.names)
        return dataclasses.replace(single, model=single.spec.merge(arrays))
    spec, _ = ModelSpec.abstract(case.config, "float32", layout)
    placed = [layout.place(axes, weights[name], case.config) for name, axes in zip(spec.names, spec.axes, strict=True)]
    return dataclasses.replace(single, model=spec.merge(tuple(placed)))


def _options(case: Case, attention: AttentionMode) -> GenerateOptions:
    return dataclasses.replace(case.options(attention), max_new_tokens=NEW)


def _answers(case: Case, model: LLM, mode: AttentionMode) -> dict[str, Any]:
    """A ragged batch over a cache that holds NaN wherever nothing was written."""
    result = hybrid_models.run(model, case.prompts, _options(case, mode))
    return {"tokens": result.tokens, "logprobs": result.logprobs, "pages_read": result.pages_read}


def _sampled(model: LLM) -> Any:
    """What needs all logits: filters, penalties, biases, likeliest tokens, a grammar, log-probabilities of a prompt."""
    engine = Engine(model.spec, model.weights, dataclasses.replace(model.engine_options, page_size=PAGE),
                    model.engine_config)  # fmt: skip
    attention = AttentionOptions("hybrid", EIGHT.heads, POLICY)
    sampling = (
        SamplingParams(0.9, seed=3), SamplingParams(1.2, top_k=5, top_p=0.9, seed=4),
        SamplingParams(repetition_penalty=1.4, frequency_penalty=0.3, logit_bias=((60, 1.5),)),
    )  # fmt: skip
    outputs: dict[str, Any] = {}
    for index, (each, prompt) in enumerate(zip(sampling, EIGHT.prompts, strict=False)):
        engine.add_request(Request(f"r{index}", tuple(prompt), NEW, each, attention, top_logprobs=4))
    collect(engine, outputs)
    guided = Request("guided", tuple(EIGHT.prompts[3]), NEW, attention=attention, grammar=EvenThenEnd(61, 4, 60))
    engine.add_request(guided)
    engine.add_request(Request("scored", tuple(EIGHT.prompts[3]), 1, attention=attention, prompt_logprobs=3))
    scored: list[Any] = []
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, output)
            scored += output.prompt_logprobs
            if output.request_id == "guided" and output is not outputs["guided"]:
                outputs["guided"].tokens += output.tokens
    return {
        "tokens": {name: output.tokens for name, output in sorted(outputs.items())},
        "top": [output.top for name, output in sorted(outputs.items()) if name.startswith("r")],
        "scored": scored,
    }


def _company(model: LLM) -> dict[str, Any]:
    """Requests alone, then together, then again over the prefixes that the cache kept."""
    options = dataclasses.replace(model.engine_options, page_size=PAGE)
    engine = Engine(model.spec, model.weights, options, model.engine_config)
    attention = AttentionOptions("hybrid", EIGHT.heads, POLICY)
    requests = [Request(str(row), tuple(prompt), NEW, attention=attention) for row, prompt in enumerate(EIGHT.prompts)]
    alone, together, again = {}, {}, {}
    for request in requests:
        engine.add_request(request)
        collect(engine, alone)
        engine.reset_prefix_cache()
    for found in (together, again):
        for request in requests:
            engine.add_request(request)
        collect(engine, found)
    assert engine.allocator is not None
    engine.allocator.check()
    return {
        "tokens": [[found[request.id].tokens for request in requests] for found in (alone, together, again)],
        "logprobs": [[found[request.id].logprobs for request in requests] for found in (alone, together, again)],
        "cached": [sum(found[request.id].cached_tokens for request in requests) for found in (together, again)],
    }


def _pages(model: LLM) -> Any:
    return model.read_pages(EIGHT.prompts[-1], _options(EIGHT, "hybrid")).pages.tolist()


def _shares(model: LLM) -> dict[str, Any]:
    """Bytes of the weights and of the cache, all together and on each device."""
    layout = model.spec.layout
    assert layout is not None
    runner = model.engine(dataclasses.replace(model.engine_options, page_size=PAGE)).runner
    if runner is None:
        model.generate_tokens([[1]], _options(THREE, "dense"))
        runner = model.engine(dataclasses.replace(model.engine_options, page_size=PAGE)).runner
    assert runner is not None
    divided = [
        array for array, axes in zip(model.weights, model.spec.axes, strict=True) if any(map(layout.divides, axes))
    ]

    def by_device(arrays: list[jax.Array]) -> list[int]:
        return [
            sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards if shard.device == device)
            for device in layout.devices
        ]

    pools = [leaf for pool in runner.pools for leaf in jax.tree.leaves(pool)]
    return {
        "divided": len(divided), "weights": by_device(divided), "pools": by_device(pools),
        "places": layout.places, "pool_heads": [pool.data.shape[1] for pool in runner.pools],
    }  # fmt: skip


def _messages(model: LLM) -> dict[str, int]:
    """Collectives of a decode block as it is traced: the compiler adds none to a program of one device's view."""
    runner = model.engine(dataclasses.replace(model.engine_options, page_size=PAGE)).runner
    assert runner is not None
    plan = runner.plan(AttentionOptions("hybrid", EIGHT.heads, POLICY), np.zeros((1,), bool), 8)
    angles = np.zeros((2, 8, EIGHT.head_dim // 2), np.float32)
    lowered = programs.decode_block.lower(
        model.spec, plan, model.weights, runner.pools, runner.rows, np.zeros((2,), np.int32),
        np.zeros((2, 16), np.int32), angles, angles, np.full((2, 8), -1, np.int32), np.zeros((2,), bool),
    )  # fmt: skip
    text = lowered.as_text()
    kinds = ("all_reduce", "all_gather", "all_to_all", "collective_permute", "reduce_scatter")
    return {kind: text.count(f'"stablehlo.{kind}"') for kind in kinds}


def _generated(folder: Path, devices: int) -> dict[str, Any]:
    """What `lychee generate` says of a checkpoint with 2 KV heads, with weights and a cache of 8 bits."""
    if not (folder / "config.json").exists():
        tiny_checkpoints.write_checkpoint(folder, tiny_checkpoints.TINY["llama"] | {"num_hidden_layers": 1})
        prompts = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (60, 17)]
        (folder / "ids.json").write_text(json.dumps(prompts))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = main([
            "generate", "--model", str(folder), "--prompt-ids", str(folder / "ids.json"), "--json", "--ignore-eos",
            "--dtype", "float32", "--quantize", "int8", "--quantize-head", "--kv-dtype", "int8", "--page-size", "16",
            "--attention", "dense", "--max-new-tokens", str(NEW), "--tensor-parallel", str(devices),
        ])  # fmt: skip
    assert status == 0
    return json.loads(out.getvalue())


def _restored() -> list[str]:
    """Weights that did not come back from their devices as they went there, of 8 bits and of two models."""
    wrong = []
    rng = np.random.default_rng(0)
    for case, kind, devices in ((EIGHT, "fp8", 4), (THREE, "int8", 2), (THREE, "fp8", 8)):
        config = dataclasses.replace(case.config, quantize=kind)
        layout = layout_for(config, devices, case.heads.roles)
        assert layout is not None
        spec, shapes = ModelSpec.abstract(config, "float32", layout)
        _, wholes = ModelSpec.abstract(config, "float32")
        for name, axes, shape, whole in zip(spec.names, spec.axes, shapes, wholes, strict=True):
            array = rng.standard_normal(whole.shape).astype(whole.dtype)
            placed = layout.place(axes, array, config)
            back = layout.restore(axes, placed, config)
            if (placed.shape, placed.dtype, placed.sharding) != (shape.shape, shape.dtype, shape.sharding):
                wrong.append(f"{name}: {placed.shape}")
            if back.tobytes() != array.tobytes():
                wrong.append(name)
    return wrong
