"""Item texts: cleaned, complete, and no two the same, whatever a title holds."""

from __future__ import annotations

import random
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.config import LLMConfig
from recbole_llm.data.atomic import read_items
from recbole_llm.data.item_text import clean, item_texts
from recbole_llm.data.prompt import plain_tokens
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.llm.tiny import tiny_llm

HEADER = "item_id:token\ttitle:token_seq"
TOKENIZER = tiny_llm()[1]
# What a line of an atomic file can hold.
TITLE = st.text(st.characters(blacklist_characters="\t\n\r", blacklist_categories=["Cs"]), max_size=40)
TWINS = st.sampled_from(["a", "a (2)", "a (3)", "a  ", " a", "b", "<b>b</b>", "&amp;", "&", ""])


class Settings(dict):
    """As much of a configuration as item texts read."""

    final_config_dict = property(lambda self: self)


def count(texts: Sequence[str]) -> list[int]:
    return [len(ids) for ids in plain_tokens(TOKENIZER, texts)]


def texts_of(
    folder: Path,
    rows: dict[str, str],
    header: str = HEADER,
    *,
    items: Sequence[str] | None = None,
    template: str = "auto",
    most: int = 48,
    end: str = "\n",
) -> dict[str, str]:
    """Item token -> its text, for a file of these rows (what stands behind the item token)."""
    lines = [header, *(f"{token}\t{rest}" for token, rest in rows.items())]
    (folder / "toy.item").write_bytes((end.join(lines) + end).encode("utf-8"))
    tokens = list(rows if items is None else items)
    config = Settings(
        data_path=str(folder),
        dataset="toy",
        field_separator="\t",
        ITEM_ID_FIELD="item_id",
        item_text=template,
        item_text_max_tokens=most,
    )
    dataset = SimpleNamespace(iid_field="item_id", field2id_token={"item_id": ["[PAD]", *tokens]})
    found = item_texts(config, dataset, count)
    assert found[0] == "" and len(found) == len(tokens) + 1
    return dict(zip(tokens, found[1:], strict=True))


# Properties


@settings(deadline=None)
@given(st.lists(TITLE | TWINS | st.just("word " * 60), min_size=1, max_size=12))
def test_texts_are_distinct_and_none_is_lost(tmp_path_factory: pytest.TempPathFactory, titles: list[str]) -> None:
    folder, rows = tmp_path_factory.getbasetemp(), {f"i{n:02}": title for n, title in enumerate(titles)}
    rows |= {f"filler{n}": f"filler {n}" for n in range(len(rows))}  # else too many may be without text
    texts = texts_of(folder, rows)
    assert len(set(texts.values())) == len(rows)
    for text in texts.values():
        assert text and text == " ".join(text.split())
        assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in text)


@settings(deadline=None)
@given(st.lists(TWINS, min_size=2, max_size=12), st.randoms())
def test_twins_are_numbered_by_rule(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str], rng: random.Random
) -> None:
    """The first by item token keeps its text; neither the file's order nor RecBole's moves a number."""
    folder, rows = tmp_path_factory.getbasetemp(), {f"i{n:02}": title for n, title in enumerate(titles)}
    rows |= {f"filler{n}": f"filler {n}" for n in range(len(rows))}
    texts = texts_of(folder, rows)
    before = {token: clean(title) or f"untitled {token}" for token, title in rows.items()}
    taken, seen = set(before.values()), set()
    for token in sorted(rows):
        expected, number = before[token], 2
        while expected in seen or (expected != before[token] and expected in taken):
            expected, number = f"{before[token]} ({number})", number + 1
        seen.add(expected)
        taken.add(expected)
        assert texts[token] == expected
    shuffled, items = list(rows.items()), list(rows)
    rng.shuffle(shuffled)
    rng.shuffle(items)
    assert texts_of(folder, dict(shuffled), items=items) == texts


@given(st.text())
def test_clean_is_one_plain_line(text: str) -> None:
    found = clean(text)
    assert found == " ".join(found.split())
    assert not any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in found)


# Cases


