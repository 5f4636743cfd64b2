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

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from checkpoints_convert import convert, store
from lychee_jax.cli import main as cli
from lychee_jax.errors import UserError
from lychee_jax.loading import load
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
    moved, unlisted, gone = *list(second)[1:3], next(iter(first))
    save_file(first | {moved: second[moved]}, sharded / FIRST)
    change(sharded, SECOND, drop=[moved])
    change(sharded, FIRST, drop=[gone])
    change_index(sharded, lambda weight_map: weight_map.pop(unlisted))
    message = refused(sharded)
    assert f"misplaced: {moved} (in {FIRST}, but the index says {SECOND})" in message
    assert f"not in the index: {unlisted} (in {SECOND})" in message
    assert f"missing: {gone}" in message
    assert message.count(unlisted) == 1


def test_the_index_decides(sharded, caplog):
    """Copies that it does not mean, tensors that it does not name, one file under two names, and files beside."""
    index = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    first, second = (load_file(sharded / name) for name in (FIRST, SECOND))
    double, spelled = list(second)[:2]
    wanted = first | second
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    strange = {"model.layers.7.input_layernorm.weight": np.ones(32, np.float32)}
    save_file(first | {double: second[double] + 1} | frequencies | strange, sharded / FIRST)
    change_index(sharded, lambda weight_map: weight_map.update({spelled: f"./{index[spelled]}"}))
    save_file({"base_model.model.x.lora_A.weight": np.ones(2, np.float32)}, sharded / "adapter_model.safetensors")
    (sharded / "adapter_config.json").write_text("{}")
    convert(sharded, sharded.parent / "out", verify=True)
    written = store.read(sharded.parent / "out" / "weights", store.shapes(sharded.parent / "out" / "weights"))
    assert sum(array.size for array in written.values()) == sum(array.size for array in wanted.values())
    parts = np.concatenate([wanted[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("gate", "up")])
    np.testing.assert_array_equal(written["layers.0.mlp.gate_up_proj.kernel"], parts)
    assert caplog.messages == [
        f"{sharded}: not used: adapter_model.safetensors",
        f"{sharded}: not in the index, so not used: model.layers.7.input_layernorm.weight",
    ]
    change_index(sharded, lambda weight_map: weight_map.update({spelled: "../elsewhere.safetensors"}))
    assert "../elsewhere.safetensors lies outside its folder" in refused(sharded)


def test_an_adapter_alone_is_no_model(hf):
    (hf / "model.safetensors").rename(hf / "adapter_model.safetensors")
    (hf / "adapter_config.json").write_text("{}")
    assert "has an adapter and no model (adapter_config.json); merge it" in refused(hf)


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
        (LLAMA | {"quantization_config": {"quant_method": "awq"}}, "quantization_config: awq"),
        (LLAMA | {"quantization": {"group_size": 64, "bits": 4}}, "quantization: 4 bits"),
        (LLAMA | {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}, "quantization: mxfp4"),
        (LLAMA | {"dual_chunk_attention_config": {"local_size": 8}}, "chunk_size"),
    ):
        (hf / "config.json").write_text(json.dumps(raw))
        assert reason in refused(hf)


@pytest.mark.parametrize("name", ["qweight", "scales", "weight_scale_inv", "weight.absmax"])
def test_quantised_weights_are_refused_in_one_word_whatever_the_config_says(hf, name):
    change(hf, **{f"model__layers__0__mlp__up_proj__{name.replace('.', '__')}": np.ones(2, np.float32)})
    message = refused(hf)
    assert f"quantised checkpoints (model.layers.0.mlp.up_proj.{name} is one of 1" in message
    assert "extra" not in message


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


@pytest.mark.parametrize("name", [b"a\\b", b"deep\\er/out", b"a\xffb"])
def test_destinations_that_the_array_library_misreads(hf, name, capsys):
    before = sorted(hf.parent.rglob("*"))
    for argv in (["convert", str(hf)], ["convert", str(hf), "--overwrite"]):
        assert cli.main([*argv, str(hf.parent / os.fsdecode(name))]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert re.search(r"backslash|not UTF-8", said.err)
    assert sorted(hf.parent.rglob("*")) == before


def test_a_converted_folder_that_was_moved_to_such_a_place(hf):
    convert(hf, hf.parent / "out")
    for name, reason in ((b"a\\b", "backslash"), (b"a\xffb", "not UTF-8")):
        moved = (hf.parent / "out").rename(hf.parent / os.fsdecode(name))
        with pytest.raises(UserError, match=reason):
            load(moved)
        moved.rename(hf.parent / "out")


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

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(store, "write", fail)
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
