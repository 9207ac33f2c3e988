"""Print what the results say, a table for each benchmark: how many times faster ours is than each side, by wall clock.

python benchmarks/summary.py [--out=results/benchmarks]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from common import RESULTS

from results import markdown

# What the operations of the plainest side are over ours.
LIMITS = ("operations_sequences_over_ours_cached", "operations_full_logits_over_ours", "operations_plain_over_ours")


def rows(cells: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each cell, and for each of our sides that others are held against."""
    found = []
    for cell, record in cells.items():
        times = record.get("times_faster") or record.get("times_recbole") or {}
        nested = any(isinstance(value, dict) and "wall" not in value for value in times.values())
        for ours, ratios in times.items() if nested else [("", times)]:
            row = {"cell": cell, **({"ours": ours} if ours else {})}
            row |= {side: ratio["wall"] for side, ratio in ratios.items() if side != ours}
            limit = next((record[key] for key in LIMITS if key in record), None)
            found.append(row | ({"limit in operations": limit} if limit else {}))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    for file in sorted(parser.parse_args(argv).out.glob("*.json")):
        table = rows(json.loads(file.read_text(encoding="utf-8"))["cells"])
        if table:
            print(f"\n{file.stem}\n\n{markdown(table)}")


if __name__ == "__main__":
    main()
