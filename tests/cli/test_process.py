"""What the command line sets in its process before JAX is imported, unless the user has set it."""

import os
import subprocess
import sys

import pytest

RUN = """
import os, sys
from lychee_jax.cli.main import main
assert main(["--version"]) == 0
assert "jax" not in sys.modules, "JAX reads its environment when it is imported"
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
import jax
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


@pytest.mark.parametrize(("user", "level"), [(None, "2"), ("0", "0")])
def test_warnings_of_xla_stay_off_standard_error_unless_the_user_wants_them(user, level):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": user} if user is not None else {}
    ran = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[1:] == [level, level]


def test_the_library_alone_sets_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    code = "import os, lychee_jax, lychee_jax.errors; assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
