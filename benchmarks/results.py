"""Results of a benchmark: a JSON file that is kept cell by cell, and its table."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common import speedups
from tabulate import tabulate

from recbole_llm.environment import environment
from recbole_llm.files import write_json


class Results:
    """A benchmark's JSON file, written after every cell; a cell that is whole is not measured again.

    Attributes:
        cells: name of a cell, such as ``P=300 k=7``, -> its record; its ``sides`` are as ``compare`` gives them.
    """

    def __init__(self, benchmark: str, args: argparse.Namespace) -> None:
        self.file = args.out / f"{benchmark}-{Path(args.llm).name}.json"
        self.again, self.rounds = args.again, args.rounds
        self.cells: dict[str, dict[str, Any]] = {}
        if self.file.is_file():
            self.cells = json.loads(self.file.read_text(encoding="utf-8"))["cells"]

    def todo(self, cells: Iterable[str]) -> Iterator[str]:
        """Those that are to be measured now."""
        for cell in cells:
            if cell in self.cells and not self.again and not failures({cell: self.cells[cell]}):
                print(f"{cell}: kept from before (--again measures it again)", flush=True)
                continue
            self._started, self._load = time.perf_counter(), _load_average()
            yield cell

    def keep(self, cell: str, record: Mapping[str, Any]) -> None:
        """Write a cell with the machine that it was measured on, and say so."""
        took = time.perf_counter() - self._started
        self.cells[cell] = {
            **record,
            "rounds": self.rounds,
            "took_s": took,
            "load_average_before": self._load,
            "environment": {**environment(), "trl": _trl_version()},
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, {"benchmark": self.file.stem, "cells": self.cells})
        print(f"{cell}: {took:.0f} s", *failures({cell: self.cells[cell]}), sep="; ", flush=True)

    @property
    def exit_message(self) -> str | None:
        """What ``sys.exit`` is given: the sides that failed, or None."""
        return "\n".join(failures(self.cells)) or None

    def table(self, ours: str) -> str:
        """Markdown: a row for each cell and side."""
        rows = []
        for cell, record in self.cells.items():
            gain = speedups(record["sides"], ours)
            for name, side in record["sides"].items():
                said = side.get("failed") or side.get("not_run") or ""
                rows.append(
                    {
                        "cell": cell,
                        "side": name,
                        "wall s": side.get("wall_s"),
                        "CPU s": side.get("cpu_s"),
                        f"/ {ours}, wall": gain.get(name, {}).get("wall"),
                        f"/ {ours}, CPU": gain.get(name, {}).get("cpu"),
                        "difference": f"{side['difference']:.0e}" if "difference" in side else "",
                        "": said,
                    }
                )
        return markdown(rows)


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a Markdown table, numbers with three digits."""
    return tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".3g", missingval="–")


def failures(cells: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line for each side that failed the gate."""
    return [
        f"{cell}, {name}: {side['failed']}"
        for cell, record in cells.items()
        for name, side in record["sides"].items()
        if "failed" in side
    ]


def _load_average() -> list[float] | None:
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def _trl_version() -> str | None:
    try:
        return version("trl")
    except PackageNotFoundError:
        return None
