"""Bad input: one line on stderr that names the culprit, exit status 2, nothing on stdout, nothing half-written."""

import json
import shutil
import subprocess
import sys

import pytest

from lychee_jax.cli import main as cli
from tests.support import tiny_checkpoints, tiny_tokenizers

RAW = tiny_checkpoints.TINY["llama"] | {"vocab_size": 320, "eos_token_id": 1}
HEADS = {
    "format": "lychee-heads/1",
    "model": "tiny",
    "num_layers": 2,
    "num_kv_heads": 2,
    "retrieval": [[0, 1], [1]],
    "meta": {},
}


@pytest.fixture(scope="session")
def good(tmp_path_factory):
    """A checkpoint in two shards, with a tokenizer but no chat template and no head map."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    tiny_checkpoints.write_checkpoint(folder, RAW, shards=2)
    return tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level())


@pytest.fixture
def broken(good, tmp_path):
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "broken")


@pytest.fixture
def ids(tmp_path):
    """Writes a file of token ids."""

    def write(content):
        file = tmp_path / "ids.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return write


@pytest.fixture
def refused(capfd, monkeypatch):
    """Asserts that a command line is refused in one line that contains `culprits`."""
    monkeypatch.setenv("USE_TORCH", "0")

    def check(*argv, culprits):
        status = cli.main([str(part) for part in argv])
        out, err = capfd.readouterr()
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        for culprit in [culprits] if isinstance(culprits, str) else culprits:
            assert culprit in err

    return check


@pytest.fixture
def generate_refused(refused, good):
    def check(*argv, culprits, model=good):
        refused("generate", "--model", model, *argv, culprits=culprits)

    return check


# Checkpoints ----------------------------------------------------------------------------------------------------------


def both(refused, folder, tmp_path, culprits):
    """Both readers of a Hugging Face folder refuse it, and conversion leaves nothing."""
    refused("generate", "--model", folder, "--prompt", "a", culprits=culprits)
    target = tmp_path / "made" / "converted"
    refused("convert", folder, target, culprits=culprits)
    assert not (tmp_path / "made").exists()


def test_missing_folder(refused, tmp_path):
    both(refused, tmp_path / "nowhere", tmp_path, ["nowhere"])


def test_folder_that_is_no_checkpoint(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    both(refused, tmp_path / "empty", tmp_path, ["empty", "config.json"])


def test_file_instead_of_a_folder(refused, tmp_path):
    (tmp_path / "file").write_text("")
    both(refused, tmp_path / "file", tmp_path, "file")


def test_config_that_is_not_json(refused, broken, tmp_path):
    (broken / "config.json").write_text("{]")
    both(refused, broken, tmp_path, "config.json")


def test_truncated_safetensors(refused, broken, tmp_path):
    shard = broken / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    both(refused, broken, tmp_path, shard.name)


def test_missing_shard(refused, broken, tmp_path):
    (broken / "model-00001-of-00002.safetensors").unlink()
    both(refused, broken, tmp_path, "model-00001-of-00002.safetensors")


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"model_type": "mixtral"}, "mixtral"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "awq"}}, "quanti"),
    ],
)
def test_unsupported_models(refused, broken, tmp_path, changes, culprit):
    (broken / "config.json").write_text(json.dumps(RAW | changes))
    both(refused, broken, tmp_path, culprit)


def test_broken_tokenizer(generate_refused, broken):
    (broken / "tokenizer.json").write_text("{]")
    generate_refused("--prompt", "a", model=broken, culprits=["tokenizer", str(broken)])


def test_existing_destination(refused, good, tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    refused("convert", good, target, culprits=["target", "exists", "--overwrite"])
    assert [file.name for file in target.iterdir()] == ["mine.txt"]


# Head maps ------------------------------------------------------------------------------------------------------------

BAD_MAPS = {
    "not JSON": ("{]", "JSON"),
    "a list": ([], "object"),
    "another format": (HEADS | {"format": "lychee-heads/9"}, "lychee-heads/9"),
    "other layers": (HEADS | {"num_layers": 3, "retrieval": [[0, 1], [], []]}, "3 layers"),
    "other heads": (HEADS | {"num_kv_heads": 3, "retrieval": [[0, 1, 2], []]}, "3 KV heads"),
    "too few rows": (HEADS | {"retrieval": [[0, 1]]}, "retrieval"),
    "out of range": (HEADS | {"retrieval": [[0, 1], [2]]}, "layer 1"),
    "negative": (HEADS | {"retrieval": [[0, 1], [-1]]}, "layer 1"),
    "no whole numbers": (HEADS | {"retrieval": [[0, 1], [0.5]]}, "layer 1"),
    "twice": (HEADS | {"retrieval": [[0, 1], [1, 1]]}, "layer 1"),
    "not ascending": (HEADS | {"retrieval": [[0, 1], [1, 0]]}, "layer 1"),
    "layer 0 incomplete": (HEADS | {"retrieval": [[0], [1]]}, "layer 0"),
    "of another model": (HEADS | {"meta": {"fingerprint": "0" * 64}}, "fingerprint"),
}


@pytest.mark.parametrize("kind", BAD_MAPS)
def test_bad_maps_in_every_attention_mode(generate_refused, tmp_path, kind):
    content, culprit = BAD_MAPS[kind]
    file = tmp_path / "map.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    for attention in ("auto", "hybrid", "dense"):
        generate_refused("--prompt", "a", "--attention", attention, "--heads", file, culprits=[str(file), culprit])


def test_missing_map(generate_refused, tmp_path):
    generate_refused("--prompt", "a", "--heads", tmp_path / "none.json", culprits="none.json")


def test_bad_map_in_the_models_folder(generate_refused, broken):
    (broken / "heads.json").write_text(json.dumps(HEADS | {"retrieval": [[0], [1]]}))
    generate_refused("--prompt", "a", "--attention", "dense", model=broken, culprits=["heads.json", "layer 0"])


def test_bad_map_shown_or_plotted(refused, tmp_path):
    file = tmp_path / "map.json"
    file.write_text("{]")
    for command in ("show", "plot"):
        refused("heads", command, file, culprits=["map.json", "JSON"])
    assert [path.name for path in tmp_path.iterdir()] == ["map.json"]


# Prompts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--prompt", "a", "--prompt-file", "b"],
        ["--prompt", "a", "--prompt-ids", "b"],
        ["--prompt-file", "a", "--prompt-ids", "b"],
        ["--prompt", "a", "--prompt", "b"],
    ],
)
def test_no_prompt_or_several(generate_refused, argv):
    generate_refused(*argv, culprits=["exactly one", "--prompt-ids"])


def test_empty_prompts(generate_refused, ids, tmp_path):
    generate_refused("--prompt", "", culprits="empty")
    (tmp_path / "empty.txt").write_text("")
    generate_refused("--prompt-file", tmp_path / "empty.txt", culprits=["empty.txt", "empty"])
    generate_refused("--prompt-ids", ids([]), culprits=["ids.json", "empty"])
    generate_refused("--prompt-ids", ids([[3], []]), culprits=["ids.json", "row 1", "empty"])


@pytest.mark.parametrize(
    "content", ["[1, 2.5]", "[1, true]", '[1, "2"]', "[[1], [null]]", "[[1], 2]", "7", '{"a": [1]}']
)
def test_ids_that_are_not_whole_numbers(generate_refused, ids, content):
    generate_refused("--prompt-ids", ids(content), culprits="ids.json")


@pytest.mark.parametrize("token", [-1, 320, 10**30])
def test_ids_outside_the_vocabulary(generate_refused, ids, token):
    generate_refused("--prompt-ids", ids([[5], [5, token]]), culprits=["1", str(token), "319"])


def test_files_of_the_wrong_kind(generate_refused, ids, tmp_path):
    generate_refused("--prompt-ids", ids("[1, 2"), culprits=["ids.json", "JSON"])
    generate_refused("--prompt-ids", ids("[" * 100_000), culprits=["ids.json", "JSON"])
    generate_refused("--prompt-ids", tmp_path / "none.json", culprits="none.json")
    generate_refused("--prompt-file", tmp_path, culprits=str(tmp_path))
    (tmp_path / "latin1.txt").write_bytes("é".encode("latin-1"))
    generate_refused("--prompt-file", tmp_path / "latin1.txt", culprits=["latin1.txt", "UTF-8"])
    generate_refused("--prompt-ids", tmp_path / "latin1.txt", culprits=["latin1.txt", "UTF-8"])


def test_text_without_a_tokenizer(generate_refused, broken, ids):
    (broken / "tokenizer.json").unlink()
    generate_refused("--prompt", "a", model=broken, culprits=["tokenizer", "--prompt-ids"])
    generate_refused("--prompt-ids", ids([5]), "--stop", "a", model=broken, culprits=["tokenizer", "--stop"])


def test_chat_without_template_or_text(generate_refused, ids):
    generate_refused("--prompt", "a", "--chat", culprits="chat template")
    generate_refused("--prompt-ids", ids([5]), "--chat", culprits="--chat")


def test_text_that_is_no_unicode(generate_refused):
    generate_refused("--prompt", "a\udc80", culprits="Unicode")


def test_more_than_the_model_holds(generate_refused, ids):
    generate_refused("--prompt-ids", ids([[5], [5] * 500]), "--max-new-tokens", 13, culprits=["500", "13", "512"])


# Numbers --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "culprits"),
    [
        (["--max-new-tokens", 0], "max_new_tokens"),
        (["--max-new-tokens", -3], "max_new_tokens"),
        (["--temperature", -0.5], "temperature"),
        (["--temperature", "nan"], "temperature"),
        (["--top-k", -1], "top-k"),
        (["--top-p", 0], "top-p"),
        (["--min-p", 1.5], "min-p"),
        (["--repetition-penalty", 0], "repetition penalty"),
        (["--presence-penalty", "2.5"], "presence_penalty must lie between -2 and 2"),
        (["--logit-bias", "7=x"], "give a token id and a number"),
        (["--logit-bias", "7=101"], "must lie between -100 and 100"),
        (["--seed", -1], "seed"),
        (["--correct-every", -1], "correct_every"),
        (["--budget", 0], "budget"),
        (["--budget", -64], "budget"),
        (["--budget", 100], ["budget", "100", "64"]),
        (["--sink", -1], "sink"),
        (["--recent", -1], "recent"),
        (["--budget", 128, "--sink", 128, "--recent", 1], ["sink", "recent", "budget"]),
        (["--page-size", 0], "page size"),
        (["--page-size", -8], "page size"),
        (["--rule", "ratio", "--ratio", 0], "ratio"),
        (["--rule", "top_p", "--top-p-mass", 1.5], "top_p"),
        (["--rule", "threshold", "--threshold", 1], "threshold"),
        (["--stop", ""], "stop string"),
    ],
    ids=str,
)
@pytest.mark.parametrize("attention", ["auto", "dense"])
def test_numbers_out_of_range(generate_refused, argv, culprits, attention):
    generate_refused("--prompt", "a", "--attention", attention, *argv, culprits=culprits)


@pytest.mark.parametrize(
    ("argv", "culprits"),
    [
        (["nonsense"], "nonsense"),
        (["--nonsense"], "--nonsense"),
        (["generate", "--nonsense"], "--nonsense"),
        (["generate", "--prompt"], "--prompt"),
        (["generate", "unexpected"], "unexpected"),
        (["generate", "--temperature", "warm"], "--temperature"),
        (["generate", "--max-new-tokens", "2.5"], "--max-new-tokens"),
        (["generate", "--attention", "sparse"], ["--attention", "sparse", "hybrid"]),
        (["generate", "--dtype", "int8"], ["--dtype", "int8", "bfloat16"]),
        (["generate", "--rule", "best"], ["--rule", "best"]),
        (["generate", "--implementation", "cuda"], ["--implementation", "cuda"]),
        (["generate", "--kv-dtype", "int4"], ["--kv-dtype", "int4", "fp8"]),
        (["convert"], "SRC"),
        (["convert", "a"], "DST"),
        (["convert", "a", "b", "--dtype", "int8"], ["--dtype", "int8"]),
        (["heads"], "heads"),
        (["heads", "draw"], "draw"),
        (["heads", "show"], "FILE"),
        (["bench"], "bench"),
        (["bench", "everything"], "everything"),
    ],
    ids=str,
)
def test_unknown_options_commands_and_values(refused, argv, culprits):
    refused(*argv, culprits=culprits)


def test_an_implementation_that_is_not_here(generate_refused):
    generate_refused("--prompt", "a", "--implementation", "mosaic_tpu", culprits="mosaic_tpu")


# The whole process ----------------------------------------------------------------------------------------------------


def test_a_bad_prompt_in_a_process_of_its_own(good):
    argv = [sys.executable, "-m", "lychee_jax", "generate", "--model", str(good), "--prompt", ""]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: the prompt is empty\n")


def test_ctrl_c_during_conversion(good, tmp_path):
    """A real SIGINT, sent when half of the tensors have been read: nothing is left beside the destination."""
    program = (
        "import os, signal, sys\n"
        "from checkpoints_convert.weights import Weights\n"
        "from lychee_jax.cli.main import main\n"
        "read, seen = Weights.read, []\n"
        "def interrupted(self, *arguments):\n"
        "    seen.append(1)\n"
        "    if len(seen) == 10:\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return read(self, *arguments)\n"
        "Weights.read = interrupted\n"
        "sys.exit(main(['convert', *sys.argv[1:]]))\n"
    )
    target = tmp_path / "deep" / "target"
    argv = [sys.executable, "-c", program, str(good), str(target)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    assert list(tmp_path.iterdir()) == []


# Several devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "culprits"), [("0", ["tensor_parallel is 0", "at least 1"]), ("4096", ["4096", "this machine has"])]
)
def test_numbers_of_devices_that_cannot_be(refused, good, count, culprits):
    for command in (["generate", "--prompt", "a"], ["eval", "passkey", "--lengths", "256"]):
        refused(*command, "--model", good, "--tensor-parallel", count, culprits=culprits)
    refused("bench", "prefill", "--shape", "bundled", "--context", "64", "--tensor-parallel", count, culprits=culprits)


def test_a_model_is_measured_on_one_device(refused):
    refused("bench", "decode", "--tensor-parallel", "2", culprits=["--tensor-parallel", "--shape"])
