"""Packed scoring of candidates against plain transformers scoring, both in one run.

    python benchmarks/score_candidates.py [--llm=embedded] [--prompt=250] [--candidates=20] [--rounds=5]

*plain*: one sequence (prompt + title) a candidate, all in one padded batch, log-softmax of all logits, as most
published rankers do. *plain, needed logits*: the same with transformers' ``logits_to_keep``. *packed*: the prompt once,
titles as branches of a token tree. Titles are real (ml-100k). A side whose numbers differ is reported as failed, not
timed. Rounds are interleaved; the median wall and CPU time count. Writes a JSON of all that under ``results/``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.atomic import read_items
from recbole_llm.data.prompt import plain_tokens
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder
from recbole_llm.run_folder import environment, write_json

TOLERANCE = 2e-4  # nats on title log-probs of tens of nats, float32


def plain_scores(
    model: torch.nn.Module, prompt: list[int], titles: list[list[int]], *, needed_only: bool
) -> torch.Tensor:
    """One sequence a candidate ``[N]``."""
    longest = max(map(len, titles))
    ids = torch.zeros(len(titles), len(prompt) + longest, dtype=torch.long)
    attend = torch.zeros_like(ids)
    for row, title in enumerate(titles):
        ids[row, : len(prompt) + len(title)] = torch.tensor(prompt + title)
        attend[row, : len(prompt) + len(title)] = 1
    keep = {"logits_to_keep": longest + 1} if needed_only else {}
    logps = model(input_ids=ids, attention_mask=attend, **keep).logits.float().log_softmax(-1)
    logps = logps if needed_only else logps[:, len(prompt) - 1 :]
    return torch.stack([logps[i, torch.arange(len(t)), torch.tensor(t)].sum() for i, t in enumerate(titles)])


def packed_tree(prompt: list[int], titles: list[list[int]]) -> TokenTree:
    """The same as one token tree."""
    builder = TreeBuilder()
    end = builder.chain(-1, prompt)[-1]
    for title in titles:
        builder.completion(builder.chain(end, title))
    return builder.build()


def material(tokenizer: object, prompt_tokens: int, candidates: int) -> tuple[list[int], list[list[int]]]:
    """A prompt of real titles cut to length, and real titles to score."""
    _, rows = read_items(LLMConfig("LLMRanker", "ml-100k").final_config_dict, "ml-100k")
    titles = plain_tokens(tokenizer, [f"{row['movie_title']} ({row['release_year']})\n" for row in rows.values()])
    titles = [titles[i] for i in torch.randperm(len(titles), generator=torch.Generator().manual_seed(0)).tolist()]
    prompt = [token for title in titles[candidates:] for token in title][:prompt_tokens]
    return prompt, titles[:candidates]


def measure(sides: dict[str, Callable[[], torch.Tensor]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds of each side, rounds interleaved, after one round of warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            wall, cpu = time.perf_counter(), time.process_time()
            side()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {
        name: {"wall_s": statistics.median(w for w, _ in t), "cpu_s": statistics.median(c for _, c in t)}
        for name, t in times.items()
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="embedded")
    parser.add_argument("--prompt", type=int, default=250, help="prompt tokens")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    llm = load_llm(llm=args.llm, device=torch.device("cpu"), finetune="none", dtype="float32", seed=0)
    prompt, titles = material(llm.tokenizer, args.prompt, args.candidates)
    tree = packed_tree(prompt, titles)
    sides = {
        "plain": lambda: plain_scores(llm.model, prompt, titles, needed_only=False),
        "plain, needed logits": lambda: plain_scores(llm.model, prompt, titles, needed_only=True),
        "packed": lambda: batch_logps(llm.model, [tree]),
    }
    expected = sides["plain"]()
    for name, side in sides.items():
        worst = (side() - expected).abs().max().item()
        if worst > TOLERANCE:
            raise SystemExit(f"{name}: scores differ by {worst:.1e} nats; not timed")
    times = measure(sides, args.rounds)
    record = {
        "llm": llm.name,
        "revision": llm.revision,
        "dtype": llm.dtype,
        "prompt_tokens": len(prompt),
        "candidates": len(titles),
        "title_tokens": sum(map(len, titles)),
        "tokens_plain": len(titles) * (len(prompt) + max(map(len, titles))),
        "tokens_packed": len(tree.without_leaves()),
        "rounds": args.rounds,
        "times": times,
        "speedup_wall": {n: times[n]["wall_s"] / times["packed"]["wall_s"] for n in times},
        "speedup_cpu": {n: times[n]["cpu_s"] / times["packed"]["cpu_s"] for n in times},
        "environment": environment(),
    }
    print(json.dumps({k: v for k, v in record.items() if k != "environment"}, indent=2))
    results = Path(__file__).resolve().parents[1] / "results"
    results.mkdir(exist_ok=True)
    write_json(results / f"benchmark_score_candidates-{args.llm}-{len(prompt)}-{len(titles)}.json", record)


if __name__ == "__main__":
    main()
