"""Texts from a server with OpenAI's interface: a local vLLM or llama.cpp, or a service.

The key comes from the environment variable ``OPENAI_API_KEY``; it stands in no configuration, log or file.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from typing import Any

from huggingface_hub import InferenceClient, InferenceTimeoutError
from recbole.config import Config

from recbole_llm.dpo4rec.reasoning import Asked, Writer
from recbole_llm.errors import NotAtHand
from recbole_llm.llm.sampling import Sampling, Written

KEY = "OPENAI_API_KEY"
SECONDS = 120  # that a text may take, where a server may write a batch's one after the other; and to wait at most
WAITS = (1.0, 4.0, 16.0)  # seconds before another try
BUSY = (408, 425, 429)  # refusals that pass, beside a server's own faults (5xx)


def endpoint_writer(config: Config) -> Writer:
    """Writes by the server at ``endpoint``; the prompts of a batch are asked for side by side.

    Raises:
        UserError: while it is called, after all texts that did come, when the server cannot be reached or refuses.
    """
    url, model = config["endpoint"], config["endpoint_model"]
    for library in ("httpx", "httpx2"):  # a line for each text in the run's log
        logging.getLogger(library).setLevel(logging.WARNING)
    # Never without a key: the client would send this machine's hub token instead.
    key = os.environ.get(KEY) or "none"
    client = InferenceClient(base_url=url, api_key=key, timeout=SECONDS * config["generation_batch"])

    def one(prompt: str, sampling: Sampling, seed: int) -> Written:
        choice = {"temperature": sampling.temperature}
        if sampling.temperature:
            choice |= {"top_p": sampling.top_p, "seed": seed}
        answer = client.chat_completion(
            [{"role": "user", "content": prompt}], model=model, max_tokens=sampling.most, **choice
        )
        first = answer.choices[0]
        tokens = answer.usage.completion_tokens if answer.usage else 0
        return Written(first.message.content or "", tokens, first.finish_reason == "stop")

    def of_prompt(prompt: str, sampling: Sampling, seed: int) -> list[Written]:
        return [patiently(partial(one, prompt, sampling, seed + n)) for n in range(sampling.number)]

    def write(asked: Sequence[Asked], sampling: Sampling, seed: int) -> Iterator[tuple[int, list[Written]]]:
        failed: Exception | None = None
        with ThreadPoolExecutor(max_workers=len(asked)) as pool:
            jobs = {pool.submit(of_prompt, str(a.prompt), sampling, seed): place for place, a in enumerate(asked)}
            for job in as_completed(jobs):
                try:
                    texts = job.result()
                except Exception as error:  # clients and servers fail in any way
                    failed = error
                else:
                    yield jobs[job], texts
        if failed:
            # Before it is cut: half a key is a key told. No "from": that would be shown with the key.
            told = " ".join(str(failed).replace(key, "<key>").split())[:300]
            raise NotAtHand(
                f"--endpoint={url}: the server did not answer as OpenAI's interface does "
                f"({type(failed).__name__}: {told}). Check the address (it ends with /v1), --endpoint_model={model}, "
                f"and the key in {KEY}; where it is slow, lower --generation_batch. Texts that came are kept."
            )

    return write


def patiently(ask: Callable[[], Any]) -> Any:
    """What ``ask`` gives; where it fails in a way that may pass, it is tried again a few times, with growing waits.

    A server's own ``Retry-After`` in seconds goes before our waits; one that is longer than ``SECONDS`` is not waited
    for.

    Raises:
        Exception: that of the last try.
    """
    for wait in WAITS:
        try:
            return ask()
        except InferenceTimeoutError:  # the server may still be at it
            raise
        except Exception as error:  # of httpx or httpx2, as huggingface_hub has it
            response = getattr(error, "response", None)  # there is none where the connection failed
            if response is not None and response.status_code < 500 and response.status_code not in BUSY:
                raise
            asked_for = response.headers.get("Retry-After", "") if response is not None else ""
            wait = float(asked_for) if asked_for.isdecimal() else wait
            if wait > SECONDS:
                raise
        time.sleep(wait)
    return ask()
