"""Bad checkpoints and bad destinations: one line that names everything, and nothing written."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert, store
from lychee_jax.cli import main as cli
from lychee_jax.errors import UserError
from tests.support import tiny_checkpoints

LLAMA = tiny_checkpoints.TINY["llama"] | {"num_hidden_layers": 1}
Q_PROJ, NORM, EMBEDDING = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.fixture
def hf(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    return tmp_path / "hf"


@pytest.fixture
def sharded(tmp_path):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA, shards=2)
    return tmp_path / "hf"


def refused(folder, **options):
    """What a conversion says that fails; nothing may be left of it."""
    before = sorted(folder.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        convert(folder, folder.parent / "deep" / "out", **options)
    assert sorted(folder.parent.rglob("*")) == before
    message = str(error.value)
    assert "\n" not in message
    return message


def change(folder, file="model.safetensors", *, drop=(), **tensors):
    """Rewrites a file; keywords have __ for dots."""
    content = {name: array for name, array in load_file(folder / file).items() if name not in drop}
    save_file(content | {name.replace("__", "."): array for name, array in tensors.items()}, folder / file)


def change_index(folder, change):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_everything_wrong_with_the_tensors_is_told_at_once(hf):
    tensors = load_file(hf / "model.safetensors")
    change(
        hf,
        drop=[NORM, "model.layers.0.mlp.up_proj.weight"],
        model__layers__0__self_attn__q_proj__weight=tensors[Q_PROJ].reshape(64, 16),
        model__layers__7__input_layernorm__weight=np.ones(32, np.float32),
        model__embed_tokens__weight=tensors[EMBEDDING].astype(np.int8),
    )
    message = refused(hf)
    assert "missing: model.layers.0.mlp.up_proj.weight, model.norm.weight" in message
    assert "extra: model.layers.7.input_layernorm.weight" in message
    assert f"misshapen: {Q_PROJ} (64×16 instead of 32×32)" in message
    assert f"unsupported dtype: {EMBEDDING} (I8)" in message


def test_long_lists_are_cut(hf):
    raw = LLAMA | {"num_hidden_layers": 4}
    (hf / "config.json").write_text(json.dumps(raw))
    assert "… and 19 more" in refused(hf)


def test_untied_without_a_head_misses_it(hf):
    change(hf, drop=["lm_head.weight"])
    assert "missing: lm_head.weight" in refused(hf)


def test_tied_with_a_misshapen_head(hf):
    (hf / "config.json").write_text(json.dumps(LLAMA | {"tie_word_embeddings": True}))
    change(hf, lm_head__weight=np.ones((95, 32), np.float32))
    assert "misshapen: lm_head.weight (95×32 instead of 96×32)" in refused(hf)


def test_shards_that_contradict_their_index(sharded):
    first, second = (load_file(sharded / name) for name in (FIRST, SECOND))
    double, moved, unlisted, gone = *list(second)[:3], next(iter(first))
    save_file(first | {double: second[double], moved: second[moved]}, sharded / FIRST)
    change(sharded, SECOND, drop=[moved])
    change(sharded, FIRST, drop=[gone])
    change_index(sharded, lambda weight_map: weight_map.pop(unlisted))
    message = refused(sharded)
    assert f"duplicate: {double} (in {FIRST} and {SECOND})" in message
    assert f"misplaced: {moved} (in {FIRST}, but the index says {SECOND})" in message
    assert f"not in the index: {unlisted} (in {SECOND})" in message
    assert f"missing: {gone}" in message
    assert message.count(unlisted) == 1


def test_missing_and_truncated_shards(sharded):
    shard = sharded / FIRST
    content = shard.read_bytes()
    shard.write_bytes(content[:-10])
    message = refused(sharded)
    assert f"truncated or damaged file: {FIRST}" in message
    assert "missing:" not in message  # its tensors are not listed one by one
    shard.unlink()
    assert f"missing file: {FIRST}" in refused(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_single_file(hf, keep):
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated or damaged file: model.safetensors" in refused(hf)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_broken_index(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    assert "no safetensors index" in refused(sharded)


def test_folders_that_are_no_checkpoints(tmp_path, hf):
    assert "no such folder" in refused(tmp_path / "none" / "at" / "all")
    assert "is a file" in refused(hf / "config.json")
    (hf / "config.json").rename(hf / "kept.json")
    assert "has no config.json" in refused(hf)
    (hf / "kept.json").rename(hf / "config.json")
    (hf / "model.safetensors").rename(hf / "weights.safetensors")
    assert "by their index only" in refused(hf)
    (hf / "weights.safetensors").rename(hf / "pytorch_model.bin")
    assert re.search(r"\.bin weights only.*safetensors", refused(hf))
    (hf / "pytorch_model.bin").unlink()
    assert "not a checkpoint" in refused(hf)


def test_configs_that_are_refused(hf):
    for raw, reason in (
        (LLAMA | {"model_type": "gpt2"}, "gpt2"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "awq"),
    ):
        (hf / "config.json").write_text(json.dumps(raw))
        assert reason in refused(hf)


def test_unknown_dtype(hf):
    assert "use one of float32, bfloat16, float16" in refused(hf, dtype="int8")


def test_numbers_that_float16_cannot_hold(hf):
    change(hf, model__norm__weight=np.full(32, 1e5, np.float32))
    message = refused(hf, dtype="float16")
    assert NORM in message
    assert "use bfloat16 or float32" in message


def test_a_converted_folder_is_not_converted_again(hf):
    convert(hf, hf.parent / "out")
    with pytest.raises(UserError, match="converted already"):
        convert(hf.parent / "out", hf.parent / "again")


def offline(*_, **__):
    raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nand a long explanation")


def test_hub_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match=r"some/model is no local folder, and the Hugging Face Hub.*no network\)$"):
        convert("some/model", tmp_path / "out")
    for path in ("./model", "/some/model", "a/b/c", ".."):
        with pytest.raises(UserError, match=r"no such folder|in use|exists"):
            convert(f"{path}/missing", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("shards", [1, 2])
def test_only_the_needed_files_of_a_hub_model_are_fetched(tmp_path, monkeypatch, shards):
    remote, cache = tmp_path / "remote", tmp_path / "cache"
    tiny_checkpoints.write_checkpoint(remote, LLAMA, shards=shards)
    for name in (
        "tokenizer.json",
        "consolidated.safetensors",
        "model.fp16.safetensors",
        "pytorch_model.bin",
        "README.md",
    ):
        (remote / name).write_text("{}")
    cache.mkdir()

    def download(repository, allow_patterns):
        assert repository == "some/model"
        for name in huggingface_hub.utils.filter_repo_objects(os.listdir(remote), allow_patterns=allow_patterns):
            shutil.copy(remote / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    convert("some/model", tmp_path / "out", verify=True)
    weights = {"model.safetensors"} if shards == 1 else {"model.safetensors.index.json", FIRST, SECOND}
    assert {file.name for file in cache.iterdir()} == {"config.json", "tokenizer.json"} | weights


def test_an_existing_destination_is_not_touched(hf):
    out = hf.parent / "out"
    out.mkdir()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"out exists; .*--overwrite"):
        convert(hf, out)
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    convert(hf, out, overwrite=True)
    assert not (out / "mine.txt").exists()
    assert sorted(file.name for file in hf.parent.iterdir()) == ["hf", "out"]


def test_overwrite_keeps_the_old_folder_when_the_new_one_fails(hf, monkeypatch):
    out = hf.parent / "out"
    convert(hf, out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    change(hf, drop=[NORM])
    with pytest.raises(UserError, match="missing"):
        convert(hf, out, overwrite=True)
    change(hf, model__norm__weight=np.zeros(32, np.float32))
    monkeypatch.setattr(store, "write", offline)
    with pytest.raises(UserError):
        convert(hf, out, overwrite=True)
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert sorted(file.name for file in hf.parent.iterdir()) == ["hf", "out"]


def test_overwrite_spares_the_source_the_working_folder_and_files(hf, monkeypatch):
    with pytest.raises(UserError, match="would go with it"):
        convert(hf, hf, overwrite=True)
    with pytest.raises(UserError, match="would go with it"):
        convert(hf, hf.parent, overwrite=True)
    (hf.parent / "here").mkdir()
    monkeypatch.chdir(hf.parent / "here")
    with pytest.raises(UserError, match="would go with it"):
        convert(hf, ".", overwrite=True)
    (hf.parent / "file").write_text("kept")
    with pytest.raises(UserError, match="is a file"):
        convert(hf, hf.parent / "file", overwrite=True)
    assert (hf.parent / "file").read_text() == "kept"


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), MemoryError()]
)
def test_a_failure_in_the_middle_leaves_nothing(hf, monkeypatch, failure):
    def fail(stage, done, total):
        if done > total // 2:
            raise failure

    expected = UserError if isinstance(failure, OSError) else type(failure)
    with pytest.raises(expected) as error:
        convert(hf, hf.parent / "deep" / "out", progress=fail)
    assert not isinstance(failure, OSError) or str(error.value).endswith("out: No space left on device")
    assert [file.name for file in hf.parent.iterdir()] == ["hf"]


def test_a_failed_verification_leaves_nothing(hf, monkeypatch):
    write = store.write

    def write_and_damage(folder, *args):
        write(folder, *args)
        chunk = next(file for file in (folder / "norm.scale" / "c").rglob("*") if file.is_file())
        chunk.write_bytes(bytes(len(chunk.read_bytes())))

    monkeypatch.setattr(store, "write", write_and_damage)
    assert "norm.scale" in refused(hf, verify=True)


def test_too_little_space_is_told_before_anything_is_written(hf, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    assert "GB left" in refused(hf)


def test_write_errors_of_the_system_are_one_line(hf):
    """A limit on file sizes stands for a full disk: the same error path, in Orbax's own threads."""
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000));"
        "from lychee_jax.cli.main import main; sys.exit(main(['convert', 'hf', 'deep/out']))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=hf.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"error: cannot write .*/deep/out: File too large\n", done.stderr)
    assert [file.name for file in hf.parent.iterdir()] == ["hf"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_ctrl_c_leaves_nothing_and_exits_with_130(tmp_path):
    raw = LLAMA | {"num_hidden_layers": 40}
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", raw)
    command = [sys.executable, "-m", "checkpoints_convert", "hf", "deep/out", "--verify"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("deep/.out.*/weights*/*"))) < 20:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.strip()) == (130, "", "interrupted")
    assert [file.name for file in tmp_path.iterdir()] == ["hf"]


def test_the_command_line_tells_errors_in_one_line(hf, capsys):
    change(hf, drop=[NORM])
    assert cli.main(["convert", str(hf), str(hf.parent / "out")]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert NORM in said.err
