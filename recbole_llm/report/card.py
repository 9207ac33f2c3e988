"""A run folder's README.md: what was trained on what, what it was asked, what came out, how to have it again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm import keys
from recbole_llm.config import LLMConfig
from recbole_llm.data.template import FAMILIES, load_template
from recbole_llm.read_keys import reranks
from recbole_llm.report.command import command_of
from recbole_llm.report.hub import front_matter, loading_code
from recbole_llm.report.markdown import fenced, inline
from recbole_llm.report.runs import done_before, name_of, stood_still

GIB = 2**30
VERSIONS = ("recbole", "torch", "transformers", "peft", "python")


def model_card(config: LLMConfig, record: Mapping[str, Any], machine: Mapping[str, Any], folder: Path) -> str:
    """The card of a run, as Markdown; of an LLM with the front matter that model hubs read.

    Args:
        config: of the run.
        record: what ``result.json`` will hold.
        machine: what ``env.json`` holds.
        folder: the run's own; says which weights there are.
    """
    sections = [front_matter(record, folder)] if _has_llm(record) else []
    sections += [
        f"# {inline(name_of(record))} on {inline(record['dataset'])}",
        inline(_what(config, record)),
        _result(record),
        "\n".join(f"- **{name}**: {inline(told)}" for name, told in _facts(config, record, machine).items()),
        "## Limits\n\n" + "\n".join(f"- {inline(limit)}" for limit in _limits(config, record)),
        *(f"## Prompt: {inline(config[key])}\n\n" + fenced(_template(config, key), "yaml") for key in _prompts(config)),
    ]
    if code := loading_code(record["llm"], record["dtype"], folder) if _has_llm(record) else None:
        sections.append("## Load\n\nIn this folder:\n\n" + fenced(code, "python"))
    sections += [
        "## Run again\n\nIn the folder where it was run, to which paths are relative:\n\n"
        + fenced(command_of(config), "sh"),
        "Every setting stands in `config.yaml`, every number in `result.json`, every test row in `per_user.csv.gz`.",
    ]
    return "\n\n".join(sections) + "\n"


def _has_llm(record: Mapping[str, Any]) -> bool:
    """Whether an LLM of this machine took part."""
    return "llm_revision" in record


# ---- what it is


def _what(config: LLMConfig, record: Mapping[str, Any]) -> str:
    if record["model"] == "DPO4Rec":
        chosen = record["selected_iteration"]
        writer = "the LLM that wrote its texts" if chosen else "the LLM that wrote its texts, which is as it came"
        return (
            f"{record['recommender_model']} that reads an LLM's texts about users (knowledge: {record['knowledge']}). "
            f"DPO4Rec.pth holds the recommender of iteration {chosen}; the adapter, where there is one, is {writer}."
        )
    if not keys.ranks_titles(config.final_config_dict):
        return f"RecBole's {record['model']}, trained and evaluated by RecBole-LLM."
    trained = ", then ".join(stage["loss"] for stage in record["stages"])
    how = {"lora": "LoRA adapter over", "full": "All weights of", "none": "Nothing is trained:"}[config["finetune"]]
    return f"Ranks items by the log-probability that an LLM gives to their titles. {how} {record['llm']}" + (
        f", trained by {trained}." if trained else ", as it is."
    )


def _facts(config: LLMConfig, record: Mapping[str, Any], machine: Mapping[str, Any]) -> dict[str, str]:
    facts = {
        "Data": _data(record),
        "Protocol": _protocol(config, record),
        "Model": _model(config, record),
        "Cost": _cost(record, machine),
        "Seeds": f"{record['seed']} (training), {record['candidate_seed']} (candidates), "
        f"{record['few_shot_seed']} (few-shot)",
        "Versions": f"recbole_llm {record['versions']['recbole_llm']} (code {record['versions']['recbole_llm_code']}, "
        f"commit {machine['git_commit'] or 'unknown'}), "
        + ", ".join(f"{name} {record['versions'][name]}" for name in VERSIONS if name in record["versions"]),
    }
    return facts


def _data(record: Mapping[str, Any]) -> str:
    number = record["training_users"]
    users = "all users" if number is None else f"{number:,} users"
    users += " (few-shot)" if record["few_shot"] else ""
    return (
        f"{record['training_dataset']}, files {record['training_data_hash'][:12]} (SHA-256); trained on {users}, "
        f"{record['training_interactions']:,} interactions"
    )


def _protocol(config: LLMConfig, record: Mapping[str, Any]) -> str:
    split = ", ".join(f"{kind} {how}" for kind, how in record["split"].items())
    of = "" if record["dataset"] == record["training_dataset"] else f" of {record['dataset']}"
    ahead = "" if record["next_items"] == 1 else f", the next {record['next_items']} items"
    history = f"; histories of up to {config['MAX_ITEM_LIST_LENGTH']} items" if config["MAX_ITEM_LIST_LENGTH"] else ""
    return (
        f"split {split}, by time; test {record['rows']:,} rows{of}{ahead}, {record['mode']}, candidates "
        f"{_short(record)}; validation {config['eval_args']['mode']['valid']}, candidates "
        f"{record['valid_candidate_hash'][:12]}, selects by {record['valid_metric']}{history}"
    )


def _short(record: Mapping[str, Any]) -> str:
    return record["candidate_hash"][:12]


def _model(config: LLMConfig, record: Mapping[str, Any]) -> str:
    told = []
    if _has_llm(record):
        told.append(f"{record['llm']}, weights {record['llm_revision']}, {record['dtype']}")
        if config["finetune"] in ("lora", None):
            modules = config["lora_target_modules"]
            modules = modules if isinstance(modules, str) else " ".join(modules)
            told.append(
                f"LoRA r {config['lora_r']}, alpha {config['lora_alpha']}, dropout {config['lora_dropout']}, {modules}"
            )
    if record.get("loss", "SFT") != "SFT":
        told.append(f"beta {config['beta']}, {config['rejected_num']} rejected titles a pair ({config['rejected']})")
    return "; ".join([*told, f"{record['trainable_parameters']:,} trained parameters"])


def _cost(record: Mapping[str, Any], machine: Mapping[str, Any]) -> str:
    timings = record["timings"]
    stages = [
        f"{stage['loss']} {stage['seconds']:.0f} s" + (" (in another run)" if stage.get("reused") else "")
        for stage in record.get("stages", [])
    ]
    told = [*(stages or [f"training {timings['train_s']:.0f} s"]), f"test {timings['test_s']:.1f} s"]
    beside = "beside what was found done" if done_before(record) else "in all"
    told.append(f"{timings['total_cpu_s'] / 60:.1f} CPU min {beside}")
    for name in ("train", "test"):
        if record.get(f"{name}_tokens"):
            told.append(f"{record[f'{name}_tokens']:,} tokens in {'training' if name == 'train' else 'the test'}")
    if record["peak_memory_bytes"]:
        told.append(f"peak memory {record['peak_memory_bytes'] / GIB:.1f} GiB")
    on = machine["cuda"] if str(record["device"]).startswith("cuda") else machine["processor"]
    return f"{', '.join(told)}; on {on}, CPU threads: {machine['torch_threads']}"


# ---- result and limits


def _result(record: Mapping[str, Any]) -> str:
    """A line a metric, a column for each K of test and validation; below it the metrics without K."""
    splits = {"test": record["metrics"], "validation": record["valid_metrics"] or {}}
    columns = [(split, k) for split, found in splits.items() for k in _cutoffs(found)]
    rows = [["metric", *(f"{split} @{k}" for split, k in columns)], ["---"] + ["--:"] * len(columns)]
    for metric in dict.fromkeys(name.partition("@")[0] for name in record["metrics"] if "@" in name):
        rows.append([inline(metric), *(_number(splits[split].get(f"{metric}@{k}")) for split, k in columns)])
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    for split, found in splits.items():
        if others := [f"{inline(name)} {_number(value)}" for name, value in found.items() if "@" not in name]:
            parts.append(f"{split.capitalize()}: {', '.join(others)}.")
    return "\n\n".join(parts)


def _cutoffs(metrics: Mapping[str, Any]) -> list[int]:
    return sorted({int(name.partition("@")[2]) for name in metrics if "@" in name})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _limits(config: LLMConfig, record: Mapping[str, Any]) -> list[str]:
    mode, titles = record["mode"], keys.ranks_titles(config.final_config_dict)
    limits = ["One seed: a difference smaller than that between seeds says nothing."]
    if mode != "full":
        limits.append(
            f"Each row ranks {int(mode[3:]) + record['next_items']} candidates ({mode}), not the whole catalogue: the "
            "numbers are above those of full ranking, and stand beside those of the same candidates alone."
        )
    if titles and reranks(config, mode):
        base, weight = config["rerank_model"], record.get("rerank_weight", config["rerank_weight"])
        mixed = "" if weight == 1 else f", mixed with its scores (share of the LLM {weight})"
        told = f"The LLM reorders the top {config['rerank_topk']} of {base}{mixed}"
        limits.append(f"{told}; what {base} misses it cannot find.")
    if record["eval_users"] and record["test_users"] >= record["eval_users"]:  # else there were not so many
        limits.append(f"A sample of users was asked: {record['rows']:,} rows.")
    if record["few_shot"]:
        limits.append(f"Trained on {record['training_users']} users alone.")
    if not record["valid_metrics"]:
        limits.append("Nothing was validated, so nothing was selected.")
    for stage in filter(stood_still, record.get("stages", [])):
        limits.append(f"The {stage['loss']} loss ended where it starts: that stage changed next to nothing.")
    if record.get("llm") == "tiny":
        limits.append("tiny is a random LLM of two layers: its numbers mean nothing.")
    if config["quantization"]:
        limits.append("Trained over 4-bit weights (NF4): over the same weights in other types its scores differ.")
    if _has_llm(record):
        limits.append("Of an item the LLM reads its text alone; it may have met these items before, in pretraining.")
    else:
        limits.append("It knows items by their ids: those of its training, and no others.")
    return limits


# ---- prompt and weights


def _prompts(config: LLMConfig) -> Sequence[str]:
    return [key for key in FAMILIES if key in config]


def _template(config: LLMConfig, key: str) -> str:
    template = load_template(config[key], config.properties, key)
    return "\n".join(f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in template.items())
