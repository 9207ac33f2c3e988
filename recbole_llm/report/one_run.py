"""One run or trial in a process of its own: ``python -m recbole_llm.report.one_run asked.json outcome.json``.

It ends when whoever began it ends, because nobody would wait for it any more.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from recbole_llm.files import write_json
from recbole_llm.report.jobs import run_once
from recbole_llm.report.trials import trial_once


def main(asked: Path, outcome: Path) -> None:
    """Do the run or trial that ``asked`` describes; write what went wrong, or nothing, to ``outcome``."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    told: dict[str, Any] = json.loads(asked.read_text(encoding="utf-8"))
    if "values" in told:
        error = trial_once(told["model"], told["dataset"], told["settings"], told["values"])
    else:
        folder = Path(told["folder"])
        error = run_once(folder, told["model"], told["dataset"], told["settings"])
    write_json(outcome, {"error": error})


def _end_with_parent() -> None:
    # Returns when the other end of the pipe is gone. Not sys.stdin, whose lock Python would want as it ends.
    os.read(0, 1)
    os._exit(130)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
