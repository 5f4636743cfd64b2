"""One evaluation from start to end: a folder is opened or resumed, what it lacks is run, and the report is written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.cases import Cell, ReadsFiles
from lychee_jax.evaluation.journal import Journal
from lychee_jax.evaluation.report import EvaluationReport, Style
from lychee_jax.evaluation.runner import EvaluationPlan, run, tokenizer_of
from lychee_jax.files import digest_of, json_text
from lychee_jax.llm import LLM
from lychee_jax.run_folder import Record


def evaluate(
    model: LLM,
    style: Style,
    plan: EvaluationPlan,
    output: Path,
    settings: Record,
    on_progress: Callable[[Cell, int], None] = lambda cell, answers: None,
    on_prefill: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Run a plan in the folder `output`, which is made, or resumed if it holds the same run.

    It is the same by its contents: weights, tokenizer, head map, files, prompts and settings. Tasks, lengths, samples,
    attentions and budgets may grow from run to run; the report is about all of the folder.

    Args:
        model: that answers.
        style: of the benchmark.
        plan: what to run.
        output: the folder.
        settings: the benchmark's own numbers that decide its prompts; plain data.
        on_progress: called with a cell and how many of its answers have come.
        on_prefill: called with the prompt tokens of a batch that were read, and how many there are.

    Raises:
        UserError: no cells, two of the same name, or a folder that holds something else.
    """
    keys = [cell.key for cell in plan.cells]
    if not keys or len(set(keys)) < len(keys):
        raise UserError("a task, a length or a depth is given twice" if keys else "there is nothing to evaluate")
    if (longest := max(cell.length for cell in plan.cells)) > (limit := model.config.max_tokens):
        raise UserError(f"a length of {longest:,} tokens is above the model's limit of {limit:,}")
    # A missing file or a length that is too short must not show after hours.
    first = [(cell, cell.task.case(cell.length, cell.depth, 0)) for cell in plan.cells]
    inputs = {
        name: digest
        for cell in plan.cells
        if isinstance(cell.task, ReadsFiles)
        for name, digest in cell.task.inputs.items()
    }
    about = {"model": model.name, "fingerprint": model.config.fingerprint()}
    fixed = {
        "benchmark": style.name,
        **answer_settings(model, plan.options),
        "decode_last": plan.decode_last,
        **settings,
    }
    journal = Journal(output, fixed, inputs)
    for cell, case in first:
        journal.check_prompt(cell, 0, case)
    run(model, plan, journal, on_progress, on_prefill)
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    report = EvaluationReport.of(style, {**about, **machine, "settings": fixed}, journal.records)
    report.save(output)
    return report


def answer_settings(model: LLM, options: GenerateOptions) -> Record:
    """What decides answers beside attention and budget: contents by their digests, the head map by its roles."""
    heads = options.heads or HeadMap.all(model.config)
    policy = dataclasses.asdict(options.policy)
    del policy["budget"]
    return {
        "fingerprint": model.config.fingerprint(),
        "weights": model.weights_digest(),
        "tokenizer": tokenizer_of(model).digest(),
        "eos_ids": sorted(options.eos_ids),
        "dtype": str(model.dtype),
        "heads": f"{heads.num_retrieval} of {heads.num_layers * heads.num_kv_heads} retrieve",
        "heads_sha256": digest_of(json_text(heads.retrieval)),
        "page_size": options.page_size,
        **policy,
        "correct_every": options.correct_every,
        # Not where it is the activations' dtype: folders of before this option can be resumed.
        **({} if options.kv_dtype is None else {"kv_dtype": options.kv_dtype}),
    }
