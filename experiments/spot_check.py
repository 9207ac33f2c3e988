"""Cells of a committed table, drawn by a seed and run again from nothing: do they give the numbers of the table?

    python experiments/spot_check.py few-shot-games --cells=3 --data_path=<folder that holds amazon-games/>

Reads properties/compare/<name>.yaml and results/<name>/table.json, and what searches chose from the trials in
`saved/` (--checkpoint_dir). Each cell is trained and tested in a folder of its own, with no stage at hand. Writes
spot_check.json beside the table: metrics in the table, metrics now. Exit status 1 where one differs by more than
--within (0: to the last printed digit).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from typing import Any

from kept import RESULTS

from recbole_llm.environment import environment
from recbole_llm.files import write_json
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.entries import parse_models, split_options
from recbole_llm.report.grid import Cell, cells
from recbole_llm.report.tune_lines import tune_all
from recbole_llm.settings import PROPERTIES, read_yaml


def main() -> None:
    """Draw, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the comparison, in properties/compare and in results")
    parser.add_argument("--checkpoint_dir", default="saved", help="where the trials of the table are")
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--within", type=float, default=0.0)
    parser.add_argument("--data_path", default=None)
    given = parser.parse_args()
    home = RESULTS / given.name
    tables = json.loads((home / "table.json").read_text(encoding="utf-8"))
    kept = {run["run"]: run["metrics"] for table in tables for model in table["models"] for run in model["runs"]}
    grid = tuned_cells(given.name, {k: v for k in ("checkpoint_dir", "data_path") if (v := getattr(given, k))})
    if lost := sorted(set(kept) - {cell.folder.name for cell in grid}):
        sys.exit(
            f"{home}: {', '.join(lost)} would have another name now; code, versions, data or settings have changed."
        )
    found = [checked(cell, kept) for cell in random.Random(given.seed).sample(grid, given.cells)]
    write_json(home / "spot_check.json", {"drawn_by": given.seed, "cells": found, **environment()})
    sys.exit(any(cell["largest"] > given.within for cell in found))


def tuned_cells(name: str, settings: dict[str, Any]) -> list[Cell]:
    """All cells of the comparison, with the values that its searches chose; finished trials are read."""
    asked = read_yaml(PROPERTIES / "compare" / f"{name}.yaml") | settings
    entries = parse_models(asked.pop("models"))
    options, shared = split_options(asked)
    chosen, _ = tune_all(cells(entries, options, shared), options)
    return cells(entries, options, shared, chosen=chosen)


def checked(cell: Cell, kept: dict[str, dict[str, float]]) -> dict[str, Any]:
    """A cell run again, beside what the table has, and the largest absolute difference of any metric."""
    with tempfile.TemporaryDirectory() as fresh:
        settings = cell.settings | {"checkpoint_dir": fresh}
        now = dict(run_recbole_llm(cell.entry.model, cell.setting.dataset, None, settings)["test_result"])
    table = kept[cell.folder.name]
    largest = max(abs(table[name] - now[name]) for name in now)
    print(f"{cell.label}: largest difference {largest:g}", flush=True)
    return {"cell": cell.label, "run": cell.folder.name, "table": table, "again": now, "largest": largest}


if __name__ == "__main__":
    main()
