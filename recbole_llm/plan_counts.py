"""What a run will compute, counted from configuration and data: positions, passes, tokens, LM-head rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from recbole.config import Config

from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.llm_trainer import optimizer_steps
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.reference import WINDOWS_AT_ONCE
from recbole_llm.scoring import candidate_chunks
from recbole_llm.stages import Stage


@dataclass
class Work:
    """Passes of one kind over the same data: a training stage, its reference, an evaluation.

    Attributes:
        name: as shown.
        rounds: how often all of it is done: epochs, or validations.
        positions: supervised positions, or rows that are ranked, of one round.
        windows: token trees of one round.
        steps: optimizer steps of all rounds; 0 where nothing is trained.
        passes: forward passes of one round.
        tokens: that go through the LLM in one round.
        one_by_one: the same with one sequence (prompt and completion) for each completion.
        head_rows: rows of the LM head in one round.
        largest: tokens and LM-head rows of the largest pass.
        trained: whether gradients are computed.
        sample: windows to time the passes with.
        cached: whether an earlier run left its result.
        seconds: of all rounds; None = not measured.
    """

    name: str
    rounds: int
    positions: int
    windows: int
    steps: int
    passes: int
    tokens: int
    one_by_one: int
    head_rows: int
    largest: tuple[int, int]
    trained: bool
    sample: list[Window] = field(default_factory=list)
    cached: bool = False
    seconds: float | None = None


def head_rows(prompt: Prompt | PairPrompt, window: Window) -> int:
    """Tokens of a window's tree whose next-token distribution is needed."""
    if isinstance(prompt, PairPrompt):
        target = window.items[window.targets[0]]
        return sum(1 + 2 * (len(prompt.answer(target, r)) - 1) for r in window.rejected[0])
    chosen = sum(len(prompt.answers[window.items[t]]) for t in window.targets)
    return chosen + sum(len(prompt.answers[i]) - 1 for items in window.branches() for i in items)


def tokens_one_by_one(prompt: Prompt | PairPrompt, window: Window) -> int:
    """Tokens of a window's completions, each in a sequence of its own behind its prompt."""
    trunks = [len(prompt.trunk(window.items[:t])) for t in window.targets]
    if isinstance(prompt, PairPrompt):
        target = window.items[window.targets[0]]
        asked = [len(prompt.listing(target, r)) + len(prompt.answer(target, r)) for r in window.rejected[0]]
        return sum(2 * (trunks[0] + tokens) for tokens in asked)
    total = 0
    for trunk, target, others in zip(trunks, window.targets, window.branches(), strict=True):
        total += sum(trunk + len(prompt.answers[i]) for i in (window.items[target], *others))
    return total


def stage_work(config: Config, prompt: Prompt | PairPrompt, stage: Stage) -> list[Work]:
    """A training stage, with its reference where it has one."""
    grouped = [
        optimizer_steps(stage.windows, config["train_batch_size"], config["seed"], epoch)
        for epoch in range(stage.epochs)
    ]
    epochs = [[part for step in steps for part in _passes(config, prompt, step)] for steps in grouped]
    steps = sum(1 for _ in optimizer_steps(stage.windows, config["train_batch_size"], config["seed"], 0))
    trained = _work(stage.loss, prompt, epochs[0], stage.windows, rounds=stage.epochs, steps=stage.epochs * steps)
    trained.largest = max(_sizes(prompt, part) for epoch in epochs for part in epoch)
    if stage.loss == "SFT":
        return [trained]
    return [pass_work(config, prompt, f"{stage.loss}: reference", [stage.windows]), trained]


def pass_work(config: Config, prompt: Prompt | PairPrompt, name: str, calls: Iterable[list[Window]]) -> Work:
    """Log-probs of windows without gradients, asked for in some calls."""
    calls = list(calls)
    parts = [some[first : first + WINDOWS_AT_ONCE] for some in calls for first in range(0, len(some), WINDOWS_AT_ONCE)]
    passes = [found for part in parts for found in _passes(config, prompt, part)]
    return _work(name, prompt, passes, [w for some in calls for w in some])


def eval_work(
    config: Config, prompt: Prompt | PairPrompt, rows: EvalRows, popularity: np.ndarray, context: int, rounds: int
) -> Work:
    """An evaluation of frozen rows, once or, for validation, after several epochs.

    Args:
        popularity: training interactions of each item; what ``rerank_model`` will offer is not known before it is
            trained, so its candidates are counted as the most popular items.
        context: tokens of a prompt with its answer at most.
    """
    name = "validation" if rows.split == "valid" else rows.split
    fitted = list(_histories(config, prompt, rows, context))
    if rows.mode == "full" and config["full_ranking"] != "rerank":
        return _catalogue_work(config, prompt, name, fitted, rounds)
    items = rows.candidates.tolist() if rows.mode != "full" else _most_popular(config, rows, popularity)
    alone = [_asked(history, mine) for history, mine in zip(fitted, items, strict=True)]
    batches = [[alone[row] for row in batch] for batch in rows.batches(LLMRanker.users_at_once)]
    return _ranking_work(config, prompt, name, batches, rounds)


def prior_work(config: Config, prompt: Prompt | PairPrompt, rounds: int) -> Work:
    """Log-probs of all titles after an empty history (``score_norm=pmi``)."""
    return _ranking_work(
        config, prompt, "titles without history", [[_asked([], range(1, len(prompt.answers)))]], rounds
    )


