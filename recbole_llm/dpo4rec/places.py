"""Where in whose history a text is written, and which labels only judge texts.

A text is written at a *place*: a user and how many of their first items it may know. A row reads a text only if the
text was written from items before the row's target, so no text ever holds an answer. Three kinds of users:

* *readers* train the recommender to read: their last ``text_positions`` training rows read one text, written before.
* *pair users* judge texts: N texts are written before their last ``reward_positions`` training items, which are the
  relevant items of one list. No recommender of the run is trained on these labels, and no reader is a pair user.
* *asked* users are ranked for: one text from all their training items serves validation and test.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader

from recbole_llm.data.dataset import POSITION
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError


@dataclass(frozen=True)
class Places:
    """How many leading items of a user a text is written from, by internal user id.

    Attributes:
        readers, pairs, asked: user -> items known.
    """

    readers: dict[int, int]
    pairs: dict[int, int]
    asked: dict[int, int]

    def written(self) -> list[tuple[int, int]]:
        """(user, items known) of every text that the recommender reads, each once, in order."""
        return sorted({*self.readers.items(), *self.asked.items()})


def draw_places(config: Config, protocol: Protocol) -> Places:
    """Readers and pair users, drawn by user token and seed from the training users; all users with rows are asked.

    Raises:
        UserError: fewer training users with enough items than ``pair_users`` and ``text_users`` ask for.
    """
    sequences = protocol.training_sequences()
    tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
    drawn = np.array(sorted(sequences))
    drawn = drawn[np.argsort(tokens[drawn])]  # by token: internal ids follow the file's order
    drawn = np.random.default_rng([config["few_shot_seed"], 4]).permutation(drawn)
    last, labels = config["text_positions"], config["reward_positions"]
    judging = [int(u) for u in drawn if len(sequences[u]) > labels][: config["pair_users"]]
    if len(judging) < config["pair_users"]:
        raise UserError(
            f"--pair_users={config['pair_users']}: only {len(judging)} training users have more than "
            f"{labels} training items (--reward_positions). Ask for fewer."
        )
    judges = set(judging)
    reading = [int(u) for u in drawn if u not in judges][: config["text_users"]]
    if config["knowledge"] != "none" and len(reading) < (config["text_users"] or 2):
        raise UserError(
            f"--text_users={config['text_users']}, --pair_users={config['pair_users']}: {len(sequences)} training "
            f"users leave {len(reading)} whose rows can read texts. Lower --pair_users (to a third of them, say) or "
            "raise --few_shot."
        )
    asked = sorted({int(u) for rows in (protocol.valid, protocol.test) for u in rows.users})
    few = sum(protocol.train_ends[u] == 0 for u in asked)
    if few:
        logging.getLogger().info(f"DPO4Rec: {few} asked users have no training items, so no text.")
    places = Places(
        {u: max(1, len(sequences[u]) - last) for u in sorted(reading)},
        {u: len(sequences[u]) - labels for u in sorted(judging)},
        {u: int(protocol.train_ends[u]) for u in asked if protocol.train_ends[u]},
    )
    if config["knowledge"] == "placebo":
        check_placebo(places)
    return places


def check_placebo(places: Places) -> None:
    """Raises UserError where one user has more than half of the texts: others' cannot stand in for all of them."""
    written = places.written()
    most = max(Counter(user for user, _ in written).values(), default=0)
    if 2 * most > len(written):
        raise UserError(
            f"--knowledge=placebo: one user has {most} of {len(written)} texts, so there are not enough of others to "
            "exchange them with. Raise --text_users or --eval_users."
        )


def trained_rows(places: Places, users: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Which training rows may train a recommender: all but the labels that judge texts.

    Args:
        users, positions: of each row ``[n]``; the position is that of its target among the user's items.
    """
    first_label = np.full(int(users.max(initial=0)) + 1, np.iinfo(np.int64).max)
    for user, known in places.pairs.items():
        if user < len(first_label):
            first_label[user] = known
    return positions < first_label[users]


def train_rows_of(protocol: Protocol) -> tuple[np.ndarray, np.ndarray]:
    """Users and target positions of RecBole's training rows ``[n]``."""
    rows = protocol.train_data._dataset
    return rows.inter_feat[rows.uid_field].numpy(), rows.inter_feat[POSITION].numpy()


def training_loader(config: Config, protocol: Protocol, places: Places) -> AbstractDataLoader:
    """A new loader of RecBole's training rows, without the labels that judge texts."""
    loader = protocol.train_data
    rows = loader._dataset
    kept = trained_rows(places, *train_rows_of(protocol))
    if not kept.any():
        raise UserError(
            f"--pair_users={config['pair_users']}, --reward_positions={config['reward_positions']}: their labels judge "
            "texts, and no training row is left. Lower one of them, or raise --few_shot."
        )
    part = rows.copy(rows.inter_feat[torch.as_tensor(kept)])
    return type(loader)(config, part, loader._sampler, shuffle=config["shuffle"])
