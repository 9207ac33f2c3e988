"""RecBole's data sets under one protocol: exact time order, one split and one few-shot sample for every model."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset, SequentialDataset
from recbole.utils import ModelType

from recbole_llm.errors import UserError

POSITION = "event_position"  # 0-based place of an interaction's target among its user's events, by time
SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Events:
    """All interactions by user and time, before any history is cut.

    Attributes:
        user, item: internal ids, sorted by (user, time, file order) ``[n]``.
        rating: as in the file, nan where there is none ``[n]``.
        start: row of a user's first event; ``start[u]:start[u + 1]`` are the events of user u ``[n_users + 1]``.
    """

    user: np.ndarray
    item: np.ndarray
    rating: np.ndarray
    start: np.ndarray

    def items_of(self, user: int) -> np.ndarray:
        """Items of a user in order of time."""
        return self.item[self.start[user] : self.start[user + 1]]


class ProtocolDataset:
    """Mixed in before a RecBole data set class: sorts in full precision and obeys the split and the few-shot sample.

    RecBole turns times into float32 before it sorts, which moves leave-one-out targets (unix times keep about
    two minutes); a stable sort on the full values first makes RecBole's later sort keep the right order.
    """

    follow: SplitTable | None = None  # the split that a non-sequential data set obeys
    _parts: list[Dataset] | None = None

    def _change_feat_format(self) -> None:
        order = [self.uid_field, self.time_field]
        self.inter_feat = self.inter_feat.sort_values(order, kind="stable").reset_index(drop=True)
        self.events = _events(self)
        position = self.inter_feat.groupby(self.uid_field, sort=False).cumcount().to_numpy()
        super()._change_feat_format()
        if isinstance(self, SequentialDataset):  # one row for each event but a user's first
            position = position[position > 0]
        self.inter_feat[POSITION] = torch.as_tensor(position)

    def build(self) -> list[Dataset]:
        """RecBole's train, valid and test parts; train holds the few-shot users alone where that is asked for."""
        if self._parts is None:
            if self.follow is None:
                self._parts = super().build()
            else:
                self._change_feat_format()
                split = self.follow.of(self.inter_feat[self.uid_field].numpy(), self.inter_feat[POSITION].numpy())
                self._parts = [self.copy(self.inter_feat[torch.as_tensor(split == i)]) for i in range(3)]
            self.split_table = self.follow or SplitTable.of_parts(self._parts, self.uid_field, self.events)
            users = self.split_table.few_shot_users(self.config, self.field2id_token[self.uid_field])
            if users is not None:
                keep = np.isin(self._parts[0].inter_feat[self.uid_field].numpy(), users)
                self._parts[0] = self.copy(self._parts[0].inter_feat[torch.as_tensor(keep)])
            self.train_users = users
        return list(self._parts)


@dataclass(frozen=True)
class SplitTable:
    """How many leading events of each user are for training, validation and test.

    Attributes:
        ends: ``[n_users, 3]``; events ``0:ends[u, 0]`` train, ``ends[u, 0]:ends[u, 1]`` validate, and so on.
    """

    ends: np.ndarray

    @staticmethod
    def of_parts(parts: list[Dataset], user_field: str, events: Events) -> SplitTable:
        """Read the split off the parts that RecBole made of a sequential data set."""
        n_users = len(events.start) - 1
        counts = np.stack([np.bincount(p.inter_feat[user_field].numpy(), minlength=n_users) for p in parts], axis=1)
        counts[:, 0] += counts[:, 0] > 0  # the first event is history of the first row, and trains where that row does
        return SplitTable(np.cumsum(counts, axis=1))

    def of(self, user: np.ndarray, position: np.ndarray) -> np.ndarray:
        """0, 1 or 2 (train, valid, test) for each (user, event position); 3 = in none ``[n]``."""
        return (position[:, None] >= self.ends[user]).sum(axis=1)

    def few_shot_users(self, config: Config, user_tokens: np.ndarray) -> np.ndarray | None:
        """Internal ids of the training users kept, or None for all. Drawn by user token, so that no model moves it.

        Raises:
            UserError: fewer users have training events than ``few_shot`` asks for.
        """
        if config["few_shot"] is None:
            return None
        users = np.flatnonzero(self.ends[:, 0] > 1)
        if len(users) < config["few_shot"]:
            raise UserError(f"--few_shot={config['few_shot']}: only {len(users)} users have training interactions.")
        users = users[np.argsort(user_tokens[users])]
        return np.sort(np.random.default_rng(config["few_shot_seed"]).choice(users, config["few_shot"], replace=False))


def _events(dataset: Dataset) -> Events:
    """Events of a data set whose table is sorted by user and time, still as pandas."""
    table: pd.DataFrame = dataset.inter_feat
    user = table[dataset.uid_field].to_numpy()
    rating_field = dataset.config["RATING_FIELD"]
    rating = table[rating_field].to_numpy(float) if rating_field in table else np.full(len(table), np.nan)
    start = np.searchsorted(user, np.arange(dataset.num(dataset.uid_field) + 1))
    return Events(user, table[dataset.iid_field].to_numpy(), rating, start)


def create_dataset(config: Config, follow: SplitTable | None = None, *, sequential: bool = False) -> Dataset:
    """The model's RecBole data set under our protocol.

    Args:
        follow: the split to obey, for models whose data set is not sequential.
        sequential: make the plain sequential data set, whatever the model.
    """
    module = importlib.import_module("recbole.data.dataset")
    by_type = {ModelType.SEQUENTIAL: "SequentialDataset", ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}
    name = f"{config['model']}Dataset"
    if sequential or not hasattr(module, name):
        name = by_type.get(ModelType.SEQUENTIAL if sequential else config["MODEL_TYPE"], "Dataset")
    base = getattr(module, name)
    dataset = type(base.__name__, (ProtocolDataset, base), {})(config)
    dataset.follow = follow
    return dataset
