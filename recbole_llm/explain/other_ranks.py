"""Where other finished runs that were asked the same put a user's target, from their per-user tables."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole.evaluator.register import smaller_metrics

from recbole_llm.data.candidates import check_saved_rows
from recbole_llm.errors import UserError
from recbole_llm.explain.run_files import read_per_user, read_record


@dataclass(frozen=True)
class OtherRank:
    """Another run's rank of the target.

    Attributes:
        model: its name.
        folder: its run folder.
        rank: the target's, ties at their mean.
        trained_on: its training users; None = all.
    """

    model: str
    folder: str
    rank: float
    trained_on: int | None


def other_ranks(
    folder: Path, record: dict[str, Any], user: str, target: str, baseline: Path | None = None
) -> list[OtherRank]:
    """The target's rank under RecBole's models, SASRec first.

    Of several runs of a model it is the one with as many training users, then with the best validation score.

    Args:
        folder, record: the run that is explained.
        user, target: as its per-user table names them.
        baseline: a run folder of any model, alone in the place of those that lie beside the run.

    Raises:
        UserError: ``baseline`` is no finished run, or was asked something else.
    """
    if baseline is not None:
        other = read_record(baseline)
        if other["candidate_hash"] != record["candidate_hash"]:
            raise UserError(
                f"--baseline={baseline}: it ranked other candidates ({other['candidate_hash'][:12]}) than {folder} "
                f"({record['candidate_hash'][:12]}). Run it with the same data, --eval_args, --eval_users and "
                "--candidate_seed."
            )
        return [_rank(baseline, other, user, target)]
    found = [(file.parent, _asked_the_same(file, record)) for file in sorted(folder.parent.glob("*/result.json"))]
    best: dict[str, tuple[Path, dict[str, Any]]] = {}
    for place, other in sorted(((p, o) for p, o in found if o), key=lambda one: _preferred(one[1], record)):
        best.setdefault(other["model"], (place, other))
    names = sorted(best, key=lambda name: (name != "SASRec", name))
    return [_rank(*best[name], user, target) for name in names]


def _preferred(other: dict[str, Any], record: dict[str, Any]) -> tuple[bool, float]:
    """By what a run holds, never by when it was written: clocks are set back."""
    metric = other.get("valid_metric", "")
    score = (other.get("valid_metrics") or {}).get(metric, -math.inf)
    worse = score if metric.split("@")[0] in smaller_metrics else -score
    return other.get("training_users") != record.get("training_users"), worse


def _asked_the_same(file: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of another model's run over the same candidates; None for any other file."""
    try:
        other = json.loads(file.read_text(encoding="utf-8"))
        same = other["model"] != record["model"] and other["candidate_hash"] == record["candidate_hash"]
    except (OSError, ValueError, TypeError, KeyError):  # a run that was killed, or no run
        return None
    if same and not (file.parent / "per_user.csv.gz").is_file():
        logging.getLogger().warning(f"{file.parent} is left out: it has lost its per_user.csv.gz; run it again.")
        return None
    return other if same else None


def _rank(folder: Path, record: dict[str, Any], user: str, target: str) -> OtherRank:
    check_saved_rows(folder, record)
    table = read_per_user(folder)
    mine = table[(table["user"] == user) & (table["target"] == target)]
    if mine.empty:
        raise UserError(f"{folder / 'per_user.csv.gz'} has no row of user {user} and item {target}; run it again.")
    return OtherRank(record["model"], str(folder), float(mine["rank"].iloc[-1]), record.get("training_users"))
