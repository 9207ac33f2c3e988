"""Where other finished runs that were asked the same put a user's target, from their per-user tables."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    """The target's rank under RecBole's models, SASRec first; of several runs of a model the newest.

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
    newest: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in sorted(folder.parent.glob("*/result.json"), key=lambda file: -file.stat().st_mtime):
        found = _asked_the_same(file, record)
        if found is not None:
            newest.setdefault(found["model"], (file.parent, found))
    names = sorted(newest, key=lambda name: (name != "SASRec", name))
    return [_rank(*newest[name], user, target) for name in names]


def _asked_the_same(file: Path, record: dict[str, Any]) -> dict[str, Any] | None:
    """The record of another model's run over the same candidates; None for any other file."""
    try:
        other = json.loads(file.read_text(encoding="utf-8"))
        same = other["model"] != record["model"] and other["candidate_hash"] == record["candidate_hash"]
    except (OSError, ValueError, TypeError, KeyError):  # a run that was killed, or no run
        return None
    return other if same else None


def _rank(folder: Path, record: dict[str, Any], user: str, target: str) -> OtherRank:
    table = read_per_user(folder)
    mine = table[(table["user"] == user) & (table["target"] == target)]
    if mine.empty:
        raise UserError(f"{folder / 'per_user.csv.gz'} has no row of user {user} and item {target}; run it again.")
    return OtherRank(record["model"], str(folder), float(mine["rank"].iloc[-1]), record.get("training_users"))
