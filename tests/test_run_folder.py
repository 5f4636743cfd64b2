"""Folders of runs: claimed, resumed, refused; lines that an interrupt cut off."""

import json
from pathlib import Path

import pytest

from lychee_jax.errors import UserError
from lychee_jax.run_folder import MetricsFile, append_lines, claim, read_json, read_lines, write_json

SETTINGS = {"seed": 0, "lengths": (1, 2), "text": None}


def test_the_same_run_claims_its_folder_again(tmp_path: Path):
    folder = tmp_path / "new" / "run"
    claim(folder, SETTINGS)
    before = (folder / "plan.json").read_bytes()
    (folder / "mine.txt").write_text("mine")
    claim(folder, SETTINGS)
    claim(folder, SETTINGS | {"later": None})  # a setting that older folders do not have
    assert (folder / "plan.json").read_bytes() == before
    assert (folder / "mine.txt").read_text() == "mine"


def test_another_run_is_refused_by_the_settings_that_differ(tmp_path: Path):
    claim(tmp_path, SETTINGS)
    for changed, message in [
        ({"seed": 1}, r"other settings \(seed was 0, now 1\)"),
        ({"lengths": (1, 3), "more": "x"}, r"lengths was \[1, 2\], now \[1, 3\], more was None, now 'x'"),
    ]:
        with pytest.raises(UserError, match=message):
            claim(tmp_path, SETTINGS | changed)
    with pytest.raises(UserError, match="lengths was"):
        claim(tmp_path, {"seed": 0})
    assert read_json(tmp_path / "plan.json") == json.loads(json.dumps(SETTINGS))


def test_what_was_read_may_grow_but_not_change(tmp_path: Path):
    claim(tmp_path, SETTINGS, inputs={"a.txt": "1"})
    claim(tmp_path, SETTINGS, inputs={"b.txt": "2"})
    claim(tmp_path, SETTINGS)
    before = (tmp_path / "plan.json").read_bytes()
    with pytest.raises(UserError, match=r"has read other contents of a\.txt, b\.txt; give another folder"):
        claim(tmp_path, SETTINGS, inputs={"a.txt": "2", "b.txt": "1", "c.txt": "3"})
    with pytest.raises(UserError, match="seed was 0, now 1"):
        claim(tmp_path, SETTINGS | {"seed": 1}, inputs={"a.txt": "1"})
    assert (tmp_path / "plan.json").read_bytes() == before


@pytest.mark.parametrize(("content", "message"), [("{]", "is not valid JSON"), ("[1]", "must hold a JSON object")])
def test_what_is_in_the_way_stays_as_it_is(tmp_path: Path, content: str, message: str):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(UserError, match=message):
        claim(tmp_path, SETTINGS, "settings.json")
    with pytest.raises(UserError, match="is a file; give a folder"):
        claim(file, SETTINGS)
    assert file.read_text() == content
    assert list(tmp_path.iterdir()) == [file]


def test_a_line_that_was_cut_off_is_removed(tmp_path: Path):
    file = tmp_path / "lines.jsonl"
    assert read_lines(file) == []
    append_lines(file, [{"a": "é"}, {"b": 2}])
    whole = file.read_bytes()
    with file.open("a") as handle:
        handle.write('{"c": ')
    assert read_lines(file) == [{"a": "é"}, {"b": 2}]
    assert file.read_bytes() == whole
    file.write_text("nonsense\n")
    with pytest.raises(UserError, match="line 1 is not valid JSON"):
        read_lines(file)


def test_steps_that_are_done_again_are_dropped(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file, 0)
    for step in (1, 2, 3):
        metrics.write(step=step, loss=1 / 3)
    with file.open("a") as handle:
        handle.write('{"step": 4, "lo')
    MetricsFile(file, 2).write(step=3, loss=0.5)
    assert [(line["step"], line["loss"]) for line in read_lines(file)] == [(1, 0.333333), (2, 0.333333), (3, 0.5)]


def test_json_appears_whole_or_not_at_all(tmp_path: Path):
    file = tmp_path / "results.json"
    assert read_json(file) == {}
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]
