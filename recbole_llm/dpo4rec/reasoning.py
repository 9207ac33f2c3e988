"""Stage 1: texts about users, written once, to a file that a killed run goes on with.

A file holds one JSON line a text. Its folder is named by the hash of everything that determines the texts. Ours are
written in fixed batches with a seed of each batch's own, since a text's sums depend on those beside it: a run that was
killed and one that was not have the same texts. A server's texts depend on their prompts alone, and so a prompt is
looked up by itself. Of several runs that need the same texts one writes, and the others wait for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recbole_llm.costs import Clock
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError
from recbole_llm.files import content_hash, only_here
from recbole_llm.llm.sampling import Sampling, Written
from recbole_llm.progress import bar

# Prompts, sampling, seed -> number of each prompt and its texts, as they come: our LLM or a server.
Writer = Callable[[Sequence["Asked"], Sampling, int], Iterable[tuple[int, list[Written]]]]


@dataclass(frozen=True)
class Asked:
    """A prompt about a user.

    Attributes:
        user: token of the user.
        known: how many of the user's first items it may tell of.
        prompt: in words, or as tokens for our LLM.
    """

    user: str
    known: int
    prompt: Any


class Texts(NamedTuple):
    """Texts of each prompt, and what those cost that were found written.

    Attributes:
        texts: of each prompt, in the order that was asked.
        file: where they lie.
        found: wall and processor seconds that another process, or this run before it was cut off, took for its part.
    """

    texts: list[list[Written]]
    file: Path
    found: tuple[float, float]


def write_texts(
    asked: Sequence[Asked],
    write: Writer,
    sampling: Sampling,
    *,
    folder: Path,
    author: str,
    seed: int,
    together: int,
    what: str,
    apart: bool = False,
    show_progress: bool = False,
) -> Texts:
    """The texts of each prompt, ``sampling.number`` of each; those that the file holds are read, not written again.

    Args:
        asked: the prompts.
        write: writes a batch.
        folder: of stages; the file lies in one of its own there.
        author: what identifies the LLM and its weights.
        seed: of the draws.
        together: texts written at a time; a prompt's texts stay together.
        what: told in the progress bar.
        apart: a prompt's texts do not depend on those written beside it. Then neither ``together`` nor the other
            prompts name the file, and every batch has the same seed.
    """
    told = [content_hash(asdict(one)) for one in asked]
    named_by = [author, asdict(sampling), seed if sampling.temperature else None]
    name = content_hash(named_by if apart else [*named_by, together, told])
    place = folder / f"DPO4Rec-texts-{name[:12]}"
    with only_here(place):
        file = place / "texts.jsonl"
        found, cost = _read(file, told, sampling.number)
        missing = _missing(_batches(asked, prompts_together(together, sampling)), found, apart)
        done = sum(texts is not None for texts in found)
        shown = bar(total=len(asked), initial=done, desc=what, unit="user", disable=not show_progress or not missing)
        with shown, file.open("a", encoding="utf-8") as out:
            for batch in missing:
                own = int(seeded(seed, *(() if apart else (told[i] for i in batch))).integers(2**31))
                clock = Clock()
                for number, texts in write([asked[i] for i in batch], sampling, own):
                    i = batch[number]
                    out.write(_lines(asked[i], told[i], texts, clock.spent()))
                    out.flush()
                    found[i], clock = texts, Clock()
                    shown.update()
    return Texts([texts for texts in found if texts is not None], file, cost)


def _missing(batches: Sequence[list[int]], found: Sequence[object], apart: bool) -> list[list[int]]:
    """Batches that have to be written: whole, unless a prompt's texts do not depend on those beside it."""
    lacking = [[i for i in batch if found[i] is None] for batch in batches]
    return [left if apart else batch for batch, left in zip(batches, lacking, strict=True) if left]


def prompts_together(texts: int, sampling: Sampling) -> int:
    """Prompts of a batch of so many texts; those of one prompt stay together."""
    return max(1, texts // sampling.number)


def _batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Prompts of like lengths together, so that a batch is little padding; the same ones whatever is done already."""
    order = np.argsort([len(one.prompt) for one in asked], kind="stable")
    return [[int(i) for i in order[first : first + size]] for first in range(0, len(order), size)]


def _lines(one: Asked, told: str, texts: Sequence[Written], seconds: Sequence[float]) -> str:
    """A line for each text of a prompt, which share the wall and processor seconds."""
    prompt = {"prompt": one.prompt} if isinstance(one.prompt, str) else {}
    each = dict(zip(("seconds", "cpu_seconds"), (value / len(texts) for value in seconds), strict=True))
    lines = []
    for number, text in enumerate(texts):
        record = {"user": one.user, "known": one.known, "number": number, "asked": told, **asdict(text)}
        lines.append(json.dumps(record | prompt | each, ensure_ascii=False) + "\n")
    return "".join(lines)


def _read(file: Path, told: Sequence[str], number: int) -> tuple[list[list[Written] | None], tuple[float, float]]:
    """Texts that the file holds of each prompt, None where it lacks any, and the seconds that these took; a line that a
    kill cut off is dropped.
    """
    kept: dict[str, dict[int, Written]] = {one: {} for one in told}
    wall = cpu = 0.0
    if file.is_file():
        whole = file.read_bytes()
        sound = whole[: whole.rfind(b"\n") + 1]
        if len(sound) < len(whole):
            os.truncate(file, len(sound))  # which a kill or a full disk does not leave halfway
        try:
            for line in sound.decode("utf-8").split("\n")[:-1]:
                record = json.loads(line)
                if record["asked"] not in kept:  # a server's file holds prompts of other runs too
                    continue
                text = Written(record["text"], record["tokens"], record["ended"], record["end"])
                kept[record["asked"]][record["number"]] = text
                wall, cpu = wall + record.get("seconds", 0.0), cpu + record.get("cpu_seconds", 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!r}): remove it, and its texts are written anew.") from error
    found: list[list[Written] | None] = []
    for asked in told:
        texts = kept[asked]
        found.append([texts[n] for n in range(number)] if len(texts) >= number else None)
    return found, (wall, cpu)
