"""A plan as tables."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from recbole_llm.memory import GIB

COLUMNS = ("", "rounds", "positions", "steps", "passes", "tokens", "one by one", "ratio", "head rows", "at most")


def plan_text(found: dict[str, Any]) -> str:
    """A plan as tables."""
    lines = [f"Plan of {found['model']} on {found['dataset']} ({found['machine']})", ""]
    rows = [_row(part) for part in found["work"]]
    lines += [tabulate(rows, headers=COLUMNS, disable_numparse=True, colalign=("left",) + ("right",) * 9), ""]
    lines += _memory_lines(found["memory"])
    if found["seconds"]:
        whole = all(part["seconds"] is not None or part.get("cached") for part in found["work"])
        told = "in all" if whole else "for what is measured"
        lines += ["", f"time: at most {_time(found['seconds']['total'])} {told}."]
    return "\n".join([*lines, "", *(f"- {note}" for note in found["notes"])])


def _row(part: dict[str, Any]) -> list[str]:
    times = part["rounds"]
    counts = [f"{part.get(name, 0) * times:,}" if name in part else "" for name in ("passes", "tokens", "one_by_one")]
    ratio = f"{part['one_by_one'] / part['tokens']:.1f}x" if part.get("tokens") and "one_by_one" in part else ""
    heads = f"{part['head_rows'] * times:,}" if "head_rows" in part else ""
    seconds = 0.0 if part.get("cached") else part["seconds"]
    steps = f"{part['steps']:,}" if part["steps"] else ""
    shown_time = "" if seconds is None else _time(seconds)
    return [part["name"], str(times), f"{part['positions']:,}", steps, *counts, ratio, heads, shown_time]


def _memory_lines(parts: dict[str, Any]) -> list[str]:
    sizes = {k: v for k, v in parts.items() if k not in ("machine", "fits", "gpu", "gpus")}
    lines = [tabulate([[name, _size(value)] for name, value in sizes.items()], headers=("peak memory", ""))]
    if "total" in parts:
        verdict = "fits" if parts["fits"] else "does NOT fit"
        lines.append(f"this machine has {_size(parts['machine'])}: {verdict}.")
        classes = ", ".join(f"{size} GiB {'yes' if fits else 'no'}" for size, fits in parts["gpus"].items())
        lines.append(f"on a GPU the same would need {_size(parts['gpu'])}: {classes}.")
    return lines


def _size(value: float) -> str:
    return f"{value / GIB:.2f} GiB" if value >= 0.1 * GIB else f"{value / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.1f} s"
