"""What the LLM reads: a user's prompt, the answers it is trained on, and the tokens they take."""

from __future__ import annotations

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.dpo4rec.preview import preview_texts
from recbole_llm.errors import UserError
from recbole_llm.model import OWN_MODELS
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.recommender import check_recommenders
from recbole_llm.run_log import explained
from recbole_llm.stages import preference_windows, sft_windows


def preview_user(config: LLMConfig, user: str | None) -> str:
    """The last training window of a user as text: prompt, chosen title, rejected titles, token counts.

    Strategies that ask the policy (self_hard) ask the LLM as it is before training; those that ask a recommender train
    it first.

    Args:
        config: of LLMRanker, or of DPO4Rec (see ``preview_texts``).
        user: user token; None = the first training user.

    Raises:
        UserError: no training user of this token, or a model that reads no prompts.
    """
    if config["model"] not in OWN_MODELS:
        raise UserError(f"--model={config['model']}: only {' and '.join(OWN_MODELS)} read prompts.")
    check_recommenders(config)
    if config["model"] == "DPO4Rec":
        return preview_texts(config, user)
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
    tokens, sequences = protocol.dataset.field2id_token[protocol.dataset.uid_field], protocol.training_sequences()
    names = {str(tokens[u]): u for u in sequences}
    if user is not None and user not in names:
        some = ", ".join(sorted(names)[:5])
        raise UserError(f"--user={user}: not a training user; there are {len(names)}, for example {some}.")
    internal = names[user] if user is not None else next(iter(sequences))
    model = LLMRanker(config, protocol.train_data._dataset)
    window = _window(config, protocol, model, internal)
    return _shown(model, window, str(tokens[internal]), len(sequences[internal]))


def _window(config: LLMConfig, protocol: Protocol, model: LLMRanker, user: int) -> Window:
    """The user's last window in the stage that the loss names.

    Raises:
        UserError: none of the user's items is trained.
    """
    if config["loss"] == "SFT":
        windows = sft_windows(config, protocol, model.prompt, model.llm.context, users=[user])
    else:
        windows, _ = preference_windows(
            config, protocol, model.prompt, model.llm.context, model.reference_logps, users=[user]
        )
    return windows[-1]


def _shown(model: LLMRanker, window: Window, user: str, trained: int) -> str:
    target = window.targets[-1]
    prompt = model.prompt.trunk(window.items[:target])
    told = f"user {user}: {trained} training items, {target} of them in this prompt, {len(prompt)} tokens"
    answers = _pairs(model, window) if isinstance(model.prompt, PairPrompt) else _titles(model, window)
    lines = [told, "", model.llm.tokenizer.decode(prompt), "", *answers]
    for place, epsilon in enumerate(window.smoothing[-1] if window.smoothing else ()):
        lines.append(f"epsilon   {epsilon:.3f}: the oracle's chance that the user prefers rejected title {place + 1}")
    longest = int(np.argmax([len(a) for a in model.prompt.answers]))
    size = len(model.prompt.answers[longest])
    return "\n".join([*lines, "", f"longest title of the catalogue: {model.texts[longest]!r} ({size} tokens)"])


def _titles(model: LLMRanker, window: Window) -> list[str]:
    """The last target's title and those beside it."""
    also = window.also[-1] if window.also else ()
    rejected = window.rejected[-1] if window.rejected else ()
    asked = [("chosen", i) for i in (window.items[window.targets[-1]], *also)] + [("rejected", i) for i in rejected]
    return [_line(model, kind, model.prompt.answers[item]) for kind, item in asked]


def _pairs(model: LLMRanker, window: Window) -> list[str]:
    """Each rejected item's listing with its two answers."""
    chosen, lines = window.items[window.targets[-1]], []
    for place, item in enumerate(window.rejected[-1]):
        listed = model.prompt.listing(*model.prompt.order(window, place))
        lines.append(f"pair {place + 1}: {model.llm.tokenizer.decode(listed)}")
        lines.append(_line(model, "chosen", model.prompt.answer(chosen, item)))
        lines.append(_line(model, "rejected", model.prompt.answer(item, chosen)))
    return lines


def _line(model: LLMRanker, kind: str, answer: list[int]) -> str:
    return f"{kind:<9}{model.llm.tokenizer.decode(answer)!r}  ({len(answer)} tokens)"
