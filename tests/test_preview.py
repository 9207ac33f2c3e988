"""`recbole-llm preview`: what it shows is what is trained, and its counts are those worked out by hand."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_llm.cli import main
from recbole_llm.config import LLMConfig
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.llm import tiny as tiny_module
from recbole_llm.llm.token_tree import TokenTree
from recbole_llm.preview import left_out, preview_user
from tests.conftest import prepared, started
from tests.test_dpo4rec import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


def shown(settings: dict[str, Any], user: str | None = None, **changes: Any) -> str:
    return preview_user(LLMConfig(config_dict={**settings, **changes}), user)


def trained_window(settings: dict[str, Any], user: str, **changes: Any) -> tuple[Any, Window]:
    """A trainer, and the last window of a user in its last stage, as a run trains it."""
    config, protocol = prepared(settings, "LLMRanker", **changes)
    trainer = started(config, protocol)
    trainer.run_folder = Path(config["checkpoint_dir"])
    *_, stage = trainer.stages()
    internal = protocol.dataset.token2id(protocol.dataset.uid_field, user)
    return trainer, [w for w in stage.windows if w.user == internal][-1]


def paths(tree: TokenTree) -> list[list[int]]:
    """Token ids from the root to the end of each completion, by walking parents."""
    last = {int(c): int(n) for n, c in zip(tree.scored, tree.completion, strict=True)}
    found = []
    for number in sorted(last):
        node, tokens = last[number], []
        while node >= 0:
            tokens.append(int(tree.token[node]))
            node = int(tree.parent[node])
        found.append(tokens[::-1])
    return found


def sequences_told(text: str) -> list[str]:
    """Prompt and answer of each line that is chosen or rejected, put together."""
    _, prompt, rest = re.split(r"\n\n(?=Titles that|<\|im_start)|\n\n(?=chosen|pair 1)", text, maxsplit=2)
    listing, found = "", []
    for part in re.split(r"\n(?=pair \d|chosen |rejected )", rest.split("\n\nall ")[0]):
        if part.startswith("pair"):
            listing = part.split(": ", 1)[1].rsplit("  (", 1)[0]
        else:
            literal = part[9:].rsplit("  (", 1)[0]
            found.append(prompt + listing + ast.literal_eval(literal))
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"loss": "DMPO", "rejected_num": 2},
        {"loss": "SFT", "prompt": "instruct"},
        {"loss": "SDPO", "rejected_num": 2, "prompt": "instruct"},
        {"loss": "MultDPO", "rejected_num": 2, "chosen_num": 2},
        {"loss": "DMPO", "rejected_num": 2, "prompt": "pair", "eval_args": {"mode": "uni1"}},
        {"loss": "DPO", "rejected_num": 1, "MAX_ITEM_LIST_LENGTH": 3, "item_text_max_tokens": 6},
    ],
)
def test_what_is_shown_is_what_is_trained(tiny: dict[str, Any], changes: dict[str, Any]) -> None:
    """Prompt and answers, put together, are the root-to-leaf paths of the window's tree."""
    text = shown(tiny, "u3", **changes)
    trainer, window = trained_window(tiny, "u3", **changes)
    prompt, decode = trainer.model.prompt, trainer.model.llm.tokenizer.decode
    tree = paths(prompt.window_tree(window))
    targets, each = len(window.targets), len(tree) // len(window.targets)
    last = [decode(path) for path in tree[(targets - 1) * each :]]
    assert sorted(sequences_told(text)) == sorted(last) and len(last) == each >= 1
    counts = [int(n) for n in re.findall(r"^(?:chosen|rejected).*\((\d+) tokens\)$", text, re.MULTILINE)]
    trunk = prompt.trunk(window.items[: window.targets[-1]])
    assert text.splitlines()[0].endswith(f", {len(trunk)} tokens")
    if "pair" not in changes.values():
        assert sorted(counts) == sorted(len(path) - len(trunk) for path in tree[(targets - 1) * each :])
    assert f"{targets} positions, {prompt.window_size(window)} tokens\n" in text


# ---- what is left out


def test_left_out_by_hand() -> None:
    # Ten training items, the last is the target: nine before it.
    def ten(last: int) -> list[int]:
        return [*range(20, 29), last]

    assert left_out(Window(1, tuple(range(10)), (9,)), ten(9), 20) == (0, 0)
    assert left_out(Window(1, tuple(range(5)), (1, 4)), ten(4), 4) == (5, 0)
    assert left_out(Window(1, tuple(range(3)), (2,)), ten(2), 4) == (5, 2)
    # Two chosen a pair: the target is the last but one, eight before it.
    assert left_out(Window(1, tuple(range(9)), (8,), also=((1,),)), [*range(9), 1], 20) == (0, 0)


