"""From a configuration to training data and frozen evaluation rows, the same for every model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.dataloader.user_dataloader import UserDataLoader
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.data.utils import create_samplers, get_dataloader
from recbole.sampler import KGSampler
from recbole.utils import ModelType

from recbole_llm.data.candidates import EvalRows, freeze_rows, popularity
from recbole_llm.data.dataset import Events, create_dataset
from recbole_llm.errors import UserError
from recbole_llm.eval_checks import check_list_lengths


@dataclass
class Protocol:
    """Everything that all models share.

    Attributes:
        train_data: RecBole's training loader for this model.
        valid, test: frozen rows.
        events: all interactions, uncut; only the first ``train_ends[u]`` of a user may be learned from.
        train_users: internal ids of the training users (few-shot, ``min_disliked``, ``users``), or None for all.
        item_counter: training interactions of each item id, of the training users alone.
        dataset: the whole RecBole data set (fields, tokens).
        popularity: training interactions of each item over all users, so that few-shot does not move it ``[n_items]``.
    """

    dataset: Dataset
    train_data: AbstractDataLoader
    valid: EvalRows
    test: EvalRows
    events: Events
    train_ends: np.ndarray
    train_users: np.ndarray | None
    item_counter: Counter[int]
    popularity: np.ndarray

    @property
    def candidate_hash(self) -> str:
        """SHA-256 of the test rows; results with different ones are not comparable."""
        return self.test.digest

    def training_sequences(self) -> dict[int, np.ndarray]:
        """Training items of each training user, in order of time."""
        users = np.flatnonzero(self.train_ends > 1) if self.train_users is None else self.train_users
        return {int(u): self.events.items_of(int(u))[: self.train_ends[u]] for u in users}


def prepare_data(config: Config, users: np.ndarray | None = None) -> Protocol:
    """Load, split, sample and freeze.

    The sequential data set makes the split; a model of another kind trains on exactly the interactions
    that it leaves for training.

    Args:
        users: internal ids; of the training users only these train, and nothing else changes. Internal ids are the
            same in every call with the same data and settings.

    Raises:
        UserError: the data or the users do not suffice for the settings.
    """
    sequences = create_dataset(config, sequential=config["MODEL_TYPE"] != ModelType.SEQUENTIAL, only_users=users)
    parts = sequences.build()
    dataset = sequences
    if config["MODEL_TYPE"] != ModelType.SEQUENTIAL:
        dataset = create_dataset(config, follow=sequences.split_table, only_users=users)
        _check_ids(sequences, dataset)
    train_data = _train_loader(config, dataset)
    events, split_table = sequences.events, sequences.split_table
    ends = split_table.ends[:, 0]
    kept = ends.copy()
    if sequences.train_users is not None:
        kept[np.setdiff1d(np.arange(len(kept)), sequences.train_users)] = 0
    valid, test = (
        freeze_rows(config, part, split, events, ends, split_table.users[split])
        for part, split in zip(parts[1:], ("valid", "test"), strict=True)
    )
    check_list_lengths(config, (valid, test))
    counts = popularity(events, kept, dataset.item_num)
    counter = Counter({int(i): int(n) for i, n in enumerate(counts) if n})
    everyone = popularity(events, ends, dataset.item_num)
    return Protocol(dataset, train_data, valid, test, events, ends, sequences.train_users, counter, everyone)


def _check_ids(sequences: Dataset, dataset: Dataset) -> None:
    """Raises ``UserError`` where a model's own data set numbers users or items otherwise than the rows that ask it."""
    for field in (sequences.uid_field, sequences.iid_field):
        if not np.array_equal(sequences.field2id_token[field], dataset.field2id_token[field]):
            raise UserError(
                f"--model={dataset.config['model']}: its data set ({type(dataset).__name__}) numbers {field} "
                "otherwise than the rows that ask it. Leave out what filters or adds some for it alone (--load_col)."
            )


class TrainingUsers(UserDataLoader):
    """RecBole's loader of users (MultiVAE, CDAE, ...), of those alone who train: of the others there is nothing to
    learn, and what an epoch is would hang on how many they are.
    """

    def _init_batch_size_and_step(self) -> None:
        super()._init_batch_size_and_step()
        self.user_list = Interaction({self.uid_field: torch.unique(self._dataset.inter_feat[self.uid_field])})
        self.sample_size = len(self.user_list)


def _train_loader(config: Config, dataset: Dataset) -> AbstractDataLoader:
    """RecBole's training loader, as its ``data_preparation`` makes it.

    That function would also take loaders that an earlier RecBole run left in ``checkpoint_dir``, with another split.
    """
    parts = dataset.build()
    train = parts[0]  # alone, for what is popular is read off the parts
    sampler, _, _ = create_samplers(config, train, [train] * len(parts))
    loader = get_dataloader(config, "train")
    if loader is UserDataLoader and dataset.train_users is not None:
        loader = TrainingUsers
    if config["MODEL_TYPE"] != ModelType.KNOWLEDGE:
        return loader(config, train, sampler, shuffle=config["shuffle"])
    negatives = config["train_neg_sample_args"]
    return loader(
        config, train, sampler, KGSampler(dataset, negatives["distribution"], negatives["alpha"]), shuffle=True
    )
