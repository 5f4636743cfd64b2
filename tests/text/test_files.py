"""Text and JSON in files: byte order marks, odd line separators, numbers that JSON does not have, depth."""

import ast
import json
import math
from pathlib import Path

import pytest

from lychee_jax import files
from lychee_jax.attention.head_map import HeadMap
from lychee_jax.config import ModelConfig
from lychee_jax.errors import UserError
from lychee_jax.evaluation.journal import append_lines, read_lines
from lychee_jax.run_folder import MetricsFile

ROOT = Path(__file__).parents[2]


def test_texts_and_json_are_read_and_written_in_one_module():
    """Or else some writer writes NaN or trips over a file's name, and some reader trips over a byte order mark."""
    # A fingerprint, which must never change, and a tokenizer's state, which is no file.
    allowed = {("lychee_jax/config.py", "dumps"), ("lychee_jax/text/tokenizer.py", "loads")}
    found = set()
    for package in ("lychee_jax", "checkpoints_convert", "pallas_kernels"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
                    found.add((str(file.relative_to(ROOT)), node.attr))
                if isinstance(node, ast.Attribute) and node.attr == "write_text":
                    found.add((str(file.relative_to(ROOT)), node.attr))
    assert {(file, name) for file, name in found if file != "lychee_jax/files.py"} == allowed


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_no_writer_writes_a_number_that_json_does_not_have(number, tmp_path):
    with pytest.raises(UserError, match=rf"rows\[1\]\.score is {number}"):
        files.json_text({"rows": [{"score": 1.0}, {"score": number}]})
    with pytest.raises(UserError, match=f"a result is {number}"):
        files.json_text(number)
    with pytest.raises(UserError, match="score"):
        append_lines(tmp_path / "answers.jsonl", [{"score": number}])
    with pytest.raises(UserError, match="loss"):
        MetricsFile(tmp_path / "metrics.jsonl", 0).write(step=1, loss=number)
    with pytest.raises(UserError, match="tau"):
        HeadMap.from_json(HeadMap(1, 1, ((0,),)).to_json() | {"meta": {"tau": number}})


def test_text_without_its_byte_order_mark_and_with_all_its_newlines(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\xef\xbb\xbf\n")
    assert files.read_text(file) == "one\r\ntwo\ufeff\n"
    file.write_bytes(b"a\xff")
    with pytest.raises(UserError, match=r"text\.txt is not UTF-8 text: .* at byte 1"):
        files.read_text(file)
    with pytest.raises(UserError, match="cannot be read"):
        files.read_text(tmp_path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\r\n"])
def test_only_a_line_feed_separates_json_lines(separator, tmp_path):
    records = [{"text": f"a{separator}b"}, {"text": separator}]
    append_lines(tmp_path / "lines.jsonl", records)
    assert read_lines(tmp_path / "lines.jsonl") == records
    lines = "\ufeff" + "\r\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    assert files.parse_json_lines(lines, "lines") == records


def test_a_line_that_is_no_json_is_named_by_its_number():
    with pytest.raises(UserError, match="lines, line 3 is not valid JSON"):
        files.parse_json_lines('{}\n\n{"a"}\n', "lines")


def test_a_configs_byte_order_mark_is_dropped(tmp_path):
    raw = json.loads((ROOT / "lychee_jax" / "bundled" / "config.json").read_text())
    (tmp_path / "config.json").write_text("\ufeff" + json.dumps(raw), encoding="utf-8")
    assert ModelConfig.from_folder(tmp_path) == ModelConfig.from_hf(raw)


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, "[" * 100_000 + "]" * 100_000])
def test_deep_nesting_is_one_error(deep, tmp_path):
    (tmp_path / "config.json").write_text(deep)
    with pytest.raises(UserError, match=r"config\.json is not valid JSON: it is nested too deeply"):
        ModelConfig.from_folder(tmp_path)
    with pytest.raises(UserError, match=r"head map .*nested too deeply"):
        HeadMap.load(tmp_path / "config.json")


def test_half_of_a_surrogate_pair_is_refused_when_read_and_never_breaks_a_writer(tmp_path):
    content = HeadMap(1, 1, ((0,),)).to_json()
    (tmp_path / "map.json").write_text(json.dumps(content | {"model": "\ud800"}))
    with pytest.raises(UserError, match=r"map\.json is not valid JSON: .*surrogate"):
        HeadMap.load(tmp_path / "map.json")
    (tmp_path / "map.json").write_text(json.dumps(content | {"model": "😀 \\ud800"}))  # a pair, and a backslash
    assert HeadMap.load(tmp_path / "map.json").model == "😀 \\ud800"
    written = files.json_text({"label": "é\udc80"})
    assert json.loads(written.encode()) == {"label": "é\udc80"}
    assert files.json_text({"label": "é"}) == '{"label": "é"}'
