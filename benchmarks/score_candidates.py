"""Scoring N candidates after one prompt: ours against plain transformers, with and without its own KV cache.

    python benchmarks/score_candidates.py [--prompt 150 300 600] [--candidates 20 100] [--form=bare] [--llm=embedded]

*full logits*: one sequence (prompt + title) a candidate, 20 in a padded batch, log-softmax of all logits, as most
published rankers do. *logits_to_keep*: the same with logits from the prompt's end on. *expanded KV cache*: the prompt
once, its cache repeated for a batch of titles. *ours*: prompt and titles as one token tree. Equal to 2e-4
nats (1e-3 for those that use float32 log_softmax).
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from common import Side, arguments, compare, form_argument, load, material, named, speedups, title_tree
from operations import one_sequence_each, scoring, shared_prompt
from plain import ROUGH_NATS, cached_logps, in_batches, logp_by_hand

from recbole_llm.llm.logps import batch_logps
from results import Results

TOLERANCE = 2e-4  # nats on title log-probs of tens of nats, float32
PLAIN, KEEP, CACHE, OURS = "full logits", "logits_to_keep", "expanded KV cache", "ours"


def measured(
    plain: torch.nn.Module, model: torch.nn.Module, prompt: list[int], titles: list[list[int]], rounds: int
) -> dict[str, Any]:
    """A cell: gate and times.

    Args:
        plain, model: the same weights with transformers' attention and with ours.
    """
    asked = [(prompt, title) for title in titles]
    lengths = [len(title) for title in titles]
    naive, least = one_sequence_each(len(prompt), lengths, every_row=True), shared_prompt(len(prompt), lengths)
    sides = {
        PLAIN: Side(lambda: in_batches(plain, asked, "all"), tolerance=ROUGH_NATS, facts={"tokens": naive.tokens}),
        KEEP: Side(lambda: in_batches(plain, asked, "last"), tolerance=ROUGH_NATS, facts={"tokens": naive.tokens}),
        CACHE: Side(lambda: cached_logps(plain, prompt, titles, at_once=len(titles)), tolerance=ROUGH_NATS),
        OURS: Side(lambda: batch_logps(model, [title_tree(prompt, titles)]), facts={"tokens": least.tokens}),
    }
    right = torch.stack([logp_by_hand(plain, *pair) for pair in asked])
    records = compare(sides, lambda found: (found - right).abs().max().item(), TOLERANCE, rounds)
    limit = scoring(plain, naive) / scoring(plain, least)
    faster = speedups(records, OURS)
    return {
        "prompt_tokens": len(prompt),
        "title_tokens": lengths,
        "sides": records,
        "times_faster": faster,
        "operations_full_logits_over_ours": limit,
        "share_of_limit_reached": faster[PLAIN]["cpu"] / limit if PLAIN in faster else None,
    }


@torch.no_grad()
def main(argv: list[str] | None = None) -> Results:
    """Measure the cells that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, nargs="+", default=[150, 300, 600], help="prompt tokens")
    parser.add_argument("--candidates", type=int, nargs="+", default=[20, 100])
    form_argument(parser)
    args = arguments(parser, argv)
    results = Results("score_candidates", args)
    plain, ours = load(args.llm, finetune="none", attention="sdpa"), load(args.llm, finetune="none")
    shapes = {
        named(f"P={prompt} N={number}", args.form): (prompt, number)
        for prompt in args.prompt
        for number in args.candidates
    }
    for cell in results.todo(shapes):
        results.keep(
            cell,
            measured(plain.model, ours.model, *material(ours.tokenizer, *shapes[cell], form=args.form), args.rounds),
        )
    print(results.table(OURS))
    for cell, record in results.cells.items():
        if record["share_of_limit_reached"]:
            limit, reached = record["operations_full_logits_over_ours"], record["share_of_limit_reached"]
            print(f"{cell}: {limit:.1f} times fewer operations than full logits; {reached:.0%} of that reached")
    return results


if __name__ == "__main__":
    sys.exit(main().exit_message)
