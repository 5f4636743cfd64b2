"""The command line from outside: what it prints where, on a tiny random model."""

import inspect
import io
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from lychee_jax.attention.head_map import HeadMap
from lychee_jax.attention.selection import SelectionPolicy
from lychee_jax.cli import main as cli
from lychee_jax.cli.generate import generate
from lychee_jax.engine.options import GenerateOptions
from lychee_jax.engine.sampling_params import SamplingParams
from lychee_jax.errors import UserError
from lychee_jax.llm import LLM
from lychee_jax.text.streaming import StreamDecoder
from lychee_jax.text.tokenizer import Tokenizer
from tests.support import tiny_checkpoints, tiny_tokenizers

SMALL = ["--page-size", "8", "--budget", "32", "--sink", "8", "--recent", "8", "--max-new-tokens", "12"]
TEXT = "the dog is no stop " * 5
RAW = tiny_checkpoints.TINY["llama"] | {
    "vocab_size": 320,
    "num_hidden_layers": 2,
    "eos_token_id": 1,
    "max_position_embeddings": 4096,
}
HEADS = {
    "format": "lychee-heads/1",
    "model": "tiny",
    "num_layers": 2,
    "num_kv_heads": 2,
    "retrieval": [[0, 1], [1]],
    "meta": {},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A Hugging Face checkpoint with tokenizer, chat template and head map."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_checkpoints.write_checkpoint(folder, RAW)
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level(), chat_template=tiny_tokenizers.CHAT_TEMPLATE)
    (folder / "heads.json").write_text(json.dumps(HEADS))
    return folder


@pytest.fixture(scope="session")
def bare(tmp_path_factory):
    """The same weights with nothing beside them, and no head map."""
    folder = tmp_path_factory.mktemp("bare")
    tiny_checkpoints.write_checkpoint(folder, RAW)
    return folder


