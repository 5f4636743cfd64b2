"""What docs/serving.md shows to clients, against a server."""

import json
import re
from pathlib import Path

import httpx
import pytest

from lychee_jax.files import read_text
from tests.support.servers import Running

TEXT = read_text(Path(__file__).parents[2] / "docs" / "serving.md")
PYTHON = re.findall(r"^```python\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
CURL = re.findall(r"^curl http://127\.0\.0\.1:8000(\S+) .*? -d '(.*?)'$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", PYTHON)
def test_a_client_that_is_shown_gets_an_answer(code: str, server: Running, monkeypatch, capsys):
    with httpx.Client() as http:  # a client that is closed: warnings are errors here
        code = code.replace("http://127.0.0.1:8000", server.url).replace('lychee"', 'tiny"')
        exec(code.replace('api_key="none"', 'api_key="none", http_client=http, max_retries=0'), {"http": http})
    assert capsys.readouterr().out.strip()


def test_the_request_that_is_shown_gets_an_answer(server: Running):
    assert len(CURL) == 1
    path, body = CURL[0]
    answer = httpx.post(server.url + path, json=json.loads(body), timeout=60)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] in ("stop", "length")
