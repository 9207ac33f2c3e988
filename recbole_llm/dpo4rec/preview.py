"""What the LLM is asked about a user, what it writes, and what each text is worth to the recommender."""

from __future__ import annotations

from typing import Any

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.dpo4rec.loop import DPO4RecTrainer
from recbole_llm.dpo4rec.work import Judged, Work
from recbole_llm.errors import UserError
from recbole_llm.files import make_stage_folder, only_here
from recbole_llm.run_folder import run_folder_of
from recbole_llm.run_log import explained


def preview_texts(config: LLMConfig, user: str | None) -> str:
    """The prompt about a pair user, the N texts with their rewards, and the pair, all by the untuned LLM.

    The stages that this takes (texts for the recommender, its training, texts about all pair users) are those of the
    run itself: kept, and found there by it.

    Args:
        config: of DPO4Rec.
        user: token of a pair user; None = the first one.

    Raises:
        UserError: no pair user of this token, or a run that judges no texts.
    """
    if config["knowledge"] != "reasoning" or not config["pair_users"]:
        raise UserError(
            "preview of DPO4Rec shows texts about pair users: set --knowledge=reasoning and --pair_users=10."
        )
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
    trainer = DPO4RecTrainer(config, config.model_class(config, protocol.train_data._dataset).to(config["device"]))
    folder = make_stage_folder(run_folder_of(config))
    trainer.start(protocol, folder)
    names = {str(trainer.work.user_tokens[u]): u for u in trainer.places.pairs}
    if user is not None and user not in names:
        some = ", ".join(sorted(names)[:5])
        raise UserError(f"--user={user}: not a pair user; there are {len(names)}, for example {some}.")
    with only_here(folder):
        trainer.teach_recommender(0, protocol.valid, show_progress=config["show_progress"])
        judged = trainer.work.judge(trainer.model, trainer.places.pairs)
    internal = names[user] if user is not None else next(iter(trainer.places.pairs))
    row = list(trainer.places.pairs).index(internal)
    return _shown(trainer, judged, row, str(trainer.work.user_tokens[internal]))


def _shown(trainer: DPO4RecTrainer, judged: Judged, row: int, user: str) -> str:
    one, work = judged.lists[row], trainer.work
    titles = work.question.texts
    pair: Any = next((p for p in judged.pairs if p.row == row), None)
    following = "; ".join(titles[i] for i in one.items[one.relevant])
    lines = [
        *_told(work, one.history, user),
        "",
        _prompt(work, one.history),
        "",
        f"chosen next: {following}",
        "",
    ]
    for number, (text, reward) in enumerate(zip(judged.texts[row], judged.rewards[row], strict=True)):
        mark = "best" if pair and number == pair.best else "worst" if pair and number == pair.worst else ""
        told = f"NDCG@5 {reward.ndcg:.3f}  MAP@5 {reward.map:.3f}  log-prob {reward.logp:.3f}"
        lines += [f"[{number + 1}] {told}  {text.tokens} tokens  {mark}".rstrip(), text.text.strip(), ""]
    if pair is None:
        lines.append(
            f"no pair: best and worst differ by less than --reward_gap={trainer.config['reward_gap']} in NDCG@5."
        )
    return "\n".join(lines).rstrip()


def _told(work: Work, history: np.ndarray, user: str) -> list[str]:
    """How much of a user's history the prompt holds."""
    known, most, told = len(history), work.question.most, len(work.question.history(history))
    tokens = f", {len(work.question.tokens(history))} tokens" if work.reasoner else ""
    return [
        f"user {user}: {known} items known, {told} of them in this prompt{tokens}",
        f"left out: {max(0, known - most)} older items by --reasoning_history={most}, {min(known, most) - told} by the "
        "LLM's context",
    ]


def _prompt(work: Work, history: np.ndarray) -> str:
    """As the LLM reads it; a server adds a chat template of its own."""
    if not work.reasoner:
        return work.question.text(history)
    return work.reasoner.llm.tokenizer.decode(work.question.tokens(history), clean_up_tokenization_spaces=False)
