"""``fast_linears`` on against off: the products with frozen weights, by the library that is faster on this CPU.

    python benchmarks/cpu_kernels.py [--llm=embedded] [--rounds=5]

Scoring of 20 candidates after 300 tokens, and a LoRA step with 3 rejected titles after 300 tokens. Log-probs must be
equal to 1e-4 nats, gradients to 1e-4 (relative L2).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from common import Side, arguments, compare, load, material, speedups, title_tree
from plain import difference, gradients, pair_loss, stir_adapter

from recbole_llm.llm.logps import batch_logps
from results import Results

TOLERANCE = 1e-4
OFF, ON = "fast_linears off", "fast_linears on"


def scoring(model: torch.nn.Module, prompt: list[int], titles: Sequence[list[int]]) -> Side:
    """Log-probs of titles after a prompt."""

    @torch.no_grad()
    def score() -> torch.Tensor:
        return batch_logps(model, [title_tree(prompt, titles)])

    return Side(score)


def step(model: torch.nn.Module, prompt: list[int], titles: Sequence[list[int]]) -> Side:
    """A preference step, its reference cached."""
    reference = scoring(model, prompt, titles).run().mean().expand(len(titles))

    def train() -> torch.Tensor:
        model.zero_grad()
        loss = pair_loss(batch_logps(model, [title_tree(prompt, titles)]), reference)
        loss.backward()
        return loss.detach()

    return Side(train, lambda loss: (loss, gradients(model)))


def main(argv: list[str] | None = None) -> Results:
    """Measure both cells and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, default=300, help="prompt tokens")
    parser.add_argument("--candidates", type=int, default=20)
    parser.add_argument("--k", type=int, default=3, help="rejected titles")
    args = arguments(parser, argv)
    results = Results("cpu_kernels", args)
    llms = {OFF: load(args.llm), ON: load(args.llm, fast_linears=True)}
    models = {name: stir_adapter(llm.model) for name, llm in llms.items()}
    shapes = {f"score P={args.prompt} N={args.candidates}": args.candidates, f"step P={args.prompt} k={args.k}": 0}
    for cell in results.todo(shapes):
        prompt, titles = material(llms[ON].tokenizer, args.prompt, shapes[cell] or args.k + 1, form="bare")
        make = scoring if shapes[cell] else step
        sides = {name: make(model, prompt, titles) for name, model in models.items()}
        right = sides[OFF].result(sides[OFF].run())
        far = difference if make is step else lambda found, right: (found - right).abs().max().item()
        records = compare(sides, lambda found, right=right, far=far: far(found, right), TOLERANCE, args.rounds)
        facts = {"kernels": llms[ON].kernels, "times_faster": speedups(records, ON)}
        results.keep(cell, {**facts, "sides": records})
    print(f"kernels chosen: {llms[ON].kernels}")
    print(results.table(ON))
    return results


if __name__ == "__main__":
    sys.exit(main().exit_message)
