"""Finished runs made up on the disk, as a comparison would find them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd
from recbole.utils import ModelType

from recbole_llm.environment import environment, versions
from recbole_llm.files import write_json, write_table, write_text
from recbole_llm.report.entries import Entry
from recbole_llm.report.grid import Cell, Setting

NOT_GIVEN = Setting("toy", None, False, None)


def write_run(
    folder: Path, users: pd.DataFrame, *, steps: Sequence[dict[str, Any]] = (), **facts: Any
) -> dict[str, Any]:
    """A run folder whose metrics are the means of ``users`` (index: user), and its record; ``facts`` win."""
    folder.mkdir(parents=True)
    traits = ["history", "target_popularity"]
    table = users.rename_axis("user").reset_index()
    write_table(folder / "per_user.csv.gz", table)
    write_json(folder / "env.json", environment())
    write_text(folder / "config.yaml", "eval_args: {split: {LS: valid_and_test}, order: TO, group_by: user}\n")
    if steps:
        write_text(folder / "metrics.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    record = {
        "model": "Pop",
        "dataset": "toy",
        "training_dataset": "toy",
        "metrics": users.drop(columns=traits, errors="ignore").mean().to_dict(),
        "candidate_hash": "c" * 64,
        "data_hash": "d" * 64,
        "seed": 1,
        "candidate_seed": 2020,
        "few_shot": None,
        "mode": "uni99",
        "valid_metric": "NDCG@10",
        "rows": len(users),
        "training_users": None,
        "training_interactions": 9000,
        "trainable_parameters": 1000,
        "device": "cpu",
        "timings": {"train_s": 5.0, "test_s": 1.0, "total_s": 6.0, "total_cpu_s": 12.0},
        "versions": versions(),
        **facts,
    }
    write_json(folder / "result.json", record)
    return record | {"label": record["model"], "run_hash": folder.name, "run_folder": str(folder)}


class MadeConfig(dict[str, Any]):
    """As much of a configuration as a comparison of finished runs reads."""

    final_config_dict: ClassVar[dict[str, Any]] = {}
    dataset = "toy"


def cell_of(label: str, folder: Path, setting: Setting = NOT_GIVEN, seed: int | None = None) -> Cell:
    """A cell of the grid whose run lies in ``folder``."""
    told = {"valid_users": None, "eval_users": None, "MODEL_TYPE": ModelType.SEQUENTIAL, "MAX_ITEM_LIST_LENGTH": 20}
    told["valid_metric"] = "NDCG@10"
    config: Any = MadeConfig(dataset="toy", eval_dataset=None, few_shot=setting.few_shot, **told)
    cell = Cell(Entry(label, label.partition("[")[0], {}), setting, seed, {}, config)
    cell.__dict__["folder"] = folder  # else it is asked of the configuration
    return cell


def made_grid(
    home: Path,
    labels: Sequence[str],
    settings: Sequence[Setting],
    seeds: Sequence[int] = (1, 2),
    users: int = 300,
    failing: Sequence[str] = (),
) -> tuple[list[Cell], list[dict[str, Any]]]:
    """Cells and records of every label, setting and seed: NDCG and hits that grow with the label's place."""
    cells, records = [], []
    for setting in settings:
        for place, label in enumerate(labels):
            for seed in seeds:
                folder = home / f"run-{len(cells)}"
                cells.append(cell_of(label, folder, setting, seed))
                if label in failing:
                    told = {"label": label, "run_hash": folder.name, "asked_seed": seed}
                    records.append(told | {"error": "--n_heads=3: does not divide 8."})
                    continue
                frame, facts = made_up(place, label, setting, seed, users)
                records.append(write_run(folder, frame, **facts) | {"label": label, "asked_seed": seed})
    return cells, records


def made_up(place: int, label: str, setting: Setting, seed: int, users: int) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Per-user rows and facts of a run; LLM rankers cost more, and have steps."""
    everyone, rng = np.random.default_rng(0), np.random.default_rng([place, seed, setting.few_shot or 0])
    history, popular = everyone.geometric(0.03, users), everyone.geometric(0.01, users) - 1
    skill = 0.06 * place + 0.02 * np.log(setting.few_shot or 900) + 0.05 * (setting.mode == "uni99")
    ndcg = np.clip(rng.beta(1, 3, users) * (skill + 0.1 * (popular > 60)) + 0.02 * rng.normal(size=users), 0, 1)
    frame = pd.DataFrame(
        {
            "hit@10": (ndcg > 0.1).astype(float),
            "ndcg@10": ndcg,
            "popularity_lift@1": rng.normal(0.3 * place - 0.6, 1, users),
            "popularity_lift@10": rng.normal(0.2 * place - 0.5, 1, users),
            "history": history,
            "target_popularity": popular,
        },
        index=pd.Index([f"u{n:04d}" for n in range(users)], name="user"),
    ).sort_index()
    facts: dict[str, Any] = {
        "model": label.partition("[")[0],
        "seed": seed,
        "few_shot": setting.few_shot,
        "training_users": setting.few_shot,
        "mode": setting.mode or "uni99",
        "trainable_parameters": 0 if label == "Pop" else 1000 * 7**place,
        "timings": {"train_s": 1.0, "test_s": 1.0, "total_s": 2.0, "total_cpu_s": 3.0 * 4**place},
    }
    if label.startswith("LLMRanker"):
        facts["steps"] = made_steps(place, seed)
        facts["stages"] = [
            {"loss": "SFT", "seconds": 9.0, "cpu_seconds": 20.0, **({"reused": True} if place > 3 else {})}
        ]
    return frame, facts


def made_steps(place: int, seed: int, count: int = 120) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``: SFT, then a preference loss under which the chosen titles fall after place 4."""
    rng, found = np.random.default_rng([place, seed]), []
    for step in range(count if place <= 3 else 0):
        loss = 3 * np.exp(-step / 30) + 1 + 0.1 * rng.normal()
        found.append({"stage": "SFT", "epoch": 0, "step": step, "loss": loss, "learning_rate": 1e-4})
    for step in range(count):
        done, fall = step / count, (4 - place) * step / count
        found.append(
            {
                "stage": "DPO",
                "epoch": 0,
                "step": len(found),
                "loss": 0.69 * np.exp(-done) + 0.03 * rng.normal(),
                "rewards/margins": place * done + 0.1 * rng.normal(),
                "rewards/accuracies": min(1.0, 0.5 + 0.4 * done + 0.05 * rng.normal()),
                "logps/chosen": -12 + fall + rng.normal(),
                "logps/chosen_shift": fall + 0.2 * rng.normal(),
            }
        )
    return found
