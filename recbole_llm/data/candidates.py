"""What every model is asked: evaluation rows with frozen, hashed candidates, free of anything that tells the answer."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction

from recbole_llm.data.dataset import POSITION, Events
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError
from recbole_llm.files import whole_gzip

RESTORE = "Restore the file, or remove that folder and give the run's command again."


@dataclass
class EvalRows:
    """One row for each question of a split. With leave-one-out that is one row a user.

    A row asks for the next item, or with ``next_items`` for the next P: all of them are its relevant items.

    Attributes:
        split: "valid" or "test".
        mode: "full", "uniN", "popN" or "lowN".
        visible: what a model may see of each row: user and history, no target, label, rating or time of it ``[R]``.
        users: internal ids ``[R]``.
        relevant: internal ids of the next P items by time; one that the user met twice stands twice ``[R, P]``.
        candidates: internal item ids in an order that says nothing ``[R, N + P]``; None for "full".
        hidden: items of the user that are no answers in "full" mode, for each row, each once.
        unmet: items of the vocabulary that nobody met, no answers of any row in "full" mode.
        digest: SHA-256 over users, targets, candidates (by token) and the masking rule.
        history: items of the user before each row, oldest first, uncut; for measures, not for models.
    """

    split: str
    mode: str
    visible: Interaction
    users: np.ndarray
    relevant: np.ndarray
    candidates: np.ndarray | None
    hidden: list[np.ndarray]
    user_tokens: np.ndarray
    item_tokens: np.ndarray
    digest: str = ""
    history: list[np.ndarray] = field(default_factory=list)
    unmet: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def targets(self) -> np.ndarray:
        """Internal id of the next item of each row ``[R]``."""
        return self.relevant[:, 0]

    def __len__(self) -> int:
        return len(self.users)

    def hidden_of(self, row: int) -> np.ndarray:
        """All items that are no answers of a row in "full" mode."""
        return np.append(self.hidden[row], self.unmet)

    def repeated(self) -> int:
        """Rows with a relevant item that the user met before; of the other answers none is, unless history is kept."""
        return sum(bool(np.isin(known, r).any()) for known, r in zip(self.history, self.relevant, strict=True))

    def batches(self, size: int) -> Iterator[np.ndarray]:
        """Row numbers in chunks of ``size``."""
        for first in range(0, len(self), size):
            yield np.arange(first, min(first + size, len(self)))

    def batches_by_history(self, size: int, length: int) -> Iterator[np.ndarray]:
        """As ``batches``, rows whose last ``length`` items are equal next to one another."""
        order = sorted(range(len(self)), key=lambda row: self.history[row][-length:].tobytes())
        for first in range(0, len(self), size):
            yield np.array(order[first : first + size])

    def target_tokens(self, row: int) -> list[str]:
        """The distinct relevant items of a row, by time."""
        return list(dict.fromkeys(map(str, self.item_tokens[self.relevant[row]])))

    def records(self) -> Iterator[dict[str, Any]]:
        """One JSON-able record a row, by tokens, in file order; ``targets`` in place of ``target`` where P > 1."""
        for row in range(len(self)):
            candidates = None if self.candidates is None else self.item_tokens[self.candidates[row]].tolist()
            tokens = self.target_tokens(row)
            yield {
                "user": str(self.user_tokens[self.users[row]]),
                **({"target": tokens[0]} if self.relevant.shape[1] == 1 else {"targets": tokens}),
                "candidates": candidates,
            }

    def save(self, file: Path) -> None:
        """Write the rows as gzipped JSON lines, whole or not at all."""
        with whole_gzip(file) as out:
            for record in self.records():
                out.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def freeze_rows(
    config: Config, part: Dataset, split: str, events: Events, train_ends: np.ndarray, asked: np.ndarray
) -> EvalRows:
    """Evaluation rows of a split, with candidates drawn once.

    Candidates are distinct, never met by the user (before or after the row), or with lowN disliked at any time, and
    drawn by a generator seeded with (candidate_seed, split, user token, row of the user): never with the targets,
    which are left out of the draw and move nothing else in it, nor the order. All lists are equally long: where the
    user meets an item twice among the next P, one more drawn item fills the place.

    Args:
        part: the split of the sequential data set.
        train_ends: training events of each user, for the popularity of popN ``[n_users]``.
        asked: internal ids of the users whose rows are kept.

    Raises:
        UserError: a user has fewer than N never-seen items, or no user has a row.
    """
    feat, relevant = _rows_of(part, split, asked)
    users = feat[part.uid_field].numpy()
    positions = feat[POSITION].numpy()
    mode = config["eval_args"]["mode"][split]
    user_tokens, item_tokens = part.field2id_token[part.uid_field], part.field2id_token[part.iid_field]
    rows = EvalRows(split, mode, _visible(part, feat), users, relevant, None, [], user_tokens, item_tokens)
    rows.history = [events.items_of(u)[:p] for u, p in zip(users, positions, strict=True)]
    if mode == "full":
        masked = config["mask_history"]
        rows.hidden = [np.setdiff1d(h, r) if masked else h[:0] for h, r in zip(rows.history, relevant, strict=True)]
        # What a model's `load_col` brings along is no answer: others do not have it.
        rows.unmet = np.setdiff1d(np.arange(1, part.item_num), events.catalogue)
    else:
        rows.candidates = _draw(config, rows, positions, events, train_ends)
    rows.digest = _digest(rows.records(), split, mode, config["mask_history"])
    return rows


def popularity(events: Events, train_ends: np.ndarray, n_items: int) -> np.ndarray:
    """Training interactions of each item ``[n_items]``."""
    position = np.arange(len(events.user)) - events.start[events.user]
    return np.bincount(events.item[position < train_ends[events.user]], minlength=n_items)


def _rows_of(part: Dataset, split: str, users: np.ndarray) -> tuple[Interaction, np.ndarray]:
    """Rows of these users, by user and position; of every P the first, and the items of all P ``[R, P]``."""
    feat, size = part.inter_feat, part.config["next_items"]
    if len(feat) == 0:
        ahead = f" (--next_items={size})" if size > 1 else ""
        how, told = part.config["eval_args"]["split"], f"give other shares, or look whether {part.time_field} varies"
        told = f"leave-one-out needs users with at least {2 * size + 2} events{ahead}" if "LS" in how else told
        raise UserError(f"--eval_args: the split {how} leaves no {split} interactions; {told}.")
    feat = feat[torch.as_tensor(np.isin(feat[part.uid_field].numpy(), users))]
    order = np.lexsort((feat[POSITION].numpy(), feat[part.uid_field].numpy()))
    relevant = feat[part.iid_field].numpy()[order].reshape(-1, size)
    return feat[torch.as_tensor(order[::size].copy())], relevant


def _visible(part: Dataset, feat: Interaction) -> Interaction:
    """User and history columns alone, joined with the user's own features."""
    suffix, length = part.config["LIST_SUFFIX"], part.config["ITEM_LIST_LENGTH_FIELD"]
    # A column of the file may itself be called `..._list`; history columns are those that RecBole made of another.
    history = {f + suffix for f in feat.interaction} & set(feat.interaction)
    seen = {f: feat[f] for f in feat.interaction if f in history or f in (part.uid_field, length)}
    return part.join(Interaction(seen))


