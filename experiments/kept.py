"""What an experiment leaves in results/: its tables, the record of every run, and the machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from recbole_llm.run_folder import environment, write_json, write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"


def keep(done: dict[str, Any], name: str, folder: str, note: str = "") -> None:
    """Write a comparison as ``results/<folder>/<name>.{md,csv,json}``, beside ``env.json``.

    Args:
        done: what ``recbole_llm.report.compare.compare`` returned.
        note: one paragraph above the table.
    """
    home = RESULTS / folder
    home.mkdir(parents=True, exist_ok=True)
    write_text(home / f"{name}.md", (f"{note}\n\n" if note else "") + done["markdown"])
    write_text(home / f"{name}.csv", done["table"].to_csv(index=False))
    write_json(home / f"{name}.json", done["runs"])
    write_json(home / "env.json", environment())
    print(f"written: {home}/{name}.md, .csv, .json")
