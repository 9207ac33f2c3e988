"""Texts by a server process with OpenAI's interface; its key stays a secret."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from recbole_llm.dpo4rec.endpoint import endpoint_writer
from recbole_llm.dpo4rec.reasoning import Asked
from recbole_llm.errors import NotAtHand, UserError
from recbole_llm.llm.sampling import Sampling
from recbole_llm.quick_start import run_recbole_llm
from tests.test_dpo4rec import SMALL

KEY = "a-very-secret-key"
SETTINGS = {"endpoint_model": "m", "generation_batch": 4}


class Server:
    """The process, its address and what it was asked."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"

    def requests(self) -> list[dict[str, Any]]:
        self.process.terminate()
        return [json.loads(line) for line in self.process.stdout.read().splitlines()]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    file = Path(__file__).parent / "openai_server.py"
    pad = str(getattr(request, "param", 0))
    process = subprocess.Popen([sys.executable, str(file), KEY, pad], stdout=subprocess.PIPE, text=True)
    yield Server(process)
    process.kill()
    process.wait()


def test_texts_of_a_batch(server: Server) -> None:
    """Each text of each prompt is asked for once, with a seed of its own; greedy ones without any."""
    write = endpoint_writer({**SETTINGS, "endpoint": server.url})
    asked = [Asked("u1", 3, "one?"), Asked("u2", 3, "two?")]
    sampled = write(asked, Sampling(3, 20, 0.7, 0.9), 40)
    assert [len(mine) for mine in sampled] == [3, 3]
    assert len({text.text for mine in sampled for text in mine}) == 6
    assert all(text.ended and text.tokens == 4 for mine in sampled for text in mine)
    assert sampled == write(asked, Sampling(3, 20, 0.7, 0.9), 40)
    write(asked, Sampling(1, 20), 40)
    told = server.requests()
    assert sorted(r["seed"] for r in told[:6]) == [40, 40, 41, 41, 42, 42]
    assert {(r["model"], r["temperature"], r["top_p"], r["max_tokens"]) for r in told[:6]} == {("m", 0.7, 0.9, 20)}
    assert [(r["seed"], r["temperature"], r["top_p"]) for r in told[-2:]] == [(None, 0.0, None)] * 2


def test_run_with_a_server(server: Server, toy: dict[str, Any], tmp_path: Path) -> None:
    """A whole run whose texts a server writes: the questions hold titles, the key stands in no file."""
    settings = {**toy, **SMALL, "endpoint": server.url, "endpoint_model": "m", "iterations": 0}
    run = run_recbole_llm("DPO4Rec", None, None, settings)
    told = server.requests()
    assert len(told) == 30 + 40  # readers, and asked users
    assert all(r["status"] == 200 and "expert on what people enjoy" in r["question"] for r in told)
    texts = (Path(run["run_folder"]) / "texts-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert len({json.loads(line)["text"] for line in texts}) > 40
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in files if KEY.encode() in file.read_bytes()]


@pytest.mark.parametrize("wrong", ["address", "nobody"])
def test_server_that_is_not_there(server: Server, wrong: str) -> None:
    """Told with the address and what to check."""
    url = {"address": server.url + "/x", "nobody": "http://127.0.0.1:9/v1"}[wrong]
    write = endpoint_writer({**SETTINGS, "endpoint": url})
    with pytest.raises(NotAtHand, match=f"--endpoint={url}: the server did not answer") as raised:
        write([Asked("u1", 3, "one?")], Sampling(1, 20), 0)
    assert "OPENAI_API_KEY" in str(raised.value)


@pytest.mark.parametrize("server", range(0, 300, 10), indirect=True)
def test_refusal_that_tells_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that repeats the key anywhere in its refusal: neither the key nor its beginning is told."""
    wrong = "zq9-another-secret-key"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    write = endpoint_writer({**SETTINGS, "endpoint": server.url})
    with pytest.raises(UserError, match="the server did not answer") as raised:
        write([Asked("u1", 3, "one?")], Sampling(1, 20), 0)
    assert "zq9" not in "".join(traceback.format_exception(raised.value))
