"""Settings that are wrong together; told before any work."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from recbole import __file__ as recbole_file
from recbole.utils import ModelType

from recbole_llm import keys
from recbole_llm.dpo4rec.setting_checks import wrong_dpo4rec
from recbole_llm.errors import problems_of
from recbole_llm.model import OWN_MODELS, UNFIT, model_class
from recbole_llm.read_keys import eval_config_modes, reranks
from recbole_llm.wandb_log import wandb_is_installed

# A switch of a preference loss -> the losses that read it.
SWITCHES = {
    "pairwise_mean": ("DMPO",),
    "reference_free": ("DMPO",),
    "robust": ("RosePO",),
    "boundary_negatives": ("DMPO", "SDPO", "RosePO"),
    "dynamic_beta": ("DMPO", "SDPO", "RosePO"),
}
# Files that models begin with, and where they do not.
WEIGHTS = ("pretrain_path", "mf_pretrain_path", "mlp_pretrain_path", "pre_model_path")
NO_WEIGHTS = {"use_pretrain": False, "train_method": "no_pretrain"}
# Models of RecBole that import what RecBole does not require: the module, and the package that has it.
PACKAGES = {
    "NCL": ("faiss", "faiss-cpu"),
    "KGAT": ("dgl", "dgl"),
    "KGIN": ("torch_scatter", "torch-scatter"),
    "MCCLK": ("torch_scatter", "torch-scatter"),
}


def model_keys(properties: Path) -> dict[str, list[str]]:
    """Every key that some model's YAML lists -> the models, ours before RecBole's."""
    recbole = Path(recbole_file).parent / "properties"
    found: dict[str, list[str]] = {}
    ours = sorted((properties / "model").glob("*.yaml"), key=lambda file: (file.stem != "LLMRanker", file.stem))
    for file in [*ours, *sorted((recbole / "model").glob("*.yaml"))]:
        for key in yaml.safe_load(file.read_text(encoding="utf-8")) or {}:
            found.setdefault(key, [])
            found[key] += [file.stem] if file.stem not in found[key] else []
    for model, unlisted in keys.UNLISTED_MODEL_KEYS.items():
        for key in unlisted:
            found.setdefault(key, []).append(model)
    return found


def shared_keys(properties: Path) -> set[str]:
    """Keys that RecBole's and our settings of every model and data set list."""
    recbole = Path(recbole_file).parent / "properties"
    files = (recbole / "overall.yaml", recbole / "dataset" / "sample.yaml", properties / "overall.yaml")
    return {key for file in files for key in yaml.safe_load(file.read_text(encoding="utf-8"))}


def wrong_model(model: str, kind: ModelType, settings: Mapping[str, Any]) -> list[str]:
    """A model that cannot rank under the protocol."""
    if kind in (ModelType.CONTEXT, ModelType.DECISIONTREE):
        return [
            f"--model={model}: it predicts clicks from an interaction's own columns (rating, time), "
            "which no model may see here; name a general, sequential or knowledge-aware model."
        ]
    if model in UNFIT:
        return [f"--model={model}: {UNFIT[model]}; `recbole-llm ls` lists the models that can be ranked here."]
    module, package = PACKAGES.get(model, ("recbole", ""))
    if find_spec(module) is None:
        return [f"--model={model}: it needs the package {module}; `pip install {package}`, or name another model."]
    if settings.get("repeatable") is True and kind != ModelType.SEQUENTIAL:
        return [
            "--repeatable=True: negatives could then be items that the user met, and that is all it would change here; "
            "to let known items be answers set --mask_history=False."
        ]
    if not keys.ranks_titles(settings) and settings.get("epochs") == 0:
        return ["--epochs=0: must be a whole number >= 1."]
    if any(settings.get(key) == value for key, value in NO_WEIGHTS.items()):
        return []
    begins_with = {key: settings.get(key) for key in WEIGHTS}
    return [
        f"--{key}={path}: there is no such file; name one that RecBole saved, or leave it out."
        for key, path in begins_with.items()
        if isinstance(path, str) and path and not Path(path).is_file()
    ]


