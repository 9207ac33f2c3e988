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
from recbole_llm.progress import WholeRun
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.table import comparison, to_markdown, write_comparison
from recbole_llm.run_folder import content_hash, run_folder_of

MODEL = re.compile(r"(?P<model>\w+)(\[(?P<settings>.*)\])?")


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
    parts = re.split(r",(?![^\[]*\])", text) if isinstance(text, str) else list(text)
    entries, problems = [], []
    for part in (p.strip() for p in parts if p.strip()):
        found = MODEL.fullmatch(part)
        pairs = [s.partition("=") for s in (found["settings"] or "").split(",") if s] if found else []
        if not found or any(not key.strip() or not mark for key, mark, _ in pairs):
            problems.append(f"--models: `{part}` must look like SASRec or LLMRanker[loss=DMPO,beta=0.5].")
            continue
        entries.append(Entry(part, found["model"], {k.strip(): parse_value(v.strip()) for k, _, v in pairs}))
    if not entries and not problems:
        problems.append("--models: name at least one, for example --models=Pop,SASRec,LLMRanker.")
    if problems:
        raise ConfigError(problems)
    return entries


def compare(models: str | Sequence[str], dataset: str | None = None, config_dict: dict[str, Any] | None = None,
            per_model: dict[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Run every model and write the table.

    A run that finished before with the same configuration, data and version is not run again. A run that fails is
    reported in the table and stops nothing else; wrong settings of any model are told before the first run.

    Args:
        models: entries as ``parse_models`` reads them.
        dataset, config_dict: as for a run, shared by all models.
        per_model: model name -> settings of all its entries; an entry's own settings win over them.

    Returns:
        ``table`` (DataFrame), ``markdown``, ``files`` and ``failed`` (labels).

    Raises:
        ConfigError: of all models together.
        UserError: the finished runs have different candidates.
    """
    entries = parse_models(models)
    settings = {e.label: {**(config_dict or {}), **(per_model or {}).get(e.model, {}), **e.settings} for e in entries}
    configs = _check_all(entries, dataset, settings)
    whole = WholeRun([(entry.label, config) for entry, config in zip(entries, configs, strict=True)])
    runs = []
    for entry, config in zip(entries, configs, strict=True):
        with whole.running(entry.label):
            runs.append(_run(entry, config, dataset, settings[entry.label]))
    table = comparison(runs)
    name = f"compare-{configs[0]['dataset']}-{content_hash([r.get('run_hash', r['label']) for r in runs])[:10]}"
    files = write_comparison(table, runs, Path(configs[0]["checkpoint_dir"]), name)
    failed = [run["label"] for run in runs if "error" in run]
    return {"table": table, "markdown": to_markdown(table, runs), "files": files, "failed": failed}


def _check_all(entries: list[Entry], dataset: str | None, settings: dict[str, dict[str, Any]]) -> list[LLMConfig]:
    """Every model's configuration, or the problems of all of them at once."""
    configs, problems = [], []
    for entry in entries:
        try:
            configs.append(LLMConfig(entry.model, dataset, None, settings[entry.label]))
        except ConfigError as error:
            problems += [f"{entry.label}: {p}" for p in error.problems]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return configs


def _run(entry: Entry, config: LLMConfig, dataset: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    folder = run_folder_of(config)
    finished = folder / "result.json"
    try:
        if not finished.is_file():
            run_recbole_llm(entry.model, dataset, None, settings)
        return {**json.loads(finished.read_text(encoding="utf-8")), "label": entry.label, "run_hash": folder.name}
    except UserError as error:
        logging.getLogger().error(f"{entry.label} failed: {error}")
        return {"label": entry.label, "error": str(error).splitlines()[0]}
    except Exception as error:  # a model of RecBole's may fail in any way; the others still belong in the table
        logging.getLogger().exception(f"{entry.label} failed")
        return {"label": entry.label, "error": f"{type(error).__name__}: {error}"}