def test_a_target_that_is_not_the_last_lacks_nothing(tiny: dict[str, Any]) -> None:
    """Of low_rating the last item may be one that was rated low: what comes after the target is not left out."""
    low = {"loss": "DMPO", "rejected": "low_rating", "rejected_num": 1, "rating_threshold": 4, "liked_only": False}
    config = LLMConfig(config_dict={**tiny, **low, "min_disliked": 1})
    protocol = prepare_data(config)
    tokens, events = protocol.dataset.field2id_token[protocol.dataset.uid_field], protocol.events
    rated_low = [
        str(tokens[user])
        for user, items in protocol.training_sequences().items()
        if items[-1] in events.disliked(user, len(items))
    ]
    assert rated_low
    for user in rated_low[:3]:
        told = preview_user(config, user)
        assert "left out: 0 older items by --MAX_ITEM_LIST_LENGTH=20, 0 by the LLM's context" in told


def test_history_that_is_too_long(tiny: dict[str, Any]) -> None:
    text = shown(tiny, "u3", MAX_ITEM_LIST_LENGTH=4)
    assert text.startswith("user u3: 10 training items, 4 of them in this prompt, ")
    assert "left out: 5 older items by --MAX_ITEM_LIST_LENGTH=4, 0 by the LLM's context of 8192 tokens\n" in text
    assert "; 100.0 % lack items by MAX_ITEM_LIST_LENGTH, 0.0 % by the context\n" in text


@pytest.mark.parametrize(("prompt", "context"), [("stream", 100), ("instruct", 140)])
def test_context_that_is_too_small(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, prompt: str, context: int
) -> None:
    monkeypatch.setattr(tiny_module, "CONTEXT", context)
    text = shown(tiny, "u3", prompt=prompt)
    in_prompt = int(re.match(r"user u3: 10 training items, (\d+) of", text)[1])
    lacks = 9 - in_prompt
    assert 0 < lacks < 9
    assert (
        f"left out: 0 older items by --MAX_ITEM_LIST_LENGTH=20, {lacks} by the LLM's context of {context} tokens\n"
        in text
    )
    body = text.split("\n\n")[1]
    assert sum(line.endswith(")") for line in body.splitlines()) == in_prompt
    assert re.search(r"; 0.0 % lack items by MAX_ITEM_LIST_LENGTH, 100.0 % by the context\n", text)


def test_titles_that_are_cut(tiny: dict[str, Any]) -> None:
    wordy = {
        "item_text": "{title} and a long tail of words",
        "item_text_max_tokens": 7,
        "loss": "DPO",
        "rejected_num": 1,
    }
    text = shown(tiny, "u3", **wordy)
    trainer, window = trained_window(tiny, "u3", **wordy)
    cut = re.findall(r"^cut by --item_text_max_tokens=7: '(.*)' of '(.*)'$", text, re.MULTILINE)
    read = [trainer.model.texts[i] for i in dict.fromkeys([*window.items, *window.rejected[-1]])]
    assert [short for short, _ in cut] == read
    assert all(whole.startswith(short) and whole.endswith("and a long tail of words") for short, whole in cut)
    assert "\nall 60 titles: 60 cut; longest " in text
    plain = shown(tiny, "u3")
    assert "cut by" not in plain and "\nall 60 titles: 0 cut; longest " in plain


def test_all_users(tiny: dict[str, Any]) -> None:
    """Against the prompt of every user's last training item, one by one."""
    changes = {"few_shot": 12, "prompt": "instruct"}
    text = shown(tiny, **changes)
    trainer = started(*prepared(tiny, "LLMRanker", **changes))
    prompt, sequences = trainer.model.prompt, trainer.protocol.training_sequences()
    sizes = [len(prompt.trunk([int(i) for i in items[:-1]])) for items in sequences.values()]
    half, nearly_all = np.percentile(sizes, [50, 95])
    told = f"{half:.0f} tokens (median), {nearly_all:.0f} (95 %), {max(sizes)} (most); 0.0 % lack items by"
    assert f"\nall 12 training users: prompts of {told} MAX_ITEM_LIST_LENGTH, 0.0 % by the context\n" in text
    assert text.endswith(f"({max(map(len, prompt.answers))} tokens)")


# ---- DPO4Rec


def test_dpo4rec_shows_its_prompt_to_the_letter(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    settings = {**toy, **SMALL, "reasoning_history": 5}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    assert main(["preview", "--model=DPO4Rec", *flags]) == 0
    text = capsys.readouterr().out
    trainer = started(*prepared(settings, "DPO4Rec"))
    user = re.match(r"user (u\d+): 8 items known, 5 of them in this prompt, (\d+) tokens\n", text)
    dataset, events = trainer.protocol.dataset, trainer.protocol.events
    known = events.items_of(dataset.token2id(dataset.uid_field, user[1]))[:8]
    tokens = trainer.work.question.tokens(known)
    assert int(user[2]) == len(tokens)
    assert f"\n\n{trainer.work.reasoner.llm.tokenizer.decode(tokens)}\n" in text
    assert "left out: 3 older items by --reasoning_history=5, 0 by the LLM's context\n" in text
