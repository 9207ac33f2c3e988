"""Which stages a run has, what each trains on, and where its best epoch is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recbole.config import Config

from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.data.rejected import rejected_items
from recbole_llm.data.windows import training_windows
from recbole_llm.run_folder import content_hash, data_hash, versions

# What determines the SFT adapter, besides data, model and protocol. A preference loss shares the stage of all others.
SFT_KEYS = tuple(
    """
    llm dtype quantization finetune lora_r lora_alpha lora_dropout lora_target_modules item_text item_text_max_tokens
    prompt score_norm epochs learning_rate sft_positions train_batch_size learner weight_decay lr_scheduler
    warmup_ratio clip_grad_norm stopping_step eval_step seed few_shot few_shot_seed eval_args valid_metric
    MAX_ITEM_LIST_LENGTH rerank_model rerank_topk
""".split()
)


@dataclass(frozen=True)
class Stage:
    """One training stage: ``loss`` over ``windows``, its best epoch kept in ``folder``."""

    loss: str
    epochs: int
    learning_rate: float
    windows: list[Window]
    folder: Path


def stages(
    config: Config, protocol: Protocol, prompt: Prompt, *, context: int, base: str, run_folder: Path
) -> Iterator[Stage]:
    """SFT (``epochs`` > 0), then the preference loss (``preference_epochs`` > 0); none where nothing is trained.

    Args:
        context: tokens of a prompt with its answer at most.
        base: fingerprint of the base weights and the item texts, which name the SFT stage together with the settings.
        run_folder: where the preference stage keeps its best epoch; an SFT stage has a folder that runs share.
    """
    if config["finetune"] == "none":
        return
    sequences = protocol.training_sequences()
    cut = {"history": config["MAX_ITEM_LIST_LENGTH"], "most_tokens": context}
    if config["epochs"] > 0:
        windows = training_windows(sequences, prompt, last=config["sft_positions"], **cut)
        folder = sft_folder(config, protocol, prompt, base)
        yield Stage("SFT", config["epochs"], config["learning_rate"], windows, folder)
    if config["loss"] != "SFT" and config["preference_epochs"] > 0:
        windows = training_windows(sequences, prompt, last=config["preference_positions"], **cut)
        windows = rejected_items(config, protocol).fill(windows)
        rate = config["preference_learning_rate"]
        yield Stage(config["loss"], config["preference_epochs"], rate, windows, run_folder)


def sft_folder(config: Config, protocol: Protocol, prompt: Prompt, base: str) -> Path:
    """``<checkpoint_dir>/stages/SFT-<hash of everything that determines the stage>``."""
    settings = {key: config[key] for key in SFT_KEYS}
    selected_on = protocol.valid.digest if config["eval_step"] else None
    what = [settings, base, data_hash(config), selected_on, prompt.prefix, prompt.suffix, versions()]
    return Path(config["checkpoint_dir"]) / "stages" / f"SFT-{content_hash(what)[:12]}"
