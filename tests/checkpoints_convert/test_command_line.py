"""`python -m checkpoints_convert` has a parser of its own, which knows what `lychee convert` knows."""

import argparse
import inspect

import pytest

from checkpoints_convert import __main__ as command_line
from lychee_jax.cli import main as cli
from tests.support import tiny_checkpoints

LLAMA = tiny_checkpoints.TINY["llama"]


def test_it_has_the_arguments_of_lychee_convert():
    own = [each for each in command_line.parser()._actions if not isinstance(each, argparse._HelpAction)]
    lychee = inspect.signature(cli.convert).parameters
    assert [each.dest for each in own] == list(lychee)
    for each in own:
        theirs = lychee[each.dest]
        default = None if theirs.default is inspect.Parameter.empty else theirs.default
        assert each.default == default, each.dest
        # Literal[…] is written out there, as a string: annotations are not evaluated.
        assert all(repr(choice).strip("'") in theirs.annotation for choice in each.choices or ()), each.dest


def test_it_converts_and_prints_what_it_did(tmp_path, capsys):
    tiny_checkpoints.write_checkpoint(tmp_path / "hf", LLAMA)
    argv = [str(tmp_path / "hf"), str(tmp_path / "out"), "--dtype", "bfloat16", "--verify"]
    assert command_line.main(argv) == 0
    said = capsys.readouterr()
    assert "bfloat16" in said.out
    assert "verified" in said.out
    assert said.err == ""
    assert command_line.main(argv) == 2  # the folder exists
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "--overwrite" in said.err
    assert command_line.main([*argv, "--overwrite"]) == 0


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [([], "DST"), (["a", "b", "--dtype", "int3"], "int3"), (["a", "b", "--verfy"], "--verfy"), (["a", "b", "c"], "c")],
)
def test_wrong_arguments_are_told_in_one_line(capsys, argv, culprit):
    with pytest.raises(SystemExit) as error:
        command_line.main(argv)
    said = capsys.readouterr()
    assert (error.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    assert culprit in said.err


def test_bad_input_is_told_in_one_line(tmp_path, capsys):
    assert command_line.main([str(tmp_path), str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert said.err.startswith("error: not a checkpoint")


def test_progress_is_one_line_that_goes_away(capsys):
    command_line._show("verify", 1, 2)
    command_line._show("verify", 2, 2)
    assert capsys.readouterr().err == "\r\x1b[Kverify 1/2\r\x1b[K"