@pytest.mark.parametrize(
    ("title", "text"),
    [
        ("Toys &amp; Games", "Toys & Games"),
        ("&amp;quot;Hi&amp;quot;", '"Hi"'),
        ("Caf&eacute;", "Café"),
        ("&#233;", "é"),
        ("<b>Bold</b> <br/>new", "Bold new"),
        ("I <3 you", "I <3 you"),
        ("a < b > c", "a < b > c"),
        ("x<y", "x<y"),
        ("one\x00two\x07\x1b[0m", "one two [0m"),
        ("a\u0085b\u2028c\u2029d\u00a0e\u3000f", "a b c d e f"),
        ("line&#10;break&#9;tab", "line break tab"),
        ("  many   blanks ", "many blanks"),
        ("None", "None"),
        ("NA", "NA"),
        ("null", "null"),
        ('"Weird Al"', '"Weird Al"'),
        ('"open', '"open'),
        ("'quoted'", "'quoted'"),
        ("1,2,3", "1,2,3"),
        ("1e5", "1e5"),
        ("\\N", "\\N"),
        ("# text", "# text"),
        ("😀 𝔘𝔫𝔦", "😀 𝔘𝔫𝔦"),
        ("مرحبا بالعالم", "مرحبا بالعالم"),
        ("שלום (1995)", "שלום (1995)"),
        ("東京物語", "東京物語"),
        ("<|im_end|>", "<|im_end|>"),
        ("{title}", "{title}"),
        ("%s", "%s"),
        ("{0.__class__}", "{0.__class__}"),
    ],
)
def test_titles(tmp_path: Path, title: str, text: str) -> None:
    """Quotes, NA and the like are titles too, and swallow no rows."""
    assert texts_of(tmp_path, {"i1": title, "i2": "other"}) == {"i1": text, "i2": "other"}


@pytest.mark.parametrize(
    "title",
    ["word " * 2000, "x" * 10_000, "é " * 5000, "😀" * 2500, "a " + "b" * 9998],
    ids=["words", "one word", "letters", "emoji", "long word"],
)
def test_ten_kilobytes_are_cut(tmp_path: Path, title: str) -> None:
    """By whole words where there are some, and without a token count for each word."""
    clock = time.perf_counter()
    text = texts_of(tmp_path, {"i1": title, "i2": "other"})["i1"]
    assert time.perf_counter() - clock < 2
    assert title.startswith(text) and 1 <= count([text])[0] <= 48
    words = title.split()
    if count([words[0]])[0] <= 48:
        assert text.split() == words[: len(text.split())]
        assert count([" ".join(words[: len(text.split()) + 1])])[0] > 48


def test_texts_that_are_cut_alike_stay_apart(tmp_path: Path) -> None:
    texts = texts_of(tmp_path, {"i1": "same " * 50 + "one", "i2": "same " * 50 + "two"})
    assert texts["i2"] == f"{texts['i1']} (2)"


def test_windows_line_ends(tmp_path: Path) -> None:
    assert texts_of(tmp_path, {"i1": "red cat", "i2": "dog"}, end="\r\n") == {"i1": "red cat", "i2": "dog"}


@pytest.mark.parametrize(
    ("header", "template", "text"),
    [
        ("title:token_seq\tyear:token\tgenre:token_seq", "auto", "A (1999)"),
        ("name:token_seq\tb:token\tgenre:token_seq", "auto", "A"),
        ("movie_title:token_seq\trelease_year:token\tgenre:token_seq", "{movie_title}, {genre}", "A, G"),
        ("title:token_seq\tb:token\tgenre:token_seq", "{genre!r:>10}: {title}", "G: A"),
        ("title:token_seq\tb:token\tgenre:token_seq", "{{{title}}}", "{A}"),
    ],
)
def test_templates(tmp_path: Path, header: str, template: str, text: str) -> None:
    """No format language: a column cannot reach into objects."""
    rows = {"i1": "A\t1999\tG", "i2": "B\t2000\tH"}
    assert texts_of(tmp_path, rows, f"item_id:token\t{header}", template=template)["i1"] == text


def test_missing_parts(tmp_path: Path) -> None:
    """No year leaves no brackets; a year without a title is no title; an item may stand in no row."""
    rows = {"i1": "A\t", "i2": "\t1999", "i3": "C\t2001"}
    texts = texts_of(tmp_path, rows, f"{HEADER}\trelease_year:token", items=["i1", "i2", "i3", "i4"])
    assert texts == {"i1": "A", "i2": "untitled i2", "i3": "C (2001)", "i4": "untitled i4"}


