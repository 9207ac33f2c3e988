"""What the two forms of an explanation share: sentences, and tables whose cells are plain text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recbole_llm.errors import plain
from recbole_llm.explain.explanation import Explanation, Influence

MARK = " <- chosen"


@dataclass(frozen=True)
class Table:
    """Heads and cells; ``words`` are the columns that stand to the left, all others are numbers."""

    heads: list[str]
    rows: list[list[str]]
    words: tuple[int, ...]


def token_text(token: str) -> str:
    """A token with its blanks and line breaks shown."""
    return plain(token.replace("\n", "⏎").replace(" ", "·"))


def stages_text(found: Explanation) -> str:
    """What was trained, in order."""
    return " then ".join(found.run["stages"]) or "zero-shot"


def rank_line(found: Explanation) -> str:
    """The target's rank, and whether the run's own table says the same."""
    told = f"rank {found.target.rank:g} of {found.answers}"
    if not found.agrees:
        return (
            f"{told}, but per_user.csv.gz says {found.stored_rank:g}: this is NOT the ranking of the run. Look for "
            "changed item texts, prompt files, weights or versions (env.json)."
        )
    tie = "" if found.target.rank == found.stored_rank else f" ({found.stored_rank:g} there: scores all but tie)"
    return f"{told}, as in per_user.csv.gz{tie}"


def head_lines(found: Explanation) -> list[str]:
    """What ran, and on what."""
    run = found.run
    return [
        f"{run['model']} ({stages_text(found)}) on {run['dataset']} · {run['llm']}, {run['dtype']} · score: "
        f"{run['score_norm']} of token log-probs",
        f"{run['mode']}, candidate hash {run['candidate_hash'][:12]} · {run['folder']}",
    ]


def ranking(found: Explanation) -> Table:
    """The titles with log-probs, and with what the reference makes of them where there is one."""
    scored, compared = found.run["score_norm"] != "sum", found.reference is not None
    rewarded = any(title.reward is not None for title in found.titles)
    heads, rows = ["rank", "title", "log-prob"] + ["score"] * scored, []
    if compared:
        heads += ["change", *(["reward"] if rewarded else []), f"rank, {found.reference}"]
    for title in found.titles:
        row = [_rank(title.rank), title.text + MARK * title.is_target, f"{title.logp:.3f}"]
        row += ["–" if title.score is None else f"{title.score:.3f}"] if scored else []
        if compared:
            row += [f"{title.change:+.3f}"]
            row += [f"{title.reward:+.4f}"] if rewarded else []
            row += [_rank(title.reference_rank)]
        rows.append(row)
    return Table(heads, rows, (1,))


def ranks(found: Explanation) -> Table:
    """The target's rank under this run, what it was before, and other runs."""
    rows = [[f"this run ({stages_text(found)})", _rank(found.target.rank), _users(found.run["training_users"]), ""]]
    if found.reference is not None:
        rows.append([f"{found.reference}, before the last stage", _rank(found.target.reference_rank), "", ""])
    rows += [[other.model, _rank(other.rank), _users(other.trained_on), other.folder] for other in found.others]
    return Table(["", f"rank of {found.answers}", "training users", "run"], rows, (0, 3))


def tests(influence: Influence) -> Table:
    """Deletion tests of one title."""
    rows = [
        [
            str(test.size),
            f"{test.removed:+.3f}",
            f"{np.mean(test.removed_random):+.3f}",
            f"{np.mean(np.less(test.removed_random, test.removed)):.0%}",
            f"{test.kept:+.3f}",
            f"{np.mean(test.kept_random):+.3f}",
            f"{np.mean(np.greater(test.kept_random, test.kept)):.0%}",
            ", ".join(str(place + 1) for place in test.places),
        ]
        for test in influence.tests
    ]
    heads = ["items", "without", "random", "larger than", "alone", "random", "smaller than", "which"]
    return Table(heads, rows, (7,))


def reading_notes(found: Explanation) -> list[str]:
    """The explanation's own notes, and how to read what is easily misread."""
    notes = [
        *found.notes,
        "Leave-one-out says what this ranker does with an item, not why the user chose it.",
        "A part of each effect is common to all titles: any shorter history may make them likelier, or less. "
        + _what_moves_the_order(found),
        "Without 1 item the deletion test holds by construction: it is the leave-one-out that chose the item. The "
        "rest need not hold.",
    ]
    if any(title.reward is not None for title in found.titles):
        notes.append(
            f"reward = beta ({found.run['beta']:g}) x change, up to a term that all items of a user share: compare "
            "rewards of two titles, do not read one alone."
        )
    return notes


def _what_moves_the_order(found: Explanation) -> str:
    if found.run["mixed"]:
        return "The order of two titles is moved by the other model's scores too, which are not taken apart here."
    per_token = ", each divided by its title's tokens (score_norm=mean)" if found.run["score_norm"] == "mean" else ""
    return f"What moves the order of two titles is the difference of their columns{per_token}."


def title_heads(found: Explanation) -> list[str]:
    """The explained titles, each with why it is explained."""
    return [f"{influence.role}: {influence.title.text}" for influence in found.influences]


def effects(found: Explanation) -> list[tuple[str, tuple[float, ...]]]:
    """Columns over the history: what each item does to each explained title, and to the first against the second.

    The last is in the unit that the order goes by, nats or (``score_norm=mean``) nats a token; a mixture has none.
    """
    columns = [(head, i.by_item) for head, i in zip(title_heads(found), found.influences, strict=True)]
    if len(found.influences) > 1 and not found.run["mixed"]:
        first, second, *_ = found.influences
        by_token = found.run["score_norm"] == "mean"
        sizes = [len(one.title.tokens) if by_token else 1 for one in (first, second)]
        pairs = zip(first.by_item, second.by_item, strict=True)
        difference = tuple(a / sizes[0] - b / sizes[1] for a, b in pairs)
        columns.append((f"{first.role} rather than {second.role}", difference))
    return columns


def left_out(found: Explanation) -> str:
    """A sentence about the older part of the history; empty where there is none."""
    return f"{found.left_out} older items are not in the prompt." if found.left_out else ""


def _rank(rank: float | None) -> str:
    return "–" if rank is None else f"{rank:g}"


def _users(number: int | None) -> str:
    return "all" if number is None else f"{number:,}"
