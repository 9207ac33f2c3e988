"""The deletion test over a sample of a run's test users: is what leave-one-out says true of the ranker, on average?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recbole_llm.environment import versions
from recbole_llm.errors import UserError
from recbole_llm.explain.explain import history_effects
from recbole_llm.explain.faithfulness import DRAWS, SIZES, Comparison, Deletion, over_users
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.files import content_hash, write_json
from recbole_llm.llm.adapter import adapter_state, digest
from recbole_llm.progress import bar


def faithfulness(run: FinishedRun, users: int) -> tuple[list[Comparison], Path]:
    """Deletion tests of the title that the run puts first, for a seeded sample of test users.

    A user's tests are kept in the run folder as they come (``faithfulness-<hash>.jsonl``), and are computed once.

    Returns:
        The comparisons, and the JSON file in the run folder that holds them with a row for each user.

    Raises:
        UserError: fewer test users than asked for, or a folder that cannot be written.
    """
    rows = run.sample(users)
    kept, file = run.folder / f"faithfulness-{_key(run)[:10]}.jsonl", run.folder / f"faithfulness-{users}-users.json"
    try:
        lines = _fill(run, rows, kept)
        comparisons = over_users([[_deletion(test) for test in line["tests"]] for line in lines])
        told = {
            "run": run.folder.name,
            "candidate_hash": run.record["candidate_hash"],
            "explained": "top 1",
            "users": users,
            "sizes": list(SIZES),
            "draws": DRAWS,
            "seed": run.config["candidate_seed"],
            "versions": versions(),
            "comparisons": [asdict(comparison) for comparison in comparisons],
            "rows": lines,
        }
        write_json(file, told)
    except OSError as error:
        raise UserError(
            f"{run.folder}: the deletion tests could not be kept there ({error}). Free some space."
        ) from error
    return comparisons, file


def _key(run: FinishedRun) -> str:
    """What the tests hang on, besides the user."""
    weights = digest(adapter_state(run.model.llm)) if run.config["finetune"] != "none" else None
    return content_hash(
        [
            weights,
            run.record["llm_revision"],
            run.record["candidate_hash"],
            run.model.llm.dtype,
            SIZES,
            DRAWS,
            versions(),
        ]
    )


def _fill(run: FinishedRun, rows: list[int], file: Path) -> list[dict[str, Any]]:
    """A line for each row, those in the file read and the others computed and added to it."""
    known = _read(file)
    for row in bar(iterable=rows, desc="Deletion tests", unit="user", disable=not run.config["show_progress"]):
        if (user := run.user_token(row)) not in known:
            known[user] = _line(run, row, user)
            with open(file, "a", encoding="utf-8") as out:
                # The break comes first: where a kill cut a line, the next one is whole.
                out.write("\n" + json.dumps(known[user], ensure_ascii=False))
    return [known[run.user_token(row)] for row in rows]


def _line(run: FinishedRun, row: int, user: str) -> dict[str, Any]:
    top, history = int(run.ranking(row).items[0]), run.history(row)
    by_item, tests = history_effects(run, row, history, [top])
    return {
        "user": user,
        "item": str(run.item_tokens[top]),
        "history": [str(run.item_tokens[i]) for i in history],
        "by_item": by_item[:, 0].tolist(),
        "tests": [asdict(test) for test in tests[0]],
    }


def _read(file: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for text in file.read_bytes().split(b"\n") if file.is_file() else ():
        try:
            line = json.loads(text)
            found[line["user"]] = line
        except (ValueError, TypeError, KeyError):
            continue
    return found


def _deletion(told: dict[str, Any]) -> Deletion:
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in told.items()}
    return Deletion(**values)