@pytest.fixture
def lychee(capfd, monkeypatch):
    """Runs the command line in this process: (exit status, stdout, stderr)."""
    monkeypatch.setenv("USE_TORCH", "0")

    def run(*argv, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
        status = cli.main([str(part) for part in argv])
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def as_json(lychee, folder):
    """Runs `lychee generate --json` with a small page and budget, and reads its object."""

    def run(*argv, model=folder, stdin=""):
        status, out, _ = lychee("generate", "--model", model, "--json", *SMALL, *argv, stdin=stdin)
        assert status == 0
        assert out.count("\n") == 1
        return json.loads(out)

    return run


def test_json_has_one_row_a_prompt(as_json, folder):
    answer = as_json("--prompt", TEXT)
    assert list(answer) == ["prompt_tokens", "tokens", "logprobs", "text", "finish_reason", "timing", "attention"]
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    assert answer["prompt_tokens"] == [len(tokenizer.encode(TEXT))]
    assert [len(row) for row in answer["tokens"]] == [len(row) for row in answer["logprobs"]]
    assert 0 < len(answer["tokens"][0]) <= 12
    assert all(logprob < 0 for logprob in answer["logprobs"][0])
    assert answer["text"] == [tokenizer.decode(answer["tokens"][0])]
    assert {"prefill_s", "decode_s", "tokens_per_s"} <= set(answer["timing"])
    assert {"mode", "retrieval_heads", "budget", "sink", "recent", "page_size"} <= set(answer["attention"])
    assert answer["attention"]["retrieval_heads"] == 3


def test_every_source_of_a_prompt_gives_the_same(as_json, folder, tmp_path):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    (tmp_path / "prompt.txt").write_text(TEXT)
    (tmp_path / "ids.json").write_text(json.dumps(tokenizer.encode(TEXT)))
    wanted = as_json("--prompt", TEXT)["tokens"]
    assert as_json("--prompt-file", tmp_path / "prompt.txt")["tokens"] == wanted
    assert as_json("--prompt-file", "-", stdin=TEXT)["tokens"] == wanted
    assert as_json("--prompt-ids", tmp_path / "ids.json")["tokens"] == wanted
    assert as_json("--prompt-ids", "-", stdin=json.dumps([tokenizer.encode(TEXT)]))["tokens"] == wanted


def test_a_ragged_batch_without_tokenizer(as_json, bare, tmp_path):
    rows = [list(range(2, 40)), [7], list(range(300, 250, -1))]
    (tmp_path / "ids.json").write_text(json.dumps(rows))
    answer = as_json("--prompt-ids", tmp_path / "ids.json", model=bare)
    assert answer["prompt_tokens"] == [38, 1, 50]
    assert answer["text"] is None
    alone = as_json("--prompt-ids", "-", model=bare, stdin=json.dumps(rows[2]))
    assert alone["tokens"] == answer["tokens"][2:]


def test_chat_goes_through_the_template(as_json, folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    wanted = tokenizer.encode_messages("the dog")
    answer = as_json("--chat", "--prompt", "the dog")
    assert answer["prompt_tokens"] == [len(wanted)]
    assert answer["tokens"] == as_json("--prompt-ids", "-", stdin=json.dumps(wanted))["tokens"]


@pytest.fixture
def prompts_of(lychee, tmp_path_factory, monkeypatch):
    """Runs `lychee generate` up to the engine with a ChatML tokenizer: the prompt, special tokens shown."""
    folder = tmp_path_factory.mktemp("chat_ml")
    tiny_checkpoints.write_checkpoint(folder, RAW)
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.chat_ml(), chat_template=tiny_tokenizers.THINKING_TEMPLATE)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    caught = []

    def stream(model, prompts, options, on_prefill=None):
        caught.extend("".join(map(tokenizer.token_text, prompt)) for prompt in prompts)
        raise UserError("seen")

    monkeypatch.setattr(LLM, "stream_tokens", stream)

    def run(*argv, stdin=""):
        caught.clear()
        _, _, err = lychee("generate", "--model", folder, *SMALL, *argv, stdin=stdin)
        return caught[0] if caught else err

    return run


def test_system_messages_conversations_and_template_keywords(prompts_of, tmp_path):
    file = tmp_path / "messages.json"
    words = [("user", "is"), ("assistant", "no"), ("user", "dog")]
    turns = [{"role": role, "content": content} for role, content in words]
    file.write_text("\ufeff" + json.dumps(turns), encoding="utf-8")
    spoken = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in words)
    end = "<|im_start|>assistant\n<think>\n"
    assert prompts_of("--messages", file) == spoken + end
    assert prompts_of("--messages", "-", "--chat", stdin=json.dumps(turns)) == prompts_of("--messages", file)
    with_system = prompts_of("--messages", file, "--system", "stop")
    assert with_system == "<|im_start|>system\nstop<|im_end|>\n" + spoken + end
    asked = ["--chat", "-p", "the", "--system", "no", "--template-kwargs", '{"enable_thinking": false}']
    assert prompts_of(*asked) == (
        "<|im_start|>system\nno<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n" + end + "\n</think>\n\n"
    )


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["--messages", "-", "-p", "a"], "exactly one"),
        (["-p", "a", "--system", "s"], "system message without a chat"),
        (["-p", "a", "--template-kwargs", "{}"], "template keywords without a chat"),
        (["-p", "a", "--chat", "--template-kwargs", "{"], "--template-kwargs is not valid JSON"),
        (["-p", "a", "--chat", "--template-kwargs", "[1]"], "template keywords are [1]"),
        (["-p", "a", "--chat", "--template-kwargs", '{"tools": []}'], "'tools'"),
        (["-p", "a", "--chat", "--template-kwargs", '{"tokenize": true}'], "'tokenize'"),
        (["-p", "a", "--chat", "--template-kwargs", '{"bos_token": "x"}'], "'bos_token'"),
        (["--messages", "-"], "at least one"),
        (["--messages", "none.json"], "none.json"),
    ],
    ids=str,
)
def test_chat_options_that_cannot_be_are_refused(prompts_of, argv, culprit):
    error = prompts_of(*argv, stdin="[]")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert culprit in error


def test_special_tokens_stop_and_the_token_that_ends_a_row_is_no_text(as_json, tmp_path):
    """Every id beyond the tokenizer's becomes a special token, so that a random model soon says one."""
    known = tiny_tokenizers.byte_level()
    known.add_special_tokens([f"<|{index}|>" for index in range(known.get_vocab_size(), RAW["vocab_size"])])
    tiny_checkpoints.write_checkpoint(tmp_path, RAW)
    tiny_tokenizers.write_tokenizer(tmp_path, known)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer is not None
    warm = ["--prompt", TEXT, "--temperature", 2, "--max-new-tokens", 40]
    free = as_json(*warm, "--ignore-eos", model=tmp_path)["tokens"][0]
    special = next(token for token in free[2:] if token in tokenizer.special_ids and token > 1)
    answer = as_json(*warm, "--ignore-eos", "--stop", tokenizer.token_text(special), model=tmp_path)
    assert answer["tokens"] == [free[: free.index(special) + 1]]
    assert answer["text"] == [tokenizer.decode(free[: free.index(special)])]
    # An eos that the tokenizer does not call special.
    plain = next(token for token in free[2:] if token not in tokenizer.special_ids)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": plain}))
    answer = as_json(*warm, model=tmp_path)
    assert answer["tokens"] == [free[: free.index(plain) + 1]]
    assert answer["text"] == [tokenizer.decode(free[: free.index(plain)])]
    assert as_json(*warm, "--ignore-eos", model=tmp_path)["text"] == [tokenizer.decode(free)]


