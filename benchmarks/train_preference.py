"""A preference step, LoRA on all linears, one user: ours against TRL's DPOTrainer and trainers of full sequences.

    python benchmarks/train_preference.py [--prompt 150 300 600] [--k 1 3 7 15] [--llm=embedded] [--memory]

The prompt is shared by the chosen and k rejected titles, each with an end (instruct prompts). All sides compute the
same loss, the mean of DPO over the k pairs, on the same token ids with the same weights; loss and gradients must equal
those of one sequence at a time to 1e-5 (relative L2; 1e-4 for sides that use float32 log_softmax). *sequences* is what
S-DPO's code does: k + 1 full sequences, log_softmax of all positions, the reference in every step. TRL takes k pairs
as 2k sequences. ``--memory`` measures each side's resident memory in a process of its own instead, with AdamW.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from common import Side, arguments, compare, form_argument, load, material, named, speedups, title_tree
from memory import GIB, PeakMemory, step_bytes
from operations import lora_step, one_sequence_each, shared_prompt
from plain import (
    ROUGH,
    difference,
    gradients,
    pair_loss,
    pairs_by_hand,
    reference_by_hand,
    sequence_logps,
    stir_adapter,
)

from recbole_llm.llm.logps import batch_logps
from results import Results, markdown

TOLERANCE = 1e-5
OURS, OURS_IN_STEP = "ours, reference cached", "ours, reference in the step"
OURS_SMALL = "ours, reference cached, gradient checkpointing"
SEQUENCES, TITLES = "sequences", "sequences, head on titles"
TRL, TRL_DEFAULT = "TRL, best settings", "TRL, default"
SIDES = (TRL_DEFAULT, TRL, SEQUENCES, TITLES, OURS_IN_STEP, OURS_SMALL, OURS)


@cache
def policy(llm: str, attention: str, checkpointing: bool = False) -> torch.nn.Module:
    """A model in training mode with an adapter that is not a fresh one; the same weights whatever the options."""
    return stir_adapter(load(llm, attention=attention, gradient_checkpointing=checkpointing).model).train()


def step_side(
    model: torch.nn.Module,
    logps: Callable[[], torch.Tensor],
    reference: torch.Tensor | None,
    tokens: int,
    tolerance: float = TOLERANCE,
) -> Side:
    """A step by some way to get log-probs ``[1 + k]``; the reference by the same way where none is given."""

    def step() -> torch.Tensor:
        model.zero_grad()
        current, given = logps(), reference
        if given is None:
            with torch.no_grad(), model.disable_adapter():
                given = logps()
        loss = pair_loss(current, given)
        loss.backward()
        return loss.detach()

    return Side(step, lambda loss: (loss, gradients(model)), {"tokens": tokens}, tolerance=tolerance)


def trl_side(llm: str, prompt: list[int], answers: Sequence[list[int]], *, best: bool) -> Side:
    """TRL's ``training_step`` with the adapter that the other sides have."""
    import trl_side as trl

    model = policy(llm, "sdpa")
    base = load(llm, attention="sdpa", finetune="none")
    trainer, batch = trl.trl_trainer(base, model.peft_config["default"], [(prompt, answers)], best=best)
    adapter = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    if trainer.model.load_state_dict(adapter, strict=False).unexpected_keys:
        raise RuntimeError("the weights of TRL's adapter have other names than ours")

    def step() -> torch.Tensor:
        trainer.model.zero_grad()
        return trainer.training_step(trainer.model, batch)

    facts = {"tokens": batch["input_ids"].numel(), **trl.facts(trainer)}
    return Side(step, lambda loss: (loss, gradients(trainer.model)), facts)


def side(name: str, llm: str, prompt: list[int], answers: Sequence[list[int]]) -> Side:
    """One side, ready to run."""
    if name in (TRL, TRL_DEFAULT):
        return trl_side(llm, prompt, answers, best=name == TRL)
    if name in (SEQUENCES, TITLES):
        model, head = policy(llm, "sdpa"), "all" if name == SEQUENCES else "titles"
        asked = [(prompt, answer) for answer in answers]
        tokens = one_sequence_each(len(prompt), [len(a) for a in answers], every_row=True).tokens
        return step_side(model, lambda: sequence_logps(model, asked, head), None, tokens, ROUGH)
    model, reference = policy(llm, "auto", name == OURS_SMALL), None
    if name != OURS_IN_STEP:
        with torch.no_grad(), model.disable_adapter():
            reference = batch_logps(model, [title_tree(prompt, answers)])
    tokens = len(title_tree(prompt, answers).without_leaves())
    return step_side(model, lambda: batch_logps(model, [title_tree(prompt, answers)]), reference, tokens)


def left_out(name: str, most_gib: float, config: Any, prompt: int, answers: Sequence[list[int]]) -> str | None:
    """Why a side is not run, or None."""
    if name in (TRL, TRL_DEFAULT) and importlib.util.find_spec("trl") is None:
        return "not run: trl is not installed"
    if name in (OURS, OURS_SMALL, OURS_IN_STEP):
        return None
    rows = 2 * (len(answers) - 1) if name in (TRL, TRL_DEFAULT) else len(answers)
    tokens = rows * (prompt + max(map(len, answers)))
    # On a CPU TRL's head runs over all positions too.
    needed = step_bytes(config, tokens, all_logits=name != TITLES) / GIB
    if needed > most_gib and name != TRL_DEFAULT:  # with checkpointing it keeps one vector a layer
        return f"not run: memory, about {needed:.0f} GiB"
    return None


