"""Scoring N candidates of many users on a GPU in bfloat16: ours against plain transformers, with and without its cache.

    python benchmarks/random_llm.py llama-1b --shape=llama-1b --device=cuda --dtype=bfloat16
    python benchmarks/gpu_scoring.py --llm=llama-1b [--prompt 300] [--candidates 20 100]

The sides are those of score_candidates.py. What they must equal, and how many users they take at once: gpu.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from common import Side, compare
from gpu import (
    GATED,
    SLACK,
    Asked,
    add_mfu,
    best_at_once,
    in_passes,
    measure,
    plain_logps,
    read_arguments,
    record,
    tree_logps,
    users,
)
from operations import one_sequence_each, scoring, shared_prompt

from recbole_llm.llm.half_precision import autocast
from recbole_llm.llm.types import LLM
from results import Results

FULL, KEEP, CACHE, OURS = "full logits", "logits_to_keep", "expanded KV cache", "ours"


def cached_logps(model: torch.nn.Module, asked: Sequence[Asked]) -> torch.Tensor:
    """Prompts as a batch, then titles over transformers' KV cache, repeated for each ``[users, titles]``."""
    device, titles = next(model.parameters()).device, len(asked[0][1])
    prompts = torch.tensor([prompt for prompt, _ in asked], device=device)
    ids = torch.tensor([title for _, own in asked for title in own], device=device)
    with autocast(model):
        out = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    first = out.logits[:, -1].float().log_softmax(-1).repeat_interleave(titles, 0).gather(1, ids[:, :1])
    out.past_key_values.batch_repeat_interleave(titles)
    with autocast(model):
        logits = model(input_ids=ids[:, :-1], past_key_values=out.past_key_values, use_cache=True).logits
    rest = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (first[:, 0] + rest.sum(-1)).view(len(asked), titles)


def score_sides(llms: Mapping[str, LLM], asked: Sequence[Asked], at_once: Mapping[str, int]) -> dict[str, Side]:
    """Ways to score so many users a pass, in two passes at most."""
    plain, ours = llms["plain"].model, llms["ours"].model
    ways = {
        FULL: lambda some: plain_logps(plain, some, "all"),
        KEEP: lambda some: plain_logps(plain, some, "last"),
        CACHE: lambda some: cached_logps(plain, some),
        OURS: lambda some: tree_logps(ours, some),
    }
    sides = {}
    for name, size in at_once.items():
        some = asked[: max(2 * size, GATED)]
        sides[name] = Side(
            lambda way=ways[name], some=some, size=size: torch.cat(in_passes(some, size, way)),
            share=len(some) / len(asked),
            facts={"users_a_pass": size},
        )
    return sides


@torch.no_grad()
def score(args: argparse.Namespace, llms: Mapping[str, LLM], prompt: int, titles: int, peak: float) -> dict[str, Any]:
    """A cell of scoring: gate and times."""
    asked = users(args.users, prompt, titles, args.title, args.vocabulary)
    exact = torch.cat(
        [plain_logps(llms["exact"].model, [(p, [title])], "last") for p, own in asked[:GATED] for title in own]
    ).view(GATED, titles)

    def far(found: torch.Tensor) -> float:
        return (found[:GATED] - exact).abs().mean().item()

    whole, own = prompt + args.title, prompt + titles * args.title
    a_user = {FULL: titles * whole, KEEP: titles * whole, CACHE: own, OURS: own}
    at_once = best_at_once(lambda n: score_sides(llms, asked, n), a_user, args)
    sides = score_sides(llms, asked, at_once)
    allowed = SLACK * far(plain_logps(llms["plain"].model, asked[:GATED], "all"))
    records = compare(sides, far, allowed, args.rounds)
    least = shared_prompt(prompt, [args.title] * titles)
    naive = one_sequence_each(prompt, [args.title] * titles, every_row=True)
    model = llms["ours"].model
    add_mfu(records, scoring(model, least) * len(asked), peak)
    return record(records, OURS, len(asked), scoring(model, naive) / scoring(model, least), allowed)


def main(argv: list[str] | None = None) -> Results:
    """Measure the cells that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 100])
    args = read_arguments(parser, argv)
    cells = {f"P={p} N={n}": (p, n) for p in args.prompt for n in args.candidates}
    return measure("gpu_scoring", args, score, cells)


if __name__ == "__main__":
    sys.exit(main().exit_message)