def wrong_together(settings: Mapping[str, Any]) -> list[str]:
    """Settings that are fine alone and wrong together."""
    ill_typed = {k for k, v in settings.items() if k in keys.CHECKS and keys.CHECKS[k](v)}
    problems = _wrong_users(settings) if not ill_typed & {"few_shot", "disjoint_users", "liked_only"} else []
    problems += _wrong_normalisation(settings)
    if settings.get("log_wandb") is True and not wandb_is_installed():
        problems.append("--log_wandb=True: the package wandb is not installed; `pip install wandb`, or leave it out.")
    if "recommender_model" in settings:
        return problems + wrong_dpo4rec(settings)
    if not keys.ranks_titles(settings):
        return problems
    if not ill_typed & (set(keys.LLM_KEYS) | {"epochs"}):
        problems += [told for told, wrong in _wrong_training(settings).items() if wrong]
        problems += _wrong_switches(settings)
    problems += [
        f"--{key}={settings[key]}: the training of an LLM does not read it. Leave it out, or give it to the "
        f"model that does: in a comparison SASRec[{key}={settings[key]}]; one that serves the run takes it from "
        "--recommender_config."
        for key, default in keys.NOT_OF_LLMS.items()
        if settings.get(key, default) != default
    ]
    base = settings["rerank_model"]
    if base in OWN_MODELS:
        problems.append(
            f"--rerank_model={base}: an LLM reorders the top items of a recommender of RecBole; name one, for example "
            "SASRec."
        )
    if not ill_typed & {"rerank_candidates", "rerank_weight", "full_ranking", "eval_config"}:
        problems += _wrong_mixture(settings)
    for key in ("rerank_model", "from_model", "oracle_model"):
        if isinstance(settings[key], str) and settings[key]:
            told = problems_of(partial(model_class, settings[key]))
            problems += [p.replace("--model", f"--{key}", 1) for p in told]
    return problems


def _wrong_normalisation(settings: Mapping[str, Any]) -> list[str]:
    """RecBole would scale or cut ratings and times before they are compared."""
    read = [settings[key] for key in ("RATING_FIELD", "TIME_FIELD")]
    found = []
    for key in ("normalize_field", "numerical_features", "discretization"):
        named = settings.get(key)
        named = named if isinstance(named, (list, tuple, dict)) else [named]
        found += [key] if any(field in named for field in read) else []
    found += ["normalize_all"] if settings.get("normalize_all") else []
    return [
        f"--{key}={settings[key]!r}: ratings and times are compared as they stand in the file; "
        + ("name other columns with --normalize_field." if key == "normalize_all" else "name other columns.")
        for key in found
    ]


def _wrong_mixture(settings: Mapping[str, Any]) -> list[str]:
    """A share of a mixture that nothing mixes, or that is to be chosen where nothing is mixed."""
    weight, args = settings["rerank_weight"], settings["eval_args"]
    mode = args.get("mode") if isinstance(args, dict) else None  # what is no table is told elsewhere
    modes = mode if isinstance(mode, dict) else {"valid": mode, "test": mode}
    mixed = [split for split, asked in modes.items() if reranks(settings, str(asked))]
    elsewhere = any(reranks(settings, str(asked)) for asked in eval_config_modes(settings))
    if weight != 1 and "test" not in mixed and not elsewhere:
        return [
            f"--rerank_weight={weight}: the test is not re-ranked, so there is nothing to mix in; set "
            "--rerank_candidates=True, or ask in mode full with --full_ranking=rerank."
        ]
    if weight == "auto" and "valid" not in mixed:
        return [
            "--rerank_weight=auto: it is chosen on validation, which is not re-ranked; set --rerank_candidates=True, "
            "or give a number from 0 to 1."
        ]
    return []


