"""An explanation as one HTML file: everything escaped, nothing fetched, no script, legible without colours."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from recbole_llm.errors import UserError
from recbole_llm.explain.explanation import Explanation
from recbole_llm.explain.faithfulness import DRAWS
from recbole_llm.files import write_text
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

# Okabe and Ito's blue and vermilion, told apart by the colour-blind; signs and numbers say the same.
STYLE = """
:root { --more: #0072b2; --less: #d55e00; --ink: #1a1a1a; --paper: #fff; --line: #d0d0d0; --soft: #f3f3f3 }
@media (prefers-color-scheme: dark) {
  :root { --more: #56b4e9; --less: #e69f00; --ink: #eee; --paper: #161616; --line: #444; --soft: #242424 }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin-top: 2.5rem } p.told { margin: .3rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid var(--line) }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.chosen td { font-weight: 600 }
pre { background: var(--soft); padding: .8rem; white-space: pre-wrap; overflow-wrap: anywhere }
pre span { border-bottom: 2px solid var(--line); margin-right: 1px }
.warning { border-left: 6px solid var(--less); padding-left: .8rem; font-weight: 600 }
.bar { display: inline-block; height: .8em; vertical-align: baseline }
.more { background: var(--more) }
.less { background: repeating-linear-gradient(45deg, var(--less) 0 4px, transparent 4px 6px) }
.half { display: inline-block; width: 6rem } .half.left { text-align: right; border-right: 1px solid var(--ink) }
.tokens { display: flex; flex-wrap: wrap; align-items: flex-end; gap: 2px }
.token { display: flex; flex-direction: column; align-items: center; font-size: .8rem; min-width: 2.4rem }
.token i { display: block; width: 100%; background: var(--more) } .token code { padding: 0 .2rem }
td.effect { white-space: nowrap } details { margin: .4rem 0 } summary { cursor: pointer } .note { opacity: .85 }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a browser fetches and runs nothing
HEIGHT = 4.0  # rem, of the tallest bar


def write_explanation(found: Explanation, file: Path) -> None:
    """Write the page, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        write_text(file, explanation_html(found))
    except OSError as error:
        raise UserError(f"--html={file}: cannot be written ({error.strerror}). Name another file.") from error


def explanation_html(found: Explanation) -> str:
    """The whole page."""
    title = f"User {found.user}: {found.run['model']} on {found.run['dataset']}"
    sections = {
        "History, and what each item adds": _history(found),
        f"Top {found.k} of {found.answers}": _ranking(found),
        "Log-probs by token": _tokens(found),
        "Rank of what the user chose": _table(ranks(found)),
        "Do these items matter?": _tests(found),
        f"Prompt, {len(found.prompt_tokens)} tokens": _prompt(found),
        "Notes": "".join(f"<p class='note'>{_text(note)}</p>" for note in reading_notes(found)),
    }
    body = "".join(f"<section><h2>{_text(head)}</h2>{part}</section>" for head, part in sections.items())
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        f"<meta http-equiv='Content-Security-Policy' content=\"{POLICY}\">"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{STYLE}</style></head><body><h1>{_text(title)}</h1>{_head(found)}{body}"
        "</body></html>\n"
    )


def _text(value: str) -> str:
    """Text as text: nothing in it is markup, and control characters are spelled out."""
    return html.escape(plain(value, breaks=True), quote=True)


def _head(found: Explanation) -> str:
    lines = "".join(f"<p class='told'>{_text(line)}</p>" for line in head_lines(found))
    checked = "told" if found.agrees else "warning"
    return f"{lines}<p class='{checked}'>Chose {_text(found.target.text)}: {_text(rank_line(found))}</p>"


def _history(found: Explanation) -> str:
    told = (
        "Oldest first. A bar is the title's log-prob (nats) with all items, less that without this one: solid and to "
        f"the right, the item makes it likelier; striped and to the left, less likely. {left_out(found)}"
    )
    columns, lines = effects(found), []
    most = max(abs(value) for _, values in columns for value in values)
    for place, text in enumerate(found.history):
        bars = "".join(f"<td class='effect'>{_signed(values[place], most)}</td>" for _, values in columns)
        lines.append(f"<tr><td class='number'>{place + 1}</td><td>{_text(text)}</td>{bars}</tr>")
    heads = "".join(f"<th>{_text(head)}</th>" for head in ("", "title", *(head for head, _ in columns)))
    return f"<p>{_text(told)}</p><div class='wide'><table><tr>{heads}</tr>{''.join(lines)}</table></div>"


def _signed(value: float, most: float) -> str:
    """A number with a bar from a middle line to the right (positive) or left."""
    width = 0 if most == 0 else round(100 * abs(value) / most)
    drawn = f"<span class='bar {'more' if value > 0 else 'less'}' style='width:{width}%'></span>"
    left, right = ("", drawn) if value > 0 else (drawn, "")
    return f"<span class='half left'>{left}</span><span class='half'>{right}</span> {value:+.3f}"


def _ranking(found: Explanation) -> str:
    told = "Log-probs of whole answers, nats."
    if found.reference is not None:
        told += f" Change: less the log-prob by the reference ({found.reference})."
    return f"<p>{_text(told)}</p>" + _table(ranking(found))


def _tokens(found: Explanation) -> str:
    """For each title a bar a token; those of the explained titles are open."""
    tallest = max(-logp for title in found.titles for logp in title.logps)
    explained = {influence.title.item for influence in found.influences}
    parts = ["<p>The taller a bar, the less likely the token after all before it (nats).</p>"]
    for title in found.titles:
        bars = (_token(t, p, tallest) for t, p in zip(title.tokens, title.logps, strict=True))
        opened = " open" if title.item in explained else ""
        parts.append(
            f"<details{opened}><summary>{_text(title.text)} ({title.logp:.3f})</summary>"
            f"<div class='tokens'>{''.join(bars)}</div></details>"
        )
    return "".join(parts)


def _token(token: str, logp: float, tallest: float) -> str:
    height = HEIGHT * -logp / tallest if tallest > 0 else 0.0
    bar = f"<i style='height:{height:.2f}rem'></i>"
    return f"<span class='token'>{logp:.2f}{bar}<code>{_text(token_text(token))}</code></span>"


def _tests(found: Explanation) -> str:
    told = (
        "Without: fall of the title's log-prob (nats) without the items that leave-one-out found most influential. "
        f"Alone: with these alone. Random: mean of {DRAWS} random sets of as many items; beside it, how many of them "
        "were beaten."
    )
    parts = [f"<p>{_text(told)}</p>"]
    for influence, head in zip(found.influences, title_heads(found), strict=True):
        table = _table(tests(influence)) if influence.tests else "<p>The history is too short for it.</p>"
        parts.append(f"<h3>{_text(head)}</h3>{table}")
    return "".join(parts)


def _prompt(found: Explanation) -> str:
    spans = "".join(f"<span>{_text(token)}</span>" for token in found.prompt_tokens)
    return (
        f"<details><summary>as text</summary><pre>{_text(found.prompt)}</pre></details>"
        f"<details><summary>token by token</summary><pre>{spans}</pre></details>"
    )


def _table(table: Table) -> str:
    def cells(kind: str, row: Sequence[str]) -> str:
        number = ["" if column in table.words else " class='number'" for column in range(len(row))]
        return "".join(
            f"<{kind}{is_number}>{_text(cell)}</{kind}>" for is_number, cell in zip(number, row, strict=True)
        )

    lines = [f"<tr>{cells('th', table.heads)}</tr>"]
    for row in table.rows:
        chosen = " class='chosen'" if any(cell.endswith(MARK) for cell in row) else ""
        lines.append(f"<tr{chosen}>{cells('td', row)}</tr>")
    return f"<div class='wide'><table>{''.join(lines)}</table></div>"
