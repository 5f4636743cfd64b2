"""lm-evaluation-harness with the bundled model's tokenizer and a tiny model: real tasks from local files, no network.

What the harness reports is computed again by hand from teacher forcing of whole prompts.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_eval.api.instance import Instance

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli import main as cli
from lychee_jax.data import language
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation.harness import LycheeLM, evaluate
from lychee_jax.evaluation.variants import variants_of
from lychee_jax.llm import LLM
from lychee_jax.loading import BUNDLED, load
from tests.support import tiny_checkpoints

TEXT = "The old fox ran to the river. The young owl saw a fox near the old house. "
COLUMNS = {"test_split": "test", "num_fewshot": 0}
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
    },
}
DOCUMENTS = [
    {"text": TEXT * 3 + "Where is the owl? The owl is near the", "choices": [" house", " river"], "label": 0},
    {"text": "The fox ", "choices": ["ran to the river", "saw"], "label": 1},  # its space belongs to the continuation
    {"text": TEXT * 5, "choices": ["The", "An old"], "label": 0},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random model that speaks the bundled tokenizer and has room for few tokens."""
    folder = tmp_path_factory.mktemp("model")
    raw = tiny_checkpoints.TINY["llama"] | {
        "vocab_size": language.VOCAB_SIZE, "max_position_embeddings": 64, "eos_token_id": 2,
    }  # fmt: skip
    tiny_checkpoints.write_checkpoint(folder, raw)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((BUNDLED / name).read_bytes())
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> LLM:
    return load(folder)


