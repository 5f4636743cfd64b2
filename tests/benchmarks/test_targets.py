"""`lychee bench targets`: which targets of results files are missed."""

import pytest

from lychee_jax.benchmarks.targets import read_targets
from lychee_jax.cli import main as cli
from lychee_jax.errors import UserError
from lychee_jax.files import json_text

LISTED = [
    {"what": "a step, ms", "value": 5.2, "target": 4.8, "sense": "<="},
    {"what": "at the target", "value": 3, "target": 3.0, "sense": "<="},
    {"what": "tokens/s", "value": 900.5, "target": 1000, "sense": ">="},
    {"what": "on the right side", "value": 2.7, "target": 1.65, "sense": ">="},
    {"what": "beyond reach", "value": None, "target": 20, "sense": "<="},
]


@pytest.fixture
def listed(tmp_path):
    """A results file with these targets."""
    file = tmp_path / "some.json"
    file.write_text(json_text({"rows": [], "targets": LISTED}))
    return file


@pytest.mark.parametrize(("number", "met"), list(enumerate([False, True, False, True, False])))
def test_a_target_is_met_on_its_side(number: int, met: bool, listed):
    assert read_targets(listed)[number].met is met


def test_the_command_prints_the_missed_ones(tmp_path, listed, capsys):
    (tmp_path / "none.json").write_text(json_text({"rows": []}))
    assert cli.main(["bench", "targets", str(listed), str(tmp_path / "none.json")]) == 0
    assert capsys.readouterr().out.replace(f"{tmp_path}/", "").splitlines() == [
        "some.json: 2 of 5 targets are met",
        "  a step, ms: 5.2, target <= 4.8",
        "  tokens/s: 900.5, target >= 1000",
        "  beyond reach: not measured, target <= 20",
        "none.json: lists no targets",
    ]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ({}, "targets must be a list"),
        ([3], "target 1 must be an object"),
        ([LISTED[0], {"value": 1, "target": 2, "sense": "<="}], "target 2 must be an object"),
        ([LISTED[0] | {"value": "fast"}], "target 1 has value 'fast'"),
        ([LISTED[0] | {"target": None}], "target 1 has value 5.2 and target None"),
        ([LISTED[0] | {"sense": "<"}], "target 1 has sense '<'; give <= or >="),
    ],
)
def test_targets_of_another_form_are_refused(targets, message: str, tmp_path):
    (tmp_path / "some.json").write_text(json_text({"targets": targets}))
    with pytest.raises(UserError, match=message):
        read_targets(tmp_path / "some.json")


def test_a_missing_file_is_one_line(tmp_path, capsys):
    assert cli.main(["bench", "targets", str(tmp_path / "gone.json")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
