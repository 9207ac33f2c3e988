"""What the LLM reads: a user's prompt, the answers it is trained on, and the tokens they take."""

from __future__ import annotations

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.data.rejected import rejected_items
from recbole_llm.data.windows import training_windows
from recbole_llm.errors import UserError
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.run_log import explained


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
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
    model = LLMRanker(config, protocol.train_data._dataset)
    tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
    sequences = protocol.training_sequences()
    names = {str(tokens[u]): u for u in sequences}
    if user is not None and user not in names:
        some = ", ".join(sorted(names)[:5])
        raise UserError(f"--user={user}: not a training user; there are {len(names)}, for example {some}.")
    internal = names[user] if user is not None else next(iter(sequences))
    stage = "sft" if config["loss"] == "SFT" else "preference"
    windows = training_windows(
        {internal: sequences[internal]},
        model.prompt,
        last=config[f"{stage}_positions"],
        history=config["MAX_ITEM_LIST_LENGTH"],
        most_tokens=model.llm.context,
    )
    if stage == "preference":
        windows = rejected_items(config, protocol).fill(windows)
    window = windows[-1]
    return _shown(model, window, str(tokens[internal]), len(sequences[internal]))


def _shown(model: LLMRanker, window: Window, user: str, trained: int) -> str:
    decode, target = model.llm.tokenizer.decode, window.targets[-1]
    prompt = model.prompt.trunk(window.items[:target])
    told = f"user {user}: {trained} training items, {target} of them in this prompt, {len(prompt)} tokens"
    lines = [told, "", decode(prompt), ""]
    rejected = window.rejected[-1] if window.rejected else ()
    asked = [("chosen", window.items[target]), *(("rejected", item) for item in rejected)]
    for kind, item in asked:
        answer = model.prompt.answers[item]
        lines.append(f"{kind:<9}{decode(answer)!r}  ({len(answer)} tokens)")
    longest = int(np.argmax([len(a) for a in model.prompt.answers]))
    size = len(model.prompt.answers[longest])
    lines += ["", f"longest title of the catalogue: {model.texts[longest]!r} ({size} tokens)"]
    return "\n".join(lines)
