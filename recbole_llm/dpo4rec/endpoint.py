"""Texts from a server with OpenAI's interface: a local vLLM or llama.cpp, or a service.

The key comes from the environment variable ``OPENAI_API_KEY``; it stands in no configuration, log or file.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from huggingface_hub import InferenceClient
from recbole.config import Config

from recbole_llm.dpo4rec.reasoning import Asked, Writer
from recbole_llm.errors import NotAtHand
from recbole_llm.llm.sampling import Sampling, Written

KEY = "OPENAI_API_KEY"
SECONDS = 120  # that a text may take; a server may write a batch's texts one after the other


def endpoint_writer(config: Config) -> Writer:
    """Writes by the server at ``endpoint``; a batch's texts are asked for side by side.

    Raises:
        UserError: when it is called and the server cannot be reached or refuses.
    """
    url, model = config["endpoint"], config["endpoint_model"]
    for library in ("httpx", "httpx2"):  # a line for each text in the run's log
        logging.getLogger(library).setLevel(logging.WARNING)
    # Never without a key: the client would send this machine's hub token instead.
    key, patience = os.environ.get(KEY) or "none", SECONDS * config["generation_batch"]
    client = InferenceClient(base_url=url, api_key=key, timeout=patience)

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

    def write(asked: Sequence[Asked], sampling: Sampling, seed: int) -> list[list[Written]]:
        jobs = [(str(a.prompt), sampling, seed + n) for a in asked for n in range(sampling.number)]
        try:
            with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
                found = list(pool.map(lambda job: one(*job), jobs))
        except Exception as error:  # clients and servers fail in any way
            # Before it is cut: half a key is a key told. Not "from error": that would be shown with the key.
            told = str(error).replace(key, "<key>")
            raise NotAtHand(
                f"--endpoint={url}: the server did not answer as OpenAI's interface does "
                f"({type(error).__name__}: {' '.join(told.split())[:300]}). Check the address (it ends with /v1), "
                f"--endpoint_model={model}, and the key in {KEY}; where it is slow, lower --generation_batch. Texts "
                "that came in earlier batches are kept."
            ) from None
        return [found[i : i + sampling.number] for i in range(0, len(found), sampling.number)]

    return write
