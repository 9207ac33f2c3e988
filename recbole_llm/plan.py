"""What a run will cost, before any of it: positions, tokens, steps, peak memory and time."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

from recbole_llm import keys, memory
from recbole_llm.config import LLMConfig
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.dpo4rec.plan import plan_of_dpo4rec
from recbole_llm.evaluator import lacks_metrics
from recbole_llm.files import finished_stage
from recbole_llm.llm.hollow import hollow_llm
from recbole_llm.llm.types import LLM
from recbole_llm.machine import machine_bytes
from recbole_llm.model.llmranker import Catalogue, LLMRanker, read_catalogue
from recbole_llm.plan_counts import Work, pass_work, stage_work
from recbole_llm.plan_eval import eval_work
from recbole_llm.plan_recbole import plan_of_recbole
from recbole_llm.probe import Pace, PeakMemory, pace_of
from recbole_llm.read_keys import needed_recommenders
from recbole_llm.recommender import check_recommenders
from recbole_llm.run_folder import run_folder_of
from recbole_llm.run_log import explained
from recbole_llm.stages import base_hash, preference_folder, stages
from recbole_llm.transfer import eval_config_of


def plan(config: LLMConfig, probe: bool = True) -> dict[str, Any]:
    """Count a run's work and memory, and time a few passes; nothing is trained, nor written to ``checkpoint_dir``.

    Args:
        config: of the run.
        probe: time passes with the LLM's weights, where they are there.

    Returns:
        ``work`` (a dict for each kind of pass, see ``Work``), ``memory`` (bytes by part; without passes and a total
        where these cannot be counted), ``seconds`` (by part; None = not measured), ``machine`` and ``notes``.

    Raises:
        UserError: as a run, and where the LLM's config.json or tokenizer cannot be had.
    """
    if config["model"] == "DPO4Rec":
        return plan_of_dpo4rec(config, probe)
    if not keys.ranks_titles(config):
        return plan_of_recbole(config, probe)
    clock = time.perf_counter()
    test_config = eval_config_of(config)
    check_recommenders(config)
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
        asked = protocol if test_config is config else prepare_data(test_config)
    read = time.perf_counter() - clock
    llm, has_weights = hollow_llm(config)
    catalogue = read_catalogue(config, protocol.dataset, llm.tokenizer)
    ranked = catalogue if asked is protocol else read_catalogue(test_config, asked.dataset, llm.tokenizer)
    work, notes = _all_work(config, protocol, asked, catalogue, ranked, llm)
    parts = _memory(config, llm)
    try:
        parts |= _pass_memory(config, llm, work)
    except Exception as error:  # architectures, peft and torch refuse the meta device in their own ways
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        notes.append(f"memory: of passes not known, and no total: this LLM's cannot be counted by shapes ({reason}).")
    seconds: dict[str, float] | None = None
    if probe and has_weights:
        seconds = _probe(config, protocol, llm, work, parts)
        seconds["start"] += read
        seconds["total"] += read
        left_out = [w.name for w in work if not w.sample]
        notes += [f"{', '.join(left_out)}: time not measured, and not in the total."] if left_out else []
    else:
        notes.append("time: not measured" + ("." if has_weights else ": weights not at hand."))
    return {
        "model": config["model"],
        "dataset": config["dataset"],
        "work": [{k: v for k, v in asdict(w).items() if k != "sample"} for w in work],
        "memory": _totals(config, parts),
        "seconds": seconds,
        "machine": memory.machine_name(config["device"]),
        "notes": notes,
    }


# ---- counts


def _all_work(
    config: LLMConfig, protocol: Protocol, asked: Protocol, catalogue: Catalogue, ranked: Catalogue, llm: LLM
) -> tuple[list[Work], list[str]]:
    """Everything that a run computes with the LLM, in order, and what is not counted."""
    pools: list[list[Window]] = []
    work, validations = [], 0
    last: dict[str, float] | None = None  # what the last stage, where it lies finished, was validated by
    base = base_hash(llm, catalogue.texts, catalogue.prompt)

    def policy(windows: Sequence[Window]) -> list[list[list[float]]]:
        pools.append(list(windows))
        return [[[0.0] * (1 + len(items)) for items in w.branches()] for w in windows]

    found = stages(
        _without_models(config),
        protocol,
        catalogue.prompt,
        context=llm.context,
        base=base,
        policy=lambda: nullcontext(policy),
    )
    for stage in found:
        if stage.loss != "SFT":  # named by what the run will choose, not by the draws that stand for it
            stage = replace(stage, folder=preference_folder(config, protocol, base))
        parts = stage_work(config, catalogue.prompt, stage)
        if pools:
            parts.insert(0, pass_work(config, catalogue.prompt, f"{stage.loss}: self_hard", pools))
        last = None
        if (finished := finished_stage(stage.folder)) is not None:
            last = finished["best_valid_result"]
            for part in parts:
                part.cached = True
        elif config["eval_step"] > 0:
            validations += stage.epochs // min(config["eval_step"], stage.epochs)
        work += parts
    validations = validations if work else 1  # zero-shot: RecBole's result has a validation part all the same
    validations += lacks_metrics(config, last)
    validations += config["rerank_weight"] == "auto"  # one pass tells the best share
    if validations:
        work += eval_work(config, catalogue.prompt, protocol.valid, protocol.popularity, llm.context, validations)
    work += eval_work(config, ranked.prompt, asked.test, asked.popularity, llm.context, 1)
    return work, _notes(config, work)


def _without_models(config: LLMConfig) -> LLMConfig:
    """The configuration with uniform draws for what another model would have to choose, and without an oracle."""
    drawn = [s if s not in ("semantic", "from_model") else "uniform" for s in config["rejected"].split("+")]
    smoothing = 0.1 if config["smoothing"] == "oracle" else config["smoothing"]
    changed = {"rejected": "+".join(drawn), "smoothing": smoothing, "show_progress": False}
    other = copy.copy(config)
    other.final_config_dict = {**config.final_config_dict, **changed}
    return other


def _notes(config: LLMConfig, work: list[Work]) -> list[str]:
    notes = []
    if (run_folder_of(config) / "result.json").is_file():
        notes.append("this run is finished: `compare` takes its result (0 s), `run` computes it again.")
    notes += [f"{w.name} was finished before and is loaded (0 s)." for w in work if w.cached]
    if config["loss"] != "SFT" and set(config["rejected"].split("+")) & {"self_hard", "semantic", "from_model"}:
        notes.append(
            f"rejected={config['rejected']}: counted with uniform draws, whose titles differ a little in length."
        )
    for key in needed_recommenders(config):
        times = f", {config['oracle_folds']} times" if key == "oracle_model" else ""
        notes.append(f"{config[key]} (--{key}) is trained first{times}; not counted.")
    if config["full_ranking"] == "exact_topk" and "full" in config["eval_args"]["mode"].values():
        notes.append(
            "exact_topk: nodes as a trained ranker visits them (an estimate); --full_ranking=exact counts the most "
            "that it can take."
        )
    if config["generate_users"]:
        notes.append(f"generate_users={config['generate_users']}: free answers are not counted.")
    if config["fsdp"]:
        notes.append(
            "fsdp: memory is that of a single process, which holds the whole LLM; each of several holds a part."
        )
    if config["finetune"] != "none" and config["eval_step"] > 0:
        notes.append("early stopping can only shorten this.")
    return notes


# ---- memory and time


def _memory(config: LLMConfig, llm: LLM) -> dict[str, float]:
    """Bytes by part but for passes, before anything is measured."""
    process = memory.process_bytes() if config["device"].type == "cpu" else memory.GPU_CONTEXT
    return {"process": process, **memory.weight_bytes(llm.model, config)}


def _pass_memory(config: LLMConfig, llm: LLM, work: list[Work]) -> dict[str, float]:
    """Bytes of the largest passes, and what allocators hold for each of them (``held``)."""
    parts: dict[str, float] = {}
    trained = [w for w in work if w.trained]
    asked = config["gradient_checkpointing"]
    for checkpointing in (asked, not asked):
        name = "training pass" if checkpointing == asked else "training pass with the other gradient_checkpointing"
        parts[name] = max((pass_bytes(config, llm, w, w.largest, checkpointing) for w in trained), default=0)
    parts["LM head of it"] = max(
        (memory.head_bytes(llm.model, w.largest[1], config["device"], trained=True) for w in trained), default=0
    )
    kept = memory.kept_bytes(llm.model)
    parts["evaluation pass"] = max(pass_bytes(config, llm, w, w.largest) + w.kept * kept for w in work if not w.trained)
    parts["held"] = memory.HELD[config["device"].type]
    return parts


def pass_bytes(
    config: LLMConfig, llm: LLM, work: Work, size: tuple[int, int], checkpointing: bool | None = None
) -> int:
    """Bytes that a pass of some tokens and LM-head rows takes at most."""
    checkpointing = config["gradient_checkpointing"] if checkpointing is None else checkpointing
    body = memory.body_bytes(llm.model, size[0], trained=work.trained, checkpointing=checkpointing)
    head = memory.head_bytes(llm.model, size[1], config["device"], trained=work.trained)
    return body.kept + max(body.work + memory.unpacked_bytes(llm.model, config), head)


def _totals(config: LLMConfig, parts: dict[str, float]) -> dict[str, Any]:
    """The parts with their sum, what the machine has, and what a GPU would have to have; alone without passes."""
    if "held" not in parts:
        return parts
    fixed = sum(parts[name] for name in ("weights", "adapters", "gradients", "optimizer"))
    largest, held = max(parts["training pass"], parts["evaluation pass"]), parts["held"]
    total = parts["process"] + fixed + held * largest
    has = machine_bytes(config["device"])
    gpu = memory.GPU_CONTEXT + fixed + memory.HELD["cuda"] * largest
    fits = {size: gpu <= size * memory.GIB for size in memory.GPU_CLASSES}
    free_holes = (parts.pop("held") - 1) * largest
    return {
        **parts,
        "allocator": free_holes,
        "total": total,
        "machine": has,
        "fits": total <= has,
        "gpu": gpu,
        "gpus": fits,
    }


def _probe(
    config: LLMConfig, protocol: Protocol, llm: LLM, work: list[Work], parts: dict[str, float]
) -> dict[str, float]:
    """Time passes with the real weights; corrects what is known of memory by what is measured."""
    clock, device = time.perf_counter(), config["device"]
    with explained(config, None, "building the model"):
        model = LLMRanker(_without_models(config), protocol.train_data._dataset).to(device)
    start = time.perf_counter() - clock
    if device.type == "cpu":
        parts["process"] = memory.process_bytes() - parts["weights"] - parts["adapters"]
    timed: dict[tuple[bool, float], Pace] = {}
    expected = 0.0
    with PeakMemory(device) as peak:
        for part in (w for w in work if w.sample and not w.cached):
            share = part.head_rows / part.tokens
            alike = (part.trained, round(share, 1))  # passes of one kind with as much work for the LM head
            if alike not in timed:
                timed[alike], tokens = pace_of(model, part)
                if "held" in parts:
                    expected = max(expected, pass_bytes(config, llm, part, (tokens, round(share * tokens))))
            part.seconds = timed[alike].seconds(part)
    if expected:
        if any(trained for trained, _ in timed):
            expected += parts["gradients"] + parts["optimizer"]
        parts["held"] = min(max(1.0, (peak.peak - peak.before) / expected), 2.5)
    computed = sum(w.seconds or 0 for w in work)
    return {"start": start, "passes": computed, "total": start + computed}
