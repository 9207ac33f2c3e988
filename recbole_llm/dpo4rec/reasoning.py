"""Stage 1: texts about users, written once, to a file that a killed run goes on with.

A file holds one JSON line a text. Its folder is named by the hash of everything that determines the texts, and they
are written in fixed batches with a seed of each batch's own: a run that was killed and one that was not have the same
texts. Of several runs that need the same texts one writes, and the others wait for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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

# Prompts, sampling, seed -> the texts of each prompt: our LLM or a server.
Writer = Callable[[Sequence["Asked"], Sampling, int], list[list[Written]]]


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
    """
    told = [content_hash(asdict(one)) for one in asked]
    name = content_hash([author, asdict(sampling), seed if sampling.temperature else None, together, told])
    place = folder / f"DPO4Rec-texts-{name[:12]}"
    with only_here(place):
        file = place / "texts.jsonl"
        found, cost = _read(file, told, sampling.number)
        missing = [batch for batch in _batches(asked, prompts_together(together, sampling))
                   if any(found[i] is None for i in batch)]  # fmt: skip
        done = sum(texts is not None for texts in found)
        shown = bar(total=len(asked), initial=done, desc=what, unit="user", disable=not show_progress or not missing)
        with shown, file.open("a", encoding="utf-8") as out:
            for batch in missing:
                own, clock = int(seeded(seed, *(told[i] for i in batch)).integers(2**31)), Clock()
                texts = write([asked[i] for i in batch], sampling, own)
                each = [value / len(batch) / sampling.number for value in clock.spent()]
                lines = [_line(asked[i], told[i], number, text, each) for i, mine in zip(batch, texts, strict=True)
                         for number, text in enumerate(mine)]  # fmt: skip
                out.write("".join(lines))  # at once, and read by whole batches: a kill leaves no half of one
                out.flush()
                for i, mine in zip(batch, texts, strict=True):
                    found[i] = mine
                shown.update(len(batch))
    return Texts([texts for texts in found if texts is not None], file, cost)


def prompts_together(texts: int, sampling: Sampling) -> int:
    """Prompts of a batch of so many texts; those of one prompt stay together."""
    return max(1, texts // sampling.number)


def _batches(asked: Sequence[Asked], size: int) -> list[list[int]]:
    """Prompts of like lengths together, so that a batch is little padding; the same ones whatever is done already."""
    order = np.argsort([len(one.prompt) for one in asked], kind="stable")
    return [[int(i) for i in order[first : first + size]] for first in range(0, len(order), size)]


def _line(one: Asked, told: str, number: int, text: Written, seconds: Sequence[float]) -> str:
    prompt = {"prompt": one.prompt} if isinstance(one.prompt, str) else {}
    record = {"user": one.user, "known": one.known, "number": number, "asked": told, **asdict(text), **prompt}
    record["seconds"], record["cpu_seconds"] = seconds
    return json.dumps(record, ensure_ascii=False) + "\n"


def _read(file: Path, told: Sequence[str], number: int) -> tuple[list[list[Written] | None], tuple[float, float]]:
    """Texts that the file holds of each prompt, None where it lacks any, and the seconds that all of them took; a line
    that a kill cut off is dropped.
    """
    kept: dict[str, dict[int, Written]] = {}
    wall = cpu = 0.0
    if file.is_file():
        whole = file.read_bytes()
        sound = whole[: whole.rfind(b"\n") + 1]
        if len(sound) < len(whole):
            file.write_bytes(sound)
        try:
            for line in sound.decode("utf-8").split("\n")[:-1]:
                record = json.loads(line)
                text = Written(record["text"], record["tokens"], record["ended"])
                kept.setdefault(record["asked"], {})[record["number"]] = text
                wall, cpu = wall + record.get("seconds", 0.0), cpu + record.get("cpu_seconds", 0.0)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!r}): remove it, and its texts are written anew.") from error
    found: list[list[Written] | None] = []
    for asked in told:
        texts = kept.get(asked, {})
        found.append([texts[n] for n in range(number)] if len(texts) >= number else None)
    return found, (wall, cpu)
