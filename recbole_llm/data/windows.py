"""Training sequences -> windows: which stretch of a history is one tree, and which items in it are trained."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window


def training_windows(
    sequences: Mapping[int, np.ndarray],
    prompt: Prompt | PairPrompt,
    *,
    history: int,
    last: int,
    most_tokens: int,
    chosen: int = 1,
) -> list[Window]:
    """Windows that train each position of each user once, the first item of a user excepted (it has no history).

    With a stream prompt a window is a stretch of ``history + 1`` items, all but its first trained; each stretch begins
    with the last item of the one before, and the first of a user is the short one. With an instruct prompt each
    trained position is a window of its own.

    Args:
        sequences: user -> training items in order of time.
        history: items of history at most (RecBole's MAX_ITEM_LIST_LENGTH).
        last: train only the last so many positions of a user; 0 = all.
        most_tokens: tokens of a prompt with its answer at most; oldest items go first.
        chosen: items chosen for each position, the target and the next others after it, each once; positions with
            fewer are left out.
    """
    windows: list[Window] = []
    longest = max(map(len, prompt.answers))
    for user, sequence in sequences.items():
        all_items = tuple(int(i) for i in sequence)
        # Before an item that is followed by enough others each item is, too.
        items = tuple(item for at, item in enumerate(all_items) if len(_also(all_items, at, chosen)) == chosen - 1)
        first = max(1, len(items) - last) if last else 1
        if prompt.every_position:
            windows += _stretches(user, items, first, history, prompt, most_tokens - longest, all_items, chosen)
        else:
            for target in range(first, len(items)):
                kept = prompt.fit(items[max(0, target - history) : target], most_tokens)
                also = (_also(all_items, target, chosen),)
                windows.append(Window(user, (*kept, items[target]), (len(kept),), also=also))
    return windows


def _also(items: tuple[int, ...], at: int, chosen: int) -> tuple[int, ...]:
    """What is chosen beside the item at a place: the next ``chosen - 1`` others, or as many as there are."""
    others: dict[int, None] = {}
    place = at + 1
    while len(others) < chosen - 1 and place < len(items):  # no further: histories may be long
        if items[place] != items[at]:
            others[items[place]] = None
        place += 1
    return tuple(others)


def _stretches(
    user: int,
    items: tuple[int, ...],
    first: int,
    history: int,
    prompt: Prompt | PairPrompt,
    room: int,
    all_items: tuple[int, ...],
    chosen: int,
) -> list[Window]:
    windows, end = [], len(items) - 1
    # From the end backwards: the latest titles, closest to what is asked later, get the longest histories.
    while end >= first:
        start = max(0, end - history)
        # After the last title but one there must be room for any answer: the last title, or one that is rejected.
        while start < end - 1 and len(prompt.trunk(items[start:end])) > room:
            start += 1
        targets = tuple(t for t in range(1, end - start + 1) if start + t >= first)
        also = tuple(_also(all_items, start + t, chosen) for t in targets)
        windows.append(Window(user, items[start : end + 1], targets, also=also))
        end = start
    return windows[::-1]
