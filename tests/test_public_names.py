"""What users import: the package's own names, the names of former modules, the logger."""

import importlib
import logging
import subprocess
import sys

import pytest

import lychee_jax
from lychee_jax import _moved
from lychee_jax.llm import LLM

FORMER = {  # what notebooks and documents imported from modules that have moved
    "lychee_jax.gates": ("HardConcrete", "HardKuma", "Plain", "harden"),
    "lychee_jax.generate": ("Engine", "GenerateOptions", "Result", "Timing"),
    "lychee_jax.heads": ("HeadMap",),
    "lychee_jax.loaded": ("Generation", "LoadedModel"),
    "lychee_jax.plots": ("plot_heads", "plot_reading"),
    "lychee_jax.reading": ("Reading",),
    "lychee_jax.sampling": ("SamplingParams",),
    "lychee_jax.selection": ("SelectionPolicy",),
    "lychee_jax.training.data": ("ask", "hide", "passkeys", "prompt"),
    "lychee_jax.training.language": ("text_of",),
    "lychee_jax.training.pictures": ("History", "plot_training"),
    "lychee_jax.training.questions": ("make_source",),
}


def test_every_public_name_is_there():
    for name in lychee_jax.__all__:
        assert getattr(lychee_jax, name).__name__ == name.replace("LoadedModel", "LLM")
    assert lychee_jax.LoadedModel is LLM
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lychee_jax.nothing


@pytest.mark.parametrize("module", _moved.MOVED)
def test_names_are_found_where_they_were(module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{module} has moved to {_moved.MOVED[module][0]}") as said:
        former = importlib.import_module(module)
    assert len(said) == 1
    assert FORMER[module]
    for name in FORMER[module]:
        found = getattr(former, name)
        assert any(getattr(importlib.import_module(home), name, None) is found for home in _moved.MOVED[module])
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
        _ = former.nothing


def test_the_warning_names_the_line_that_imports(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "lychee_jax.heads", raising=False)
    with pytest.warns(DeprecationWarning, match="attention.head_map") as said:
        exec(compile("from lychee_jax.heads import HeadMap", "notebook.py", "exec"), {})
    assert said[0].filename == "notebook.py"


def test_the_package_alone_imports_no_jax_and_logs_nowhere():
    program = (
        "import sys, logging, lychee_jax; logging.getLogger('lychee_jax.llm').warning('unheard'); "
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert any(isinstance(each, logging.NullHandler) for each in logging.getLogger("lychee_jax").handlers)
