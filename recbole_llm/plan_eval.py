"""What evaluations will compute, counted from configuration and data: rankings of candidates or of a catalogue."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from recbole.config import Config

from recbole_llm.catalogue import MOST_NODES, MOST_SHARE
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.full_ranking import KEPT, users_at_once, users_together
from recbole_llm.llm.logps import TARGETS_AT_ONCE
from recbole_llm.llm.title_trie import TitleTrie, title_trie
from recbole_llm.plan_counts import Work, passes_of, sum_work
from recbole_llm.read_keys import reranks
from recbole_llm.scoring import candidate_chunks

History = tuple[int, ...]


def eval_work(
    config: Config, prompt: Prompt | PairPrompt, rows: EvalRows, popularity: np.ndarray, context: int, rounds: int
) -> list[Work]:
    """An evaluation of frozen rows, once or, for validation, after several epochs; with ``pmi`` the titles alone too.

    Args:
        popularity: training interactions of each item; what ``rerank_model`` will offer is not known before it is
            trained, so its candidates are counted as the most popular items.
        context: tokens of a prompt with its answer at most.
    """
    name = "validation" if rows.split == "valid" else rows.split
    fitted = _histories(config, prompt, rows, context)
    groups = list(rows.batches_by_history(users_together(config), config["MAX_ITEM_LIST_LENGTH"]))
    if rows.mode == "full" and config["full_ranking"] != "rerank":
        search = config["full_ranking"] == "exact_topk"
        seen = [tuple(sorted(map(int, rows.hidden_of(row)))) if search else () for row in range(len(rows))]
        batches = [[(fitted[row], seen[row]) for row in group] for group in groups]
        found = _catalogue_work(config, prompt, name, batches, rounds, search=search)
    else:
        items = rows.candidates.tolist() if rows.candidates is not None else _most_popular(config, rows, popularity)
        items = [asked[: config["rerank_topk"]] for asked in items] if reranks(config, rows.mode) else items
        asked = [[_asked(fitted[row], items[row]) for row in group] for group in groups]
        found = _ranking_work(config, prompt, name, asked, rounds)
    return [found] + ([_prior_work(config, prompt, name, rows, rounds)] if config["score_norm"] == "pmi" else [])


def _prior_work(config: Config, prompt: Prompt | PairPrompt, name: str, rows: EvalRows, rounds: int) -> Work:
    """Log-probs of all titles after an empty history (``score_norm=pmi``)."""
    name += ": titles without history"
    if rows.mode == "full" and config["full_ranking"] != "rerank":
        return _catalogue_work(config, prompt, name, [[((), ())]], rounds)
    return _ranking_work(config, prompt, name, [[_asked((), range(1, len(prompt.answers)))]], rounds)


def expected_expansions(k: int, inner: int) -> int:
    """Nodes that best-first search for the top k may visit, of ``inner`` at most.

    As a trained ranker did over the 1,682 titles of ml-100k: 106, 219, 281 and 428 for k = 1, 10, 20 and 50. A ranker
    that spreads its probability over more titles visits more.
    """
    return min(inner, 100 + 10 * k)


def _ranking_work(
    config: Config, prompt: Prompt | PairPrompt, name: str, batches: list[list[Window]], rounds: int
) -> Work:
    """Ranking of candidates; where they exceed the budget, their trie goes below one pass of their prompt."""
    passes, below, budget = [], [], config["token_budget"]
    for batch in batches:
        trees = []
        for history, items in _joined(prompt, batch):
            chunks = candidate_chunks(prompt, history, items, budget)
            if len(chunks) > 1 and _goes_on(config, prompt):
                below.append((history, items, chunks[0]))
            else:
                trees += [_asked(history, chunk) for chunk in chunks]
        passes += passes_of(config, prompt, trees)
    found = sum_work(name, prompt, passes, [w for batch in batches for w in batch], rounds=rounds)
    for history, items, first in below:
        _add_below(found, title_trie([[], *(prompt.answers[i] for i in items)]), len(prompt.trunk(history)), budget)
        found.sample = found.sample or [_asked(history, first)]
    return found


def _catalogue_work(
    config: Config,
    prompt: Prompt | PairPrompt,
    name: str,
    batches: list[list[tuple[History, tuple[int, ...]]]],
    rounds: int,
    *,
    search: bool = False,
) -> Work:
    """Ranking of the whole catalogue below each prompt; only where that is by packed trees can it be timed.

    Args:
        batches: history, and what is hidden from a search, of users whose equal questions are asked once.
        search: for the best K alone. Counts are then what a trained ranker needs, memory is what any may need.
    """
    trie, budget = title_trie(prompt.answers), config["token_budget"]
    everyone = [len(prompt.trunk(history)) for batch in batches for history, _ in batch]
    asked = [history for batch in batches for history, _ in dict.fromkeys(batch)]
    if _goes_on(config, prompt):
        found = sum_work(name, prompt, [], [], rounds=rounds)
        nodes = expected_expansions(max(config["topk"]), len(trie.inner)) if search else None
        for history in asked:
            _add_below(found, trie, len(prompt.trunk(history)), budget, nodes)
    else:
        alone = [[_asked(history, range(1, trie.n_items))] for history in asked]
        found = _ranking_work(config, prompt, name, alone, rounds)
    found.positions = len(everyone)
    found.one_by_one = sum((trie.n_items - 1) * trunk + sum(map(len, prompt.answers[1:])) for trunk in everyone)
    if search:
        found.kept += _kept_by_search(config, trie, len(everyone), max(everyone))
    return found


def _kept_by_search(config: Config, trie: TitleTrie, users: int, longest: int) -> int:
    """Tokens and nodes whose keys and values a search of some users holds at most."""
    users = min(users, users_at_once(config["token_budget"], longest, config["device"]))
    most = min(int(MOST_SHARE * len(trie.inner)), MOST_NODES)
    # Twice the nodes: their cache grows by doubling.
    return users * longest + min(2 * users * most, max(0, KEPT * config["token_budget"] - users * longest))


def _add_below(found: Work, trie: TitleTrie, trunk: int, budget: int, nodes: int | None = None) -> None:
    """Add a trie below one prompt: all inner nodes, ``budget`` a pass, or so many of them."""
    inner = len(trie.inner)
    nodes = inner if nodes is None else nodes
    found.windows += 1
    found.passes += 1 + -(-nodes // budget)
    found.tokens += trunk + nodes
    found.head_rows += 1 + nodes
    rows = max(min(inner, budget), min(len(trie), TARGETS_AT_ONCE))  # a target takes no less memory than a row
    found.largest = (max(found.largest[0], trunk, min(inner, budget)), max(found.largest[1], rows))
    found.kept = max(found.kept, trunk + min(inner, budget + int(trie.depth.max())))


def _goes_on(config: Config, prompt: Prompt | PairPrompt) -> bool:
    """Whether passes can go on from what the LLM keeps of a prompt."""
    return config["attention"] not in ("sdpa", "eager") and not isinstance(prompt, PairPrompt)


def _asked(history: Sequence[int], items: Sequence[int]) -> Window:
    """Candidates after a history: the tree of a window with the first as target and the others beside it."""
    return Window(0, (*history, items[0]), (len(history),), (tuple(items[1:]),))


def _joined(prompt: Prompt | PairPrompt, asked: list[Window]) -> Iterable[tuple[History, list[int]]]:
    """Each history once, with the items that any user of it is asked for; a pair prompt lists its candidates."""
    items: dict[object, tuple[History, dict[int, None]]] = {}
    for window in asked:
        mine = (window.items[-1], *window.rejected[0])
        key = (window.items[:-1], mine) if isinstance(prompt, PairPrompt) else window.items[:-1]
        items.setdefault(key, (window.items[:-1], {}))[1].update(dict.fromkeys(mine))
    return [(history, list(mine)) for history, mine in items.values()]


def _histories(config: Config, prompt: Prompt | PairPrompt, rows: EvalRows, context: int) -> list[History]:
    """Each row's history as the model sees it, cut to fit."""
    suffix, length = config["LIST_SUFFIX"], config["ITEM_LIST_LENGTH_FIELD"]
    lengths, items = rows.visible[length].tolist(), rows.visible[config["ITEM_ID_FIELD"] + suffix].tolist()
    return [tuple(prompt.fit(history[:count], context)) for history, count in zip(items, lengths, strict=True)]


def _most_popular(config: Config, rows: EvalRows, popularity: np.ndarray) -> list[list[int]]:
    order = np.argsort(-popularity[1:], kind="stable") + 1
    count = min(config["rerank_topk"], len(order))
    return [order[~np.isin(order, rows.hidden_of(row))][:count].tolist() for row in range(len(rows))]
