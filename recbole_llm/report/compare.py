"""N models, one protocol, one table: runs what is not finished yet, survives what fails."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.config import LLMConfig, parse_value
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.model import model_class
from recbole_llm.progress import WholeRun
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.recommender import check_recommenders
from recbole_llm.report.table import comparison, to_markdown, write_comparison
from recbole_llm.run_folder import content_hash, run_folder_of
from recbole_llm.transfer import eval_config_of

MODEL = re.compile(r"(?P<model>\w+)(\[(?P<settings>.*)\])?", re.DOTALL)
EXAMPLE = "--models=Pop,SASRec,LLMRanker"
# Two models whose values of these differ are never asked the same.
SHARED = (
    "dataset",
    "data_path",
    "eval_args",
    "next_items",
    "eval_users",
    "candidate_seed",
    "mask_history",
    "liked_only",
    "rating_threshold",
    "min_disliked",
    "disjoint_users",
    "encoder",
    "look_alikes",
    "TIME_FIELD",
    "USER_ID_FIELD",
    "ITEM_ID_FIELD",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "rm_dup_inter",
)


@dataclass(frozen=True)
class Entry:
    """One line of the table: a model with settings of its own, by the label the user typed."""

    label: str
    model: str
    settings: dict[str, Any]


def parse_models(text: str | Sequence[str]) -> list[Entry]:
    """``Pop,SASRec,LLMRanker[loss=DMPO,beta=0.5]`` -> entries; commas inside brackets belong to the model.

    Raises:
        ConfigError: an entry is not a model name with ``key=value`` settings.
    """
    parts = _split(text) if isinstance(text, str) else text
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, str) for part in parts):
        raise ConfigError([f"--models={text!r}: must be text or a list of texts, for example {EXAMPLE}."])
    entries, problems = [], []
    for part in (p.strip() for p in parts if p.strip()):
        found = MODEL.fullmatch(part)
        pairs = [s.partition("=") for s in _split(found["settings"] or "") if s.strip()] if found else []
        if not found or any(not key.strip() or not mark for key, mark, _ in pairs):
            problems.append(f"--models: `{part}` must look like SASRec or LLMRanker[loss=DMPO,beta=0.5].")
            continue
        entries.append(Entry(part, found["model"], {k.strip(): parse_value(v.strip()) for k, _, v in pairs}))
    if not entries and not problems:
        problems.append(f"--models: name at least one, for example {EXAMPLE}.")
    if problems:
        raise ConfigError(problems)
    return entries


def _split(text: str) -> list[str]:
    """The parts between commas; commas in brackets of any kind belong to a part."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def compare(
    models: str | Sequence[str],
    dataset: str | None = None,
    config_dict: dict[str, Any] | None = None,
    per_model: dict[str, dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """Run every model and write the table.

    A run that finished before with the same configuration, data and version is not run again. A run that
    fails is reported in the table and stops nothing else; wrong settings are told before the first run.

    Args:
        models: entries as ``parse_models`` reads them.
        dataset, config_dict: as for a run, shared by all models.
        per_model: model name -> settings of all its entries; an entry's own settings win over them.

    Returns:
        ``table`` (DataFrame), ``markdown``, ``files``, ``runs`` (records) and ``failed`` (labels).

    Raises:
        ConfigError: of all models together.
        UserError: the finished runs have different candidates.
    """
    entries = parse_models(models)
    own = _per_model(per_model)
    shared = config_dict or {}
    settings = {e.label: {**shared, **own.get(e.model, {}), **e.settings} for e in entries}
    configs = _check_all(entries, dataset, settings)
    whole = WholeRun([(entry.label, config) for entry, config in zip(entries, configs, strict=True)])
    runs = []
    for entry, config in zip(entries, configs, strict=True):
        with whole.running(entry.label):
            runs.append(_run(entry, config, dataset, settings[entry.label]))
    table = comparison(runs)
    which = content_hash([run.get("run_hash", run["label"]) for run in runs])
    name = f"compare-{configs[0]['dataset']}-{which[:10]}"
    files = write_comparison(table, runs, Path(configs[0]["checkpoint_dir"]), name)
    failed = [run["label"] for run in runs if "error" in run]
    return {"table": table, "markdown": to_markdown(table, runs), "files": files, "runs": runs, "failed": failed}


def _per_model(given: Any) -> dict[str, dict[str, Any]]:
    """The ``per_model`` table, which may come from a file of the user's."""
    if not isinstance(given or {}, dict) or not all(isinstance(v, dict) for v in (given or {}).values()):
        raise ConfigError([f"--per_model={given!r}: must be a table of tables, as in {{'SASRec': {{'epochs': 50}}}}."])
    problems = []
    for model in given or {}:  # a file's table may hold more models than are asked for now
        try:
            model_class(str(model))
        except ConfigError as error:
            problems += [p.replace("--model=", "--per_model: ", 1) for p in error.problems]
    if problems:
        raise ConfigError(problems)
    return given or {}


def _check_all(entries: list[Entry], dataset: str | None, settings: dict[str, dict[str, Any]]) -> list[LLMConfig]:
    """Every model's configuration, or the problems of all of them at once."""
    configs: dict[str, LLMConfig] = {}
    asked: dict[str, LLMConfig] = {}  # how the data to be ranked are read; another data set's where one is named
    problems: dict[str, list[str]] = {}
    for entry in entries:
        try:
            mine = settings[entry.label]
            configs[entry.label] = LLMConfig(entry.model, mine.get("dataset", dataset), None, mine)
            check_recommenders(configs[entry.label])
            asked[entry.label] = eval_config_of(configs[entry.label])
        except ConfigError as error:
            for problem in error.problems:
                problems.setdefault(problem, []).append(entry.label)
    told = [
        p if set(labels) == set(settings) else f"{', '.join(dict.fromkeys(labels))}: {p}"
        for p, labels in problems.items()
    ]
    for key in SHARED:
        values = {label: config[key] for label, config in asked.items()}
        if len(set(map(content_hash, values.values()))) > 1:
            each = "; ".join(f"{label} {value!r}" for label, value in values.items())
            told.append(f"--{key}: must be the same for every model of a comparison: {each}.")
    if told:
        raise ConfigError(told)
    return [configs[entry.label] for entry in entries]


def _run(entry: Entry, config: LLMConfig, dataset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    folder = run_folder_of(config)
    finished = folder / "result.json"
    try:
        if not finished.is_file():
            run_recbole_llm(entry.model, settings.get("dataset", dataset), None, settings)
        record = json.loads(finished.read_text(encoding="utf-8"))
        return {**record, "label": entry.label, "run_hash": folder.name}
    except UserError as error:
        logging.getLogger().error(f"{entry.label} failed: {error}")
        return {"label": entry.label, "error": str(error).splitlines()[0]}
    except Exception as error:  # RecBole's models fail in any way; the others still belong in the table
        logging.getLogger().exception(f"{entry.label} failed")
        return {"label": entry.label, "error": f"{type(error).__name__}: {error}"}
