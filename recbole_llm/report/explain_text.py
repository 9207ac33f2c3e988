"""An explanation, and deletion tests over users, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from recbole_llm.explain.explanation import Explanation, Title
from recbole_llm.explain.faithfulness import DRAWS, Comparison
from recbole_llm.report.explain_tables import (
    MARK,
    Table,
    effects,
    head_lines,
    left_out,
    plain,
    rank_line,
    ranking,
    ranks,
    reading_notes,
    tests,
    title_heads,
    token_text,
)

WIDEST = 44  # characters of a title in a table


def explanation_text(found: Explanation) -> str:
    """All parts, one below the other."""
    chose = f"chose {_short(found.target.text)}: {rank_line(found)}"
    parts = {
        "History, oldest first: a title's log-prob with all items less that without this one, nats": _history(found),
        f"Prompt ({len(found.prompt_tokens)} tokens)": _indented(found.prompt),
        f"Top {found.k} of {found.answers}, log-probs in nats": _table(ranking(found)),
        "Log-probs by token, nats (⏎ = line break)": "\n".join(map(_tokens, found.titles)),
        "Rank of what the user chose": _table(ranks(found)),
        "Do these items matter? Fall of the log-prob without the most influential items, and with them alone, nats\n"
        f"(random: mean of {DRAWS} random sets of as many; then how many of these are beaten)": _tests(found),
        "Notes": "\n".join(f"- {plain(note)}" for note in reading_notes(found)),
    }
    head = "\n".join([f"user {plain(found.user)}", *map(plain, head_lines(found)), plain(chose)])
    return "\n\n".join([head, *(f"{name}\n\n{body}" for name, body in parts.items())])


def _history(found: Explanation) -> str:
    rows = [
        [str(place + 1), text, *(f"{values[place]:+.3f}" for _, values in effects(found))]
        for place, text in enumerate(found.history)
    ]
    heads = ["", "title", *(_short(head, 32) for head, _ in effects(found))]
    return "\n".join(filter(None, [_table(Table(heads, rows, (1,))), left_out(found)]))


def _tokens(title: Title) -> str:
    parts = " | ".join(f"{token_text(t)} {p:.2f}" for t, p in zip(title.tokens, title.logps, strict=True))
    return f"{_short(title.text)} ({title.logp:.2f}): {parts}"


def _tests(found: Explanation) -> str:
    parts = []
    for influence, head in zip(found.influences, title_heads(found), strict=True):
        told = _table(tests(influence)) if influence.tests else "The history is too short for it."
        parts.append(f"{_short(head)}\n{told}")
    return "\n\n".join(parts)


def faithfulness_text(comparisons: Sequence[Comparison]) -> str:
    """Deletion tests over users as a table."""
    rows = [
        [
            f"{'without' if one.test == 'removed' else 'only'} {one.size}",
            str(one.users),
            f"{one.influential:+.3f}",
            f"{one.random:+.3f}",
            f"{one.difference:+.3f}" + ("" if one.low is None else f" [{one.low:+.3f}, {one.high:+.3f}]"),
            f"{one.wins:.0%}" + (f" ({one.ties:.0%} tied)" if one.ties else ""),
            "–" if one.p is None else f"{one.p:.2g}",
        ]
        for one in comparisons
    ]
    heads = ["items", "users", "influential", "random", "difference [95 %]", "wins", "p"]
    return "\n".join(
        (
            "Faithfulness: fall of the top title's log-prob (nats) without the most influential history items, or with",
            f"only these, against random items ({DRAWS} sets a user). A win: a larger fall without, a smaller with.",
            "",
            _table(Table(heads, rows, (0,))),
            "",
            "p: paired t test over users, two-sided, not corrected. `without 1` holds by construction: it is the",
            "leave-one-out that chose the item.",
        )
    )


def _table(table: Table) -> str:
    last = len(table.heads) - 1  # may be a path
    rows = [[_short(cell, None if column == last else WIDEST) for column, cell in enumerate(row)] for row in table.rows]
    align = ["left" if column in table.words else "right" for column in range(len(table.heads))]
    return tabulate(
        rows, headers=list(map(_short, table.heads)), disable_numparse=True, colalign=align if rows else None
    )


def _short(text: str, most: int | None = WIDEST) -> str:
    """Fit for a terminal; a long title loses its end, never the mark behind it."""
    text, mark = plain(text).removesuffix(MARK), MARK if text.endswith(MARK) else ""
    return (text if most is None or len(text) <= most else text[: most - 1] + "…") + mark


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in plain(text, breaks=True).rstrip("\n").split("\n"))
