"""A head map by elimination: `python -m lychee_jax.studies.profile_heads --model DIR`.

Which KV heads must read the whole cache while the model answers? Prompts are read once, densely; then their right
answers are scored under hybrid decoding with any roles at little cost, all steps at once. From all heads retrieving,
the head that is missed least becomes sparse, one by one, until the answers suffer. (Learning the roles is the better
method, and that of arXiv 2602.04541; this one needs no gradient.)
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from jaxtyping import Bool
from rich.console import Console
from rich.progress import Progress

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.config import ModelConfig
from lychee_jax.data import facts as data
from lychee_jax.data import language
from lychee_jax.errors import UserError
from lychee_jax.files import json_text
from lychee_jax.models.decoder import Decoder
from lychee_jax.studies.scorer import Scorer

_ANSWER_TOKENS = 40
_KINDS = ("passkey", "long-passkey")


class Judge:
    """Fresh prompts with short and long passkeys, read once; `judge(roles)` scores their answers in hybrid decoding.

    Raises UserError for a model with another vocabulary than the generators', or prompts too short for their facts.
    """

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        policy: SelectionPolicy,
        *,
        length: int,
        samples: int,
        facts: int,
        seed: int,
        page_size: int = 64,
    ) -> None:
        if config.vocab_size != language.VOCAB_SIZE:
            raise UserError("head maps are profiled with the bundled model's tokens; this model has another vocabulary")
        policy.validate(page_size)
        self._policy, self._page_size = policy, page_size
        rng = np.random.default_rng(seed)
        prompts = np.zeros((samples, length), np.int32)
        self._answers = np.full((samples, _ANSWER_TOKENS), -1, np.int32)
        for row in range(samples):
            try:
                prompt = data.prompt(rng, _KINDS[row % len(_KINDS)], length, facts)
            except ValueError as error:
                raise UserError(str(error)) from error
            answer = [*language.tokens_of(" " + prompt.answer), language.EOS]
            prompts[row] = prompt.tokens
            self._answers[row, : len(answer)] = answer
        self._scorer = Scorer(config, model)
        self._memory = self._scorer.read(prompts, _ANSWER_TOKENS)

    def __call__(self, roles: Bool[np.ndarray, "L K"]) -> tuple[float, float]:
        """Mean nats a token of the answers, and the share of exact ones."""
        verdict = self._scorer.score(self._memory, self._answers, roles, self._policy, self._page_size)
        return float(verdict.losses.mean()), float(verdict.right.mean())


def eliminate(
    judge: Callable[[Bool[np.ndarray, "L K"]], tuple[float, float]], config: ModelConfig, tolerance: float
) -> tuple[HeadMap, list[dict[str, Any]]]:
    """The smallest map of the elimination whose loss is at most the dense one plus `tolerance`, and all of its steps.

    It ends where the loss is 1000 tolerances above the dense one.
    """
    roles = np.ones((config.num_layers, config.num_kv_heads), bool)
    dense, exact = judge(roles)
    way = [{"dropped": None, "heads": int(roles.sum()), "loss": dense, "exact": exact}]
    best = roles.copy()
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("dropping heads", total=int(roles[1:].sum()))
        while roles[1:].any() and way[-1]["loss"] <= dense + 1000 * tolerance:
            tried: list[tuple[float, float, int, int]] = []
            for layer, head in np.argwhere(roles[1:]):
                roles[layer + 1, head] = False
                tried.append((*judge(roles), int(layer) + 1, int(head)))
                roles[layer + 1, head] = True
            loss, exact, layer, head = min(tried)
            roles[layer, head] = False
            way.append({"dropped": [layer, head], "heads": int(roles.sum()), "loss": loss, "exact": exact})
            if loss <= dense + tolerance:
                best = roles.copy()
            progress.advance(bar)
    meta = {"fingerprint": config.fingerprint(), "method": "elimination", "tolerance": tolerance}
    retrieval = tuple(tuple(int(head) for head in np.flatnonzero(layer)) for layer in best)
    return HeadMap(config.num_layers, config.num_kv_heads, retrieval, model="bundled", meta=json_text(meta)), way


def run(
    model: Annotated[str | None, typer.Option(help="Folder of the model (default: the bundled one).")] = None,
    output: Annotated[Path | None, typer.Option(help="Head map to write (default: heads.json in that folder).")] = None,
    tolerance: Annotated[float, typer.Option(help="Nats per answer token that hybrid decoding may lose.")] = 0.0001,
    length: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 16384,
    budget: Annotated[int, typer.Option(help="Tokens that a sparse head reads at most.")] = 2048,
    samples: Annotated[int, typer.Option(help="Prompts.")] = 40,
    facts: Annotated[int, typer.Option(help="Facts hidden in each prompt.")] = 16,
    seed: Annotated[int, typer.Option(help="Another seed gives other prompts.")] = 1,
) -> None:
    """Find the KV heads that cannot do with a few pages while they answer, and write them as a head map."""
    from lychee_jax.loading import load

    loaded = load(model)
    policy = SelectionPolicy(budget=budget)
    judge = Judge(loaded.config, loaded.model, policy, length=length, samples=samples, facts=facts, seed=seed)
    head_map, way = eliminate(judge, loaded.config, tolerance)
    for step in way:
        typer.echo(json_text(step))
    output = output or loaded.path / "heads.json"
    head_map.save(output)
    total = head_map.num_layers * head_map.num_kv_heads
    typer.echo(f"{output}: {head_map.num_retrieval} of {total} KV heads retrieve, layer 0 included")


if __name__ == "__main__":
    try:
        typer.run(run)
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        raise SystemExit(2) from None