@pytest.fixture(scope="module")
def include(tmp_path_factory) -> Path:
    """The three tasks as YAML (of which JSON is a part), their documents as JSON Lines."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        source = {
            "task": name, "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps({**source, **COLUMNS, **task}))
    return folder


@pytest.fixture(scope="module")
def options(model: LLM) -> GenerateOptions:
    return GenerateOptions(
        heads=HeadMap.none(model.config), policy=SelectionPolicy(16, 8, 8), page_size=8, eos_ids=model.eos_ids
    )


def by_hand(model: LLM, options: GenerateOptions, prompt: list[int], forced: list[int]) -> tuple[float, bool]:
    result = model.generate_tokens([prompt], options, forced=[forced], limits=[len(forced)])
    return math.fsum(result.logprobs[0]), all(result.greedy[0])


def scored(model: LLM, options: GenerateOptions, document: dict[str, Any]) -> list[tuple[float, bool]]:
    """What every choice of a document should get."""
    tokenizer, limit = model.tokenizer, model.config.max_tokens
    assert tokenizer is not None
    context = tokenizer.encode(document["text"].rstrip())
    found = []
    for choice in document["choices"]:
        whole = tokenizer.encode(document["text"] + choice)
        forced = whole[len(context) :]
        found.append(by_hand(model, options, context[-(limit - len(forced)) :], forced))
    return found


def request_of(*args: Any) -> Instance:
    return Instance("loglikelihood", {}, args, 0)


def samples(folder: Path, task: str, variant: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [line for line in lines if (line["task"], line["variant"]) == (task, variant)]


@pytest.fixture(scope="module")
def finished(model: LLM, options: GenerateOptions, include: Path, tmp_path_factory):
    """All tasks, dense and hybrid, with the folder that keeps them."""
    output = tmp_path_factory.mktemp("run") / "output"
    variants = variants_of(["dense", "hybrid"], ["16"])
    return evaluate(model, list(TASKS), variants, options, include=include, output=output), output


@pytest.mark.parametrize("variant", variants_of(["dense", "hybrid"], ["16"]), ids=lambda variant: variant.label)
def test_log_likelihoods_are_those_of_teacher_forcing(model, options, finished, variant):
    report, output = finished
    right = []
    for sample, document in zip(samples(output, "choice", variant.label), DOCUMENTS, strict=True):
        wanted = scored(model, variant.options(options, 64, 1), document)
        # The choices that lm-eval looked at come as texts or numbers; both are compared as numbers.
        for found, (logprob, greedy) in zip(sample["filtered_resps"], wanted, strict=True):
            assert float(found[0]) == pytest.approx(logprob, abs=1e-4)
            assert str(found[1]) == str(greedy)
        best = max(range(len(wanted)), key=lambda choice: wanted[choice][0])
        right.append(best == document["label"])
    assert report.results[variant.label]["choice"]["acc,none"] == pytest.approx(sum(right) / len(right))


def test_hybrid_reads_less_and_differs(finished):
    report, output = finished
    assert report.kv_read_share["dense"] == 1.0
    assert report.kv_read_share["hybrid@16"] < 0.9
    assert samples(output, "texts", "dense")[0]["resps"] != samples(output, "texts", "hybrid@16")[0]["resps"]


def test_perplexity_scores_every_token_once_in_windows_of_the_limit(model, options, finished):
    report, _ = finished
    dense = variants_of(["dense"], [])[0].options(options, 64, 1)
    room, total, size = model.config.max_tokens - 1, 0.0, 0
    for document in DOCUMENTS:
        tokens = model.tokenizer.encode_plain(document["text"])
        for first in range(0, len(tokens), room):
            end = min(first + room, len(tokens))
            # The last window is as long as the others: what it scores has more in front of it.
            before = tokens[end - room - 1 : first] if first else [language.BOS]
            total += by_hand(model, dense, before, tokens[first:end])[0]
        size += len(document["text"].encode())
    found = report.results["dense"]["texts"]
    assert found["byte_perplexity,none"] == pytest.approx(math.exp(-total / size), rel=1e-5)


def test_texts_are_those_of_generate(model, options, finished):
    _, output = finished
    for sample, document in zip(samples(output, "words", "dense"), DOCUMENTS, strict=True):
        prompt = model.tokenizer.encode(document["text"])[-(model.config.max_tokens - 9) :]
        wanted = model.generate([prompt], stop=["\n"], max_new_tokens=9, attention="dense", page_size=8)
        assert sample["resps"] == [wanted.text]


def test_the_token_that_ends_an_answer_is_not_in_it(model, options):
    wish = {"max_gen_toks": 4, "until": []}
    prompt = model.tokenizer.encode("The fox")
    first, second = model.generate([prompt], max_new_tokens=2, attention="dense", page_size=8).tokens[0]
    assert first != second
    assert second not in model.tokenizer.special_ids
    judged = LycheeLM(model, dataclasses.replace(options, attention="dense", eos_ids=(second,)))
    assert judged.generate_until([request_of("The fox", wish)]) == [model.tokenizer.decode([first])]


def test_a_run_is_resumed_and_asks_nothing_twice(model, options, include, finished, monkeypatch):
    report, output = finished
    lines = (output / "answers.jsonl").read_text().splitlines(keepends=True)
    asked = {(each["variant"], each["question"]) for each in map(json.loads, lines)}
    (output / "answers.jsonl").write_text("".join(lines[:-3]) + '{"variant": "dense", "que')
    told: list[int] = []
    again = evaluate(
        model, list(TASKS), variants_of(["dense", "hybrid"], ["16"]), options, include=include, output=output,
        on_progress=lambda stage, done, total: told.append(done),
    )  # fmt: skip
    assert sum(told) == 3
    kept = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    assert {(each["variant"], each["question"]) for each in kept} == asked
    assert len(kept) == len(lines) == len(asked)
    for variant, found in report.results.items():
        for task, metric in (("choice", "acc"), ("words", "exact_match"), ("texts", "byte_perplexity")):
            name = f"{metric},none"
            assert again.results[variant][task][name] == pytest.approx(found[task][name], rel=1e-5)
    with pytest.raises(UserError, match="holds a run with other settings"):
        evaluate(
            model, ["choice"], variants_of(["dense"], []), options, include=include, output=output, decode_last=3
        )  # fmt: skip


def test_other_weights_do_not_go_on(model, options, include, tmp_path):
    def ask(judged: LLM) -> None:
        evaluate(judged, ["words"], variants_of(["dense"], []), options, include=include, limit=1, output=tmp_path)

    ask(model)
    other = dataclasses.replace(model, model=model.spec.merge(tuple(array + 1 for array in model.weights)))
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        ask(other)


def test_decode_last_feeds_the_end_of_a_prompt_through_the_decode_path(model, options):
    hybrid = variants_of(["hybrid"], ["16"])[0]
    request = request_of(TEXT + "The owl is", " near")
    found = {
        last: LycheeLM(model, options, hybrid, decode_last=last).loglikelihood([request])[0][0] for last in (0, 12)
    }
    prompt, forced = model.tokenizer.encode(TEXT + "The owl is"), model.tokenizer.encode_plain(" near")
    chosen = hybrid.options(options, len(prompt), 1)
    assert found[0] == pytest.approx(by_hand(model, chosen, prompt, forced)[0], abs=1e-4)
    result = model.generate_tokens([prompt[:-12]], chosen, forced=[prompt[-12:] + forced], limits=[12 + len(forced)])
    assert found[12] == pytest.approx(math.fsum(result.logprobs[0][12:]), abs=1e-4)
    assert found[12] != pytest.approx(found[0], abs=1e-4)


def test_what_is_drawn_repeats_with_the_seed_and_not_within_it(model, options):
    wish = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 6, "until": []}
    requests = [request_of("The fox", wish) for _ in range(3)]
    drawn = [LycheeLM(model, options, batch=batch).generate_until(requests) for batch in (1, 3)]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 3


def test_odd_requests_are_answered_as_well(model, options):
    judged = LycheeLM(model, options)
    asked = [request_of(*args) for args in (("", " near"), ("  ", "near"), ("The owl", ""))]
    empty, spaces, nothing = judged.loglikelihood(asked)
    forced = model.tokenizer.encode_plain(" near")
    assert empty[0] == pytest.approx(by_hand(model, options, [language.BOS], forced)[0], abs=1e-4)
    assert spaces[0] < 0
    assert nothing == (0.0, True)
    assert judged.tok_encode("<|bos|>The owl") == judged.tok_encode("The owl")  # as a chat template writes it
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": " Near"}]
    assert judged.apply_chat_template(chat[:1]) == "<|bos|>Where?\nAnswer:"
    assert judged.apply_chat_template(chat, add_generation_prompt=False) == "<|bos|>Where?\nAnswer: Near"


@pytest.mark.parametrize(
    ("wish", "culprit"),
    [({"num_beams": 4}, "num_beams"), ({"typical_p": 0.5}, "typical_p"), ({"max_gen_toks": 64}, "64 new tokens")],
)
def test_generation_that_is_not_supported_is_refused_by_name(model, options, wish, culprit):
    with pytest.raises(UserError, match=culprit):
        LycheeLM(model, options).generate_until([request_of("The fox", wish)])


def test_lm_eval_finds_the_model_by_its_name(folder, include):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include), include_defaults=False)
    arguments = f"path={folder},attention=dense,page_size=8"
    found = simple_evaluate("lychee", arguments, tasks=["choice"], task_manager=manager, limit=1)
    assert found is not None
    assert found.get("results", {})["choice"]["acc,none"] in (0.0, 1.0)


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_prints_a_table_or_one_object(folder, include, capfd, as_json):
    argv = ["eval", "harness", "choi*", "--include", str(include), "--model", str(folder), "--limit", "2", "--chat"]
    small = ["--page-size", "8", "--sink", "8", "--recent", "8", "--heads", "none", "--attention", "dense,hybrid"]
    small += ["--budget", "16"]
    assert cli.main([*argv, *small, *(["--json"] if as_json else [])]) == 0
    out = capfd.readouterr().out
    if as_json:
        found = json.loads(out)
        assert found["results"].keys() == {"dense", "hybrid@16"}
        assert (found["about"]["tasks"], found["about"]["limit"]) == (["choice"], 2)
    else:
        assert out.startswith("| task | metric | dense | hybrid@16 |\n")
        assert "| choice | acc |" in out


def refusal(argv: list[str], capfd) -> str:
    assert cli.main(["eval", "harness", *argv]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    return [line for line in err.splitlines() if line.startswith("error: ")][-1]


def test_bad_input_is_refused_in_one_line(folder, include, tmp_path, capfd):
    few = ["--include", str(include), "--model", str(folder)]
    assert "--include nowhere is no folder" in refusal(["x", "--include", "nowhere", "--model", str(folder)], capfd)
    assert "--limit is 0" in refusal(["choice", *few, "--limit", "0"], capfd)
    broken = {"task": "broken", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "missing.jsonl"}}}
    (tmp_path / "broken.yaml").write_text(json.dumps({**broken, **COLUMNS, **TASKS["choice"]}))
    told = refusal(["broken", "--include", str(tmp_path), "--model", str(folder)], capfd)
    assert "the tasks cannot be loaded" in told
    assert "missing.jsonl" in told


def test_a_missing_harness_is_named_with_its_extra(folder, monkeypatch, capfd):
    monkeypatch.delitem(sys.modules, "lychee_jax.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'lychee-jax[eval]'" in refusal(["choice", "--model", str(folder)], capfd)
