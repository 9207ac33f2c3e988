"""What the LLM reads: a user's prompt, the answers it is trained on, and the tokens they take."""

from __future__ import annotations

import numpy as np
from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import popularity
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.data.rejected import RejectedItems
from recbole_llm.data.windows import training_windows
from recbole_llm.errors import UserError
from recbole_llm.model.llmranker import LLMRanker


def preview_user(config: LLMConfig, user: str | None) -> str:
    """The last training window of a user as text: prompt, chosen title, rejected titles, token counts.

    Args:
        config: of LLMRanker.
        user: user token; None = the first training user.

    Raises:
        UserError: no training user of this token, or a model that reads no prompts.
    """
    if config["model"] != "LLMRanker":
        raise UserError(f"--model={config['model']}: only LLMRanker reads prompts.")
    protocol = prepare_data(config)
    model = LLMRanker(config, protocol.train_data._dataset)
    tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
    sequences = protocol.training_sequences()
    names = {str(tokens[u]): u for u in sequences}
    if user is not None and user not in names:
        raise UserError(f"--user={user}: not a training user; there are {len(names)}, for example {', '.join(sorted(names)[:5])}.")
    internal = names[user] if user is not None else next(iter(sequences))
    windows = training_windows({internal: sequences[internal]}, model.prompt, history=config["MAX_ITEM_LIST_LENGTH"], last=1,
                               most_tokens=model.llm.context)
    window = windows[-1]
    if config["loss"] != "SFT":
        counts = popularity(protocol.events, protocol.train_ends, protocol.dataset.item_num)
        sampler = RejectedItems(config["rejected"], config["rejected_num"], protocol.events, protocol.train_ends, counts, tokens,
                                threshold=config["rating_threshold"], seed=config["seed"])
        window = Window(window.user, window.items, window.targets, (sampler.draw(internal, 1),))
    return _shown(model, window, str(tokens[internal]), len(sequences[internal]))


def _shown(model: LLMRanker, window: Window, user: str, trained: int) -> str:
    decode, target = model.llm.tokenizer.decode, window.targets[-1]
    prompt = model.prompt.trunk(window.items[:target])
    lines = [f"user {user}: {trained} training items, {target} of them in this prompt, {len(prompt)} tokens", "", decode(prompt), ""]
    asked = [("chosen", window.items[target])] + [("rejected", i) for i in (window.rejected[-1] if window.rejected else ())]
    for kind, item in asked:
        answer = model.prompt.answers[item]
        lines.append(f"{kind:<9}{decode(answer)!r}  ({len(answer)} tokens)")
    longest = int(np.argmax([len(a) for a in model.prompt.answers]))
    lines += ["", f"longest title of the catalogue: {model.texts[longest]!r} ({len(model.prompt.answers[longest])} tokens)"]
    return "\n".join(lines)
