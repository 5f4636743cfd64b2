"""LongBench: metrics by hand, truncation in the middle, and files that are not there. Perplexity's windows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from lychee_jax.cli import main as cli
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.errors import UserError
from lychee_jax.evaluation import metrics
from lychee_jax.evaluation.longbench import EXTRA_TASKS, TASKS, LongBench
from lychee_jax.evaluation.perplexity import FilePerplexity, OwnPerplexity, file_tasks
from lychee_jax.loading import BUNDLED, load
from lychee_jax.text.chat import ChatOptions
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_tokenizers

LINE = {
    "context": "word " * 900,
    "input": "Where is it?",
    "answers": ["under the table", "a table"],
    "all_classes": None,
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(BUNDLED)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in (*TASKS, *EXTRA_TASKS):
        line = {"trec": LINE | {"answers": ["Animal"], "all_classes": ["Animal", "Plant", "Ani"]},
                "passage_retrieval_en": LINE | {"answers": ["Paragraph 7"]}}.get(name, LINE)  # fmt: skip
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line) + "\n")
    return tmp_path


def test_f1_counts_words_without_articles_case_and_punctuation():
    assert metrics.qa_f1("The cat, sat!", "a CAT sat") == 1.0
    assert metrics.qa_f1("cat cat dog", "cat bird") == pytest.approx(2 * 1 / 5)
    assert metrics.qa_f1("the", "a") == 0.0
    assert metrics.qa_f1("", "cat") == 0.0


def test_rouge_l_is_the_longest_common_subsequence():
    assert metrics.rouge_l("the cat sat", "the cat sat") == pytest.approx(1.0)
    # "the sat" in 3 and 4 words.
    assert metrics.rouge_l("the dog sat", "the cat sat down") == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert metrics.rouge_l("", "something") == 0.0
    assert metrics.rouge_l("...", "something") == 0.0


def test_classes_share_the_point_unless_they_are_parts_of_the_right_one():
    classes = ["Animal", "Plant", "Ani"]
    assert metrics.classification("It is an Animal", "Animal", classes) == 1.0
    assert metrics.classification("Animal or Plant", "Animal", classes) == 0.5
    assert metrics.classification("Plant", "Animal", classes) == 0.0
    assert metrics.classification("none of them", "Animal", classes) == 0.0


def test_retrieval_shares_the_point_among_all_numbers():
    assert metrics.retrieval("Paragraph 7", "Paragraph 7") == 1.0
    assert metrics.retrieval("7 or 17", "Paragraph 7") == 0.5
    assert metrics.retrieval("Paragraph 70", "Paragraph 7") == 0.0
    assert metrics.retrieval("the first", "Paragraph 7") == 0.0


@pytest.mark.parametrize("name", [*TASKS, *EXTRA_TASKS])
def test_long_prompts_lose_their_middle(tokenizer, folder, name):
    task = LongBench(tokenizer, name, folder)
    whole, cut = task.case(10**6, None, 0), task.case(600, None, 0)
    assert len(whole.tokens) > 900
    assert 590 <= len(cut.tokens) <= 600
    assert cut.tokens[:250] == whole.tokens[:250]
    assert cut.tokens[-250:] == whole.tokens[-250:]
    assert cut.tokens == tokenizer.encode(cut.prompt)
    with pytest.raises(UserError, match="no room for a prompt"):
        task.case(1, None, 0)


def test_answers_are_scored_by_the_task_and_its_best_reference(tokenizer, folder):
    def score(name: str, answer: str) -> float:
        task = LongBench(tokenizer, name, folder)
        return task.score(task.case(600, None, 1), answer, [])

    assert score("qasper", "the table") == 1.0
    assert score("triviaqa", "\n\na table\nQuestion: and much more") == 1.0
    assert score("qasper", "a table\nQuestion: and much more") < 0.5
    assert score("qmsum", "under the table") == pytest.approx(1.0)
    assert score("passage_retrieval_en", "Paragraph 7") == 1.0
    assert score("trec", "Animal\nPlant") == 1.0


def test_lines_end_at_line_feeds_alone_and_a_byte_order_mark_is_no_text(tmp_path):
    line = LINE | {"context": "one\u2028two\u2029three\u0085four"}
    lines = "\ufeff" + "\r\n".join([json.dumps(line, ensure_ascii=False)] * 2)
    (tmp_path / "hotpotqa.jsonl").write_bytes(lines.encode())
    tokenizer = Tokenizer.from_folder(BUNDLED)
    assert tokenizer is not None
    assert LongBench(tokenizer, "hotpotqa", tmp_path).lines == [line, line]


def test_few_shot_tasks_stay_without_a_chat_template(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("chat")
    tiny_tokenizers.write_tokenizer(other, tiny_tokenizers.byte_level(), chat_template=tiny_tokenizers.CHAT_TEMPLATE)
    tokenizer = Tokenizer.from_folder(other)
    assert tokenizer is not None
    chats = (None, ChatOptions())
    plain, chat = (LongBench(tokenizer, "hotpotqa", folder, chat=chat).case(3000, None, 0) for chat in chats)
    assert len(plain.tokens) <= 3000
    assert len(chat.tokens) <= 3000
    assert chat.tokens == tokenizer.encode_messages(chat.prompt)
    few = [LongBench(tokenizer, "triviaqa", folder, chat=chat).case(3000, None, 0) for chat in chats]
    assert few[0] == few[1]


def test_files_that_are_missing_or_others_are_refused(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"qasper\.jsonl cannot be read: .*huggingface"):
        LongBench(tokenizer, "qasper", tmp_path).case(600, None, 0)
    (tmp_path / "qasper.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(UserError, match="each line needs context, input and answers"):
        LongBench(tokenizer, "qasper", tmp_path).case(600, None, 0)
    (tmp_path / "qasper.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        LongBench(tokenizer, "qasper", tmp_path).case(600, None, 0)
    with pytest.raises(UserError, match="task 'lcc' is unknown"):
        LongBench(tokenizer, "lcc", tmp_path)


def test_windows_cover_the_text_from_its_beginning_to_its_end(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text(" ".join(f"{n}" for n in range(2000)))
    task = FilePerplexity(tokenizer, tmp_path / "book.txt", scored=16, windows=3)
    cases = [task.case(100, None, index) for index in range(3)]
    assert all((len(case.tokens), len(case.forced)) == (100, 16) for case in cases)
    assert [*cases[0].tokens, *cases[0].forced] == tokenizer.encode(task.text)[:116]
    assert all(case.tokens[0] == cases[0].tokens[0] for case in cases)
    assert cases[2].forced == task.tokens[-16:]
    with pytest.raises(UserError, match="100000 and 16 to score are more"):
        task.case(100_000, None, 0)
    with pytest.raises(UserError, match="cannot be read"):
        FilePerplexity(tokenizer, tmp_path / "none.txt", 16, 3).case(100, None, 0)


@pytest.mark.parametrize("behind", ["</s>", "</s> </s>"])
@pytest.mark.parametrize("front", ["", "<s> "])
def test_an_end_that_the_tokenizer_appends_is_not_scored_and_no_token_is_lost(tmp_path, front, behind):
    """Some tokenizers end every text with an eos, as T5's does, or with another special token."""
    pipeline = tiny_tokenizers.byte_level()
    pipeline.post_processor = TemplateProcessing(single=f"{front}$A {behind}", special_tokens=[("<s>", 0), ("</s>", 1)])
    tiny_tokenizers.write_tokenizer(tmp_path, pipeline)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    (tmp_path / "book.txt").write_text("the dog is no stop " * 30)
    task = FilePerplexity(tokenizer, tmp_path / "book.txt", scored=8, windows=2)
    (first, last), bos = [task.case(20, None, index) for index in range(2)], [0] if front else []
    text = tokenizer.encode_plain("the dog is no stop " * 30)
    assert [*first.tokens, *first.forced] == [*bos, *text][:28]
    assert [*last.tokens, *last.forced] == [*bos, *text[len(bos) - 28 :]]


