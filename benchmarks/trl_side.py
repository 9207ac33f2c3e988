"""TRL's DPOTrainer on given token ids: k pairs of one prompt, which it takes as 2k sequences."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from typing import Any

import torch

os.environ.setdefault("TQDM_DISABLE", "1")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
from datasets import Dataset, disable_progress_bars  # noqa: E402
from peft import LoraConfig  # noqa: E402
from plain import BETA  # noqa: E402
from trl import DPOConfig, DPOTrainer  # noqa: E402

from recbole_llm.llm.types import LLM  # noqa: E402


class TokenPairs(DPOTrainer):
    """DPOTrainer whose data set holds token ids already, so that both sides read the same ones."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


Asked = tuple[list[int], Sequence[list[int]]]  # a prompt, and its answers, the chosen one first


def trl_trainer(
    llm: LLM, lora: LoraConfig, users: Sequence[Asked], *, best: bool
) -> tuple[DPOTrainer, dict[str, torch.Tensor]]:
    """A trainer over a model without an adapter, and its batch of all pairs (answers[0], another) of some users.

    It trains where the model lies; in autocast where that is a GPU and the weights are in bfloat16.

    Args:
        best: reference log-probs computed beforehand, no gradient checkpointing, padding-free asked for; otherwise
            TRL's defaults: the reference in every step, gradient checkpointing.
    """
    for name in ("trl", "transformers", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bars()
    pairs = [
        {"prompt_ids": prompt, "chosen_ids": answers[0], "rejected_ids": other}
        for prompt, answers in users
        for other in answers[1:]
    ]
    on_gpu = llm.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(pairs),
            precompute_ref_log_probs=best,
            padding_free=best,
            gradient_checkpointing=not best,
            beta=BETA,
            max_length=None,
            bf16=on_gpu and llm.dtype == "bfloat16",
            use_cpu=not on_gpu,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = TokenPairs(
            model=llm.model,
            args=settings,
            train_dataset=Dataset.from_list(pairs),
            processing_class=llm.tokenizer,
            peft_config=lora,
        )
        batch = next(iter(trainer.get_train_dataloader()))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    if not best:  # the trainer switches it on in train(), which is not called here
        trainer.model.gradient_checkpointing_enable()
    return trainer, batch


def facts(trainer: DPOTrainer) -> dict[str, Any]:
    """What the trainer made of its settings."""
    asked, on = trainer.args.padding_free, trainer.padding_free
    refused = "asked for; TRL falls back to padding ('temporarily unavailable after a refactor')"
    return {
        "padding_free": on if on or not asked else refused,
        "reference_precomputed": trainer.precompute_ref_logps,
        "gradient_checkpointing": trainer.args.gradient_checkpointing,
    }
