"""``recbole-llm explain``: checks what was typed, explains, prints, and writes the files."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from recbole_llm.errors import ConfigError, UserError
from recbole_llm.explain.explain import explain_user
from recbole_llm.explain.faithful_users import faithfulness
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.key_checks import integer
from recbole_llm.report.explain_html import write_explanation
from recbole_llm.report.explain_tables import plain, rank_line
from recbole_llm.report.explain_text import explanation_text, faithfulness_text

OF_A_USER = ("k", "item", "baseline", "html")  # flags that say nothing without --user


def explain_run(settings: dict[str, Any]) -> int:
    """Explain ``run_folder`` for ``user``, and test the explanations of ``users`` users.

    Args:
        settings: of the command line; beside its own flags those of ``run_files.MOVABLE``.

    Returns:
        0; 1 where the ranking is not that of the run.

    Raises:
        UserError: bad input.
    """
    given = dict(settings)
    folder, user, users = (given.pop(key, None) for key in ("run_folder", "user", "users"))
    own = {key: given.pop(key) for key in OF_A_USER if key in given}
    _check(folder, user, users, own)
    run = FinishedRun(Path(folder), given)
    if user is None and users is None:
        some = ", ".join(run.user_token(row) for row in range(min(5, len(run.rows))))
        raise UserError(f"--user: name a test user of the run, for example {some}; or --users=50 to test over users.")
    if users is not None:
        run.sample(users)  # too many are told before any work
    status = 0 if user is None else _explain(run, user, own)
    if users is not None:
        comparisons, file = faithfulness(run, users)
        print(f"\n{faithfulness_text(comparisons)}\nwritten: {file}")
    return status


def _check(folder: Any, user: Any, users: Any, own: dict[str, Any]) -> None:
    """Raises ``ConfigError`` for what is wrong with explain's own flags, all of it at once."""
    problems = []
    if not folder:
        problems.append(
            "name the run folder, for example recbole-llm explain saved/LLMRanker-ml-100k-0123456789 --user=196."
        )
    for key, value in (("k", own.get("k", 10)), ("users", 1 if users is None else users)):
        told = integer(1)(value)
        problems += [f"--{key}={value!r}: {told}."] if told else []
    if user is None:
        problems += [f"--{key}: it belongs to --user; name one." for key in own]
    problems += [f"--{key}: give it a value." for key in ("item", "baseline", "html") if own.get(key, "x") == ""]
    if problems:
        raise ConfigError(problems)


def _explain(run: FinishedRun, user: str, own: dict[str, Any]) -> int:
    baseline = Path(own["baseline"]) if "baseline" in own else None
    file = Path(own["html"]) if "html" in own else run.folder / f"explain-{_file_name(user)}.html"
    if not file.parent.is_dir():
        raise UserError(f"--html={file}: there is no folder {file.parent}. Make it, or name another file.")
    if file.is_dir():
        raise UserError(f"--html={file}: it is a folder; name a file in it.")
    found = explain_user(run, user, own.get("k", 10), own.get("item"), baseline)
    print(explanation_text(found))
    write_explanation(found, file)
    print(f"\nwritten: {file}")
    if not found.agrees:
        print(f"\nrecbole-llm: user {plain(user)}: {rank_line(found)}", file=sys.stderr)
    return 0 if found.agrees else 1


def _file_name(user: str) -> str:
    """A user token as part of a file name."""
    return re.sub(r"[^\w.-]", "_", user)[:80]
