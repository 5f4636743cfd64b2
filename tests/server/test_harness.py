"""lm-evaluation-harness as a client: it is told over HTTP what `lychee eval harness` finds in its own process."""

import json
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from lychee_jax.evaluation.harness import LycheeLM
from tests.support import servers
from tests.support.servers import Running

TEXT = "The old fox ran to the river. The young owl saw a fox near the old house. "
TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "label",
        "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until", "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 9, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip
DOCUMENTS = [
    {"text": TEXT * 3 + "Where is the owl? The owl is near the", "choices": [" house", " river"], "label": 0},
    {"text": TEXT + "The fox", "choices": [" ran to the river", " saw"], "label": 1},
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Both tasks as YAML (of which JSON is a part), their documents as JSON Lines."""
    folder = tmp_path_factory.mktemp("tasks")
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    for name, task in TASKS.items():
        source = {
            "task": name, "dataset_path": "json", "test_split": "test", "num_fewshot": 0, "doc_to_text": "{{text}}",
            "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        }  # fmt: skip
        (folder / f"{name}.yaml").write_text(json.dumps(source | task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def answers(model: LM | str, tasks: TaskManager, *names: str, **options: Any) -> dict[str, list[Any]]:
    """What the model has said to each document of the tasks."""
    evaluate: Any = simple_evaluate  # its decorator hides its parameters
    found = evaluate(
        model, tasks=list(names), task_manager=tasks, bootstrap_iters=0, log_samples=True, batch_size=1, **options
    )
    return {name: [sample["resps"] for sample in found["samples"][name]] for name in names}


def test_log_likelihoods_and_answers_are_those_of_our_own_harness(server: Running, tasks: TaskManager):
    own = LycheeLM(server.another_llm(), servers.DEFAULTS)
    expected = answers(own, tasks, "choice", "words")
    arguments: Any = {
        "model": "tiny", "base_url": f"{server.url}/v1/completions", "tokenizer": str(server.llm.path),
        "tokenizer_backend": "huggingface", "add_bos_token": True, "max_length": 512,
    }  # fmt: skip
    told = answers("local-completions", tasks, "choice", "words", model_args=arguments)
    assert told["words"] == expected["words"]
    assert [len(each) for each in told["choice"]] == [2, 2]
    for document, own_document in zip(told["choice"], expected["choice"], strict=True):
        for ((loglikelihood, greedy),), ((own_loglikelihood, own_greedy),) in zip(document, own_document, strict=True):
            assert float(loglikelihood) == pytest.approx(float(own_loglikelihood), abs=1e-4)
            assert str(greedy) == str(own_greedy)


def test_chats(server: Running, tasks: TaskManager):
    arguments: Any = {"model": "tiny", "base_url": f"{server.url}/v1/chat/completions"}
    told = answers("local-chat-completions", tasks, "words", model_args=arguments, apply_chat_template=True)
    for document, answer in zip(DOCUMENTS, told["words"], strict=True):
        body = {"messages": [{"role": "user", "content": document["text"]}], "max_tokens": 9, "temperature": 0}
        choice = server.post("/v1/chat/completions", body | {"stop": ["\n"]}).json()["choices"][0]
        assert answer == [[choice["message"]["content"]]]