def test_texts_of_one_name_are_told_apart_by_their_folders(tokenizer, tmp_path):
    paths = [tmp_path / "a" / "x" / "book.txt", tmp_path / "b" / "x" / "book.txt", tmp_path / "b" / "other.txt"]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert [task.name for task in file_tasks(tokenizer, paths, 8, 1)] == ["a/x/book.txt", "b/x/book.txt", "other.txt"]
    assert [task.name for task in file_tasks(tokenizer, paths[:1], 8, 1)] == ["book.txt"]
    with pytest.raises(UserError, match=r"other\.txt is given twice"):
        file_tasks(tokenizer, [paths[2], tmp_path / "b" / "x" / ".." / "other.txt"], 8, 1)


def test_own_documents_need_the_own_tokenizer(tokenizer, tmp_path):
    case = OwnPerplexity(tokenizer, 64, seed=1).case(700, None, 0)
    assert (len(case.tokens), len(case.forced)) == (700, 64)
    tiny_tokenizers.write_tokenizer(tmp_path, tiny_tokenizers.byte_level())
    other = Tokenizer.from_folder(tmp_path)
    assert other is not None
    with pytest.raises(UserError, match="--text FILE"):
        OwnPerplexity(other, 64, seed=1).case(700, None, 0)


def test_perplexity_is_that_of_the_full_forward_pass(capfd, tokenizer, tmp_path):
    """Dense decoding, token by token, against one pass over the whole window."""
    model = load(dtype="float32")
    text = tmp_path / "text.txt"
    text.write_text("The old fox ran to the river. " * 40)
    command = ["eval", "perplexity", "--dtype", "float32", "--text", text, "--lengths", "200", "--scored", "12",
               "--samples", "2", "--attention", "dense", "--output", tmp_path / "out"]  # fmt: skip
    assert cli.main([str(part) for part in command]) == 0
    assert "| text.txt | dense |" in capfd.readouterr().out
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"][0]
    task = FilePerplexity(tokenizer, text, 12, 2)
    losses = []
    for index in range(2):
        case = task.case(200, None, index)
        for end in range(len(case.forced)):
            prompt, token = [*case.tokens, *case.forced[:end]], case.forced[end]
            found_alone = model.generate_tokens([prompt], GenerateOptions("dense"), forced=[[token]], limits=[1])
            losses.append(-found_alone.logprobs[0][0])
    assert found["score"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["shown"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-4)
