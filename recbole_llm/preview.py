"""What the LLM reads: a user's prompt, the answers it is trained on, the tokens they take, and what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.data.item_text import whole_texts
from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Window, plain_tokens
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.data.windows import training_windows
from recbole_llm.dpo4rec.preview import preview_texts
from recbole_llm.errors import UserError
from recbole_llm.model import OWN_MODELS
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.recommender import check_recommenders
from recbole_llm.run_log import explained
from recbole_llm.stages import preference_windows, sft_windows


def preview_user(config: LLMConfig, user: str | None) -> str:
    """The last training window of a user as text: prompt, chosen title, rejected titles, token counts, what was cut.

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
    whole = _cut_titles(config, protocol, model)
    told = _told(model, window, str(tokens[internal]), sequences[internal].tolist(), whole)
    return "\n".join([*told, "", *_shown(model, window), "", *_all_users(config, protocol, model, whole)])


def _window(config: LLMConfig, protocol: Protocol, model: LLMRanker, user: int) -> Window:
    """The user's last window in the stage that the loss names.

    Raises:
        UserError: none of the user's items is trained.
    """
    if config["loss"] == "SFT":
        windows = sft_windows(config, protocol, model.prompt, model.llm.context, users=[user])
    else:
        windows, _ = preference_windows(
            config, protocol, model.prompt, model.llm.context, lambda: nullcontext(model.reference_logps), users=[user]
        )
    return windows[-1]


def _cut_titles(config: LLMConfig, protocol: Protocol, model: LLMRanker) -> dict[int, str]:
    """Item id -> the whole text of those that ``item_text_max_tokens`` cuts."""
    texts = whole_texts(config, protocol.dataset)
    sizes = map(len, plain_tokens(model.llm.tokenizer, texts))
    return {i + 1: texts[i] for i, size in enumerate(sizes) if size > config["item_text_max_tokens"]}


def _told(model: LLMRanker, window: Window, user: str, trained: Sequence[int], whole: dict[int, str]) -> list[str]:
    """How much of a user's history the prompt holds, and which of its titles are not whole."""
    config, target = model.config, window.targets[-1]
    prompt = model.prompt.trunk(window.items[:target])
    most = config["MAX_ITEM_LIST_LENGTH"]
    by_length, by_context = left_out(window, trained, most)
    lines = [
        f"user {user}: {len(trained)} training items, {target} of them in this prompt, {len(prompt)} tokens",
        f"left out: {by_length} older items by --MAX_ITEM_LIST_LENGTH={most}, {by_context} by the LLM's context of "
        f"{model.llm.context} tokens",
        f"trained in one pass with it: {len(window.targets)} positions, {model.prompt.window_size(window)} tokens",
    ]
    shown = dict.fromkeys(i for i in (*window.items, *window.branches()[-1]) if i in whole)
    most = config["item_text_max_tokens"]
    return lines + [f"cut by --item_text_max_tokens={most}: {model.texts[i]!r} of {whole[i]!r}" for i in shown]


def left_out(window: Window, trained: Sequence[int], most: int) -> tuple[int, int]:
    """Items before the last target that its prompt lacks: over ``most``, and for lack of room in the LLM's context.

    Args:
        window: the user's last.
        trained: the user's training items in order.
        most: items of history at most.
    """
    # Of low_rating the target is the last that is not rated low; an item met again counts where it was met last.
    known = trained[: len(trained) - (len(window.also[-1]) if window.also else 0)]
    before = len(known) - 1 - known[::-1].index(window.items[window.targets[-1]])
    return max(0, before - most), min(before, most) - window.targets[-1]


def _shown(model: LLMRanker, window: Window) -> list[str]:
    """The prompt to the letter, and its answers."""
    prompt = model.prompt.trunk(window.items[: window.targets[-1]])
    answers = _pairs(model, window) if isinstance(model.prompt, PairPrompt) else _titles(model, window)
    lines = [_text(model, prompt), "", *answers]
    for place, epsilon in enumerate(window.smoothing[-1] if window.smoothing else ()):
        lines.append(f"epsilon   {epsilon:.3f}: the oracle's chance that the user prefers rejected title {place + 1}")
    return lines


def _all_users(config: LLMConfig, protocol: Protocol, model: LLMRanker, whole: dict[int, str]) -> list[str]:
    """The same of the last prompt of every training user, and of the catalogue's titles."""
    sequences, most = protocol.training_sequences(), config["MAX_ITEM_LIST_LENGTH"]
    windows = training_windows(
        sequences,
        model.prompt,
        history=most,
        last=1,
        most_tokens=model.llm.context,
        chosen=config["chosen_num"] if config["loss"] == "MultDPO" else 1,
    )
    sizes = [len(model.prompt.trunk(w.items[: w.targets[-1]])) for w in windows]
    lacks = np.array([left_out(w, sequences[w.user].tolist(), most) for w in windows]) > 0
    by_length, by_context = 100 * lacks.mean(0)
    half, nearly_all = np.percentile(sizes, [50, 95])
    longest = int(np.argmax([len(a) for a in model.prompt.answers]))
    return [
        f"all {len(windows):,} training users: prompts of {half:.0f} tokens (median), {nearly_all:.0f} (95 %), "
        f"{max(sizes)} (most); {by_length:.1f} % lack items by MAX_ITEM_LIST_LENGTH, {by_context:.1f} % by the context",
        f"all {len(model.texts) - 1:,} titles: {len(whole):,} cut; longest {model.texts[longest]!r} "
        f"({len(model.prompt.answers[longest])} tokens)",
    ]


def _titles(model: LLMRanker, window: Window) -> list[str]:
    """The last target's title and those beside it."""
    also = window.also[-1] if window.also else ()
    rejected = window.rejected[-1] if window.rejected else ()
    asked = [("chosen", i) for i in (window.items[window.targets[-1]], *also)] + [("rejected", i) for i in rejected]
    return [_line(model, kind, model.prompt.answers[item]) for kind, item in asked]


def _pairs(model: LLMRanker, window: Window) -> list[str]:
    """Each rejected item's listing with its two answers."""
    chosen, lines = window.items[window.targets[-1]], []
    prompt: Any = model.prompt  # a PairPrompt: windows of pairs have no other
    for place, item in enumerate(window.rejected[-1]):
        listed = prompt.listing(*prompt.order(window, place))
        lines.append(f"pair {place + 1}: {_text(model, listed)}  ({len(listed)} tokens)")
        lines.append(_line(model, "chosen", prompt.answer(chosen, item)))
        lines.append(_line(model, "rejected", prompt.answer(item, chosen)))
    return lines


def _line(model: LLMRanker, kind: str, answer: list[int]) -> str:
    return f"{kind:<9}{_text(model, answer)!r}  ({len(answer)} tokens)"


def _text(model: LLMRanker, tokens: list[int]) -> str:
    return model.llm.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
