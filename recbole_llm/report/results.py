"""Finished runs -> lines of tables: each model's runs over seeds, and its metrics user by user."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from recbole.evaluator.register import metrics_dict, smaller_metrics
from recbole.utils import ModelType

from recbole_llm import keys
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import check_saved_rows
from recbole_llm.errors import UserError
from recbole_llm.harm import HARM
from recbole_llm.read_keys import answers_of, reranks
from recbole_llm.report.grid import Cell, Setting
from recbole_llm.transfer import eval_config_of

GENERATED = "generation/"  # metrics of free answers, which only some models give
TRAITS = ("history", "target_popularity")  # of a row, whoever ranks it; runs of older versions lack them
NOT_METRICS = ("user", "target", "rank", "tied", "answers", *TRAITS)
_NAMES = {name.lower(): cls.__name__ for name, cls in metrics_dict.items()}


@dataclass(frozen=True)
class Line:
    """A model in one setting.

    Attributes:
        label: as the user typed it, or the name given for it.
        runs: records of the finished runs, one a seed.
        errors: why the others failed.
        trained_on: ``dataset`` and ``few_shot`` of its settings; what runs record wins.
        reads: of its settings what lines of one table need not share: ``valid_users``, and ``MAX_ITEM_LIST_LENGTH``
            where the model reads histories; numbers as text.
    """

    label: str
    runs: list[dict[str, Any]]
    errors: list[str]
    trained_on: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)

    @cached_property
    def by_seed(self) -> pd.DataFrame:
        """Every metric of every run ``[seeds, metrics]``; the index are the seeds."""
        return pd.DataFrame([run["metrics"] for run in self.runs], index=[run["seed"] for run in self.runs])

    @cached_property
    def users_by_seed(self) -> list[pd.DataFrame]:
        """Of each run every metric that users have ``[users, metrics]``: mean over a user's rows."""
        return [user_rows(run) for run in self.runs]

    @cached_property
    def users(self) -> pd.DataFrame:
        """The same, mean over seeds."""
        tables = self.users_by_seed
        return sum(tables[1:], tables[0]) / len(tables) if tables else pd.DataFrame()


@dataclass(frozen=True)
class Results:
    """One table's worth: the lines of a setting, all asked the same."""

    setting: Setting
    lines: list[Line]

    @property
    def finished(self) -> list[Line]:
        """Lines of which a run has ended well."""
        return [line for line in self.lines if line.runs]

    @property
    def records(self) -> list[dict[str, Any]]:
        """All finished runs."""
        return [run for line in self.lines for run in line.runs]

    @property
    def title(self) -> str:
        """Data set, training users and mode in words."""
        if not self.records:
            return self.setting.told()
        run = self.records[0]
        users = list(dict.fromkeys(_users(r) for r in self.records))
        return f"{self.data}, {' / '.join(users)}, {run['mode']}"

    @property
    def data(self) -> str | None:
        """The data set; with ``eval_dataset`` those that were trained on before it."""
        if not self.records:
            return self.setting.dataset
        return from_to(self.records[0]["dataset"], map(training_data, self.records))

    def metrics(self) -> list[str]:
        """What every finished run has, and what of free answers any has, in the order of the first that has it."""
        every = dict.fromkeys(m for run in self.records for m in run["metrics"])
        return [m for m in every if m.startswith(GENERATED) or all(m in run["metrics"] for run in self.records)]


def from_to(ranked: str, trained: Iterable[str]) -> str:
    """The data set that was ranked, behind those that were trained on where they are others."""
    names = list(dict.fromkeys(trained))
    return ranked if names == [ranked] else f"{' / '.join(names)} → {ranked}"


def training_data(run: dict[str, Any]) -> str:
    """The data set that a run was trained on; older records lack it."""
    return run.get("training_dataset", run["dataset"])


def _users(run: dict[str, Any]) -> str:
    if run["training_users"] is None:
        return "all training users"
    return ("few-shot: " if run["few_shot"] else "") + f"{run['training_users']} training users"


