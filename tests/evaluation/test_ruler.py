"""RULER's prompts: their structure and sizes by the paper's parameters, and its scores."""

import collections
import json
import random
import re

import pytest

from lychee_jax.errors import UserError
from lychee_jax.evaluation.ruler import NEED_NO_DATA, TASKS, Ruler, fit
from lychee_jax.evaluation.ruler_data import Files, adjectives, nouns
from lychee_jax.loading import BUNDLED
from lychee_jax.text.chat import ChatOptions
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_tokenizers

NEW = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}  # all others: 128
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    found = Tokenizer.from_folder(BUNDLED)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("chat")
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level(), chat_template=tiny_tokenizers.CHAT_TEMPLATE)
    found = Tokenizer.from_folder(folder)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    """Small files of the shapes that RULER's scripts fetch."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    essay = " ".join(f"Sentence {i} has {rng.randint(3, 9)} things to say." for i in range(300))
    (folder / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay + "\n\n" + essay}))
    articles = []
    for a in range(3):
        paragraphs = [
            {
                "context": f"Article {a} paragraph {p}: the colour of thing {a}{p} is number {a * 10 + p}.",
                "qas": [
                    {"question": f"What colour is {a}{p}?", "is_impossible": False,
                     "answers": [{"text": f"number {a * 10 + p}"}, {"text": str(a * 10 + p)}]},
                    {"question": "Nobody knows?", "is_impossible": True, "answers": []},
                ],
            }
            for p in range(4)
        ]  # fmt: skip
        articles.append({"paragraphs": paragraphs})
    (folder / "squad.json").write_text(json.dumps({"data": articles}))
    hotpot = [
        {
            "question": f"Which of {i}?",
            "answer": f"answer {i}",
            "context": [[f"T{i}{j}", ["One. ", "Two."]] for j in (0, 1)],
        }
        for i in range(5)
    ]
    (folder / "hotpotqa.json").write_text(json.dumps(hotpot))
    return Files(folder)


@pytest.mark.parametrize("length", [2048, 8192])
@pytest.mark.parametrize("name", TASKS)
def test_prompts_fit_their_length_hardly_less_and_come_back(tokenizer, files, name, length):
    task = Ruler(tokenizer, name, files, seed=3)
    case = task.case(length, None, 1)
    assert case.max_new_tokens == NEW.get(name, 128)
    total = len(case.tokens) + case.max_new_tokens
    assert 0.93 * length < total <= length
    assert case.tokens == tokenizer.encode(case.prompt)
    assert Ruler(tokenizer, name, files, seed=3).case(length, None, 1) == case
    assert task.case(length, None, 2).prompt != case.prompt
    assert Ruler(tokenizer, name, files, seed=4).case(length, None, 1).prompt != case.prompt
    if not name.startswith("qa_"):
        context = case.prompt.split("\n")[1 if name.startswith("niah") else 0 :]
        assert all(reference in "\n".join(context) for reference in case.references)
    assert task.score(case, " and ".join(case.references).upper(), []) == 1.0
    assert task.score(case, "I do not know", []) == 0.0


def test_single_needles_and_their_singular(tokenizer, files):
    case = Ruler(tokenizer, "niah_single_1", files).case(2048, None, 0)
    lines = case.prompt.split("\n")
    assert lines[0].startswith("A special magic number is hidden within")
    needles = [line for line in lines[1:-1] if line != NOISE]
    assert len(needles) == 1
    key, value = re.fullmatch(r"One of the special magic numbers for (.+) is: (\d{7})\.", needles[0]).groups()  # type: ignore[union-attr]
    assert case.references == [value]
    assert key in {f"{a}-{n}" for a in adjectives() for n in nouns() if key.startswith(a) and key.endswith(n)}
    assert case.prompt.endswith(f"text? The special magic number for {key} mentioned in the provided text is")


@pytest.mark.parametrize(
    ("name", "needles", "asked"), [("niah_multikey_1", 4, 1), ("niah_multivalue", 4, 4), ("niah_multiquery", 4, 4)]
)
def test_several_needles_in_essays(tokenizer, files, name, needles, asked):
    case = Ruler(tokenizer, name, files).case(4096, None, 0)
    found = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", case.prompt)
    assert len(found) == needles
    assert len({key for key, _ in found}) == (1 if name == "niah_multivalue" else 4)
    assert len(case.references) == asked
    question = case.prompt.rsplit("\n", 1)[1]
    if name == "niah_multiquery":
        keys = re.search(r"numbers for (.+) mentioned in the provided text\? The", question).group(1)  # type: ignore[union-attr]
        assert [dict(found)[key] for key in re.split(", and |, ", keys)] == case.references
        assert question.startswith("What are all the special magic numbers for ")


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
def test_haystacks_of_needles(tokenizer, files, name):
    case = Ruler(tokenizer, name, files).case(4096, None, 0)
    lines = case.prompt.split("\n")[1:-1]
    assert all(line.startswith("One of the special magic ") for line in lines)
    assert len(lines) > 20
    answer = next(line for line in lines if case.references[0] in line)
    assert answer.split(" for ")[1].split(" is: ")[0] in case.prompt.rsplit("\n", 1)[1]


def test_variables_are_tracked_over_four_hops_behind_an_example(tokenizer, files):
    case = Ruler(tokenizer, "vt", files).case(4096, None, 0)
    example, main = case.prompt.split("\n\nMemorize")
    assert len(case.references) == 5
    value = re.search(rf"VAR {case.references[0]} = (\d{{5}})\n", main).group(1)  # type: ignore[union-attr]
    places = [main.index(f"VAR {b} = VAR {a}") for a, b in zip(case.references, case.references[1:], strict=False)]
    assert places == sorted(places)
    assert main.endswith(f"5 variables are assigned the value {value}, they are: ")
    names = re.findall(r"VAR (\w{3}) =", example)
    assert len(names) == 5
    assert example.endswith("they are:  " + " ".join(names))
    assert len(tokenizer.encode(example)) < 550


@pytest.mark.parametrize(("length", "often", "seldom"), [(8192, 30, 3), (4000, 6, 1)])
def test_common_words_come_as_often_as_they_should(tokenizer, files, length, often, seldom):
    case = Ruler(tokenizer, "cwe", files).case(length, None, 0)
    listed = case.prompt.rsplit("Memorize the ones that appear most often.\n", 1)[1].split("\nQuestion")[0]
    words = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", listed)
    assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
    counts = collections.Counter(word for _, word in words)
    assert {counts[word] for word in case.references} == {often}
    assert {count for word, count in counts.items() if word not in case.references} == {seldom}
    assert len(case.references) == 10
    example = case.prompt.split("\nBelow is")[0]
    assert re.search(r"in the list are: 1\. .+ 10\. \S+$", example)


def test_coded_words_follow_a_zeta_distribution(tokenizer, files):
    case = Ruler(tokenizer, "fwe", files).case(8192, None, 0)
    text = case.prompt.split("coded words. ", 1)[1].split("\nQuestion")[0]
    ranked = collections.Counter(text.split()).most_common(4)
    assert ranked[0][0] == "..."
    assert [word for word, _ in ranked[1:]] == case.references
    assert [round(ranked[0][1] / count, 1) for _, count in ranked] == pytest.approx([1, 4, 9, 16], rel=0.1)


def test_questions_stand_with_their_documents(tokenizer, files):
    case = Ruler(tokenizer, "qa_1", files).case(500, None, 5)
    assert case.prompt.endswith("Question: What colour is 11? Answer:")
    assert case.references == ["number 11", "11"]
    assert "the colour of thing 11 is" in case.prompt
    # Paragraphs of the same article come before any others.
    assert {int(p) for p in re.findall(r"Article 1 paragraph (\d)", case.prompt)} == {0, 1, 2, 3}
    both = Ruler(tokenizer, "qa_2", files).case(300, None, 3).prompt
    assert "T30\nOne. Two." in both
    assert "T31\nOne. Two." in both
    assert re.findall(r"Document (\d+):", both) == [str(i + 1) for i in range(both.count("Document "))]
    with pytest.raises(UserError, match="there are 5 questions"):
        Ruler(tokenizer, "qa_2", files).case(300, None, 5)


def test_scores_count_what_is_found(tokenizer, files):
    several = Ruler(tokenizer, "niah_multivalue", files)
    case = several.case(4096, None, 0)
    assert several.score(case, f"{case.references[0]},{case.references[2]}", []) == 0.5
    question = Ruler(tokenizer, "qa_1", files)
    assert question.score(question.case(500, None, 5), "It is NUMBER 11, surely", []) == 1.0


def test_a_chat_ends_with_the_beginning_of_the_answer(chat_tokenizer, files):
    case = Ruler(chat_tokenizer, "niah_single_1", files, chat=ChatOptions()).case(3000, None, 0)
    text = chat_tokenizer.decode(case.tokens)
    assert text.endswith("mentioned in the provided text is")
    assert case.tokens == chat_tokenizer.encode_messages(
        case.prompt[: case.prompt.index(" The special magic")],
        answer=case.prompt[case.prompt.index(" The special magic") :],
    )
    assert len(case.tokens) + 128 <= 3000


def test_thoughts_that_a_template_opens_do_not_swallow_the_answer(tmp_path, files):
    """The beginning of the answer stands behind the thoughts, with a system message and keywords as they were given."""
    template = tiny_tokenizers.THINKING_TEMPLATE
    tokenizer = Tokenizer.from_folder(
        tiny_tokenizers.write_tokenizer(tmp_path, tiny_tokenizers.chat_ml(), chat_template=template)
    )
    assert tokenizer is not None
    chat = ChatOptions([{"role": "system", "content": "stop"}], {"enable_thinking": True})
    case = Ruler(tokenizer, "niah_single_1", files, chat=chat).case(6000, None, 0)
    text = "".join(map(tokenizer.token_text, case.tokens))
    assert "<|im_start|>system" in text
    begun = text[text.index("<|im_start|>assistant") :]
    assert begun.startswith("<|im_start|>assistant\n<think>\n\n</think>\n\n The special magic ")
    assert len(case.tokens) + 128 <= 6000


@pytest.mark.parametrize("name", sorted(set(TASKS) - set(NEED_NO_DATA)))
def test_missing_data_are_named_with_their_source(tokenizer, tmp_path, name):
    for folder, message in ((None, "--data DIR"), (tmp_path, "has none")):
        with pytest.raises(UserError, match=rf"reads \w+\.json: .*{message}.*http"):
            Ruler(tokenizer, name, Files(folder)).case(4096, None, 0)
    for file in ("PaulGrahamEssays", "squad", "hotpotqa"):
        (tmp_path / f"{file}.json").write_text('["something else"]')
    with pytest.raises(UserError, match="is not the file"):
        Ruler(tokenizer, name, Files(tmp_path)).case(4096, None, 0)


def test_lengths_without_room_and_unknown_tasks_are_refused(tokenizer, files):
    with pytest.raises(UserError, match=r"vt at length 300 \(30 of it for the answer\): the smallest prompt has"):
        Ruler(tokenizer, "vt", files).case(300, None, 0)
    with pytest.raises(UserError, match="task 'niah' is unknown"):
        Ruler(tokenizer, "niah", files)


def test_fit_finds_the_largest_with_few_looks():
    rng = random.Random()
    for _ in range(200):
        slope, base, least = rng.uniform(0.2, 20), rng.randint(0, 500), rng.randint(1, 40)
        looks: list[int] = []

        def tokens(size: int, slope: float = slope, base: int = base, looks: list[int] = looks) -> int:
            looks.append(size)
            return base + int(slope * size)

        room = tokens(least) + rng.randint(0, 100_000)
        size = fit(tokens, room, least)
        assert tokens(size) <= room < tokens(size + 1)
        assert len(looks) < 45