def _wrong_users(settings: Mapping[str, Any]) -> list[str]:
    """Who is trained and asked."""
    mode = settings["eval_args"].get("mode") if isinstance(settings["eval_args"], dict) else None
    modes = mode.values() if isinstance(mode, dict) else [mode]
    problems = []
    if any(str(m).startswith("low") for m in modes) and not settings["liked_only"]:
        problems.append(
            "--eval_args: mode lowN asks for an item that the user liked against items that they rated low, so these "
            "must not stand in the history; set --liked_only=True."
        )
    for key in ("few_shot", "eval_users"):
        if settings["disjoint_users"] and settings[key] is None:
            told = "train" if key == "few_shot" else "are tested"
            problems.append(f"--disjoint_users=True: say how many users {told}, for example --{key}=100.")
    return problems


def _wrong_training(settings: Mapping[str, Any]) -> dict[str, bool]:
    """Sentence -> whether it is true, for the stages of an LLM."""
    loss, rejected, finetune = (settings[k] for k in ("loss", "rejected_num", "finetune"))
    preference, quantized = loss != "SFT", settings["quantization"] == "4bit"
    pooled = {"self_hard", "semantic", "from_model"} & set(settings["rejected"].split("+"))
    return {
        f"--rejected_num=0: {loss} needs a rejected item in each pair; set --rejected_num=3, or --loss=SFT.": preference
        and rejected == 0,
        f"--rejected_num={rejected}: DPO compares one pair; set --rejected_num=1, or --loss=DMPO or SDPO.": loss
        == "DPO"
        and rejected > 1,
        f"--rejected_pool={settings['rejected_pool']}: --rejected_num={rejected} items cannot be taken out of so few; "
        f"set --rejected_pool={max(20, rejected)}.": preference
        and bool(pooled)
        and settings["rejected_pool"] < rejected,
        "--rejected=semantic compares titles; it needs an encoder: set --encoder=minilm, or tfidf.": preference
        and "semantic" in pooled
        and settings["encoder"] == "none",
        f"--preference_epochs=0: {loss} would never be trained; set --preference_epochs=1, or --loss=SFT.": preference
        and settings["preference_epochs"] == 0,
        f"--finetune=none: {loss} trains weights; use --finetune=lora, or --loss=SFT for zero-shot.": preference
        and finetune == "none",
        "--finetune=full: 4-bit weights cannot be trained; use --finetune=lora, or drop --quantization.": quantized
        and finetune == "full",
        "--fsdp=True spreads frozen weights over processes; use --finetune=lora, or leave --fsdp out.": settings["fsdp"]
        and finetune == "full",
        "--fsdp=True: 4-bit weights cannot be spread over processes; drop --quantization, or --fsdp.": settings["fsdp"]
        and quantized,
        "--quantization: --llm=tiny cannot be quantised; leave it out.": quantized and settings["llm"] == "tiny",
        "--dtype=float16: weights of this type become no numbers when they are trained themselves; set --dtype=float32 "
        "or bfloat16, or --finetune=lora.": finetune == "full" and settings["dtype"] == "float16",
        "--learner=sparse_adam: gradients of an LLM are not sparse; use adamw.": str(settings["learner"]).lower()
        == "sparse_adam",
    }


def _wrong_switches(settings: Mapping[str, Any]) -> list[str]:
    """Switches that the loss at hand does not read."""
    loss = settings["loss"]
    problems = [
        f"--{key}=True: {loss} does not read it; it belongs to {' and '.join(losses)}. Leave it out, or set --loss."
        for key, losses in SWITCHES.items()
        if settings[key] and loss not in losses
    ]
    if settings["chosen_num"] > 1 and loss != "MultDPO":
        problems.append(f"--chosen_num={settings['chosen_num']}: {loss} takes one chosen item; set --loss=MultDPO.")
    most = settings["smoothing_max"] if settings["smoothing"] == "oracle" else settings["smoothing"]
    if settings["robust"] and np.float32(most) >= 0.5:  # the type of the loss
        problems.append("--robust=True divides by 1 - 2 epsilon; set --smoothing_max=0.4, or a --smoothing below 0.5.")
    return problems
