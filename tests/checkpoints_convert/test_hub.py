"""Models on the Hugging Face Hub, here a server on this machine: needed files only, the cache, errors of one line."""

import functools

import huggingface_hub
import pytest
from flax import nnx

import lychee_jax
from checkpoints_convert import convert
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.cli import main as cli
from lychee_jax.cli.console import load_model
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.loading import find, load
from tests.support import hub as fake_hub
from tests.support import tiny_checkpoints, tiny_tokenizers

LLAMA = tiny_checkpoints.TINY["llama"] | {"num_hidden_layers": 1, "vocab_size": 320}
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
TEXT = {"tokenizer.json", "tokenizer_config.json"}
STRANGERS = (
    "README.md",
    "consolidated.safetensors",
    "model.fp16.safetensors",
    "pytorch_model.bin",
    "training_args.bin",
)


@pytest.fixture(params=[1])
def hub(request, tmp_path):
    """A model in so many shards, with files beside it that nobody needs."""
    folder = tmp_path / "remote"
    tiny_checkpoints.write_checkpoint(folder, LLAMA, shards=request.param)
    tiny_tokenizers.write_tokenizer(folder, tiny_tokenizers.byte_level())
    for name in STRANGERS:
        (folder / name).write_text("{}")
    with fake_hub.serve(folder) as served:
        yield served


@pytest.fixture
def reach(monkeypatch, tmp_path):
    """Sends downloads to an address, with a cache of the test's own."""
    download = huggingface_hub.snapshot_download
    monkeypatch.chdir(tmp_path)

    def patch(url, **options):
        options |= {"endpoint": url, "cache_dir": tmp_path / "cache", "token": False}
        monkeypatch.setattr(huggingface_hub, "snapshot_download", functools.partial(download, **options))

    return patch


def refused(model, **options):
    with pytest.raises(UserError) as error:
        load(model, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("hub", "weights"), [(1, {"model.safetensors"}), (2, {INDEX, FIRST, SECOND})], indirect=["hub"]
)
def test_only_the_needed_files_are_downloaded_and_only_once(hub, reach, tmp_path, weights):
    reach(hub.url)
    loaded = lychee_jax.load("some/model")
    assert sorted(hub.downloaded) == sorted({"config.json"} | TEXT | weights)
    assert loaded.name == "some/model"
    assert loaded.tokenizer is not None
    convert("some/model", tmp_path / "out", verify=True)
    assert len(hub.downloaded) == 3 + len(weights)
    wanted, found = (nnx.state(load(folder).model) for folder in (hub.folder, tmp_path / "out"))
    assert str(wanted) == str(found) == str(nnx.state(loaded.model))


@pytest.mark.parametrize("hub", [2], indirect=True)
def test_without_a_network_the_cache_is_used_if_it_has_everything(hub, reach, tmp_path):
    reach(hub.url)
    hub.refused[SECOND] = (403, "")
    message = refused("some/model")
    assert "did not give it" in message
    assert "the next try goes on" in message
    for offline in ({"local_files_only": True}, {}):
        reach("http://127.0.0.1:9", **offline)  # nobody listens there
        message = refused("some/model")
        # Older versions of the library keep no list of a model's files: then the shard that is missing is named.
        assert "cannot be reached" in message or f"cache has no {SECOND}" in message
        assert "HF_HUB_OFFLINE" in message
    hub.refused.clear()
    hub.downloaded.clear()
    reach(hub.url)
    load("some/model")
    assert hub.downloaded == [SECOND]
    for offline in ({"local_files_only": True}, {}):
        reach("http://127.0.0.1:9", **offline)
        assert load("some/model").path.is_relative_to(tmp_path / "cache")


def test_a_cache_that_others_made_may_lack_shards(reach, tmp_path):
    """Older versions of the library, and other programs, keep no list of a model's files."""
    reach("http://127.0.0.1:9", local_files_only=True)
    model = tmp_path / "cache" / "models--some--model"
    snapshot = model / "snapshots" / fake_hub.COMMIT
    tiny_checkpoints.write_checkpoint(snapshot, LLAMA, shards=2)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(fake_hub.COMMIT)
    assert find("some/model") == snapshot
    (snapshot / SECOND).unlink()
    assert f"some/model: the Hub's cache has no {SECOND}; " in refused("some/model")
    (snapshot / INDEX).unlink()
    assert "neither model.safetensors nor" in refused("some/model")


def test_a_folder_of_that_name_comes_first(hub, reach, tmp_path):
    reach(hub.url)
    tiny_checkpoints.write_checkpoint(tmp_path / "some" / "model", LLAMA, seed=1)
    assert not load("some/model").path.is_absolute()
    assert hub.downloaded == []


def test_errors_are_one_line_each(hub, reach):
    reach(hub.url)
    assert "no such model on the Hugging Face Hub, or a private one" in refused("some/other")
    hub.refused[""] = (401, "GatedRepo")
    assert "some/model is gated: accept its terms at https://huggingface.co/some/model" in refused("some/model")
    hub.refused = {"model.safetensors": (403, "GatedRepo")}  # whose files are listed for everyone
    assert "some/model is gated" in refused("some/model")
    for name in ("some--thing/x", "some/" + "x" * 97):
        assert "did not give it (HFValidationError" in refused(name)
    for name in ("./some/model", "my-8b", "a/b/c", "/some/model", "some/model/"):
        assert f"no such folder: {name} (" in refused(name)


def test_a_gguf_file_is_to_be_converted_first(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(20))
    assert "is a GGUF file; convert it first: lychee convert" in refused(tmp_path / "model.gguf")


def test_a_model_without_safetensors_is_told(hub, reach):
    reach(hub.url)
    (hub.folder / "model.safetensors").unlink()
    assert refused("some/model").startswith("some/model gave neither model.safetensors nor")


def test_the_command_line_takes_hub_ids(hub, reach, tmp_path, capsys):
    reach(hub.url)
    HeadMap.all(ModelConfig.from_hf(LLAMA)).save(tmp_path / "heads.json")
    assert cli.main(["heads", "show", "heads.json", "--model", "some/model"]) == 0
    assert hub.downloaded == ["config.json"]  # a head map needs no weights
    assert load_model("some/model", None).name == "some/model"
    capsys.readouterr()
    (tmp_path / "ids.json").write_text("[5, 6, 7]")
    assert cli.main(["generate", "--model", "some/other", "--prompt-ids", "ids.json"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