def expected_expansions(k: int, inner: int) -> int:
    """Nodes that best-first search for the top k may visit, of ``inner`` at most.

    As a trained ranker did over the 1,682 titles of ml-100k: 106, 219, 281 and 428 for k = 1, 10, 20 and 50. A ranker
    that spreads its probability over more titles visits more.
    """
    return min(inner, 100 + 10 * k)


def _ranking_work(
    config: Config, prompt: Prompt | PairPrompt, name: str, batches: list[list[Window]], rounds: int
) -> Work:
    """Ranking of candidates; where they exceed the budget, several passes go below one pass of their prompt.

    Titles of such passes that begin alike share tokens; that is not counted.
    """
    shared = [_shared(config, prompt, batch) for batch in batches]
    passes = [part for windows in shared for part in _passes(config, prompt, windows)]
    found = _work(name, prompt, passes, [w for batch in batches for w in batch], rounds=rounds)
    if config["attention"] in ("sdpa", "eager") or isinstance(prompt, PairPrompt):
        return found
    for windows in shared:
        histories = [w.items[:-1] for w in windows]
        once = set(histories)
        found.tokens -= sum(len(prompt.trunk(h)) for h in histories) - sum(len(prompt.trunk(h)) for h in once)
        found.head_rows -= len(histories) - len(once)
    return found


def _catalogue_work(
    config: Config, prompt: Prompt | PairPrompt, name: str, histories: list[Sequence[int]], rounds: int
) -> Work:
    """Ranking of the whole catalogue below each prompt."""
    nodes = len(title_trie(prompt.answers).inner)
    if config["full_ranking"] == "exact_topk":
        nodes = expected_expansions(max(config["topk"]), nodes)
    trunks = [len(prompt.trunk(history)) for history in histories]
    titles = sum(map(len, prompt.answers[1:]))
    items, budget = len(prompt.answers) - 1, config["token_budget"]
    return Work(
        name,
        rounds,
        positions=len(histories),
        windows=len(histories),
        steps=0,
        passes=sum(1 + -(-nodes // budget) for _ in trunks),
        tokens=sum(trunks) + len(trunks) * nodes,
        one_by_one=sum(items * trunk + titles for trunk in trunks),
        head_rows=len(trunks) * (1 + nodes),
        largest=(max(max(trunks), min(nodes, budget)), min(nodes, budget)),
        trained=False,
        sample=[_asked(history, range(1, 1 + min(items, 50))) for history in histories[:32]],
    )


def _work(
    name: str,
    prompt: Prompt | PairPrompt,
    passes: list[list[Window]],
    alone: list[Window],
    *,
    rounds: int = 1,
    steps: int = 0,
) -> Work:
    """Sums over passes; ``alone`` are the windows before those of equal histories are joined."""
    sizes = [_sizes(prompt, part) for part in passes]
    return Work(
        name,
        rounds,
        positions=sum(len(w.targets) for w in alone),
        windows=sum(map(len, passes)),
        steps=steps,
        passes=len(passes),
        tokens=sum(tokens for tokens, _ in sizes),
        one_by_one=sum(tokens_one_by_one(prompt, w) for w in alone),
        head_rows=sum(rows for _, rows in sizes),
        largest=max(sizes),
        trained=steps > 0,
        sample=max(passes, key=lambda part: _sizes(prompt, part)),
    )


def _sizes(prompt: Prompt | PairPrompt, windows: Sequence[Window]) -> tuple[int, int]:
    """Tokens and LM-head rows of one pass."""
    return sum(map(prompt.window_size, windows)), sum(head_rows(prompt, w) for w in windows)


def _passes(config: Config, prompt: Prompt | PairPrompt, windows: Sequence[Window]) -> list[list[Window]]:
    """Windows as forward passes take them."""
    sizes = [prompt.window_size(w) for w in windows]
    return [[windows[i] for i in group] for group in batches_by_budget(sizes, config["token_budget"])]


def _asked(history: Sequence[int], items: Sequence[int]) -> Window:
    """Candidates after a history: the tree of a window with the first as target and the others beside it."""
    return Window(0, (*history, items[0]), (len(history),), (tuple(items[1:]),))


def _shared(config: Config, prompt: Prompt | PairPrompt, asked: list[Window]) -> list[Window]:
    """Windows for all users of a history, with the items that any of them is asked for, each within the budget."""
    if isinstance(prompt, PairPrompt):
        return list({(w.items, w.rejected): w for w in asked}.values())
    items: dict[tuple[int, ...], dict[int, None]] = {}
    for window in asked:
        mine = items.setdefault(window.items[:-1], {})
        mine.update(dict.fromkeys((window.items[-1], *window.rejected[0])))
    return [
        _asked(history, chunk)
        for history, mine in items.items()
        for chunk in candidate_chunks(prompt, history, list(mine), config["token_budget"])
    ]


def _histories(config: Config, prompt: Prompt | PairPrompt, rows: EvalRows, context: int) -> Iterator[Sequence[int]]:
    """Each row's history as the model sees it, cut to fit."""
    suffix, length = config["LIST_SUFFIX"], config["ITEM_LIST_LENGTH_FIELD"]
    lengths, items = rows.visible[length].tolist(), rows.visible[config["ITEM_ID_FIELD"] + suffix].tolist()
    for history, count in zip(items, lengths, strict=True):
        yield prompt.fit(history[:count], context)


def _most_popular(config: Config, rows: EvalRows, popularity: np.ndarray) -> list[list[int]]:
    order = np.argsort(-popularity[1:], kind="stable") + 1
    count = min(config["rerank_topk"], len(order))
    return [order[~np.isin(order, hidden)][:count].tolist() for hidden in rows.hidden]
