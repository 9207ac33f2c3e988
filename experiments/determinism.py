"""What moves the numbers of a run, and by how much: a base run twice, then one condition changed at a time.

    python experiments/determinism.py                        # half an hour of one core; give it again after a break
    python experiments/determinism.py --only=attention       # of what is left, these alone
    python experiments/determinism.py --packages=<folder>    # also with what `pip install --target=<folder>` put there

MovieLens-100K, 20 training users, 20 test users with 20 candidates each: the packaged LLM with 10 steps of SFT and 5 of
DPO, and SASRec with 2 epochs. Each run has a process, a folder (saved/determinism/<condition>) and an SFT stage of its
own. Results go to results/determinism/; docs/determinism.md reads them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from determinism_table import BASE, Condition, difference, folder_of, tables
from kept import RESULTS

from recbole_llm.environment import environment
from recbole_llm.files import write_json, write_text
from recbole_llm.llm.fast_linears import ONEDNN
from recbole_llm.llm.model_cache import cache_root

HERE = Path(__file__).resolve().parent
SAVED = Path("saved") / "determinism"
PROTOCOL: dict[str, Any] = {
    "few_shot": 20,
    "eval_users": 20,
    "eval_args": {"mode": {"valid": "uni19", "test": "uni19"}},
    "MAX_ITEM_LIST_LENGTH": 5,
    "seed": 2020,
    "encoder": "none",
    "eval_step": 0,
    "state": "WARNING",
    "show_progress": False,
}
OWN: dict[str, dict[str, Any]] = {
    "LLMRanker": {
        "loss": "DPO",
        "rejected_num": 1,
        "item_text": "{movie_title}",
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "epochs": 1,
        "sft_positions": 4,
        "preference_positions": 2,
        "train_batch_size": 8,
        "save_every": 1e-9,
    },
    "SASRec": {"epochs": 2, "train_batch_size": 256},
}
LLM, SASREC = ("LLMRanker",), ("SASRec",)
KILLED_AT = (6, 12)  # steps logged: in SFT, and in DPO
# An older processor's instructions, for torch, oneDNN and MKL.
OLDER = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"}


def conditions(packages: str | None) -> list[Condition]:
    """All of them, in the order of the table."""
    found = [
        Condition(BASE),
        Condition("again"),
        Condition("PYTHONHASHSEED=1", env={"PYTHONHASHSEED": "1"}),
        Condition("killed -9 twice and resumed", LLM, killed=KILLED_AT),
        Condition("in a process of compare --jobs=2", jobs=2),
        Condition("candidates in reverse", scoring={"candidates_reversed": True}),
        Condition("rows shuffled", scoring={"rows_shuffled": True}),
        Condition("users_at_once 1 (16)", LLM, scoring={"users_at_once": 1}),
        Condition("gradient_checkpointing=True", LLM, {"gradient_checkpointing": True}),
        *(Condition(f"token_budget={n} (2048)", LLM, {"token_budget": n}) for n in (1024, 512, 128)),
        *(Condition(f"attention={kind} (blocks)", LLM, {"attention": kind}) for kind in ("sdpa", "eager")),
        Condition("fast_linears=False", LLM, {"fast_linears": False}),
        Condition("fast_linears: oneDNN chosen", LLM, env={"RECBOLE_LLM_CACHE": str(SAVED / "cache-onednn")}),
        Condition("2 threads (1)", env={"OMP_NUM_THREADS": "2"}),
        Condition("2 threads, again", env={"OMP_NUM_THREADS": "2"}, against="2 threads (1)"),
        Condition("instructions of an older processor", env=OLDER, settings={"fast_linears": False}, models=LLM),
        Condition("instructions of an older processor", env=OLDER, models=SASREC),
        Condition("scored in bfloat16", LLM, {"dtype": "bfloat16"}, scoring={}),
        Condition("seed=2021", settings={"seed": 2021}),
        Condition("few_shot_seed=2021", settings={"few_shot_seed": 2021}),
    ]
    if packages:
        found.insert(-2, Condition("other packages", env={"PYTHONPATH": packages}))
    return found


# ---- runs


def scores_file(condition: Condition, model: str) -> Path:
    """Where a condition's scores lie."""
    return SAVED / re.sub(r"[^\w-]+", "-", condition.name).strip("-") / model / "scores.npz"


