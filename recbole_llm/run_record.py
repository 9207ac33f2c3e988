"""What a finished run leaves in its folder: rows, candidates, environment, model card, and result.json last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol
from recbole_llm.environment import environment, versions
from recbole_llm.errors import UserError
from recbole_llm.files import plain, write_json, write_table, write_text
from recbole_llm.report.card import model_card
from recbole_llm.run_folder import data_hash
from recbole_llm.transfer import eval_config_of

# Of models that train nothing: RecBole wants a parameter of every one.
UNUSED = ("fake_loss", "dummy_param")


def at_start(config: LLMConfig) -> dict[str, Any]:
    """What a run was started with, asked before any work: code and data may be changed while it goes on.

    Returns:
        ``machine``, which ``env.json`` holds, and ``data``, the hashes of the data's files that ``result.json`` holds.
    """
    hashes = {"data_hash": data_hash(eval_config_of(config)), "training_data_hash": data_hash(config)}
    return {"machine": environment(), "data": hashes}


def save_run(
    folder: Path,
    config: LLMConfig,
    protocol: Protocol,
    asked: Protocol,
    trainer: Any,
    result: dict[str, Any],
    costs: dict[str, Any],
    samples: list[dict[str, Any]],
    began: dict[str, Any],
) -> None:
    """Write everything but the checkpoint; ``result.json`` last, because it says that the run is whole.

    Args:
        protocol: what was trained on.
        asked: what was tested on; another data set's where ``eval_dataset`` is given.
        costs: ``timings`` (seconds) and ``peak_memory_bytes``.
        began: of ``at_start``.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    record = _record(config, protocol, asked, trainer, result, costs | began["data"])
    try:
        write_json(folder / "env.json", began["machine"])
        write_table(folder / "per_user.csv.gz", trainer.per_user)
        write_table(folder / "top.csv.gz", trainer.top)
        protocol.valid.save(folder / "candidates-valid.jsonl.gz")
        asked.test.save(folder / "candidates-test.jsonl.gz")
        if samples:
            lines = [json.dumps(plain(sample), ensure_ascii=False) for sample in samples]
            write_text(folder / "generated.jsonl", "\n".join(lines) + "\n")
        write_text(folder / "README.md", model_card(config, record, began["machine"], folder))
        write_json(folder / "result.json", record)
    except OSError as error:
        raise UserError(
            f"--checkpoint_dir={config['checkpoint_dir']}: could not write {folder} ({error}). "
            "Free some space and run again."
        ) from error


def _record(
    config: LLMConfig,
    protocol: Protocol,
    asked: Protocol,
    trainer: Any,
    result: dict[str, Any],
    measured: dict[str, Any],
) -> dict[str, Any]:
    """What ``result.json`` holds; arguments as of ``save_run``, ``measured`` are costs and hashes of the data."""
    parameters = [(name, p) for name, p in trainer.model.named_parameters() if p.requires_grad]
    trainable = sum(p.numel() for name, p in parameters if name not in UNUSED)
    trainable += getattr(trainer, "aligned_parameters", 0)
    ranked = eval_config_of(config)
    return {
        "model": config["model"],
        "dataset": config["eval_dataset"] or config["dataset"],
        "training_dataset": config["dataset"],
        "metrics": result["test_result"],
        "valid_metrics": result["best_valid_result"],
        "valid_metric": config["valid_metric"].lower(),
        "candidate_hash": asked.candidate_hash,
        "valid_candidate_hash": protocol.valid.digest,
        "seed": config["seed"],
        "candidate_seed": ranked["candidate_seed"],
        "few_shot": config["few_shot"],
        "few_shot_seed": config["few_shot_seed"],
        "mode": asked.test.mode,
        "split": ranked["eval_args"]["split"],
        "eval_users": ranked["eval_users"],
        "mask_history": config["mask_history"],
        "next_items": config["next_items"],
        "rows": len(asked.test),
        "test_users": len(set(asked.test.users.tolist())),
        "repeated_targets": asked.test.repeated(),
        "training_users": None if protocol.train_users is None else len(protocol.train_users),
        "training_interactions": sum(protocol.item_counter.values()),
        "trainable_parameters": trainable,
        "device": str(config["device"]),
        **measured,
        "versions": versions(),
        **getattr(trainer, "facts", {}),
    }
