"""A table as Markdown, LaTeX and HTML. Whatever a label or an error holds is text there, never markup."""

from __future__ import annotations

import html
import logging
import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from tabulate import tabulate

from recbole_llm.report.table import Table, Value

# Markdown


def markdown(table: Table) -> str:
    """Title, caption, table and notes in GitHub's dialect."""
    align = ["left"] * table.left + ["right"] * (len(table.header) - table.left)
    rows = [[_markdown_value(v) for v in row] for row in table.rows]
    header = [_markdown_text(h) for h in table.header]
    lines = tabulate(rows, header, tablefmt="pipe", colalign=align, disable_numparse=True)
    notes = [f"- {_markdown_text(note)}" for note in table.notes]
    parts = [f"### {_markdown_text(table.title)}", lines, "\n".join(notes), _markdown_text(table.caption)]
    return "\n\n".join(p for p in parts if p) + "\n"


def _markdown_text(text: str) -> str:
    """One line in which nothing is markup; names such as ``rejected_num`` stay readable."""
    plain = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(text.split())))
    return re.sub(r"([\\|*`~$]|\](?=\()|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", plain)


def _markdown_value(value: Value) -> str:
    text = _markdown_text(value.text)
    text = {1: f"**{text}**", 2: f"<u>{text}</u>"}.get(value.place, text) if text else text
    text += f" ± {value.spread}" if value.spread else ""
    text += f"<sup>{value.better}</sup>" if value.better else ""
    return text + (f"<sub>{value.worse}</sub>" if value.worse else "")


# LaTeX

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": r"\ensuremath{<}",
    ">": r"\ensuremath{>}",
    "|": r"\ensuremath{|}",
    '"': "''",
    "↑": r"\ensuremath{\uparrow}",
    "↓": r"\ensuremath{\downarrow}",
    "→": r"\ensuremath{\rightarrow}",
    "±": r"\ensuremath{\pm}",
    "·": r"\ensuremath{\cdot}",
    "−": r"\ensuremath{-}",
    "-": "{-}",
    "×": r"\ensuremath{\times}",
    "≤": r"\ensuremath{\leq}",
    "≥": r"\ensuremath{\geq}",
    "–": r"\textendash{}",
    "—": r"\textemdash{}",
    "‘": r"\textquoteleft{}",
    "’": r"\textquoteright{}",
    "“": r"\textquotedblleft{}",
    "”": r"\textquotedblright{}",
    "…": r"\ldots{}",
    "ß": r"\ss{}",
    "ø": r"\o{}",
    "Ø": r"\O{}",
    "æ": r"\ae{}",
    "Æ": r"\AE{}",
    "ł": r"\l{}",
    "Ł": r"\L{}",
}
# Of Greek capitals LaTeX has those that look like no Latin letter.
GREEK = """
α alpha β beta γ gamma δ delta ε epsilon ζ zeta η eta θ theta ι iota κ kappa λ lambda μ mu ν nu ξ xi π pi ρ rho
σ sigma ς varsigma τ tau υ upsilon φ phi χ chi ψ psi ω omega
Γ Gamma Δ Delta Θ Theta Λ Lambda Ξ Xi Π Pi Σ Sigma Υ Upsilon Φ Phi Ψ Psi Ω Omega
""".split()
_LATEX |= {letter: rf"\ensuremath{{\{name}}}" for letter, name in zip(GREEK[::2], GREEK[1::2], strict=True)}
_LATEX |= dict(zip("ΑΒΕΖΗΙΚΜΝΟΡΤΧοµ", [*"ABEZHIKMNOPTXo", _LATEX["μ"]], strict=True))
ACCENTS = {"0300", "0301", "0302", "0303", "0304", "0306", "0307", "0308", "030A", "030B", "030C", "0327"}
# A file that compiles by itself and can be \input into a paper, where \@nodocument is \relax.
LATEX_BEGIN = r"""% Compiles as it is; or \input it into a paper that loads booktabs and graphicx.
\expandafter\ifx\csname @nodocument\endcsname\relax\else
\documentclass{article}
\usepackage{booktabs}
\usepackage{graphicx}
\usepackage[margin=2cm]{geometry}
\begin{document}
\def\recbolellmend{\end{document}}
\fi
"""
LATEX_END = r"""
\ifdefined\recbolellmend\recbolellmend\fi
"""


def latex_file(tables: Iterable[Table]) -> str:
    """All tables in one file."""
    return LATEX_BEGIN + "\n".join(latex(table) for table in tables) + LATEX_END


