"""Stage 4: the LLM that writes, and its training on pairs of its own texts by the trainer that LLMRanker has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.prompt import Prompt, Window, plain_tokens
from recbole_llm.data.protocol import Protocol
from recbole_llm.dpo4rec.question import item_template
from recbole_llm.dpo4rec.reasoning import Asked
from recbole_llm.environment import versions
from recbole_llm.files import content_hash
from recbole_llm.llm.adapter import adapter_state, digest
from recbole_llm.llm.budget import TokenBudget, in_halves
from recbole_llm.llm.identity import NAMES_STAGES, identity
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.sampling import Sampling, Written, ends_of, sample_texts
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.policy import WindowPolicy
from recbole_llm.recommender import shared_settings
from recbole_llm.stages import Stage

LLM_SETTINGS = tuple(
    """
    llm dtype quantization attention fast_linears gradient_checkpointing lora_r lora_alpha lora_dropout
    lora_target_modules
""".split()
)
OF_STAGES = ("beta", "lr_scheduler", "warmup_ratio", "token_budget", "save_every", "resume")


def policy_config(config: LLMConfig) -> LLMConfig:
    """The settings that the preference trainer reads, as an LLMRanker of the same data would have them."""
    shared = shared_settings(config)
    shared.pop("loss_type", None)  # of the recommender
    shared["log_wandb"] = config["log_wandb"]  # which a trial has off
    stage = {
        **{key: config[key] for key in (*LLM_SETTINGS, *OF_STAGES)},
        "item_text": item_template(config.final_config_dict, config["dataset"]),  # checked, and read by nothing
        "loss": config["alignment"],
        "rejected_num": 1,
        "epochs": config["align_epochs"],
        "preference_epochs": config["align_epochs"],
        "train_batch_size": config["align_batch_size"],
    }
    return LLMConfig("LLMRanker", config["dataset"], None, {**shared, **stage})


@dataclass(frozen=True)
class TextPair:
    """What a pair user's LLM is trained on: internal user id, the prompt's tokens, and the better and worse text."""

    user: int
    prompt: list[int]
    texts: tuple[Written, Written]


class TextPairs(Prompt):
    """Prompts and answers as windows take them: "items" number prompts first, then texts.

    Args:
        prompts, answers: token ids.
    """

    def __init__(self, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> None:
        self.every_position = False
        self.prefix: list[int] = []
        self.suffix: list[int] = []
        self.lines = [*prompts, *([] for _ in answers)]
        self.answers = [*([] for _ in prompts), *answers]


class Reasoner(WindowPolicy, torch.nn.Module):
    """The LLM that writes texts about users.

    Args:
        config: of the run.
    """

    def __init__(self, config: LLMConfig) -> None:
        super().__init__()
        self.config = policy_config(config)
        settings = {key: config[key] for key in LLM_SETTINGS}
        self.llm = load_llm(device=config["device"], finetune="lora", seed=config["seed"], **settings)
        self.policy = self.llm.model
        self.budget = TokenBudget(config["token_budget"])
        self.prompt = TextPairs([], [])
        self.texts: list[str] = []

    @property
    def author(self) -> str:
        """What identifies the weights that write now: the same for every seed of LoRA while it adds nothing."""
        state = adapter_state(self.llm)
        untuned = all(not weight.any() for name, weight in state.items() if "lora_B" in name)
        adapter = "untuned" if untuned else digest(state)
        known = [identity(self.llm)[part] for part in NAMES_STAGES]
        return content_hash(
            [known, self.llm.dtype, self.config["quantization"], ends_of(self.llm), adapter, versions()]
        )

    def write(self, asked: Sequence[Asked], sampling: Sampling, seed: int) -> Iterable[tuple[int, list[Written]]]:
        """Number and texts of each prompt of tokens; where memory does not suffice for all at once, in halves of them.

        Sampled texts are then other draws, as good as those would have been.
        """

        def sample(part: Sequence[Asked]) -> list[list[Written]]:
            return sample_texts(self.llm, [list(one.prompt) for one in part], sampling, seed)

        return enumerate([texts for _, found in in_halves(asked, sample) for texts in found])

    def answer(self, text: Written) -> list[int]:
        """A text as tokens, with the token by which the LLM ended it; one without tokens has an end in any case."""
        (ids,) = plain_tokens(self.llm.tokenizer, [text.text])
        end = self.llm.tokenizer.eos_token_id if text.end is None else text.end
        return [*ids, end] if text.ended or not ids else ids

    def windows(self, pairs: Sequence[TextPair], alignment: str) -> list[Window]:
        """Windows of the pairs, which ``prompt`` then knows; for SFT the rejected texts are left out."""
        number = len(pairs)
        chosen, rejected = ([self.answer(pair.texts[side]) for pair in pairs] for side in (0, 1))
        self.prompt = TextPairs([pair.prompt for pair in pairs], [*chosen, *rejected])
        self.texts = [content_hash([*self.prompt.lines, *self.prompt.answers])]
        found = []
        for row, pair in enumerate(pairs):
            others = ((2 * number + row,),) if alignment == "DPO" else ()
            found.append(Window(pair.user, (row, number + row), (1,), others))
        return found


class AlignmentTrainer(LLMTrainer):
    """``LLMTrainer`` with one stage, which is given; there is no validation inside it."""

    rate_keys = {"SFT": "align_learning_rate", "preference": "align_learning_rate"}
    against_collapse = "raise --beta, or lower --align_learning_rate"

    def __init__(self, config: LLMConfig, reasoner: Reasoner, stage: Stage) -> None:
        super().__init__(config, reasoner)
        self.given = stage

    def stages(self) -> Iterator[Stage]:
        """The stage."""
        yield self.given


def align(
    config: LLMConfig, reasoner: Reasoner, protocol: Protocol, windows: Sequence[Window], folder: Path
) -> tuple[dict[str, Any], tuple[float, float]]:
    """Train the LLM on windows; its reference is the LLM as it is before, frozen.

    Args:
        config: of the run.
        folder: where the adapter and the stage's record go.

    Returns:
        The stage's record, and which of its wall and processor seconds are of a process before, which was cut off.
    """
    epochs, rate = config["align_epochs"], config["align_learning_rate"]
    stage = Stage(config["alignment"], epochs, rate, folder, lambda: (list(windows), {}))
    trainer = AlignmentTrainer(reasoner.config, reasoner, stage)
    trainer.start(protocol, folder)
    with closing(trainer.tensorboard):  # RecBole leaves its thread and file open
        trainer.fit(protocol.train_data, None, show_progress=config["show_progress"])
    (record,) = trainer.facts["stages"]
    return record, trainer.earlier
