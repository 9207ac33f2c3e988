"""`recbole-llm compare` with finished runs and trials of another machine taken over.

    python experiments/take_over.py FOLDER compare --config_files=properties/compare/few-shot-ml-100k.yaml --out=DIR

FOLDER is the other machine's ``checkpoint_dir`` (without weights: results, candidates and trials are enough). A run is
taken over when its configuration, data and code are the same; versions of packages (so the build of torch) may differ,
and so may what changes numbers in their last digits alone: OTHERS, as the other machine's runs had it. What is not
there is run here. Records keep the versions and the device that they were made with.

So were the tables of results/ made whose LLM lines ran on one H200 and whose recommenders ran on a CPU.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_llm import environment, run_folder
from recbole_llm.cli import main
from recbole_llm.report import ahead, trials
from recbole_llm.report.grid import Cell

# Of LLMs: the kernel of attention (`blocks` for `exact_topk`), the packing, and a type that `auto` is on a CPU.
OTHERS = [{"attention": kernel, "token_budget": 2048, "dtype": "float32"} for kernel in ("sdpa", "blocks")]


def versions_of(other: Path) -> dict[str, Any]:
    """Those of the other machine's runs.

    Raises:
        SystemExit: no run, runs of several versions, or other code than ours.
    """
    found = {json.dumps(json.loads(file.read_text())["versions"]) for file in other.glob("*/result.json")}
    if len(found) != 1:
        raise SystemExit(f"{other}: runs of {len(found)} sets of versions; one is needed.")
    versions: dict[str, Any] = json.loads(found.pop())
    ours = environment.versions()["recbole_llm_code"]
    if versions["recbole_llm_code"] != ours:
        raise SystemExit(f"{other}: made by code {versions['recbole_llm_code']}; this is {ours}. Check that one out.")
    return versions


def names_there(config: Config, versions: dict[str, Any]) -> list[str]:
    """What the other machine may call the run of this configuration."""
    settings, ours = config.final_config_dict, run_folder.versions
    kept, found = dict(settings), []
    run_folder.versions = lambda: versions
    try:
        for other in OTHERS:
            settings.update({key: value for key, value in other.items() if key in settings})
            found.append(run_folder.run_folder_of(config).name)
    finally:
        run_folder.versions = ours
        settings.clear()
        settings.update(kept)
    return list(dict.fromkeys(found))


def take_over(other: Path) -> None:
    """From now on runs and trials that are missing here are copied from there when they are looked for."""
    versions, trial_file = versions_of(other), trials.trial_file

    def trial(config: Config) -> Path:
        file = trial_file(config)
        for name in names_there(config, versions):
            there = other / "trials" / f"{name}.json"
            if not file.is_file() and there.is_file():
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(there, file)
        return file

    def folder(self: Cell) -> Path:
        here = run_folder.run_folder_of(self.config)
        for name in names_there(self.config, versions):
            if not (here / "result.json").is_file() and (other / name / "result.json").is_file():
                print(f"taken over: {self.label} ({name})", flush=True)
                shutil.copytree(other / name, here, dirs_exist_ok=True)
        return here

    trials.trial_file = ahead.trial_file = trial
    Cell.folder = property(folder)  # type: ignore[assignment]


if __name__ == "__main__":
    if len(sys.argv) < 3 or not Path(sys.argv[1]).is_dir():
        raise SystemExit(__doc__)
    take_over(Path(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