def test_plain_output_is_the_text_alone(lychee, as_json, folder):
    wanted = as_json("--prompt", TEXT)
    status, out, err = lychee("generate", "--model", folder, *SMALL, "--prompt", TEXT)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    decoder = StreamDecoder(tokenizer)
    assert out == "".join(map(decoder.push, wanted["tokens"][0])) + decoder.flush() + "\n"
    assert (status, err.count("\n")) == (0, 1)
    assert f"{wanted['prompt_tokens'][0]} prompt tokens" in err
    assert "tokens/s" in err


def test_plain_output_of_ids_and_of_batches(lychee, as_json, bare, folder):
    rows = [[5, 6, 7], [8], [9, 9]]
    wanted = as_json("--prompt-ids", "-", model=bare, stdin=json.dumps(rows))["tokens"]
    one = lychee("generate", "--model", bare, *SMALL, "--prompt-ids", "-", stdin=json.dumps(rows[:1]))[1]
    assert [int(token) for token in one.split()] == wanted[0]
    both = lychee("generate", "--model", bare, *SMALL, "--prompt-ids", "-", stdin=json.dumps(rows))[1]
    assert both.splitlines() == [f"[{row}] {' '.join(map(str, tokens))}" for row, tokens in enumerate(wanted)]
    text = as_json("--prompt-ids", "-", stdin=json.dumps(rows))["text"]
    both = lychee("generate", "--model", folder, *SMALL, "--prompt-ids", "-", stdin=json.dumps(rows))[1]
    assert both == "".join(f"[{row}] {line}\n" for row, line in enumerate(text))


def test_stop_strings_end_rows(as_json, folder):
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer is not None
    free = as_json("--prompt", TEXT, "--ignore-eos", "--temperature", 2, "--top-k", 50)
    visible = [char for char in free["text"][0] if char.isprintable() and char != "\N{REPLACEMENT CHARACTER}"]
    stop = visible[len(visible) // 2]
    stops = ["--stop", stop, "--stop", "not there"]
    answer = as_json("--prompt", TEXT, "--ignore-eos", "--temperature", 2, "--top-k", 50, *stops)
    assert answer["text"] == [free["text"][0].split(stop)[0]]
    count = len(answer["tokens"][0])
    assert answer["tokens"][0] == free["tokens"][0][:count]
    assert count < len(free["tokens"][0])
    assert len(answer["logprobs"][0]) == count
    assert (answer["finish_reason"], free["finish_reason"]) == (["stop"], ["length"])
    assert stop in tokenizer.decode(answer["tokens"][0])
    assert stop not in tokenizer.decode(answer["tokens"][0][:-1])


def test_sampling_is_repeatable(as_json):
    def tokens(*argv):
        return as_json("--prompt", TEXT, "--ignore-eos", *argv)["tokens"]

    warm = ["--temperature", 2, "--top-k", 50]
    assert tokens(*warm) == tokens(*warm)
    assert tokens(*warm) != tokens(*warm, "--seed", 1)
    assert tokens("--temperature", 2, "--top-k", 1) == tokens()


def test_eos_stops_and_is_counted(as_json, bare, tmp_path):
    ids = json.dumps([5, 6, 7])
    free = as_json("--prompt-ids", "-", "--ignore-eos", model=bare, stdin=ids)["tokens"][0]
    tiny_checkpoints.write_checkpoint(tmp_path, RAW)
    # Of this file only ids are read: sampling at temperature 5 would give other tokens.
    sampling = {"do_sample": True, "temperature": 5.0, "top_k": 3, "repetition_penalty": 9.0, "max_new_tokens": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampling | {"eos_token_id": [319, free[4]]}))
    stopped = as_json("--prompt-ids", "-", model=tmp_path, stdin=ids)["tokens"][0]
    assert stopped == free[: free.index(free[4]) + 1]
    assert as_json("--prompt-ids", "-", "--ignore-eos", model=tmp_path, stdin=ids)["tokens"][0] == free


