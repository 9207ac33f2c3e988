"""QLoRA of an 8B LLM with k = 7 on a GPU that is allowed 24 GiB: what ``plan`` says, and what a run takes.

    python benchmarks/random_llm.py llama-8b --shape=llama-8b --device=cuda --dtype=bfloat16
    python benchmarks/gpu_qlora.py --llm=llama-8b [--gib=24] [--users=6]

One run of ml-100k with both stages, SFT and S-DPO with seven rejected titles a position, 4-bit weights and gradient
checkpointing; the process gets no more than ``--gib`` of the GPU. ``plan`` is asked before anything is loaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from typing import Any

import torch
from common import arguments

from recbole_llm.config import LLMConfig
from recbole_llm.memory import GIB
from recbole_llm.plan import plan
from recbole_llm.probe import PeakMemory
from recbole_llm.quick_start import run_recbole_llm
from results import Results, markdown

SETTINGS: dict[str, Any] = {
    "quantization": "4bit",
    "dtype": "bfloat16",
    "gradient_checkpointing": True,
    "token_budget": 2048,
    "loss": "SDPO",
    "rejected_num": 7,
    "epochs": 1,
    "preference_epochs": 1,
    "eval_step": 0,
    "eval_users": 8,
    "encoder": "none",
    "gpu_id": "0",
    "show_progress": False,
}


def measured(settings: dict[str, Any], gib: float) -> dict[str, Any]:
    """What plan says and what the run took, bytes; the seconds of its stages."""
    config = LLMConfig("LLMRanker", "ml-100k", config_dict=settings)
    planned = plan(config, probe=False)
    on_gpu = config["device"].type == "cuda"
    if on_gpu:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / whole))
    clock = time.perf_counter()
    with PeakMemory(config["device"]) as peak:
        done = run_recbole_llm("LLMRanker", "ml-100k", config_dict=settings)
    seconds = time.perf_counter() - clock
    with open(f"{done['run_folder']}/result.json", encoding="utf-8") as stored:
        stages = json.load(stored)["stages"]
    return {
        "planned_bytes": planned["memory"]["gpu" if on_gpu else "total"],
        "planned": planned["memory"],
        "work": planned["work"],
        "reserved_bytes": peak.peak,
        "allocated_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "run_s": seconds,
        "stages": [{k: s[k] for k in ("loss", "positions", "steps", "tokens", "seconds")} for s in stages],
        "settings": {key: value for key, value in settings.items() if key not in ("llm", "checkpoint_dir")},
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "sides": {},
    }


def main(argv: list[str] | None = None) -> Results:
    """Plan, run, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=24, help="of GPU memory that the process may take")
    parser.add_argument("--users", type=int, default=6, help="training users")
    parser.add_argument("--settings", type=json.loads, default={}, help="keys of the run, as JSON")
    args = arguments(parser, argv)
    results = Results("gpu_qlora", args)
    for cell in results.todo([f"{args.users} users, {args.gib:g} GiB"]):
        with tempfile.TemporaryDirectory() as folder:
            settings = {**SETTINGS, "llm": args.llm, "few_shot": args.users, "checkpoint_dir": folder, **args.settings}
            results.keep(cell, measured(settings, args.gib))
    print(table(results))
    return results


def table(results: Results) -> str:
    """Markdown: a row for each cell."""
    return markdown(
        [
            {
                "cell": cell,
                "planned GiB": found["planned_bytes"] / GIB,
                "reserved GiB": found["reserved_bytes"] / GIB,
                "run s": found["run_s"],
                **{f"{s['loss']} tokens/s": s["tokens"] / s["seconds"] for s in found["stages"]},
            }
            for cell, found in results.cells.items()
        ]
    )


if __name__ == "__main__":
    sys.exit(main().exit_message)