def run(condition: Condition, model: str) -> None:
    """Make the condition's file of scores where it is not there."""
    out = scores_file(condition, model)
    home = out.parent
    if out.is_file():
        return
    home.mkdir(parents=True, exist_ok=True)
    base = None if condition.scoring is None else str(folder_of(SAVED / BASE / model, model))
    asked = {
        "model": model,
        "settings": {**PROTOCOL, **OWN[model], **condition.settings, "checkpoint_dir": str(home)},
        "folder": base,
        "scoring": condition.scoring or {},
        "jobs": condition.jobs,
    }
    write_json(home / "asked.json", asked)
    start = time.perf_counter()
    for steps in condition.killed:
        child = started(condition, home, out)
        while child.poll() is None and steps_logged(home) < steps:
            time.sleep(0.05)
        if child.poll() is not None:
            raise RuntimeError(f"{condition.name}: ended before step {steps}; see {home / 'console.log'}")
        child.kill()
        child.wait()
    if started(condition, home, out).wait():
        raise RuntimeError(f"{condition.name}, {model}: failed; see {home / 'console.log'}")
    print(f"{condition.name}, {model}: {time.perf_counter() - start:.0f} s", flush=True)


def started(condition: Condition, home: Path, out: Path) -> subprocess.Popen[bytes]:
    """A process that does the run and writes its scores; one thread unless the condition says otherwise."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **condition.env}
    paths = [condition.env.get("PYTHONPATH"), str(HERE.parent), os.environ.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    words = [sys.executable, str(HERE / "determinism_run.py"), str(home / "asked.json"), str(out)]
    with open(home / "console.log", "ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, env=env)


def steps_logged(home: Path) -> int:
    """Optimizer steps so far of the run below a folder."""
    return sum(file.read_bytes().count(b"\n") for file in home.glob("LLMRanker-*/metrics.jsonl"))


def cache_that_chose_onednn() -> None:
    """The user's cache once more, with the decision about kernels turned to oneDNN (``llm.fast_linears``)."""
    real, other = cache_root(None).resolve(), SAVED / "cache-onednn"
    (other / "kernels").mkdir(parents=True, exist_ok=True)
    for entry in real.iterdir():
        if entry.name != "kernels" and not (other / entry.name).exists():
            (other / entry.name).symlink_to(entry)
    for file in (real / "kernels").glob("*.json"):
        told = json.loads(file.read_text(encoding="utf-8"))
        write_json(other / "kernels" / file.name, {**told, "kernels": {"layers": ONEDNN, "head": ONEDNN}})


# ---- what is kept


def keep(asked: list[Condition], home: Path) -> str:
    """Write the tables of what is done into a folder; returns them."""
    files = {(c.name, m): f for c in asked for m in c.models if (f := scores_file(c, m)).is_file()}
    found = [
        difference(condition, model, files[condition.name, model], files[condition.against, model])
        for condition in asked
        for model in condition.models
        if {(condition.name, model), (condition.against, model)} <= files.keys()
    ]
    told = tables(found)
    home.mkdir(parents=True, exist_ok=True)
    table = home / "table.json"
    before = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else []
    lost = {(row["condition"], row["model"]) for row in before} - {(row["condition"], row["model"]) for row in found}
    if lost:  # saved/determinism was emptied since
        names = ", ".join(sorted({condition for condition, _ in lost}))
        return f"{told}\nnot written: {home} has what was not run here ({names}); name another --out"
    write_text(home / "table.md", told)
    write_json(table, found)
    write_json(home / "env.json", environment())
    return f"{told}\nwritten: {home}/table.md, .json, env.json"


def main() -> None:
    """Run what is not done, and keep the differences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", help="folder of other versions of packages, put before those installed")
    parser.add_argument("--only", default="", help="run conditions in whose name this pattern is found")
    parser.add_argument("--out", default="determinism", help="folder of results/ for the tables")
    given = parser.parse_args()
    asked, told = conditions(given.packages), ""
    SAVED.mkdir(parents=True, exist_ok=True)
    for condition in (c for c in asked if re.search(given.only, c.name)):
        if "RECBOLE_LLM_CACHE" in condition.env:  # after the base, which makes the decision
            cache_that_chose_onednn()
        for model in condition.models:
            run(condition, model)
            told = keep(asked, RESULTS / given.out)
    print(told)


if __name__ == "__main__":
    main()
