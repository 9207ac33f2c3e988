"""Training every position of a history in one pass, against a pass for each position; supervised positions a second.

    python benchmarks/stream_training.py [--history 75] [--k 7] [--llm=embedded] [--rounds=5]

The material is one real user of ml-100k with at least so many films of history. *SFT*: plain transformers with one
sequence a position against ours. *preference*: ours with one window a position (what an instruct prompt takes) against
ours with all positions and their k rejected titles in one tree. Loss (summed over positions) and gradients must equal
those of one sequence at a time: for SFT at full length, for preference on the first items of the window; at full
length the two ways are compared with one another.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from common import FORMS, Side, arguments, compare, form_argument, load, named, speedups
from plain import (
    BETA,
    ROUGH,
    Asked,
    difference,
    gradients,
    pairs_by_hand,
    reference_by_hand,
    sequence_logps,
    sft_by_hand,
    stir_adapter,
)
from ranker import ml_100k_ranker

from recbole_llm.data.prompt import Window
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.stages import sft_windows
from results import Results

TOLERANCE = 1e-5
LOSS = "DMPO"  # with pairwise_mean: the mean of DPO over the pairs of a position
AT_ONCE = 4  # full sequences of one pass
SFT, SFT_TITLES = "one sequence a position", "one sequence a position, head on titles"
SINGLE, OURS = "ours, one window a position", "ours"


@cache
def material(llm: str, history: int, k: int, form: str) -> tuple[LLMRanker, Window]:
    """Our model, and the window of a user with a full history."""
    loss = {"loss": LOSS, "pairwise_mean": True, "beta": BETA, "rejected_num": k}
    model, protocol = ml_100k_ranker(llm=llm, MAX_ITEM_LIST_LENGTH=history, item_text=FORMS[form], **loss)
    stir_adapter(model.policy)
    windows = sft_windows(model.config, protocol, model.prompt, model.llm.context)
    return model, random.Random(0).choice([w for w in windows if len(w.items) == history + 1])


def positions(model: LLMRanker, window: Window) -> list[list[Asked]]:
    """Prompt and title tokens of each position, the chosen title first."""
    prompt, rejected = model.prompt, window.rejected or ((),) * len(window.targets)
    return [
        [(prompt.trunk(window.items[:t]), prompt.answers[item]) for item in (window.items[t], *others)]
        for t, others in zip(window.targets, rejected, strict=True)
    ]


def one_by_one(window: Window) -> list[Window]:
    """A window for each position."""
    rejected, reference = window.rejected or ((),) * len(window.targets), window.reference
    return [
        Window(window.user, window.items[: t + 1], (t,), (rejected[i],), (), reference[i : i + 1])
        for i, t in enumerate(window.targets)
    ]


def our_side(model: LLMRanker, windows: Sequence[Window], loss: str) -> Side:
    """Passes of ``token_budget`` tokens, as the trainer makes them."""
    sizes = [model.prompt.window_size(w) for w in windows]

    def step() -> torch.Tensor:
        model.zero_grad()
        total = torch.zeros(())
        for group in batches_by_budget(sizes, model.config["token_budget"]):
            part = model.window_loss([windows[i] for i in group], loss).total
            part.backward()
            total += part.detach()
        return total

    return Side(step, lambda loss: (loss, gradients(model.policy)), {"tokens": sum(sizes)})


def plain_side(model: torch.nn.Module, asked: Sequence[Asked], head: Any) -> Side:
    """SFT with transformers: full sequences, neighbours in length together, gradients added up."""

    def step() -> torch.Tensor:
        model.zero_grad()
        total = torch.zeros(())
        for first in range(0, len(asked), AT_ONCE):
            part = -sequence_logps(model, asked[first : first + AT_ONCE], head).sum()
            part.backward()
            total += part.detach()
        return total

    tokens = sum(len(before) + len(title) for before, title in asked)
    return Side(step, lambda loss: (loss, gradients(model)), {"tokens": tokens}, tolerance=ROUGH)


def sft(model: LLMRanker, plain: torch.nn.Module, window: Window, rounds: int) -> dict[str, Any]:
    """A cell: SFT at every position of the window."""
    asked = [pairs[0] for pairs in positions(model, window)]
    right = sft_by_hand(plain, asked)
    sides = {
        SFT: plain_side(plain, asked, "all"),
        SFT_TITLES: plain_side(plain, asked, "titles"),
        SINGLE: our_side(model, one_by_one(window), "SFT"),
        OURS: our_side(model, [window], "SFT"),
    }
    return compare(sides, lambda found: difference(found, right), TOLERANCE, rounds)


def with_pairs(model: LLMRanker, window: Window, k: int) -> Window:
    """The window with k random rejected titles a position, and their log-probs without the adapter."""
    draw = random.Random(1)
    others = [i for i in range(1, model.n_items) if i not in window.items]
    window = replace(window, rejected=tuple(tuple(draw.sample(others, k)) for _ in window.targets))
    with model.policy.disable_adapter():
        return replace(window, reference=model.reference_logps([window])[0])


def preference(
    model: LLMRanker, plain: torch.nn.Module, window: Window, k: int, gated: int, rounds: int
) -> dict[str, Any]:
    """A cell: k pairs at every position; the first ``gated`` items are checked by hand."""
    short = Window(window.user, window.items[:gated], tuple(range(1, gated)))
    groups = positions(model, with_pairs(model, short, k))
    right = pairs_by_hand(plain, groups, [reference_by_hand(plain, asked) for asked in groups])
    checked = compare(both_ways(model, with_pairs(model, short, k)), lambda f: difference(f, right), TOLERANCE, 0)
    sides = both_ways(model, with_pairs(model, window, k))
    single = sides[SINGLE].result(sides[SINGLE].run())
    records = compare(sides, lambda found: difference(found, single), TOLERANCE, rounds)
    for name, record in checked.items():
        records[name]["difference_by_hand"] = record["difference"]
        if "failed" in record:
            records[name] = record
    return records


def both_ways(model: LLMRanker, window: Window) -> dict[str, Side]:
    return {SINGLE: our_side(model, one_by_one(window), LOSS), OURS: our_side(model, [window], LOSS)}


def main(argv: list[str] | None = None) -> Results:
    """Measure both cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--history", type=int, default=75, help="items of history (MAX_ITEM_LIST_LENGTH)")
    parser.add_argument("--k", type=int, default=7, help="rejected titles a position")
    parser.add_argument("--gated", type=int, default=4, help="items of the window that preference checks by hand")
    parser.add_argument("--stage", nargs="+", choices=["SFT", "preference"], default=["SFT", "preference"])
    form_argument(parser)
    args = arguments(parser, argv)
    results = Results("stream_training", args)
    cells = {"SFT": f"SFT L={args.history}", "preference": f"preference k={args.k} L={args.history}"}
    for cell in results.todo(named(cells[stage], args.form) for stage in args.stage):
        model, window = material(args.llm, args.history, args.k, args.form)
        plain = stir_adapter(load(args.llm, attention="sdpa").model)
        if cell.startswith("SFT"):
            records = sft(model, plain, window, args.rounds)
        else:
            records = preference(model, plain, window, args.k, args.gated, args.rounds)
        for record in records.values():
            if "wall_s" in record:
                record["positions_a_second"] = len(window.targets) / record["wall_s"]
        size = model.prompt.window_size(window)
        facts = {"positions": len(window.targets), "tokens_of_history": size, "times_faster": speedups(records, OURS)}
        results.keep(cell, {**facts, "sides": records})
    print(results.table(OURS))
    return results


if __name__ == "__main__":
    sys.exit(main().exit_message)
