"""Ranking all titles of ml-100k: plain transformers, its KV cache, our full pass, and exact best-first search.

    python benchmarks/full_catalogue.py [--adapter=<folder>] [--users=32] [--llm=embedded] [--rounds=3]

Seconds are those of one user. *plain* (one full sequence a title) is timed on 40 titles and extrapolated. The ranker
must be a trained one, or the search has nothing to go by: without ``--adapter`` one is trained by SFT on
``--train_users`` users first, and kept (saved/). For every user the search must find the same top K, ties within 1e-4
nats aside, and the same metrics as the full pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import FORMS, Side, arguments, compare, load, speedups
from plain import ROUGH_NATS, cached_logps, in_batches, logp_by_hand
from ranker import SETTINGS, ml_100k_ranker

from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.llm.adapter import load_adapter
from recbole_llm.llm.title_trie import TitleTrie, title_trie
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.title_scores import title_scores
from recbole_llm.topk_search import Found
from results import Results

TOLERANCE = 2e-4  # nats on title log-probs of tens of nats, float32
TIE = 1e-4
SOME = 40  # titles that plain scoring is timed on
PLAIN, CACHE = f"plain, from {SOME} titles", "expanded KV cache"
EXACT, TOPK = "ours, exact", "ours, exact_topk"


def trained_adapter(llm: str, form: str, history: int, users: int) -> Path:
    """The run folder of a ranker after one epoch of SFT; a stage that was trained before is taken as it is."""
    settings = {"llm": llm, "item_text": form, "MAX_ITEM_LIST_LENGTH": history, "few_shot": users, "epochs": 1}
    evaluation = {"eval_step": 0, "eval_users": 20, "learning_rate": 0.001, "train_batch_size": 16}
    done = run_recbole_llm("LLMRanker", "ml-100k", config_dict={**SETTINGS, **settings, **evaluation})
    return Path(done["run_folder"])


def best(scores: np.ndarray, k: int, hidden: np.ndarray) -> Found:
    """Items that score no less than the K-th best, by sorting all of them."""
    shown = scores.copy()
    shown[hidden] = -np.inf
    items = np.flatnonzero(shown >= np.sort(shown)[-k])
    return Found(items, shown[items])


def metrics(found: Found, target: int, k: int) -> tuple[float, float]:
    """Hit@K and NDCG@K of the target; what ties with it stands behind it."""
    own = found.scores[found.items == target]
    rank = int((found.scores > own[0]).sum()) if len(own) else k
    return (1.0, 1 / np.log2(rank + 2)) if rank < k else (0.0, 0.0)


def disagreement(found: Found, full: np.ndarray, k: int, hidden: np.ndarray) -> float:
    """0 to rounding where the search found the top K; infinite where it missed or invented one, ties aside."""
    right = best(full, k, hidden)
    least = right.scores.min()
    other = np.setxor1d(found.items, right.items)
    if (np.abs(full[other] - least) > TIE).any() or len(found.items) < k:
        return np.inf
    return float(np.abs(found.scores - full[found.items]).max())


@torch.no_grad()
def measured(args: argparse.Namespace, form: str, folder: Path) -> dict[str, Any]:
    """A cell: gate and times for one form of titles."""
    model, protocol = ml_100k_ranker(
        llm=args.llm, item_text=form, MAX_ITEM_LIST_LENGTH=args.history, eval_args={"mode": {"test": "full"}}
    )
    load_adapter(model.llm, folder)
    plain = load(args.llm, attention="sdpa")
    load_adapter(plain, folder)
    rows, trie = protocol.test, title_trie(model.prompt.answers)
    chosen = np.random.default_rng(0).choice(len(rows), args.users, replace=False)
    prompts = [model.prompt.trunk(rows.history[row][-args.history :]) for row in chosen]
    hidden = [rows.hidden[row] for row in chosen]
    searched = Search(model.policy, prompts, trie, hidden, rows.targets[chosen].tolist(), args.k)
    lengths = np.array([len(prompt) for prompt in prompts])
    typical = int(np.abs(lengths - lengths.mean()).argmin())  # what one user costs grows with the prompt
    sides = one_user(plain.model, model.policy, prompts[typical], trie, model.prompt.answers, searched.full[typical])
    sides[TOPK] = Side(searched.run, searched.difference, share=len(prompts))
    records = compare(sides, lambda found: found, TOLERANCE, args.rounds)
    return {
        "titles": trie.n_items - 1,
        "title_tokens": sum(map(len, model.prompt.answers)),
        "inner_nodes": len(trie.inner),
        "users": len(prompts),
        "k": args.k,
        "prompt_tokens": lengths.tolist(),
        "prompt_tokens_of_one_user": len(prompts[typical]),
        "adapter": folder.name,
        **searched.facts(),
        "times_faster": {ours: speedups(records, ours) for ours in (TOPK, EXACT)},
        "sides": records,
    }


class Search:
    """The search of all users, and the full pass that it is held against."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[list[int]],
        trie: TitleTrie,
        hidden: Sequence[np.ndarray],
        targets: Sequence[int],
        k: int,
    ) -> None:
        self.model, self.prompts, self.trie, self.hidden, self.k = model, prompts, trie, hidden, k
        self.targets = targets
        self.scores = title_scores(trie)
        self.full = [exact_scores(model, p, trie, self.scores, token_budget=4096).numpy() for p in prompts]

    def run(self) -> list[Found]:
        found, self.stats = exact_topk(
            self.model, self.prompts, self.trie, self.scores, k=self.k, hidden=self.hidden, token_budget=4096
        )
        self.found = found
        return found

    def difference(self, found: list[Found]) -> float:
        """The largest over users; infinite where a metric differs."""
        searched, exact = self.metrics(found)
        each = zip(found, self.full, self.hidden, strict=True)
        worst = max(disagreement(one, full, self.k, seen) for one, full, seen in each)
        return worst if (searched == exact).all() else np.inf

    def metrics(self, found: list[Found]) -> tuple[np.ndarray, np.ndarray]:
        """Hit@K and NDCG@K of each user ``[users, 2]``, by the search and by the full pass."""
        right = [best(full, self.k, seen) for full, seen in zip(self.full, self.hidden, strict=True)]
        searched, exact = (
            np.array([metrics(one, target, self.k) for one, target in zip(ranked, self.targets, strict=True)])
            for ranked in (found, right)
        )
        return searched, exact

    def facts(self) -> dict[str, Any]:
        """What the last search cost, and what it and the full pass rank."""
        searched, exact = (table.mean(0).tolist() for table in self.metrics(self.found))
        return {
            "expansions": self.stats.expansions,
            "mean_expansions": float(np.mean(self.stats.expansions)),
            "fallbacks": self.stats.given_up,
            "hit": {"exact": exact[0], "exact_topk": searched[0]},
            "ndcg": {"exact": exact[1], "exact_topk": searched[1]},
        }