def test_head_maps_are_taken_from_the_folder_or_by_name(lychee, as_json, folder, bare, tmp_path):
    def retrieval(*argv, model=folder):
        return as_json("--prompt-ids", "-", *argv, model=model, stdin="[5, 6]")["attention"]["retrieval_heads"]

    other = tmp_path / "other.json"
    other.write_text(json.dumps(HEADS | {"retrieval": [[0, 1], []], "model": "another name"}))
    assert retrieval() == 3
    assert retrieval("--heads", "all") == 4
    assert retrieval("--heads", "none") == retrieval("--heads", other) == 2
    assert retrieval(model=bare) == 4
    ids = ["generate", "--model", bare, "--json", *SMALL, "--prompt-ids", "-"]
    assert "no heads.json" in lychee(*ids, stdin="[5]")[2]
    assert lychee(*ids, "--heads", "all", stdin="[5]")[2] == ""
    assert lychee(*ids, "--attention", "dense", stdin="[5]")[2] == ""


def test_hybrid_reads_less_and_all_heads_are_dense(as_json):
    dense = as_json("--prompt", TEXT, "--attention", "dense", "--ignore-eos")
    hybrid = as_json("--prompt", TEXT, "--attention", "hybrid", "--ignore-eos")
    assert dense["attention"]["kv_read_share"] == 1
    assert hybrid["attention"]["kv_read_share"] < 1


def test_options_reach_the_engine(lychee, folder, monkeypatch):
    """Every option arrives where it should; nothing is computed."""
    caught = []

    def stream(model, prompts, options, on_prefill=None):
        caught.append((model, prompts, options))
        raise UserError("seen")

    monkeypatch.setattr(LLM, "stream_tokens", stream)
    argv = """
        --attention hybrid --heads none --page-size 4 --budget 24 --sink 5 --recent 6 --rule top_p --ratio 0.25
        --top-p-mass 0.5 --threshold 0.125 --page-score mass --correct-every 7 --temperature 0.5 --top-k 9 --top-p 0.75
        --min-p 0.0625 --repetition-penalty 1.5 --seed 11 --max-new-tokens 13 --ignore-eos --implementation xla
        --dtype bfloat16 --prompt-ids -
    """
    status = lychee("generate", "--model", folder, *argv.split(), stdin="[[5, 6], [7]]")
    assert status == (2, "", "error: seen\n")
    model, prompts, options = caught.pop()
    assert prompts == [[5, 6], [7]]
    assert model.dtype == "bfloat16"
    assert options == GenerateOptions(
        attention="hybrid",
        heads=HeadMap.none(model.config),
        policy=SelectionPolicy(24, 5, 6, "top_p", 0.25, 0.5, 0.125, "mass"),
        page_size=4,
        max_new_tokens=13,
        sampling=SamplingParams(0.5, 9, 0.75, 0.0625, 1.5, 11),
        eos_ids=(1,),
        ignore_eos=True,
        correct_every=7,
        implementation="xla",
    )


def test_vllms_names_are_other_names_of_options(lychee, folder, monkeypatch):
    caught = []

    def stream(model, prompts, options, on_prefill=None):
        caught.append((options.max_new_tokens, options.page_size, options.kv_dtype))
        raise UserError("seen")

    monkeypatch.setattr(LLM, "stream_tokens", stream)
    ours = ("--max-new-tokens", "--page-size", "--kv-dtype")
    for names in (ours, ("--max-tokens", "--block-size", "--kv-cache-dtype")):
        chosen = [word for pair in zip(names, ("13", "128", "fp8"), strict=True) for word in pair]
        lychee("generate", "--model", folder, "--prompt-ids", "-", *chosen, stdin="[5]")
    assert caught == [(13, 128, "fp8"), (13, 128, "fp8")]