def measured(args: argparse.Namespace, prompt: list[int], answers: Sequence[list[int]]) -> dict[str, Any]:
    """A cell: gate and times of every side that can be run."""
    model, asked = policy(args.llm, "sdpa"), [(prompt, answer) for answer in answers]
    right = pairs_by_hand(model, [asked], [reference_by_hand(model, asked)])
    names = SIDES if args.trl_default else SIDES[1:]
    reasons = {name: left_out(name, args.most_gib, model.config, len(prompt), answers) for name in names}
    sides = {name: side(name, args.llm, prompt, answers) for name in names if reasons[name] is None}
    records = {name: {"not_run": reason} for name, reason in reasons.items() if reason}
    records |= compare(sides, lambda found: difference(found, right), TOLERANCE, args.rounds)
    lengths = [len(answer) for answer in answers]
    least = lora_step(model, shared_prompt(len(prompt), lengths), reference=False)
    naive = lora_step(model, one_sequence_each(len(prompt), lengths, every_row=True), reference=True)
    return {
        "prompt_tokens": len(prompt),
        "k": len(answers) - 1,
        "answer_tokens": lengths,
        "sides": {name: records[name] for name in names},
        "times_faster": {ours: speedups(records, ours) for ours in (OURS, OURS_IN_STEP)},
        "operations_sequences_over_ours_cached": naive / least,
    }


# ---- memory


def probe(name: str, llm: str, prompt: list[int], answers: Sequence[list[int]]) -> dict[str, float]:
    """Bytes of this process in three steps of one side with AdamW: at most, and how many more than before."""
    with PeakMemory() as whole:
        step = side(name, llm, prompt, answers)
        with PeakMemory() as steps:
            _, flat = step.result(step.run())
            moments = [flat.clone() for _ in range(2)]  # as large as AdamW's
            for _ in range(2):
                step.run()
    del moments
    return {"peak_bytes": whole.peak, "growth_bytes": steps.peak - steps.before}


def memory(args: argparse.Namespace, prompt: list[int], answers: Sequence[list[int]]) -> dict[str, Any]:
    """A cell: each side's memory in a process of its own."""
    config = policy(args.llm, "sdpa").config
    records: dict[str, dict[str, Any]] = {}
    for name in SIDES if args.trl_default else SIDES[1:]:
        if reason := left_out(name, args.most_gib, config, len(prompt), answers):
            records[name] = {"not_run": reason}
            continue
        command = [sys.executable, __file__, f"--llm={args.llm}", f"--threads={args.threads}", f"--probe={name}"]
        command += ["--prompt", str(len(prompt)), "--k", str(len(answers) - 1), f"--form={args.form}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        failed = {"failed": f"the process ended with status {done.returncode}"}
        records[name] = failed if done.returncode else json.loads(done.stdout.splitlines()[-1])
    return {"prompt_tokens": len(prompt), "k": len(answers) - 1, "sides": records}


def gib(found: dict[str, Any], name: str) -> float | None:
    return found[name] / GIB if name in found else None


def memory_table(results: Results) -> str:
    """Markdown: gigabytes of each side."""
    return markdown(
        [
            {
                "cell": cell,
                "side": name,
                "process, GiB": gib(found, "peak_bytes"),
                "steps add, GiB": gib(found, "growth_bytes"),
                "": found.get("failed") or found.get("not_run") or "",
            }
            for cell, record in results.cells.items()
            for name, found in record["sides"].items()
        ]
    )


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", type=int, nargs="+", default=[150, 300, 600], help="prompt tokens")
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 7, 15], help="rejected titles")
    form_argument(parser)
    parser.add_argument("--trl_default", action="store_true", help="also TRL as it comes")
    parser.add_argument("--most_gib", type=float, default=16, help="sides that would take more memory are left out")
    parser.add_argument("--memory", action="store_true", help="measure memory, not time")
    parser.add_argument("--probe", choices=SIDES, help=argparse.SUPPRESS)
    return arguments(parser, argv)


def main(argv: list[str] | None = None) -> Results:
    """Measure the cells that are asked for and print them."""
    args = read_arguments(argv)
    results = Results("train_memory" if args.memory else "train_preference", args)
    tokenizer = load(args.llm, finetune="none").tokenizer
    shapes = {named(f"P={prompt} k={k}", args.form): (prompt, k) for prompt in args.prompt for k in args.k}

    def texts(cell: str) -> tuple[list[int], list[list[int]]]:
        prompt, titles = material(tokenizer, shapes[cell][0], shapes[cell][1] + 1, form=args.form, end="")
        return prompt, [[*title, tokenizer.eos_token_id] for title in titles]

    if args.probe:
        print(json.dumps(probe(args.probe, args.llm, *texts(next(iter(shapes))))))
        return results
    for cell in results.todo(shapes):
        results.keep(cell, (memory if args.memory else measured)(args, *texts(cell)))
    print(memory_table(results) if args.memory else results.table(OURS))
    return results


if __name__ == "__main__":
    sys.exit(main().exit_message)
