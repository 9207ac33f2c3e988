"""Preference steps of many users on a GPU in bfloat16: ours against TRL's DPOTrainer and trainers of full sequences.

    python benchmarks/random_llm.py llama-1b --shape=llama-1b --device=cuda --dtype=bfloat16
    python benchmarks/gpu_training.py --llm=llama-1b [--prompt 300] [--k 1 3 7 15]

The sides are those of train_preference.py; seconds are those of the gradients of ``--users`` users. What they must
equal, and how many users they take at once: gpu.py.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from common import Side, compare, timed
from gpu import (
    GATED,
    SLACK,
    Asked,
    add_mfu,
    best_at_once,
    in_passes,
    measure,
    peak_bytes,
    plain_logps,
    read_arguments,
    record,
    synchronize,
    tree_logps,
    users,
)
from operations import lora_step, one_sequence_each, shared_prompt
from plain import gradients, pair_loss

from recbole_llm.llm.types import LLM
from results import Results

SEQUENCES, TITLES = "sequences", "sequences, head on titles"
TRL = "TRL, best settings"
CACHED, IN_STEP = "ours, reference cached", "ours, reference in the step"


def step(model: torch.nn.Module, asked: Sequence[Asked], at_once: int, way: Any, reference: Any) -> torch.Tensor:
    """Gradients of the mean pair loss of all users, in passes; the reference is computed where none is given."""
    model.zero_grad()
    place = iter(range(0, len(asked), at_once))

    def one_pass(some: Sequence[Asked]) -> torch.Tensor:
        first = next(place)
        logps = way(model, some)
        if reference is None:
            with torch.no_grad(), model.disable_adapter():
                given = way(model, some)
        else:
            given = reference[first : first + len(some)]
        loss = sum(pair_loss(own, ref) for own, ref in zip(logps, given, strict=True)) / len(asked)
        loss.backward()
        return loss.detach()

    return torch.stack(in_passes(asked, at_once, one_pass)).sum()


def trl_step(llms: Mapping[str, LLM], asked: Sequence[Asked]) -> Side:
    """One ``training_step`` of TRL over some users."""
    import trl_side as trl

    policy = llms["plain"].model
    base = replace(llms["plain"], model=copy.deepcopy(policy).unload())  # the weights alone: TRL brings its own LoRA
    trainer, batch = trl.trl_trainer(base, policy.peft_config["default"], asked, best=True)
    adapter = {name: p.data for name, p in policy.named_parameters() if p.requires_grad}
    trainer.model.load_state_dict(adapter, strict=False)

    def run() -> torch.Tensor:
        trainer.model.zero_grad()
        loss = trainer.training_step(trainer.model, batch)
        synchronize()
        return loss

    facts = {"users_a_pass": len(asked), **trl.facts(trainer)}
    return Side(run, lambda loss: gradients(trainer.model), facts)


def train_sides(llms: Mapping[str, LLM], asked: Sequence[Asked], at_once: Mapping[str, int]) -> dict[str, Side]:
    """Every way to take a step over the users that it takes at once."""
    plain, ours = llms["plain"].model, llms["ours"].model
    full, titles = (lambda m, some, head=h: plain_logps(m, some, head) for h in ("all", "titles"))
    sides: dict[str, Side] = {}
    for name, size in at_once.items():
        some = asked[:size]
        if name == TRL:
            sides[name] = trl_step(llms, some)
            continue
        way = {SEQUENCES: full, TITLES: titles}.get(name, tree_logps)
        model = ours if name in (CACHED, IN_STEP) else plain
        given = None
        if name == CACHED:
            with torch.no_grad(), model.disable_adapter():
                given = tree_logps(model, some)
        sides[name] = Side(
            lambda m=model, s=some, w=way, g=given: step(m, s, len(s), w, g),
            lambda loss, m=model: gradients(m),
            {"users_a_pass": size},
        )
    return sides


def train(args: argparse.Namespace, llms: Mapping[str, LLM], prompt: int, k: int, peak: float) -> dict[str, Any]:
    """A cell of training: gate and times, all seconds those of ``--users`` users."""
    for llm in llms.values():
        llm.model.train()
    asked = users(args.users, prompt, k + 1, args.title, args.vocabulary)
    whole, own = prompt + args.title, prompt + (k + 1) * args.title
    a_user = {SEQUENCES: (k + 1) * whole, TITLES: (k + 1) * whole, TRL: 2 * k * whole, IN_STEP: own, CACHED: own}
    names = [*a_user]
    few = asked[:GATED]
    right = gradients_of(llms["exact"].model, few)

    def far(found: torch.Tensor) -> float:
        return ((found - right).norm() / right.norm()).item()

    gate = train_sides(llms, few, dict.fromkeys(names, GATED))
    loss = gate[SEQUENCES].run()
    allowed = SLACK * far(gate[SEQUENCES].result(loss))
    checked = compare(gate, far, allowed, 0)
    del gate
    equal = [name for name in names if "failed" not in checked[name]]

    def make(size: Mapping[str, int]) -> dict[str, Side]:
        made = train_sides(llms, asked, size)
        return {n: Side(s.run, s.result, s.facts, share=size[n] / len(asked)) for n, s in made.items()}

    at_once = best_at_once(make, {name: a_user[name] for name in equal}, args)
    torch.cuda.empty_cache()
    sides = make(at_once)
    peaks = {name: {"peak_bytes": peak_bytes(side)} for name, side in sides.items()}
    times = timed(sides, args.rounds)
    records = {
        n: {**checked[n], **(sides[n].facts if n in sides else {}), **times.get(n, {}), **peaks.get(n, {})}
        for n in names
    }
    lengths = [args.title] * (k + 1)
    model = llms["ours"].model
    least = lora_step(model, shared_prompt(prompt, lengths), reference=False)
    naive = lora_step(model, one_sequence_each(prompt, lengths, every_row=True), reference=True)
    add_mfu(records, least * len(asked), peak)
    for llm in llms.values():
        llm.model.eval()
    return record(records, CACHED, len(asked), naive / least, allowed)


def gradients_of(model: torch.nn.Module, asked: Sequence[Asked]) -> torch.Tensor:
    """Gradients by plain float32 code, a user at a time."""
    step(model, asked, 1, lambda m, some: plain_logps(m, some, "titles"), None)
    return gradients(model)


def main(argv: list[str] | None = None) -> Results:
    """Measure the cells that are asked for and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 7, 15], help="rejected titles")
    args = read_arguments(parser, argv)
    cells = {f"P={p} k={k}": (p, k) for p in args.prompt for k in args.k}
    return measure("gpu_training", args, train, cells)


if __name__ == "__main__":
    sys.exit(main().exit_message)
