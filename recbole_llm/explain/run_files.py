"""What the folder of a finished run says: its record, its settings as a user would give them, its per-user rows."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pandas as pd

from recbole_llm.data.candidates import check_saved_rows
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.keys import NOT_OF_LLMS
from recbole_llm.settings import read_yaml

# What RecBole derives from the other settings, and refuses to be told.
DERIVED = (
    "MODEL_INPUT_TYPE",
    "MODEL_TYPE",
    "device",
    "eval_type",
    "local_rank",
    "repeatable",
    "single_spec",
    "test_neg_sample_args",
    "valid_metric_bigger",
    "valid_neg_sample_args",
)
# What may differ between the machine that trained and this one.
MOVABLE = ("data_path", "llm", "gpu_id", "token_budget", "show_progress")


def read_record(folder: Path) -> dict[str, Any]:
    """``result.json`` of a finished run.

    Raises:
        UserError: no such folder, no finished run in it, or test rows that were changed since.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. {runs_there_are(folder.parent)}")
    try:
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        record["model"], record["candidate_hash"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder}: no finished run, its result.json cannot be read ({type(error).__name__}). Give its "
            f"`recbole-llm run` command again; finished stages are kept. {runs_there_are(folder.parent)}"
        ) from None
    check_saved_rows(folder, record)
    return record


def run_settings(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as a user would give them, from ``config.yaml``; read as plain YAML.

    Args:
        changes: of ``MOVABLE`` keys.

    Raises:
        UserError: no ``config.yaml``, or one that is not plain YAML.
        ConfigError: other changes.
    """
    told = f"explain takes it from the run; only {', '.join(MOVABLE)} may differ."
    if wrong := [key for key in changes if key not in MOVABLE]:
        raise ConfigError([f"--{key}: {told}" for key in wrong])
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{folder}: config.yaml is missing, so its settings are not known; run it again.")
    try:
        left_out = {*DERIVED, *NOT_OF_LLMS}  # which runs of older versions may hold; nothing read them
        saved = {key: value for key, value in read_yaml(str(file)).items() if key not in left_out}
    except ConfigError as error:
        told = error.problems[0].removeprefix("--config_files: ")
        raise UserError(f"The settings of the run cannot be read: {told} Run it again.") from None
    if isinstance(saved.get("data_path"), str):  # RecBole puts the data set's own folder there
        saved["data_path"] = str(Path(saved["data_path"]).parent)
    if "data_path" in changes and isinstance(saved.get("eval_config"), dict):  # both data sets lie there then
        saved["eval_config"] = {key: value for key, value in saved["eval_config"].items() if key != "data_path"}
    return {**saved, "checkpoint_dir": str(folder.parent), **changes}


def read_per_user(folder: Path) -> pd.DataFrame:
    """A run's per-user table; tokens as text.

    Raises:
        UserError: it cannot be read.
    """
    file = folder / "per_user.csv.gz"
    try:
        table = pd.read_csv(file, dtype={"user": str, "target": str}, keep_default_na=False)
        table["rank"] = table["rank"].astype(float)
    except (OSError, ValueError, KeyError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}: {error}); run it again.") from None
    return table


def runs_there_are(folder: Path) -> str:
    """A sentence that names finished LLMRanker runs of a folder."""
    newest_first = sorted(folder.glob("LLMRanker-*/result.json"), key=lambda file: -file.stat().st_mtime)
    names = [str(file.parent) for file in newest_first]
    return f"Finished runs of LLMRanker: {', '.join(names[:5])}." if names else "Name the folder that `run` printed."
