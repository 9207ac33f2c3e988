"""RecBole's data sets under one protocol: exact time order, one split and the same users for every model."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset, KnowledgeBasedDataset, SequentialDataset
from recbole.utils import ModelType

from recbole_llm.data.events import Events, LowRatings, events_of
from recbole_llm.data.users import draw_users
from recbole_llm.errors import UserError

POSITION = "event_position"  # 0-based place of an interaction's target among its user's events, by time


_Dataset: Any = object  # to a type checker a mixin has whatever the class has that it is mixed into


class ProtocolDataset(_Dataset):
    """Mixed in before a RecBole data set class: sorts in full precision and obeys the split and the training users.

    RecBole turns times into float32 before it sorts, which moves leave-one-out targets (unix times keep about
    two minutes); a stable sort on the full values first makes RecBole's later sort keep the right order.

    With ``liked_only`` the low ratings are gone before RecBole counts, numbers or splits anything; their items get
    internal ids all the same.
    """

    inter_feat: Any  # a DataFrame until RecBole makes it an Interaction
    follow: SplitTable | None = None  # the split that a non-sequential data set obeys
    only_users: np.ndarray | None = None  # training users beside whom none is kept
    _parts: list[Dataset] | None = None
    _low: pd.DataFrame | None = None  # what liked_only set aside, still by token
    low_ratings: LowRatings | None = None  # the same by internal ids

    def _filter_by_inter_num(self) -> None:
        """RecBole's filter, which counts liked interactions alone under ``liked_only``.

        Low ratings stay where their user does, and their item was not filtered out.
        """
        if not self.config["liked_only"]:
            return super()._filter_by_inter_num()
        low = self._take_low_out()
        liked = self.inter_feat[self.iid_field].unique()
        super()._filter_by_inter_num()
        stay = self.inter_feat[self.iid_field].unique()
        never_liked = ~low[self.iid_field].isin(liked)
        interval = self._parse_intervals_str(self.config["item_inter_num_interval"])
        if interval is not None and not self._within_intervals(0, interval):
            never_liked[:] = False
        fine = low[self.iid_field].isin(stay) | never_liked
        self._low = low[fine & low[self.uid_field].isin(self.inter_feat[self.uid_field])]

    def _remove_duplication(self) -> None:
        """RecBole's, whose sort throws equal times into disorder; here the rows that stay keep the file's order."""
        keep = self.config["rm_dup_inter"]
        if keep is not None:
            by_time = self.inter_feat.sort_values(self.time_field, kind="stable")
            self.inter_feat = by_time.drop_duplicates([self.uid_field, self.iid_field], keep=keep).sort_index()

    def _take_low_out(self) -> pd.DataFrame:
        """Remove interactions rated at or below the threshold and return them."""
        field, threshold = self.config["RATING_FIELD"], self.config["rating_threshold"]
        low = self.inter_feat[field] <= threshold
        if low.all():
            raise UserError(
                f"--rating_threshold={threshold}: none of {len(low)} interactions is rated above it, the highest is "
                f"{self.inter_feat[field].max():g}. Set a lower one."
            )
        aside = self.inter_feat[low]
        self.inter_feat = self.inter_feat[~low].copy()
        return aside

    def _remap_ID_all(self) -> None:
        if self._low is None:
            return super()._remap_ID_all()
        liked = len(self.inter_feat)
        self.inter_feat = pd.concat([self.inter_feat, self._low], ignore_index=True)
        super()._remap_ID_all()
        low, self.inter_feat = self.inter_feat[liked:], self.inter_feat[:liked].copy()
        self.low_ratings = LowRatings.of(low, self.inter_feat, self.uid_field, self.iid_field, self.time_field)

    def _fill_nan(self) -> None:
        """RecBole's, which takes the mean for a missing rating; here an item without a rating is not rated."""
        field = self.config["RATING_FIELD"]
        unrated = self.inter_feat[field].isna() if field in self.inter_feat else None
        super()._fill_nan()
        if unrated is not None and unrated.any():
            self.inter_feat[field] = self.inter_feat[field].mask(unrated)

    def _change_feat_format(self) -> None:
        order = [self.uid_field, self.time_field]
        self.inter_feat = self.inter_feat.sort_values(order, kind="stable").reset_index(drop=True)
        fields = (self.uid_field, self.iid_field, self.config["RATING_FIELD"])
        self.events = events_of(
            self.inter_feat, fields, self.user_num, self.config["rating_threshold"], self.low_ratings
        )
        position = self.inter_feat.groupby(self.uid_field, sort=False).cumcount().to_numpy()
        super()._change_feat_format()
        if isinstance(self, SequentialDataset):  # one row for each event but a user's first
            position = position[position > 0]
        self.inter_feat[POSITION] = torch.as_tensor(position)

    def _split_index_by_leave_one_out(
        self, grouped_index: Iterable[Iterable[int]], leave_one_num: int
    ) -> list[list[int]]:
        """RecBole's, which leaves one row for each part; here ``next_items``.

        A user who has too few rows for every part and one of training loses validation first, then the test: a part
        is whole or empty.
        """
        size = self.config["next_items"]
        parts: list[list[int]] = [[] for _ in range(leave_one_num + 1)]
        for rows in map(list, grouped_index):
            filled = min(leave_one_num, (len(rows) - 1) // size)
            first = len(rows) - filled * size
            parts[0] += rows[:first]
            for number in range(filled):
                parts[number - filled] += rows[first + number * size : first + (number + 1) * size]
        return parts

    def build(self) -> list[Dataset]:
        """RecBole's train, valid and test parts; train holds the training users alone where not all are."""
        if self._parts is None:
            if self.follow is None:
                self._parts = super().build()
                self.split_table = SplitTable.of_parts(self.config, self._parts, self.events)
            else:
                self._change_feat_format()
                self.split_table = self.follow
                split = self.follow.of(self.inter_feat[self.uid_field].numpy(), self.inter_feat[POSITION].numpy())
                self._parts = [self.copy(self.inter_feat[torch.as_tensor(split == i)]) for i in range(3)]
            users = self.split_table.users["train"]
            if self.only_users is not None:
                all_users = np.flatnonzero(self.split_table.ends[:, 0] > 1)
                users = np.intersect1d(self.only_users, all_users if users is None else users)
            if users is not None:
                keep = np.isin(self._parts[0].inter_feat[self.uid_field].numpy(), users)
                self._parts[0] = self.copy(self._parts[0].inter_feat[torch.as_tensor(keep)])
            self.train_users = users
        return list(self._parts)


class ProtocolGraph(ProtocolDataset):
    """``ProtocolDataset`` for data sets with a knowledge graph: the same interactions and item ids as without it.

    RecBole drops interactions of items that are not linked to an entity, and numbers the linked items last, so that
    such a model would be asked about other items than all others.
    """

    item2entity: dict[str, str]
    entity2item: dict[str, str]

    def _filter_link(self) -> None:
        everything = self.inter_feat.copy()
        self._one_item_an_entity()
        super()._filter_link()
        self.inter_feat = everything

    def _one_item_an_entity(self) -> None:
        """RecBole merges an item with its entity, and fails where another has the same: the first that was met has it,
        and the others count as items without one.
        """
        met, linked = self._get_rec_item_token(), dict[str, str]()
        for item in sorted(self.item2entity, key=lambda item: item not in met):
            linked.setdefault(self.item2entity[item], item)
        if others := [item for item, entity in self.item2entity.items() if linked[entity] != item]:
            self.logger.warning(
                f"{self.dataset_name}.link: RecBole knows one item an entity; {len(others)} items share theirs with "
                f"another one, such as {others[0]}, and learn nothing from the graph."
            )
        self.entity2item = linked
        self.item2entity = {item: entity for entity, item in linked.items()}

    def _merge_item_and_entity(self) -> None:
        """RecBole's, with an entity of its own, which no triple names, for each item that has none."""
        tokens = [str(token) for token in self.field2id_token[self.iid_field][1:]]
        alone = {token: f"[item] {token}" for token in tokens if token not in self.item2entity}
        self.item2entity |= alone
        self.entity2item |= {entity: token for token, entity in alone.items()}
        known = self.field2id_token[self.head_entity_field]
        entities = np.append(known, np.array(list(alone.values()), dtype=known.dtype if not alone else object))
        for field in self.alias["entity_id"]:
            self.field2id_token[field] = entities
            self.field2token_id[field] = {token: number for number, token in enumerate(entities)}
        super()._merge_item_and_entity()


@dataclass(frozen=True)
class SplitTable:
    """How many leading events of each user are for training, validation and test, and which users are asked.

    Attributes:
        ends: ``[n_users, 3]``; events ``0:ends[u, 0]`` train, ``ends[u, 0]:ends[u, 1]`` validate, and so on.
        users: internal ids of the users of "train", "valid" and "test", sorted; None = all (training only).
    """

    ends: np.ndarray
    users: dict[str, np.ndarray | None]

    @staticmethod
    def of_parts(config: Config, parts: list[Dataset], events: Events) -> SplitTable:
        """Read the split off the parts that RecBole made of a sequential data set, and draw its users."""
        n_users, field = len(events.start) - 1, parts[0].uid_field
        counts = np.stack([np.bincount(p.inter_feat[field].numpy(), minlength=n_users) for p in parts], axis=1)
        counts[:, 0] += counts[:, 0] > 0  # the first event is history of the first row, and trains where that row does
        ends = np.cumsum(counts, axis=1)
        return SplitTable(ends, draw_users(config, events, ends, parts[0].field2id_token[field]))

    def of(self, user: np.ndarray, position: np.ndarray) -> np.ndarray:
        """0, 1 or 2 (train, valid, test) for each (user, event position); 3 = in none ``[n]``."""
        return (position[:, None] >= self.ends[user]).sum(axis=1)


def create_dataset(
    config: Config,
    follow: SplitTable | None = None,
    *,
    sequential: bool = False,
    only_users: np.ndarray | None = None,
) -> Dataset:
    """The model's RecBole data set under our protocol.

    Args:
        follow: the split to obey, for models whose data set is not sequential.
        sequential: make the plain sequential data set, whatever the model.
        only_users: internal ids; of the training users only these are kept.
    """
    module = importlib.import_module("recbole.data.dataset")
    by_type = {ModelType.SEQUENTIAL: "SequentialDataset", ModelType.KNOWLEDGE: "KnowledgeBasedDataset"}
    name = f"{config['model']}Dataset"
    if sequential or not hasattr(module, name):
        name = by_type.get(ModelType.SEQUENTIAL if sequential else config["MODEL_TYPE"], "Dataset")
    base = getattr(module, name)
    ours = ProtocolGraph if issubclass(base, KnowledgeBasedDataset) else ProtocolDataset
    dataset = type(base.__name__, (ours, base), {})(config)
    dataset.follow, dataset.only_users = follow, only_users
    return dataset