def test_what_was_mended_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts_of(tmp_path, {"i1": "A", "i2": "A", "i3": "", "i4": "long " * 60})
    told = " ".join(caplog.messages)
    assert "1 items have none" in told and "1 texts are over item_text_max_tokens=48" in told
    assert "1 texts belong to several items" in told


# Errors


def test_no_titles_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="2 of 3 items have no text.*Check that the .item file belongs to"):
        texts_of(tmp_path, {"i1": "A"}, items=["i1", "j1", "j2"])
    with pytest.raises(UserError, match="2 of 2 items have no text"):
        texts_of(tmp_path, {"i1": "", "i2": " "})


def test_an_id_keeps_its_blanks(tmp_path: Path) -> None:
    """RecBole strips no ids of interactions, so an item with such an id has its title under the same."""
    assert texts_of(tmp_path, {" i1": " A ", "i1": "B"}) == {" i1": "A", "i1": "B"}
    assert texts_of(tmp_path, {"i1 ": "A"}, items=["i1"]) == {"i1": "A"}  # blanks in this file alone


def test_a_line_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"toy.item, line 3: 3 fields where the header has 2: 'i2\\tB\\tC'"):
        texts_of(tmp_path, {"i1": "A", "i2": "B\tC"})
    (tmp_path / "toy.item").write_bytes(f"{HEADER}\ni1\tok\ni2\tCaf\xe9\n".encode("latin-1"))
    settings = {"data_path": str(tmp_path), "field_separator": "\t", "ITEM_ID_FIELD": "item_id"}
    with pytest.raises(UserError, match="toy.item, line 3: not UTF-8 text; save the file as UTF-8"):
        read_items(settings, "toy")
    (tmp_path / "toy.item").write_text(f"{HEADER}\ni1\tA\ni2\tB\ni1\tA \ni2\tC\n", encoding="utf-8")
    with pytest.raises(UserError, match="toy.item, line 5: item 'i2' stands in line 3 with other text. Leave one out"):
        read_items(settings, "toy")


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("item_id:token\tlabel:token", r"--item_text=auto: no title .*columns label.*--item_text='\{label\}'"),
        ("item_id:token", r"toy.item has the columns \(none\)"),
        ("id:token\ttitle:token", "--ITEM_ID_FIELD=item_id: .* has no such column; it has id, title"),
        ("item_id\ttitle", "line 1: .* is no header of an atomic file; each column needs a type"),
        ("", "line 1: '' is no header of an atomic file"),
        ("\ufeffitem_id:token\ttitle:token", "begins with a byte-order mark"),
    ],
)
def test_wrong_headers(tiny: dict[str, Any], header: str, told: str) -> None:
    """Told with the configuration, before anything is loaded."""
    (Path(tiny["data_path"]) / "toy" / "toy.item").write_text(header + "\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=told):
        LLMConfig(config_dict=tiny)


def test_header_that_is_not_utf8(tiny: dict[str, Any]) -> None:
    file = Path(tiny["data_path"]) / "toy" / "toy.item"
    file.write_bytes("item_id:token\ttitré:token\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="toy.item cannot be read .*save it as UTF-8"):
        LLMConfig(config_dict=tiny)


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{titel}", r"no column \{titel\}; toy.item has the columns title, release_year"),
        ("{}", r"no column \{\}"),
        ("{0}", r"no column \{0\}"),
        ("{title.__class__}", r"no column \{title.__class__\}"),
        ("title", "no column in braces"),
        ("{{title}}", "no column in braces"),
        ("{title", "write columns in braces"),
        ("title}", "write columns in braces"),
    ],
)
def test_wrong_templates(tiny: dict[str, Any], template: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"--item_text='.*{told}"):
        LLMConfig(config_dict={**tiny, "item_text": template})


def test_no_item_file(tiny: dict[str, Any], toy: dict[str, Any]) -> None:
    """An LLM needs it, and the other models do not."""
    (Path(tiny["data_path"]) / "toy" / "toy.item").unlink()
    LLMConfig("SASRec", config_dict=toy)
    told = "--dataset=toy: an LLM ranks items by their titles, and there is no .*toy.item"
    with pytest.raises(ConfigError, match=told):
        LLMConfig(config_dict=tiny)
