"""Several choices for one prompt: it is read once, and each is what it would be alone."""

import dataclasses

from lychee_jax.engine.engine import Engine
from lychee_jax.engine.outputs import RequestOutput
from lychee_jax.engine.request import Request
from lychee_jax.engine.sampling_params import SamplingParams
from tests.support import servers
from tests.support.company import collect
from tests.support.servers import Running


def test_forks_are_what_they_are_alone(server: Running):
    """Whole pages are shared, the last one is copied; more rows than slots, so that some forks come later."""
    llm, options = server.llm, server.service.model.engine.options
    engine = Engine(llm.spec, llm.weights, options, servers.ENGINE_CONFIG)
    prompt = tuple(range(3, 103))
    assert len(prompt) % options.page_size
    choices = [
        Request(
            str(index), prompt, 20, SamplingParams(1.0, seed=4), servers.DEFAULTS.attention_options, sample_index=index
        )
        for index in range(6)
    ]
    alone: dict[str, RequestOutput] = {}
    for each in choices:
        engine.add_request(each)
        collect(engine, alone)
        engine.reset_prefix_cache()
    assert len({tuple(output.tokens) for output in alone.values()}) == len(choices)

    together: dict[str, RequestOutput] = {}
    read = engine.prompt_tokens_read
    for each in choices:
        engine.add_request(dataclasses.replace(each, fork_of=None if each.id == "0" else "0"))
    assert engine.allocator is not None
    collect(engine, together)
    for each in choices:
        assert together[each.id].tokens == alone[each.id].tokens
    cached = [together[each.id].cached_tokens for each in choices]
    assert cached == [0, 100, 100, 100, 64, 64]  # whole units for those that come later
    assert engine.prompt_tokens_read - read == 100 + 2 * 36
    assert engine.allocator.num_owned == 0


def test_the_server_reads_the_prompt_of_several_choices_once(server: Running):
    worker = server.service.worker
    server.wait_until(server.is_idle)
    before = worker.stats.prompt_tokens
    body = {"prompt": [list(range(200, 300))], "n": 4, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = server.post("/v1/completions", body).json()
    assert len({choice["text"] for choice in answer["choices"]}) == 1
    server.wait_until(server.is_idle)
    assert worker.stats.prompt_tokens - before == 100
