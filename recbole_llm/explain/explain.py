"""Why a finished run ranks a user's items as it does: prompt, log-probs by token, what training and history changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError
from recbole_llm.explain.agreement import agrees, ordered
from recbole_llm.explain.explanation import Explanation, Influence, Title
from recbole_llm.explain.faithfulness import Deletion, deletion_tests, influences
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.explain.history_logps import History, question, summed
from recbole_llm.explain.notes import run_notes
from recbole_llm.explain.other_ranks import other_ranks
from recbole_llm.explain.ranked import Ranked
from recbole_llm.read_keys import reranks


def explain_user(
    run: FinishedRun, user: str, k: int = 10, item: str | None = None, baseline: Path | None = None
) -> Explanation:
    """Explain a user's test row.

    Args:
        run: the finished run.
        user: token of a test user.
        k: how many titles of the top; of a search those that it found at most.
        item: token of one more item to explain.
        baseline: a run folder to read the target's rank from; None = those beside the run.

    Raises:
        UserError: no such user or item, or a baseline that was asked something else.
    """
    row = run.row_of(user)
    stored = run.stored_rank(row)
    others = other_ranks(run.folder, run.record, user, " ".join(run.rows.target_tokens(row)), baseline)
    also = [] if item is None else [_item_id(run, row, item)]
    history, ranked = run.history(row), run.ranking(row)
    k = min(k, ordered(run, ranked))
    relevant = list(dict.fromkeys(run.rows.relevant[row].tolist()))
    roles = _roles(int(ranked.items[0]), min(relevant, key=lambda i: ranked.rank([i]) or math.inf), also)
    shown = _shown(run, row, [*ranked.items[:k].tolist(), *roles])
    titles = _titles(run, row, history, ranked, shown)
    trunk, decode = _prompt_tokens(run, history, shown), run.model.llm.tokenizer.decode
    return Explanation(
        user=user,
        run=_told(run),
        history=tuple(run.model.texts[i] for i in history),
        left_out=len(run.rows.history[row]) - len(history),
        prompt=decode(trunk),
        prompt_tokens=tuple(decode([token]) for token in trunk),
        answers=len(ranked.items),
        titles=tuple(titles.values()),
        k=k,
        stored_rank=stored,
        agrees=agrees(run, row, ranked, relevant, stored),
        reference=None if run.lacks_reference else run.reference_name,
        others=tuple(others),
        influences=_influences(run, row, history, titles, roles),
        notes=tuple(run_notes(run, row, others)),
    )


def _item_id(run: FinishedRun, row: int, item: str) -> int:
    """The internal id of an item token.

    Raises:
        UserError: there is none, or a pair prompt does not list it.
    """
    place = np.flatnonzero(run.item_tokens.astype(str) == item)
    place = place[place > 0]  # RecBole's padding item
    if not len(place):
        some = ", ".join(map(str, run.item_tokens[1:6]))
        raise UserError(f"--item={item}: no such item; there are {len(run.item_tokens) - 1}, for example {some}.")
    if (pair := _pair(run, row)) and place[0] not in pair:
        listed = ", ".join(map(str, run.item_tokens[pair]))
        raise UserError(f"--item={item}: a pair prompt scores the two items that it lists, here {listed}.")
    return int(place[0])


def _pair(run: FinishedRun, row: int) -> list[int]:
    """The two items that a pair prompt lists, in its order; empty for other prompts."""
    candidates = run.rows.candidates
    return candidates[row].tolist() if isinstance(run.model.prompt, PairPrompt) and candidates is not None else []


def _roles(top: int, goal: int, also: Sequence[int]) -> dict[int, str]:
    """Items to explain -> why."""
    roles = {top: "top 1 and target"} if top == goal else {top: "top 1", goal: "target"}
    return roles | {item: "asked" for item in also if item not in roles}


def _shown(run: FinishedRun, row: int, wanted: Sequence[int]) -> list[int]:
    """Items to show, each once; of a pair prompt both, in the order that it lists them."""
    return _pair(run, row) or list(dict.fromkeys(wanted))


def _prompt_tokens(run: FinishedRun, history: History, shown: list[int]) -> list[int]:
    """All that stands before an answer."""
    prompt = run.model.prompt
    return [*prompt.prefix, *(t for i in history for t in prompt.lines[i]), *question(prompt, shown).suffix]


def _titles(run: FinishedRun, row: int, history: History, ranked: Ranked, shown: list[int]) -> dict[int, Title]:
    """Item -> its title as the LLM scores it."""
    (logps,) = run.token_logps([history], shown)
    scores = run.normed(summed(logps), shown)
    answers, decode = question(run.model.prompt, shown).answers, run.model.llm.tokenizer.decode
    titles = [
        Title(
            item=str(run.item_tokens[item]),
            text=run.model.texts[item],
            rank=ranked.rank([item]),
            score=None if ranked.score(item) is None else float(score),
            tokens=tuple(decode([token]) for token in answer),
            logps=tuple(mine.tolist()),
            is_target=item in run.rows.relevant[row],
        )
        for item, answer, mine, score in zip(shown, answers, logps, scores, strict=True)
    ]
    return dict(zip(shown, _against_reference(run, row, history, shown, titles), strict=True))


def _against_reference(
    run: FinishedRun, row: int, history: History, shown: list[int], titles: list[Title]
) -> list[Title]:
    """The titles with what the reference makes of them; as they are where there is none."""
    if run.lacks_reference:
        return titles
    with run.as_reference():
        (logps,) = run.answer_logps([history], shown).tolist()
        ranked = run.ranking(row)
    beta = None if run.record["loss"] == "SFT" else run.config["beta"]
    return [
        replace(
            title,
            reference_logp=logp,
            reference_rank=ranked.rank([item]),
            reward=None if beta is None else beta * (title.logp - logp),
        )
        for title, item, logp in zip(titles, shown, logps, strict=True)
    ]


def _influences(
    run: FinishedRun, row: int, history: History, titles: dict[int, Title], roles: dict[int, str]
) -> tuple[Influence, ...]:
    by_item, tests = history_effects(run, row, history, list(roles), run.config["show_progress"])
    return tuple(
        Influence(titles[item], role, tuple(by_item[:, place].tolist()), tuple(tests[place]))
        for place, (item, role) in enumerate(roles.items())
    )


def history_effects(
    run: FinishedRun, row: int, history: History, items: list[int], show_progress: bool = False
) -> tuple[np.ndarray, list[list[Deletion]]]:
    """Leave-one-out ``[n, I]`` and deletion tests of some items after a row's history; seeded by user."""
    asked = _pair(run, row) or items
    columns = [asked.index(item) for item in items]

    def score(histories: Sequence[History]) -> np.ndarray:
        return run.answer_logps(histories, asked, show_progress)[:, columns]

    by_item = influences(score, history)
    rng = seeded(run.config["candidate_seed"], "deletion", run.user_token(row))
    return by_item, deletion_tests(score, history, by_item, rng)


def _told(run: FinishedRun) -> dict[str, Any]:
    """What an explanation says of the run."""
    names = ("dataset", "llm", "loss", "prompt", "score_norm", "mode", "candidate_hash", "dtype", "training_users")
    told = {name: run.record[name] for name in ("model", *names)}
    stages = [stage["loss"] for stage in run.record["stages"]]
    mixed = reranks(run.config, run.rows.mode) and run.model.rerank_weight != 1
    return {"folder": str(run.folder), **told, "beta": run.config["beta"], "stages": stages, "mixed": mixed}
