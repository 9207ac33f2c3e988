"""Differences between runs of experiments/determinism.py, and their table."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from determinism_run import finished
from safetensors.numpy import load_file
from tabulate import tabulate

BASE = "base"
MODELS = ("LLMRanker", "SASRec")


@dataclass(frozen=True)
class Condition:
    """One change against another condition, most often the base.

    Attributes:
        settings: keys of the run that differ.
        env: environment variables that differ.
        scoring: the run of the base is only scored, in this way (``determinism_run.SCORING``) or under ``settings``.
        jobs: the run is that of a comparison with so many processes.
        killed: the run is killed with -9 at these numbers of steps, and goes on.
    """

    name: str
    models: tuple[str, ...] = MODELS
    settings: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    against: str = BASE
    scoring: dict[str, Any] | None = None
    jobs: int = 0
    killed: tuple[int, ...] = ()


def folder_of(home: Path, model: str) -> Path:
    """The finished run below a condition's folder."""
    found = finished(str(home), model)
    if found is None:
        raise RuntimeError(f"{home}: no finished run of {model}")
    return found


def ranks(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Rank of each row's target ``[R]``, 1 = first, ties at their mean."""
    own = scores[np.arange(len(scores)), target][:, None]
    return 1 + (scores > own).sum(1) + ((scores == own).sum(1) - 1) / 2


def ndcg(rank: np.ndarray, k: int = 10) -> float:
    """NDCG@k of one relevant item a row, mean over rows."""
    return float(np.where(rank <= k, 1 / np.log2(1 + rank), 0).mean())


def weights(folder: Path, model: str) -> dict[str, np.ndarray]:
    """What a run trained: the adapter, or SASRec's checkpoint."""
    if model == "LLMRanker":
        return load_file(folder / "adapter_model.safetensors")
    state = torch.load(folder / f"{model}.pth", weights_only=True)["state_dict"]
    return {name: tensor.numpy() for name, tensor in state.items()}


def losses(folder: Path) -> dict[str, np.ndarray]:
    """Loss of every step by stage, nats; empty for SASRec, whose steps are not logged."""
    file, found = folder / "metrics.jsonl", {}
    for line in map(json.loads, file.read_text(encoding="utf-8").splitlines() if file.is_file() else []):
        found.setdefault(line["stage"], []).append(line["loss"])
    return {stage: np.array(values) for stage, values in found.items()}


def furthest(one: np.ndarray, other: np.ndarray) -> float:
    """max |one - other|"""
    return float(np.abs(one.astype(np.float64) - other).max())


def difference(condition: Condition, model: str, mine: Path, theirs: Path) -> dict[str, Any]:
    """What differs between two files of scores: a condition's and that of the one it is held against."""
    one, other = np.load(mine), np.load(theirs)
    if not (one["users"] == other["users"]).all() or not (one["target"] == other["target"]).all():
        raise RuntimeError(f"{condition.name}: other test rows than {condition.against}")
    rank, rank_there = ranks(one["after"], one["target"]), ranks(other["after"], other["target"])
    found: dict[str, Any] = {
        "condition": condition.name,
        "against": condition.against,
        "model": model,
        "settings": condition.settings,
        "env": {k: v for k, v in condition.env.items() if k not in ("RECBOLE_LLM_CACHE", "PYTHONPATH")},
        "trained": condition.scoring is None,
        "scores_before": furthest(one["before"], other["before"]),
        "scores_after": furthest(one["after"], other["after"]),
        "users": len(rank),
        "users_rank_changed": int((rank != rank_there).sum()),
        "ndcg@10": ndcg(rank),
        "ndcg@10_difference": ndcg(rank) - ndcg(rank_there),
    }
    if condition.scoring is None:
        found |= of_training(folder_of(mine.parent, model), folder_of(theirs.parent, model), model)
        if abs(found["ndcg@10"] - found["ndcg@10_of_the_run"]) > 1e-5:  # its metrics have six places
            raise RuntimeError(f"{condition.name}, {model}: what was loaded ranks otherwise than the run did")
    same = [found["scores_before"] == 0, found["scores_after"] == 0, found.get("same_files", True)]
    return {**found, "to_the_bit": all(same)}


def of_training(mine: Path, theirs: Path, model: str) -> dict[str, Any]:
    """Differences of losses, weights and files of two runs."""
    one, other = losses(mine), losses(theirs)
    new, old = weights(mine, model), weights(theirs, model)
    names = ["per_user.csv.gz", *(["adapter_model.safetensors", "metrics.jsonl"] if model == "LLMRanker" else [])]
    record = json.loads((mine / "result.json").read_text(encoding="utf-8"))
    there = json.loads((theirs / "result.json").read_text(encoding="utf-8"))
    return {
        "losses": {stage: furthest(values, other[stage]) for stage, values in one.items()},
        "steps": {stage: len(values) for stage, values in one.items()},
        "weights": max(furthest(new[name], old[name]) for name in new),
        "largest_weight": max(float(np.abs(value).max()) for value in new.values()),
        "same_files": all((mine / name).read_bytes() == (theirs / name).read_bytes() for name in names)
        and all(np.array_equal(new[name], old[name]) for name in new),
        "ndcg@10_of_the_run": record["metrics"]["ndcg@10"],
        "kernels": record.get("kernels"),
        "cpu_seconds": record["timings"]["total_cpu_s"],
        "versions": {k: v for k, v in record["versions"].items() if there["versions"].get(k) != v},
    }


def shown(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.0e}" if value < 0.01 else f"{value:.2g}"


def table(found: list[dict[str, Any]], model: str) -> str:
    """One model's conditions as Markdown."""
    rows = []
    for one in (f for f in found if f["model"] == model and f["condition"] != BASE):
        told = one["losses"] if one.get("losses") else {}
        name = one["condition"] + (f" (against: {one['against']})" if one["against"] != BASE else "")
        name += f" ({', '.join(f'{k} {v}' for k, v in one['versions'].items())})" if one.get("versions") else ""
        cells = [name, "yes" if one["to_the_bit"] else "no", shown(one["scores_before"])]
        cells += [shown(told.get("SFT")), shown(told.get("DPO"))] if model == "LLMRanker" else []
        cells += [shown(one.get("weights")), shown(one["scores_after"])]
        rows.append([*cells, f"{one['users_rank_changed']} of {one['users']}", f"{one['ndcg@10_difference']:+.4f}"])
    steps = ["SFT losses", "DPO losses"] if model == "LLMRanker" else []
    headers = ["condition", "equal to the bit", "scores before", *steps, "weights", "scores after"]
    aligned = ["left"] + ["right"] * (len(headers) + 1)
    headers += ["ranks that changed", "NDCG@10"]
    return tabulate(rows, headers, "pipe", disable_numparse=True, colalign=aligned)


def tables(found: list[dict[str, Any]]) -> str:
    """All of it as Markdown."""
    base = {f["model"]: f["ndcg@10"] for f in found if f["condition"] == BASE}
    told = (
        "MovieLens-100K, 20 training users, 20 test users, the target among 20, float32, one thread. Differences from "
        f"a base run (NDCG@10: {', '.join(f'{model} {value:.4f}' for model, value in base.items())}), the largest over "
        "all rows and candidates, steps or weights; scores and losses of LLMRanker in nats, SASRec's scores in its own "
        "units. In brackets: what the base has.\n"
    )
    titles = ("10 steps of SFT, 5 of DPO, packaged LLM", "2 epochs")
    parts = [
        f"**{model}**, {title}\n\n{table(found, model)}\n"
        for model, title in zip(MODELS, titles, strict=True)
        if model in base
    ]
    return "\n".join([told, *parts])