def collect(
    cells: Sequence[Cell], records: Sequence[dict[str, Any]], names: dict[str, str] | None = None
) -> list[Results]:
    """Records of runs -> one ``Results`` a setting, lines in the order of the entries.

    Raises:
        UserError: runs of one setting were evaluated on different candidates, or the candidates of a run were changed
            since.
    """
    found: dict[Setting, dict[str, Line]] = {}
    for cell, record in zip(cells, records, strict=True):
        if "metrics" in record:
            check_saved_rows(Path(record["run_folder"]), record)
        label, config = cell.entry.label, cell.config
        trained_on = {
            "dataset": from_to(config["eval_dataset"] or config["dataset"], [config["dataset"]]),
            "few_shot": config["few_shot"],
        }
        new = Line((names or {}).get(label, label), [], [], trained_on, _reads(config))
        line = found.setdefault(cell.setting, {}).setdefault(label, new)
        line.runs.append(record) if "metrics" in record else line.errors.append(record["error"])
    every = [Results(setting, list(lines.values())) for setting, lines in found.items()]
    for results in every:
        check_same_candidates(results)
    return every


def _reads(config: LLMConfig) -> dict[str, str]:
    selecting = config["valid_users"] or config["eval_users"]
    found = {
        "valid_users": "all" if selecting is None else f"{selecting:,}",
        "valid_metric": str(config["valid_metric"]),
    }
    if config["MODEL_TYPE"] == ModelType.SEQUENTIAL:
        found["MAX_ITEM_LIST_LENGTH"] = str(config["MAX_ITEM_LIST_LENGTH"])
    if keys.ranks_titles(config.final_config_dict):
        asked = eval_config_of(config)
        mode = asked["eval_args"]["mode"]["test"]
        if reranks(asked, mode) and asked["rerank_topk"] < (answers_of(asked, mode) or math.inf):  # else it orders all
            found["reorders"] = f"the top {asked['rerank_topk']} of {asked['rerank_model']}"
    return found


def check_same_candidates(results: Results) -> None:
    """Models that were not asked the same share no table.

    Raises:
        UserError: names each model and its candidates.
    """
    hashes = {run["candidate_hash"] for run in results.records}
    if len(hashes) > 1:
        told = ", ".join(f"{run['label']} {run['candidate_hash'][:12]}" for run in results.records)
        raise UserError(
            f"These runs were evaluated on different candidates, and share no table: {told}. "
            "Run them with the same data, --eval_args, --eval_users and --candidate_seed."
        )


def user_rows(run: dict[str, Any]) -> pd.DataFrame:
    """A run's metrics user by user ``[users, metrics]``, sorted by user; a user's rows are averaged.

    Raises:
        UserError: the run folder has no readable per-user rows.
    """
    table = _rows(run)
    return _by_user(table, [c for c in table.columns if c not in NOT_METRICS])


def user_traits(run: dict[str, Any]) -> pd.DataFrame:
    """What users are like, whoever ranks for them ``[users, TRAITS]``, as ``user_rows``; no columns in older runs."""
    table = _rows(run)
    return _by_user(table, [c for c in TRAITS if c in table])


def _rows(run: dict[str, Any]) -> pd.DataFrame:
    file = Path(run["run_folder"]) / "per_user.csv.gz"
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)  # a user may be called NA
        table["user"]
    except (OSError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise UserError(
            f"{file} cannot be read ({error}), and there is no test without it. Remove that folder and give the same "
            "command again: the run is done anew."
        ) from error
    return table


def _by_user(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    return table[columns].replace("", np.nan).astype(float).groupby(table["user"]).mean().sort_index()


# What a metric is called, and which of its values are good.


def metric_name(metric: str) -> str:
    """``ndcg@10`` -> ``NDCG@10``, as RecBole writes it."""
    name, at, k = metric.partition("@")
    return _NAMES.get(name, name) + at + k


def direction(metric: str) -> str | None:
    """larger | smaller | zero (the nearest to it) | None (it says nothing about a model)."""
    name = metric.split("@")[0].lower()
    if name.startswith(GENERATED):
        return None  # shares of a few answers
    return HARM.get(name, "smaller" if name in smaller_metrics else "larger")


def is_harm(metric: str) -> bool:
    """Whether it tells what a ranking does besides hitting."""
    return metric.split("@")[0] in HARM or metric.startswith(GENERATED)


def merit(metric: str, values: np.ndarray) -> np.ndarray:
    """The values so that larger is better; NaN where none is."""
    return {"larger": values, "smaller": -values, "zero": -np.abs(values), None: values * np.nan}[direction(metric)]
