"""What commands set in their process before JAX is imported, unless the user has set it."""

import os
import subprocess
import sys

import pytest

COMMANDS = {
    "lychee": "from lychee_jax.cli.main import main; assert main(['--version']) == 0",
    "a study": "from lychee_jax.studies.command import main; assert main(lambda: print()) == 0",
}
RUN = """
import os, sys
{}
assert "jax" not in sys.modules, "JAX reads its environment when it is imported"
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
import jax
print(os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(("user", "level"), [(None, "2"), ("0", "0")])
def test_warnings_of_xla_stay_off_standard_error_unless_the_user_wants_them(command, user, level):
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": user} if user is not None else {}
    program = [sys.executable, "-c", RUN.format(COMMANDS[command])]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[1:] == [level, level]


def test_the_library_alone_sets_nothing():
    environment = {name: value for name, value in os.environ.items() if name != "TF_CPP_MIN_LOG_LEVEL"}
    code = "import os, lychee_jax, lychee_jax.errors; assert 'TF_CPP_MIN_LOG_LEVEL' not in os.environ"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
