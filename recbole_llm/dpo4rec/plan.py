"""What a DPO4Rec run will cost: texts to write and to judge, an LLM to align, a recommender to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.dpo4rec.align import Reasoner, TextPair
from recbole_llm.dpo4rec.places import draw_places
from recbole_llm.dpo4rec.reasoning import Asked, prompts_together
from recbole_llm.dpo4rec.setting_checks import alignment_rounds
from recbole_llm.dpo4rec.work import Work
from recbole_llm.llm.sampling import Sampling, Written
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.memory import machine_name
from recbole_llm.plan_recbole import batch_seconds, weight_bytes
from recbole_llm.probe import timed
from recbole_llm.recommender import check_recommenders
from recbole_llm.run_log import explained


def plan_of_dpo4rec(config: LLMConfig, probe: bool) -> dict[str, Any]:
    """Texts, tokens and steps of every stage; time of a batch of each where it is probed.

    Every text is counted with ``reasoning_tokens`` and every pair user with a pair, so that all of it is at most.

    Raises:
        UserError: as a run.
    """
    check_recommenders(config)
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
        model = config.model_class(config, protocol.train_data._dataset).to(config["device"])
    reads = config["knowledge"] != "none"
    rounds = alignment_rounds(config)
    batches, work = len(protocol.train_data), []
    memory = {"recommender": weight_bytes(model)}
    if reads:
        desk = Work(config, protocol, draw_places(config, protocol))
        work = _llm_work(config, desk, rounds, probe)
        memory |= {"LLM's weights": weight_bytes(desk.reasoner)} if desk.reasoner else {}
    recommender = {
        "name": "recommender",
        "rounds": (rounds + 1) * config["epochs"],
        "positions": len(protocol.train_data._dataset),
        "steps": (rounds + 1) * config["epochs"] * batches,
        "seconds": None,
    }
    if probe:
        recommender["seconds"] = recommender["steps"] * batch_seconds(model, protocol.train_data)
    work.append(recommender)
    found = [part["seconds"] for part in work]
    return {
        "model": config["model"],
        "dataset": config["dataset"],
        "work": work,
        "memory": memory,
        "seconds": {"total": sum(filter(None, found))} if probe else None,
        "machine": machine_name(config["device"]),
        "notes": [
            "texts count with --reasoning_tokens and pair users with a pair each; most end or are dropped before.",
            "stages that are there already are counted; early stopping can only shorten the recommender's training.",
            "encoding of texts, validation and test are not measured; memory is that of weights alone.",
        ],
    }


def _size(one: Asked) -> int:
    """Tokens of a prompt; of one in words about a token for four characters."""
    return len(one.prompt) // 4 if isinstance(one.prompt, str) else len(one.prompt)


def _llm_work(config: LLMConfig, work: Work, rounds: int, probe: bool) -> list[dict[str, Any]]:
    places, most = work.places, config["reasoning_tokens"]
    read, judged = (work.asked(list(p)) for p in (places.written(), places.pairs.items()))
    greedy = Sampling(1, most)
    sampled = Sampling(config["samples"], most, config["temperature"], config["top_p"])
    parts = [_writing(config, work, "texts to read", rounds + 1, read, greedy, probe)]
    if not rounds:
        return parts
    parts.append(_writing(config, work, "texts to judge", rounds, judged, sampled, probe))
    answers = 2 if config["alignment"] == "DPO" else 1
    sizes = [_size(one) + answers * most for one in judged]
    steps, epochs = ceil(len(judged) / config["align_batch_size"]), rounds * config["align_epochs"]
    parts.append(
        {
            "name": f"{config['alignment']} of the LLM",
            "rounds": epochs,
            "positions": len(judged),
            "steps": epochs * steps,
            "passes": len(batches_by_budget(sizes, config["token_budget"])),
            "tokens": sum(sizes),
            "seconds": epochs * _training(work.reasoner, judged, most, config) if probe and work.reasoner else None,
        }
    )
    return parts


def _writing(
    config: LLMConfig, work: Work, name: str, rounds: int, asked: list[Asked], sampling: Sampling, probe: bool
) -> dict[str, Any]:
    together = prompts_together(config["generation_batch"], sampling)
    batches = ceil(len(asked) / together)
    seconds = None
    reasoner = work.reasoner
    if probe and reasoner:
        middle = sorted(asked, key=lambda one: len(one.prompt))[len(asked) // 2 :][:together]
        seconds = rounds * batches * _second(reasoner, lambda: reasoner.write(middle, sampling, 0))
    return {
        "name": name,
        "rounds": rounds,
        "positions": len(asked) * sampling.number,
        "steps": 0,
        "passes": batches * sampling.most,
        "tokens": sum(map(_size, asked)) + len(asked) * sampling.number * sampling.most,
        "seconds": seconds,
    }


def _training(reasoner: Reasoner, asked: list[Asked], most: int, config: LLMConfig) -> float:
    """Seconds of an epoch over pairs as long as they can be, by the pace of two of them."""
    text = Written("word " * most, most, False)
    two = [TextPair(0, list(one.prompt), (text, text)) for one in asked[:2]]
    windows = reasoner.windows(two, config["alignment"])
    windows = [replace(window, reference=[[0.0] * (1 + len(window.rejected))]) for window in windows]

    def train() -> None:
        reasoner.window_loss(windows, config["alignment"]).total.backward()
        reasoner.zero_grad()

    return _second(reasoner, train) * len(asked) / len(two)


def _second(reasoner: Reasoner, work: Callable[[], Any]) -> float:
    """Seconds of the second of two runs; the first one warms up."""
    work()
    return timed(reasoner.llm.device, work)