def test_what_is_not_done_is_told_once_on_stderr(lychee, folder, tmp_path):
    copy, out = shutil.copytree(folder, tmp_path / "copy"), tmp_path / "out"
    dual = {"chunk_size": 512, "local_size": 64, "original_max_position_embeddings": 256}
    (copy / "config.json").write_text(json.dumps(RAW | {"dual_chunk_attention_config": dual}))
    (copy / "adapter_model.safetensors").write_bytes(b"")
    status, _, err = lychee("convert", copy, out)
    exact = "config.json asks for dual chunk attention, which is not supported: attention is full, and the model exact"
    notices = [f"notice: {copy}/{exact} up to 256 tokens", f"notice: {copy}: not used: adapter_model.safetensors"]
    assert (status, err.splitlines()) == (0, notices)
    status, _, err = lychee("heads", "show", folder / "heads.json", "--model", out)
    assert (status, err.splitlines()) == (0, [f"notice: {out}/{exact} up to 256 tokens"])
    dual["original_max_position_embeddings"] = RAW["max_position_embeddings"]
    (out / "config.json").write_text(json.dumps(RAW | {"dual_chunk_attention_config": dual | {"chunk_size": 8192}}))
    assert lychee("heads", "show", folder / "heads.json", "--model", out)[::2] == (0, "")


def test_a_long_prompt_shows_its_progress_on_a_terminal(lychee, folder, monkeypatch):
    argv = ["generate", "--model", folder, "--json", *SMALL, "--prompt-ids", "-"]
    ids = json.dumps([5] * 2048)
    status, out, err = lychee(*argv, stdin=ids)
    assert "Reading the prompt" not in err
    monkeypatch.setenv("FORCE_COLOR", "1")
    status, out, err = lychee(*argv, stdin=ids)
    assert status == 0
    assert "Reading the prompt" in err
    assert json.loads(out)["prompt_tokens"] == [2048]


def test_defaults_are_the_librarys():
    given = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    policy, sampling, options = SelectionPolicy(), SamplingParams(), GenerateOptions()
    for name in ("budget", "sink", "recent", "rule", "ratio", "threshold", "page_score"):
        assert given[name] == getattr(policy, name)
    assert given["top_p_mass"] == policy.top_p
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"):
        assert given[name] == getattr(sampling, name)
    for name in ("attention", "page_size", "max_new_tokens", "ignore_eos", "correct_every", "implementation"):
        assert given[name] == getattr(options, name)


def test_heads_show_and_plot(lychee, folder, tmp_path):
    status, out, err = lychee("heads", "show", folder / "heads.json")
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "tiny: 3 of 4 KV heads retrieve (■)",
        "layer   0  ■ ■",
        "layer   1  · ■",
    ]
    picture = tmp_path / "roles.png"
    status, out, err = lychee("heads", "plot", folder / "heads.json", "--output", picture)
    assert (status, out, err) == (0, f"{picture}\n", "")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--help"],
        ["generate", "-h"],
        ["convert", "--help"],
        ["heads", "plot", "-h"],
        ["bench", "decode", "-h"],
        ["demo", "-h"],
    ],
)
def test_help_is_on_stdout(lychee, argv):
    status, out, err = lychee(*argv)
    assert (status, err) == (0, "")
    assert "Usage: lychee" in out


def test_help_imports_no_jax():
    program = (
        "import sys; from lychee_jax.cli.main import main\n"
        "assert main(['generate', '--help']) == 0\n"
        "print(sorted({'jax', 'numpy', 'transformers', 'flax'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


def test_version(lychee):
    status, out, _ = lychee("--version")
    assert status == 0
    assert out.startswith("lychee-jax ")


def start(*argv, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "lychee_jax", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        **options,
    )


def test_text_streams_and_ctrl_c_ends_it(folder):
    """The first text comes while the rest is still being generated; Ctrl-C then ends the process with 130."""
    with start("generate", "--model", folder, "--prompt", "the", "--ignore-eos", "--max-new-tokens", 4000) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (130, b"interrupted\n")


def test_a_reader_that_leaves_is_no_error(folder):
    """As in `lychee generate … | head -c 1`."""
    with start("generate", "--model", folder, "--prompt", "the", "--ignore-eos", "--max-new-tokens", 4000) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_programs_are_kept_between_runs(bare, tmp_path):
    ids = tmp_path / "ids.json"
    ids.write_text("[5, 6, 7]")
    argv = ["generate", "--model", bare, "--prompt-ids", ids, "--json", *SMALL]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "lychee_jax", *map(str, argv)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"},
    )
    assert json.loads(done.stdout)["prompt_tokens"] == [3]
    assert list((tmp_path / "lychee-jax" / "programs").iterdir())
    assert done.stderr.count("\n") == 1  # the notice about the missing head map
