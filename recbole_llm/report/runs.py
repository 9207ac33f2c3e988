"""The runs below a folder, read from their ``result.json`` alone: no torch, so that looking is quick."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS = ("run", "model", "data set", "seed", "few-shot", "mode", "on test", "finished")


def runs_text(folder: Path) -> str:
    """Finished runs, the latest last, as a table; below it how many folders are unfinished or cannot be read."""
    finished: list[tuple[float, list[str]]] = []
    unfinished, unreadable = 0, []
    for settings in sorted(folder.glob("*/config.yaml")):
        file = settings.with_name("result.json")
        try:
            finished.append((file.stat().st_mtime, run_line(file)))
        except FileNotFoundError:
            unfinished += 1
        except OSError as error:
            unreadable.append(f"{_shown(file)} ({error.strerror})")
        except (ValueError, RecursionError):
            unreadable.append(f"{_shown(file)} (no JSON)")
        except (LookupError, TypeError, AttributeError):
            unreadable.append(f"{_shown(file)} (no record of a run)")
    lines = [line for _, line in sorted(finished)]
    told = [tabulate(lines, headers=COLUMNS, disable_numparse=True)] if lines else [f"no finished run in {folder}"]
    told += [f"unfinished: {unfinished}"] if unfinished else []
    told += [f"cannot be read: {', '.join(unreadable)}"] if unreadable else []
    return "\n".join(told)


def run_line(file: Path) -> list[str]:
    """What ``COLUMNS`` say of a ``result.json``.

    Raises:
        OSError, ValueError, RecursionError: it cannot be read, or is no JSON.
        LookupError, TypeError, AttributeError: it is no record of a run.
    """
    run = json.loads(file.read_text(encoding="utf-8"))
    when = datetime.fromtimestamp(file.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
    asked = run["mode"] if run.get("next_items", 1) == 1 else f"{run['mode']}, next {run['next_items']}"
    few_shot = "" if run["few_shot"] is None else run["few_shot"]
    words = [file.parent.name, name_of(run), _dataset(run), run["seed"], few_shot, asked, _on_test(run), when]
    return [_shown(word) for word in words]


def name_of(run: Mapping[str, Any]) -> str:
    """The model of a ``result.json``, with its loss where an LLM ranks titles."""
    if "loss" not in run:
        return run["model"]
    return f"{run['model']} ({run['loss'] if run['stages'] else 'zero-shot'})"


def stood_still(stage: dict[str, Any]) -> bool:
    """Whether a preference stage's loss never left its start; older records do not tell."""
    return stage.get("standstill", {}).get("stood_still", False)


def done_before(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a run needs and found done, which is not among the seconds of its ``timings``; each with its own seconds.

    Stages that another run finished, because another loss shares them, reference log-probs, texts and alignments of
    DPO4Rec, and, once each, recommenders that serve the run.
    """
    stages = run.get("stages", ())
    shared = [stage for stage in stages if stage.get("reused")] + run.get("found", [])
    shared += [part for stage in stages for part in stage.get("found", [])]
    served = [one for part in (run, *stages) for one in part.get("recommenders", [])]
    made = {one["where"] for one in served if one["made"]}  # by the run, or by a stage whose seconds hold it
    return [*shared, *{one["where"]: one for one in served if one["where"] not in made}.values()]


def _dataset(run: dict[str, Any]) -> str:
    trained, ranked = run.get("training_dataset", run["dataset"]), run["dataset"]
    return ranked if trained == ranked else f"{trained} -> {ranked}"


def _on_test(run: dict[str, Any]) -> str:
    """The metric that validation selects by; nothing in records that do not name it."""
    name = run.get("valid_metric")
    return f"{name} {run['metrics'][name]:.4f}" if name else ""


def _shown(word: object) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(word))
