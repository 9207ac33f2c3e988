"""What experiments share: small settings that two cores can run, and what they leave in results/."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_llm.environment import environment
from recbole_llm.files import write_json, write_text
from recbole_llm.report.entries import Options
from recbole_llm.report.formats import markdown as as_markdown
from recbole_llm.report.frames import results_frame
from recbole_llm.report.results import Results
from recbole_llm.report.table import costs_table, harm_table, results_table

RESULTS = Path(__file__).resolve().parents[1] / "results"
# The target among 20 candidates, 100 test users, histories of 10, one seed.
PROTOCOL: dict[str, Any] = {
    "eval_users": 100,
    "eval_args": {"mode": {"valid": "uni19", "test": "uni19"}},
    "MAX_ITEM_LIST_LENGTH": 10,
    "seed": 2020,
    "state": "WARNING",
}
# One epoch of each stage, the last epoch evaluated: validation would have nothing to select.
LLM: dict[str, Any] = {
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "epochs": 1,
    "eval_step": 0,
    "sft_positions": 30,
    "learning_rate": 0.001,
    "train_batch_size": 16,
    "preference_positions": 4,
}
CLASSIC = {"train_batch_size": 256, "epochs": 50, "stopping_step": 5}


def keep(done: dict[str, Any], name: str, folder: str, note: str = "", names: dict[str, str] | None = None) -> str:
    """Write a comparison as ``results/<folder>/<name>.{md,csv,json}``, beside ``env.json``.

    Args:
        done: what ``recbole_llm.report.compare.compare`` returned.
        note: one paragraph above the table.
        names: label of a run -> a shorter one for the tables; the records keep what was typed as ``entry``.

    Returns:
        The tables as Markdown.
    """
    home = RESULTS / folder
    home.mkdir(parents=True, exist_ok=True)
    runs = [
        {**run, "entry": run["label"], "label": (names or {}).get(run["label"], run["label"])} for run in done["runs"]
    ]
    shown = [
        Results(r.setting, [replace(line, label=(names or {}).get(line.label, line.label)) for line in r.lines])
        for r in done["results"]
    ]
    tables = [results_table(r, pd.DataFrame(), [], Options(), i) for i, r in enumerate(shown)]
    tables += [t for i, r in enumerate(shown) if (t := harm_table(r, pd.DataFrame(), [], Options(), i))]
    markdown = (f"{note}\n\n" if note else "") + "\n".join(map(as_markdown, [*tables, costs_table(shown)]))
    write_text(home / f"{name}.md", markdown)
    write_text(home / f"{name}.csv", results_frame(shown).to_csv(index=False))
    write_json(home / f"{name}.json", runs)
    write_json(home / "env.json", environment())
    print(f"written: {home}/{name}.md, .csv, .json")
    return markdown
