"""Texts by a server process with OpenAI's interface; its key stays a secret."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import InferenceTimeoutError

from recbole_llm.dpo4rec import endpoint
from recbole_llm.dpo4rec.endpoint import endpoint_writer
from recbole_llm.dpo4rec.reasoning import Asked, Writer, write_texts
from recbole_llm.errors import NotAtHand, UserError
from recbole_llm.llm.sampling import Sampling, Written
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
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0, 0.0))
    file = Path(__file__).parent / "openai_server.py"
    options = str(getattr(request, "param", 0)).split()
    process = subprocess.Popen([sys.executable, str(file), KEY, *options], stdout=subprocess.PIPE, text=True)
    yield Server(process)
    process.kill()
    process.wait()


def texts_of(write: Writer, asked: Sequence[Asked], sampling: Sampling, seed: int) -> list[list[Written]]:
    """The texts of each prompt, in the order of the prompts."""
    return [texts for _, texts in sorted(write(asked, sampling, seed))]


def test_texts_of_a_batch(server: Server) -> None:
    """Each text of each prompt is asked for once, with a seed of its own; greedy ones without any."""
    write = endpoint_writer({**SETTINGS, "endpoint": server.url})
    asked = [Asked("u1", 3, "one?"), Asked("u2", 3, "two?")]
    sampled = texts_of(write, asked, Sampling(3, 20, 0.7, 0.9), 40)
    assert [len(mine) for mine in sampled] == [3, 3]
    assert len({text.text for mine in sampled for text in mine}) == 6
    assert all(text.ended and text.tokens == 4 for mine in sampled for text in mine)
    assert sampled == texts_of(write, asked, Sampling(3, 20, 0.7, 0.9), 40)
    texts_of(write, asked, Sampling(1, 20), 40)
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
        texts_of(write, [Asked("u1", 3, "one?")], Sampling(1, 20), 0)
    assert "OPENAI_API_KEY" in str(raised.value)


@pytest.mark.parametrize("server", range(0, 300, 10), indirect=True)
def test_refusal_that_tells_the_key(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that repeats the key anywhere in its refusal: neither the key nor its beginning is told."""
    wrong = "zq9-another-secret-key"
    monkeypatch.setenv("OPENAI_API_KEY", wrong)
    write = endpoint_writer({**SETTINGS, "endpoint": server.url})
    with pytest.raises(UserError, match="the server did not answer") as raised:
        texts_of(write, [Asked("u1", 3, "one?")], Sampling(1, 20), 0)
    assert "zq9" not in "".join(traceback.format_exception(raised.value))


# ---- what was paid for is kept


class Paid:
    """A run's texts by a server, and how many requests it answered."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server, self.folder = server, folder

    def texts(self, number: int, together: int) -> list[list[Written]]:
        asked = [Asked(f"u{i}", i, f"question {i}") for i in range(number)]
        options = {"folder": self.folder, "author": "m", "seed": 0, "together": together, "what": "x", "apart": True}
        write = endpoint_writer({**SETTINGS, "endpoint": self.server.url})
        return write_texts(asked, write, Sampling(1, 20), **options).texts


@pytest.mark.parametrize("server", ["0 404"], indirect=True)
def test_one_refusal_costs_one_text(server: Server, tmp_path: Path) -> None:
    """Of a batch of four one is refused: the others' texts are kept, and a run with another batch, one user fewer or
    one user more asks for what is missing alone."""
    paid = Paid(server, tmp_path)
    with pytest.raises(NotAtHand, match="404.*lower --generation_batch. Texts that came are kept"):
        paid.texts(8, together=4)
    (file,) = tmp_path.rglob("texts.jsonl")
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    eight = paid.texts(8, together=2)
    assert paid.texts(7, together=4) == eight[:7]
    assert paid.texts(9, together=9)[:8] == eight
    told = server.requests()
    assert [r["status"] for r in told].count(200) == len({r["question"] for r in told}) == 9
    assert len(told) == 10


@pytest.mark.parametrize("server", ["0 429", "0 503,500", "0 0"], indirect=True)
def test_what_may_pass_is_tried_again(server: Server, tmp_path: Path) -> None:
    """A rate limit, a server's fault, a dropped connection."""
    (text,), (other,) = Paid(server, tmp_path).texts(2, together=1)
    assert text.text.startswith("likes") and other.text.startswith("likes")


@pytest.mark.parametrize("server", ["0 503,503,503,503"], indirect=True)
def test_tries_end(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NotAtHand, match="503"):
        Paid(server, tmp_path).texts(1, together=1)
    assert [r["status"] for r in server.requests()] == [503] * 4


@pytest.mark.parametrize("server", ["0 400"], indirect=True)
def test_what_will_not_pass_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(NotAtHand, match="BadRequestError"):
        Paid(server, tmp_path).texts(1, together=1)
    assert len(server.requests()) == 1


class Refused(Exception):
    """As huggingface_hub's, with the answer to the request."""

    def __init__(self, status: int, after: str | None) -> None:
        headers = {} if after is None else {"Retry-After": after}
        self.response = type("Response", (), {"status_code": status, "headers": headers})


def test_a_timeout_is_not_tried_again() -> None:
    """The server may still be at it, and would write the text twice."""
    asked = []

    def ask() -> None:
        asked.append(1)
        raise InferenceTimeoutError("Inference call timed out")

    with pytest.raises(InferenceTimeoutError):
        endpoint.patiently(ask)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("status", "after", "waits"),
    [
        (429, "7", [7.0, 7.0, 7.0]),
        (503, None, [1.0, 4.0, 16.0]),
        (429, "Wed, 21 Oct 2015 07:28:00 GMT", [1.0, 4.0, 16.0]),  # a date is not read: no clock decides
        (429, "3600", []),
        (401, "7", []),
    ],
)
def test_waits(monkeypatch: pytest.MonkeyPatch, status: int, after: str | None, waits: list[float]) -> None:
    """Ours grow, a server's own go first, and nobody waits an hour."""
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)

    def ask() -> None:
        raise Refused(status, after)

    with pytest.raises(Refused):
        endpoint.patiently(ask)
    assert slept == waits
