"""Texts on disk: written once, cut files mended, the same whatever was written before."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from recbole_llm.dpo4rec.reasoning import Asked, write_texts
from recbole_llm.errors import UserError
from recbole_llm.llm.sampling import Sampling, Written

ASKED = [Asked(f"u{i}", i, [1] * (20 - i)) for i in range(10)]
SAMPLING = Sampling(3, 8, 1.0, 0.9)


class Author:
    """Writes what it is asked, by seed and place in the batch, and remembers how often."""

    def __init__(self, most: int = 99) -> None:
        self.calls: list[list[str]] = []
        self.most = most

    def __call__(self, asked: Sequence[Asked], sampling: Sampling, seed: int) -> Iterable[tuple[int, list[Written]]]:
        if len(self.calls) == self.most:
            raise KeyboardInterrupt
        self.calls.append([one.user for one in asked])
        return enumerate(
            [
                Written(f"{one.user} {n} {seed} é\n\u2028", n + 1, n == 0, 7 if n == 0 else None)
                for n in range(sampling.number)
            ]
            for one in asked
        )


def texts_of(writes: Author, folder: Path, **changes: object) -> tuple[list[list[Written]], Path]:
    options = {"folder": folder, "author": "a", "seed": 1, "together": 6, "what": "x"} | changes
    return write_texts(ASKED, writes, SAMPLING, **options)[:2]  # type: ignore[arg-type]


def test_order_and_batches(tmp_path: Path) -> None:
    """Two prompts of three texts are six texts together; the result is in the order that was asked."""
    author = Author()
    found, file = texts_of(author, tmp_path)
    assert [len(call) for call in author.calls] == [2] * 5
    assert [mine[1].text.split()[:2] for mine in found] == [[f"u{i}", "1"] for i in range(10)]
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(lines) == 30
    assert {line["user"] for line in lines} == {f"u{i}" for i in range(10)}


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    first, _ = texts_of(Author(), tmp_path)
    again = Author(most=0)
    assert texts_of(again, tmp_path)[0] == first


@pytest.mark.parametrize(("cut", "left"), [(0, 3), (1, 4), (40, 4), (10**6, 5)])
def test_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int, left: int) -> None:
    """Stopped after two batches, the last line cut off anywhere: the rest is written, and all is as if unbroken."""
    unbroken, _ = texts_of(Author(), tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        texts_of(Author(most=2), tmp_path / "b")
    (file,) = (tmp_path / "b").rglob("*.jsonl")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) - min(cut, len(whole) - 5)])
    rest = Author()
    with monkeypatch.context() as broken:  # a kill in the middle of writing it all again would lose it all
        broken.setattr(Path, "write_bytes", lambda *_: pytest.fail("the sound lines were written again"))
        found, _ = texts_of(rest, tmp_path / "b")
    assert found == unbroken
    assert len(rest.calls) == left  # of five batches


@pytest.mark.parametrize(("key", "value"), [("author", "b"), ("seed", 2), ("together", 3)])
def test_other_texts_lie_elsewhere(tmp_path: Path, key: str, value: object) -> None:
    _, file = texts_of(Author(), tmp_path)
    author = Author()
    _, other = texts_of(author, tmp_path, **{key: value})
    assert other != file
    assert author.calls


def test_texts_that_stand_alone(tmp_path: Path) -> None:
    """Where a prompt's texts do not depend on others, another batch and other prompts find them by their own hash;
    another author and seed do not. A killed batch keeps what came."""
    first, file = texts_of(Author(), tmp_path, apart=True)
    again = Author(most=0)
    assert texts_of(again, tmp_path, apart=True, together=3) == (first, file)
    more = Author()
    options = {"folder": tmp_path, "author": "a", "seed": 1, "together": 6, "what": "x", "apart": True}
    found = write_texts([ASKED[3], Asked("u9", 1, [1])], more, SAMPLING, **options)  # type: ignore[arg-type]
    assert found.texts[0] == first[3]
    assert more.calls == [["u9"]]
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    assert len(lines) == 33
    mine = [line["seconds"] for line in lines if line["user"] == "u3"]
    assert found.found[0] == pytest.approx(sum(mine), rel=1e-9)  # not what the others had taken
    for change in ({"author": "b"}, {"seed": 2}):
        other = Author()
        assert texts_of(other, tmp_path, apart=True, **change)[1] != file
        assert len(other.calls) == 5


def test_damaged_file(tmp_path: Path) -> None:
    _, file = texts_of(Author(), tmp_path)
    file.write_bytes(b"{broken\n" + file.read_bytes())
    with pytest.raises(UserError, match=r"DPO4Rec-texts-\w+/texts.jsonl is damaged .*remove it"):
        texts_of(Author(), tmp_path)