def _behind_a_break(row: str) -> str:
    """A row that LaTeX does not take for an argument of the rule or the line break before it."""
    return "{}" + row if row.startswith(("[", "*")) else row


def latex(table: Table) -> str:
    """A ``table`` environment with booktabs rules, as wide as the line at most."""
    columns = "l" * table.left + "r" * (len(table.header) - table.left)
    rows = [_behind_a_break(" & ".join(map(_latex_value, row))) + r" \\" for row in table.rows]
    notes = "".join(f"\n\n\\smallskip\\footnotesize {latex_text(note)}" for note in table.notes)
    body = "\n".join(
        [
            rf"\begin{{tabular}}{{{columns}}}",
            r"\toprule",
            " & ".join(latex_text(h) for h in table.header) + r" \\",
            r"\midrule",
            *rows,
            r"\bottomrule",
            r"\end{tabular}",
        ]
    )
    return "\n".join(
        [
            r"\begin{table}[htbp]",
            r"\centering",
            rf"\caption{{{latex_text(_whole_caption(table))}}}",
            rf"\label{{tab:{table.name}}}",
            r"\small",
            r"\sbox0{%",
            body + "}%",
            r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi" + notes,
            r"\end{table}",
        ]
    )


def _whole_caption(table: Table) -> str:
    """The caption with the title before it, which LaTeX shows nowhere else."""
    return table.caption if table.caption.startswith(table.title) else f"{table.title}. {table.caption}"


def latex_text(text: str) -> str:
    """Text with every character of LaTeX's own escaped; what pdfLaTeX would stop at becomes a question mark, and is
    told.
    """
    plain = re.sub(r"(?<![\w-])-(?=\d)", "−", " ".join(text.split()))  # a minus, not a hyphen
    return "".join(_LATEX.get(c) or (c if " " <= c <= "~" or _composed(c) else _unknown(c)) for c in plain)


@cache  # told once
def _unknown(character: str) -> str:
    logging.getLogger().warning(
        f"table.tex: {character!r} (U+{ord(character):04X}) is in no font of LaTeX, and a question mark there; --names "
        "gives a line another label."
    )
    return "?"


def _composed(character: str) -> bool:
    """Whether it is an ASCII letter under an accent that every LaTeX font composes."""
    letter, _, accent = unicodedata.decomposition(character).partition(" ")
    return accent in ACCENTS and chr(int(letter, 16)).isascii()


def _latex_value(value: Value) -> str:
    text = latex_text(value.text)
    text = {1: rf"\textbf{{{text}}}", 2: rf"\underline{{{text}}}"}.get(value.place, text) if text else text
    text += rf" {{\scriptsize \ensuremath{{\pm}} {value.spread}}}" if value.spread else ""
    marks = (f"^{{\\mathrm{{{value.better}}}}}" if value.better else "") + (
        f"_{{\\mathrm{{{value.worse}}}}}" if value.worse else ""
    )
    return text + (rf"\ensuremath{{{marks}}}" if marks else "")


# HTML


def html_table(table: Table) -> str:
    """A ``section`` with a table that the page's script sorts by a click on a header."""
    head = "".join(html_head(h, text=i < table.left) for i, h in enumerate(table.header))
    rows = "".join(
        f"<tr>{''.join(_html_value(v, i < table.left) for i, v in enumerate(row))}</tr>" for row in table.rows
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        f'<section id="{html.escape(table.name)}"><h2>{html.escape(table.title)}</h2>'
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        + (f'<ul class="notes">{notes}</ul>' if notes else "")
        + f'<p class="caption">{html.escape(table.caption)}</p></section>'
    )


def html_head(name: str, text: bool) -> str:
    """The head of a column, which sorts by it; ``text`` stands on the left, numbers on the right."""
    kind = "text" if text else "number"
    return f'<th scope="col" class="{kind}"><button type="button">{html.escape(name)}</button></th>'


def html_label(label: str) -> str:
    """Text that may be broken behind commas and brackets."""
    return re.sub(r"([,\[])", r"\1<wbr>", html.escape(label))


def _html_value(value: Value, text: bool) -> str:
    shown = html_label(value.text) if text else html.escape(value.text)
    shown = {1: f"<b>{shown}</b>", 2: f"<u>{shown}</u>"}.get(value.place, shown) if shown else shown
    shown += f' <span class="spread">± {html.escape(value.spread)}</span>' if value.spread else ""
    shown += f"<sup>{value.better}</sup>" if value.better else ""
    shown += f"<sub>{value.worse}</sub>" if value.worse else ""
    return f'<td class="{"text" if text else "number"}">{shown}</td>'
