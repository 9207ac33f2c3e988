"""Train and evaluate one model, with the same flags as RecBole's ``run_recbole.py``."""

from __future__ import annotations

import sys

from recbole_llm.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["run", *sys.argv[1:]]))
