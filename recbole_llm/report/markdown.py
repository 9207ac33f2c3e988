"""Markdown that no name or title can break."""

from __future__ import annotations

import re


def one_line(text: str) -> str:
    """Text without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def inline(text: str) -> str:
    """Text on one line in which nothing is markup, behind a word or two of ours."""
    text = one_line(text)
    text = re.sub(r"([\\`*\[\]<>|~$#])", r"\\\1", text)
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # one inside a word is no markup
    return re.sub(r"&(?=#?\w+;)", "&amp;", text)


def fenced(text: str, language: str) -> str:
    """A block of code, whatever it holds."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
