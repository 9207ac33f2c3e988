"""What benchmarks share: material, the equality gate, interleaved rounds, and results that are kept cell by cell."""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from recbole_llm.config import LLMConfig
from recbole_llm.data.atomic import read_items
from recbole_llm.data.prompt import plain_tokens
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder
from recbole_llm.llm.types import LLM

transformers_logging.disable_progress_bar()
RESULTS = Path(__file__).resolve().parents[1] / "results" / "benchmarks"
WITH_YEAR, BARE = "{movie_title} ({release_year})", "{movie_title}"
FORMS = {"bare": BARE, "with year": WITH_YEAR}


def arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options that every benchmark has, read; torch is set to ``--threads``."""
    parser.add_argument("--llm", default="embedded", help="as run_recbole_llm.py takes it; tiny to try things out")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--again", action="store_true", help="measure cells again that are in the results already")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    return args


def form_argument(parser: argparse.ArgumentParser) -> None:
    """How titles are written; bare ones have about 8 tokens with their end, as in the literature, with a year 11."""
    parser.add_argument("--form", choices=FORMS, default="bare", help="how titles are written")


def named(cell: str, form: str) -> str:
    """A cell's name with the form of its titles, unless that is the plain one."""
    return cell if form == "bare" else f"{cell}, {form}"


def load(llm: str, **options: Any) -> LLM:
    """An LLM in float32 on the CPU, PyTorch's own linears unless asked otherwise."""
    given = {"device": torch.device("cpu"), "dtype": "float32", "fast_linears": False, "seed": 0, **options}
    return load_llm(llm=llm, **given)


def ml_100k_titles(form: str) -> list[str]:
    """Titles of all films of ml-100k in the order of its file, as a template over its columns writes them."""
    _, rows = read_items(LLMConfig("LLMRanker", "ml-100k").final_config_dict, "ml-100k")
    return [form.format(**row) for row in rows.values()]


def material(
    tokenizer: Any, prompt_tokens: int, titles: int, *, form: str, end: str = "\n"
) -> tuple[list[int], list[list[int]]]:
    """A prompt of real titles, a line each, cut to so many tokens, and other real titles, each with its end.

    Args:
        form: of titles, a key of ``FORMS``.
    """
    texts = ml_100k_titles(FORMS[form])
    random.Random(0).shuffle(texts)
    lines = plain_tokens(tokenizer, [f"{title}\n" for title in texts[titles:]])
    prompt = [token for line in lines for token in line][:prompt_tokens]
    return prompt, plain_tokens(tokenizer, [title + end for title in texts[:titles]])


def title_tree(prompt: list[int], titles: Sequence[list[int]]) -> TokenTree:
    """The prompt with each title as a branch."""
    builder = TreeBuilder()
    end = builder.chain(-1, prompt)[-1]
    for title in titles:
        builder.completion(builder.chain(end, title))
    return builder.build()


# ---- sides


@dataclass(frozen=True)
class Side:
    """One way to do the work.

    Attributes:
        run: the work, timed.
        result: from what ``run`` returned to what all sides must agree on; not timed.
        facts: what else the results say of it.
        tolerance: where its own rounding is coarser than the benchmark's tolerance.
        share: how much of the work that is compared one run does; its seconds are divided by it.
    """

    run: Callable[[], Any]
    result: Callable[[Any], Any] = lambda output: output
    facts: Mapping[str, Any] = field(default_factory=dict)
    share: float = 1
    tolerance: float | None = None


def compare(
    sides: Mapping[str, Side], difference: Callable[[Any], float], tolerance: float, rounds: int
) -> dict[str, dict[str, Any]]:
    """Gate, then time: what is written of each side.

    The gate's run is each side's warm-up. A side whose result differs is reported as ``failed`` and not timed.

    Args:
        difference: of a result from the right one.
        tolerance: the largest difference that passes; nan does not.

    Returns:
        Of each side its ``difference``, its facts, and ``failed`` or the seconds of ``timed``.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        found = difference(side.result(side.run()))
        records[name] = {**side.facts, "difference": found}
        allowed = side.tolerance or tolerance
        if not found <= allowed:
            records[name]["failed"] = f"differs by {found:.1e}, allowed is {allowed:.0e}; not timed"
    equal = {name: side for name, side in sides.items() if "failed" not in records[name]}
    for name, times in timed(equal, rounds).items():
        records[name] |= times
    return records


def timed(sides: Mapping[str, Side], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of wall clock and processor of each side, rounds interleaved: medians, and the fastest round."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side.run()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            taken[name].append((wall / side.share, cpu / side.share))
    return {name: seconds(times) for name, times in taken.items() if times}


def seconds(rounds: list[tuple[float, float]]) -> dict[str, float]:
    """Of (wall, processor) seconds of several rounds: medians, and the fastest round's wall."""
    wall, cpu = zip(*rounds, strict=True)
    return {"wall_s": statistics.median(wall), "cpu_s": statistics.median(cpu), "least_wall_s": min(wall)}


def speedups(records: Mapping[str, Mapping[str, Any]], ours: str) -> dict[str, dict[str, float]]:
    """How many times faster ``ours`` is than each side, by wall clock and by processor time; {} if it was not timed."""
    mine = records.get(ours, {})
    if "wall_s" not in mine:
        return {}
    return {
        name: {"wall": record["wall_s"] / mine["wall_s"], "cpu": record["cpu_s"] / mine["cpu_s"]}
        for name, record in records.items()
        if "wall_s" in record
    }