def _draw(config: Config, rows: EvalRows, positions: np.ndarray, events: Events, train_ends: np.ndarray) -> np.ndarray:
    """Candidates of each row, the relevant items among them ``[R, N + P]``."""
    wanted = int(rows.mode[3:])
    universe = events.catalogue
    universe = universe[np.argsort(rows.item_tokens[universe])]  # by token: internal ids may differ between models
    weight = popularity(events, train_ends, len(rows.item_tokens))[universe] if rows.mode.startswith("pop") else None
    drawn = np.zeros((len(rows), wanted + rows.relevant.shape[1]), dtype=np.int64)

    def free_of(user: int) -> np.ndarray:
        """Which items may be drawn."""
        if rows.mode.startswith("low"):
            return np.isin(universe, events.disliked(user, len(events.items_of(user))))
        unmet = np.ones(len(rows.item_tokens), dtype=bool)
        unmet[events.met(user)] = False
        unmet = unmet[universe]
        return unmet if weight is None else unmet & (weight > 0)

    for row, (user, position) in enumerate(zip(rows.users, positions, strict=True)):
        rng = seeded(config["candidate_seed"], rows.split, rows.user_tokens[user], position)
        free = free_of(user)
        relevant = np.array(list(dict.fromkeys(rows.relevant[row])))
        others = drawn.shape[1] - len(relevant)
        if free.sum() < others:
            spare = [free_of(u).sum() + len(set(r)) for u, r in zip(rows.users, rows.relevant, strict=True)]
            most = min(spare) - rows.relevant.shape[1]
            fewer = f"mode {rows.mode[:3]}{most} or less, or full" if most > 0 else "full, or leave such users out"
            raise UserError(
                f"--eval_args: mode {rows.mode} needs {others} items that user {rows.user_tokens[user]} never met, "
                f"but there are {free.sum()}. Use {fewer}."
            )
        # Each item waits for a time drawn for it alone, shorter for a popular one, and the first to come are taken: the
        # same odds as drawing one after the other, but an item that is left out moves no other.
        wait = rng.exponential(size=len(universe)) / (1 if weight is None else np.maximum(weight, 1))
        wait[~free] = np.inf
        first = np.argpartition(wait, others - 1)[:others]
        items = universe[first[np.argsort(wait[first])]]
        drawn[row] = rng.permutation(np.append(items, relevant))
    return drawn


def check_saved_rows(folder: Path, record: Mapping[str, Any]) -> None:
    """Whether the test rows that a finished run left are those that its ``result.json`` names; no file, no fault.

    Raises:
        UserError: the file cannot be read, or was changed.
    """
    file = folder / "candidates-test.jsonl.gz"
    if not file.is_file():
        return
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            found = _digest(map(json.loads, lines), "test", record["mode"], record.get("mask_history"))
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error) as error:
        raise UserError(f"{file} cannot be read ({error!r}). {RESTORE}") from None
    if found != record["candidate_hash"]:
        raise UserError(
            f"{file}: its rows have the hash {found[:12]}, and the run ranked {record['candidate_hash'][:12]}: the "
            f"file or result.json was changed since. {RESTORE}"
        )


def _digest(records: Iterable[dict[str, Any]], split: str, mode: str, mask_history: bool | None) -> str:
    told = hashlib.sha256(json.dumps([split, mode, mask_history if mode == "full" else None]).encode())
    for record in records:
        if record["candidates"] is not None:
            record["candidates"] = sorted(record["candidates"])
        told.update(json.dumps(record, sort_keys=True).encode())
    return told.hexdigest()
