"""DPO4Rec: a sequential recommender whose users and items are augmented by texts about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_llm.adaptor import HybridExperts, PlainAdaptor
from recbole_llm.data.dataset import POSITION
from recbole_llm.dpo4rec.loop import DPO4RecTrainer
from recbole_llm.dpo4rec.question import described_items
from recbole_llm.dpo4rec.text_vectors import text_vectors
from recbole_llm.recommender import recommender_config

NEVER = np.iinfo(np.int64).max  # a position that no row has


class DPO4Rec(SequentialRecommender):
    """SASRec or GRU4Rec that also reads a text about the user.

    With s the recommender's user representation, a the adapted user text, e and b an item's embedding and its adapted
    title: a user who has a text is s + W [s; a], one who has none is s; an item is e + V b; the score is their inner
    product. With ``knowledge`` none it is the recommender alone.

    Raises:
        UserError: titles that cannot be read, or an encoder that cannot be had.
    """

    input_type = InputType.POINTWISE
    trainer_class = DPO4RecTrainer

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        own = recommender_config(config, config["recommender_model"])
        self.recommender = own.model_class(own, dataset)  # first, so that it begins as it would alone
        self.loss_fct = nn.CrossEntropyLoss()
        self.reads = config["knowledge"] != "none"
        if not self.reads:
            return
        vectors = torch.as_tensor(text_vectors(config, described_items(config, dataset)))
        self.register_buffer("item_vectors", vectors * self.scale_of(vectors))
        width_in, width = vectors.shape[1], self.recommender.item_embedding.embedding_dim
        sides = ("user", "item") if config["item_knowledge"] else ("user",)
        sizes = (width_in, config["adaptor_hidden"], config["adaptor_width"])
        common = {"sides": sides, "dropout": config["adaptor_dropout"]}
        if config["adaptor"] == "experts":
            shared, each = config["shared_experts"], config["own_experts"]
            self.adaptor: nn.Module = HybridExperts(*sizes, shared=shared, own=each, **common)
        else:
            self.adaptor = PlainAdaptor(*sizes, **common)
        self.fuse_user = nn.Linear(width + config["adaptor_width"], width)
        self.fuse_item = nn.Linear(config["adaptor_width"], width) if config["item_knowledge"] else None
        for layer in filter(None, (self.fuse_user, self.fuse_item)):  # at first the recommender leads
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        for name in ("train_text", "asked_text"):
            self.register_buffer(name, torch.zeros(dataset.user_num, width_in))
        self.register_buffer("train_from", torch.full((dataset.user_num,), NEVER))

    # ---- texts

    def read_texts(self, train: Mapping[int, tuple[int, np.ndarray]], asked: Mapping[int, np.ndarray]) -> None:
        """Take the texts' vectors.

        Args:
            train: user -> items that the text was written from, and its unit vector ``[d]``; training rows from that
                position on read it.
            asked: user -> the unit vector that rows without a position (validation, test) read.
        """
        self.train_text.zero_(), self.asked_text.zero_(), self.train_from.fill_(NEVER)
        scale = self.scale_of(self.item_vectors)
        for user, (known, vector) in train.items():
            self.train_text[user] = torch.as_tensor(vector) * scale
            self.train_from[user] = known
        for user, vector in asked.items():
            self.asked_text[user] = torch.as_tensor(vector) * scale

    @staticmethod
    def scale_of(vectors: Tensor) -> float:
        """Unit vectors of many dimensions have entries near zero; by this factor they have a mean square of 1."""
        return vectors.shape[1] ** 0.5

    def _texts(self, interaction: Interaction) -> Tensor | None:
        """The vector that each row may read ``[B, d]``, zeros for none."""
        if not self.reads:
            return None
        users = interaction[self.USER_ID]
        if POSITION not in interaction:
            return self.asked_text[users]
        may = interaction[POSITION] >= self.train_from[users]
        return self.train_text[users] * may[:, None]

    # ---- representations

    def forward(self, item_seq: Tensor, item_seq_len: Tensor, texts: Tensor | None) -> Tensor:
        """User representations ``[B, width]`` of histories and text vectors ``[B, d]`` (zeros: no text)."""
        alone = self.recommender.forward(item_seq, item_seq_len)
        if texts is None:
            return alone
        has = (texts != 0).any(1, keepdim=True)
        added = self.fuse_user(torch.cat([alone, self.adaptor(texts, "user")], dim=1))
        return alone + added * has

    def items(self) -> Tensor:
        """Item representations ``[n_items, width]``."""
        embedding = self.recommender.item_embedding.weight
        if not self.reads or self.fuse_item is None:
            return embedding
        return embedding + self.fuse_item(self.adaptor(self.item_vectors, "item"))

    # ---- RecBole

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        """Cross-entropy of the target over all items, mean nats a row."""
        scores = self._scores(interaction)
        return self.loss_fct(scores, interaction[self.POS_ITEM_ID])

    def predict(self, interaction: Interaction) -> Tensor:
        """Scores of (history, item) rows ``[B]``."""
        users = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], self._texts(interaction))
        return (users * self.items()[interaction[self.ITEM_ID]]).sum(1)

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        """Scores of all items ``[B, n_items]``."""
        return self._scores(interaction)

    def _scores(self, interaction: Interaction) -> Tensor:
        users = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN], self._texts(interaction))
        return users @ self.items().t()

    # ---- reward

    @torch.no_grad()
    def scores_of_texts(self, histories: Sequence[Sequence[int]], texts: np.ndarray) -> np.ndarray:
        """Scores of all items ``[B, n_items]`` after each history of item ids, oldest first, with a text vector each.

        Args:
            texts: unit vectors ``[B, d]``.
        """
        self.eval()
        most, device = self.max_seq_length, self.recommender.item_embedding.weight.device
        kept = [[int(i) for i in h][-most:] for h in histories]
        padded = torch.tensor([h + [0] * (most - len(h)) for h in kept], device=device)
        lengths = torch.tensor([len(h) for h in kept], device=device)
        vectors = torch.as_tensor(texts, device=device) * self.scale_of(self.item_vectors)
        users = self.forward(padded, lengths, vectors)
        return (users @ self.items().t()).float().cpu().numpy()