def one_user(
    plain: torch.nn.Module,
    model: torch.nn.Module,
    prompt: list[int],
    trie: TitleTrie,
    answers: Sequence[list[int]],
    full: np.ndarray,
) -> dict[str, Side]:
    """The ways that score every title of one user; each is held against plain scoring of some titles."""
    titles, scores = answers[1:], title_scores(trie)
    some = np.random.default_rng(1).choice(len(titles), min(SOME, len(titles)), replace=False)
    asked = [(prompt, titles[i]) for i in some]
    right = torch.stack([logp_by_hand(plain, *pair) for pair in asked])

    def far(found: torch.Tensor) -> float:
        return (found - right).abs().max().item()

    return {
        PLAIN: Side(lambda: in_batches(plain, asked, "all"), far, share=len(some) / len(titles), tolerance=ROUGH_NATS),
        CACHE: Side(
            lambda: cached_logps(plain, prompt, titles, at_once=128),
            lambda found: far(found[some]),
            tolerance=ROUGH_NATS,
        ),
        EXACT: Side(
            lambda: exact_scores(model, prompt, trie, scores, token_budget=4096), lambda found: far(found[1:][some])
        ),
    }


def main(argv: list[str] | None = None) -> Results:
    """Measure the cells that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS), help="how titles are written")
    parser.add_argument("--users", type=int, default=32, help="users that the search is checked and timed on")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--history", type=int, default=30, help="items of history (MAX_ITEM_LIST_LENGTH)")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter that SFT on one form has trained")
    parser.add_argument("--train_users", type=int, default=60, help="without --adapter: users of one epoch of SFT")
    args = arguments(parser, argv)
    results = Results("full_catalogue", args)
    cells = {f"{form}, K={args.k}, history {args.history}, {args.users} users": FORMS[form] for form in args.form}
    for cell in results.todo(cells):
        folder = args.adapter or trained_adapter(args.llm, cells[cell], args.history, args.train_users)
        results.keep(cell, measured(args, cells[cell], folder))
    print(results.table(TOPK))
    for cell, record in results.cells.items():
        print(
            f"{cell}: {record['mean_expansions']:.0f} of {record['inner_nodes']} nodes a user, {record['fallbacks']} "
            f"fallbacks, Hit@{record['k']} {record['hit']['exact']:.3f} and {record['hit']['exact_topk']:.3f}"
        )
    return results


if __name__ == "__main__":
    sys.exit(main().exit_message)
