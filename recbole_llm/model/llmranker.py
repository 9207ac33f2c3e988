"""LLMRanker: ranks items by the log-probability that an LLM gives to their titles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import AbstractRecommender, SequentialRecommender
from recbole.utils import InputType

from recbole_llm.data.item_text import item_texts
from recbole_llm.data.pair_prompt import PairPrompt, make_prompt
from recbole_llm.data.prompt import Prompt, Window, plain_tokens
from recbole_llm.data.template import load_template
from recbole_llm.errors import UserError
from recbole_llm.full_ranking import ExactRanking, check_search, users_together
from recbole_llm.llm.budget import TokenBudget
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.sharded import is_sharded
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.policy import WindowPolicy
from recbole_llm.processes import world_size
from recbole_llm.read_keys import asked_modes
from recbole_llm.rerank import rerank
from recbole_llm.scoring import candidate_logps, normalise


@dataclass(frozen=True)
class Catalogue:
    """What an LLM reads of a data set's items.

    Attributes:
        texts: text of each internal item id, entry 0 empty.
        prompt: prompts and answers made of them.
    """

    texts: list[str]
    prompt: Prompt | PairPrompt


def read_catalogue(config: Config, dataset: Dataset, tokenizer: Any) -> Catalogue:
    """The texts and prompts of a data set for a tokenizer.

    Raises:
        UserError: no item text.
    """
    texts = item_texts(config, dataset, lambda texts: [len(ids) for ids in plain_tokens(tokenizer, texts)])
    return Catalogue(texts, make_prompt(load_template(config["prompt"], config.properties), texts, tokenizer))


class LLMRanker(WindowPolicy, SequentialRecommender):
    """An LLM as a RecBole sequential model.

    ``predict`` scores all candidates of a user over one pass of the prompt; ``full_sort_predict`` ranks the whole
    catalogue, or reorders the top items of another recommender (``rerank_with``). ``calculate_loss`` takes RecBole's
    training rows; the trainer feeds windows instead, which train every position of a stretch in one pass.

    Raises:
        UserError: no item text, an LLM that cannot be loaded or cannot do what ``full_ranking`` asks, or prompts that
            do not fit its context.
    """

    input_type = InputType.POINTWISE
    trainer_class = LLMTrainer

    def __init__(self, config: Config, dataset: Dataset) -> None:
        super().__init__(config, dataset)
        self.config = config
        self.llm = load_llm(
            llm=config["llm"],
            device=config["device"],
            dtype=config["dtype"],
            quantization=config["quantization"],
            finetune=config["finetune"],
            lora_r=config["lora_r"],
            lora_alpha=config["lora_alpha"],
            lora_dropout=config["lora_dropout"],
            lora_target_modules=config["lora_target_modules"],
            attention=config["attention"],
            gradient_checkpointing=config["gradient_checkpointing"],
            fast_linears=config["fast_linears"],
            fsdp=config["fsdp"] and world_size() > 1,
            seed=config["seed"],
        )
        self.policy = self.llm.model
        self.budget = TokenBudget(config["token_budget"], shrinks=not is_sharded(self.policy))
        self.base: AbstractRecommender | None = None
        chosen_later = config["rerank_weight"] == "auto"
        self.rerank_weight = 1.0 if chosen_later else float(config["rerank_weight"])
        self._remembered: dict[Any, torch.Tensor] | None = None
        if config["full_ranking"] == "exact_topk" and "full" in asked_modes(config):
            check_search(config, self.policy)
        self.users_at_once = users_together(config)
        self.rank_items_of(self.read_items(config, dataset))

    def read_items(self, config: Config, dataset: Dataset) -> Catalogue:
        """The texts and prompts of a data set, which need not be the one the model is trained on.

        Raises:
            UserError: no item text, or prompts that do not fit the LLM's context.
        """
        catalogue = read_catalogue(config, dataset, self.llm.tokenizer)
        self._check_context(catalogue.prompt)
        return catalogue

    def rank_items_of(self, catalogue: Catalogue) -> None:
        """Rank these items from now on; the weights stay."""
        self.texts, self.prompt, self.n_items = catalogue.texts, catalogue.prompt, len(catalogue.texts)
        self.prior: torch.Tensor | None = None
        self.exact: ExactRanking | None = None

    def _check_context(self, prompt: Prompt | PairPrompt) -> None:
        items = self.max_seq_length
        if (needed := prompt.longest(1)) > self.llm.context:
            raise UserError(
                f"--llm={self.config['llm']}: its context is {self.llm.context} tokens, and one item of "
                f"history with one answer takes {needed}. "
                "Lower --item_text_max_tokens, or use another LLM or a shorter --prompt."
            )
        if (needed := prompt.longest(items)) > self.llm.context:
            self.logger.warning(
                f"{items} items of history (MAX_ITEM_LIST_LENGTH) can take {needed} tokens, over the LLM's context "
                f"of {self.llm.context}: the oldest items of such histories are left out."
            )

    # ---- training

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """SFT loss of RecBole's training rows (history -> item), mean nats a title token.

        Raises:
            UserError: a pair prompt, whose rows need a second candidate.
        """
        if isinstance(self.prompt, PairPrompt):
            raise UserError(f"--prompt={self.config['prompt']}: RecBole's rows have no second candidate to list.")
        lengths, targets = interaction[self.ITEM_SEQ_LEN].tolist(), interaction[self.ITEM_ID].tolist()
        windows = []
        for history, length, target in zip(interaction[self.ITEM_SEQ].tolist(), lengths, targets, strict=True):
            kept = self.prompt.fit(history[:length], self.llm.context)
            windows.append(Window(0, (*kept, target), (len(kept),)))
        loss = self.window_loss(windows, "SFT")
        return loss.total / loss.count

    # ---- ranking

    def predict(self, interaction: Interaction, length: int | None = None) -> torch.Tensor:
        """Scores of (history, item) rows ``[B]``; consecutive rows of one history share one pass of the prompt.

        Args:
            length: of each list of candidates; None = a list ends where the user or the history changes.
        """
        histories, lengths = interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]
        change = (histories[1:] != histories[:-1]).any(1) | (lengths[1:] != lengths[:-1])
        if self.USER_ID in interaction:  # two users may have the same history, and candidates of their own
            change |= interaction[self.USER_ID][1:] != interaction[self.USER_ID][:-1]
        if length:
            starts = [*range(0, len(histories), length), len(histories)]
        else:
            starts = [0, *(torch.nonzero(change)[:, 0] + 1).tolist(), len(histories)]
        firsts = starts[:-1]
        told = [h[:n] for h, n in zip(histories[firsts].tolist(), lengths[firsts].tolist(), strict=True)]
        items = interaction[self.ITEM_ID].tolist()
        asked = [items[a:b] for a, b in zip(starts[:-1], starts[1:], strict=True)]
        if self.base is not None and self.config["rerank_candidates"]:
            return self._reranked_candidates(interaction[firsts], told, asked)
        return torch.cat(self._scores(told, asked)).to(histories.device)

    def _reranked_candidates(
        self, interaction: Interaction, histories: Sequence[Sequence[int]], asked: Sequence[Sequence[int]]
    ) -> torch.Tensor:
        """Scores of each user's own candidates, one user after another ``[C_1 + C_2 + ...]``."""
        everything = self._base_scores(interaction)
        rows = [
            found[torch.as_tensor(items, device=found.device)] for found, items in zip(everything, asked, strict=True)
        ]
        tops = [row.topk(min(self.config["rerank_topk"], len(row))).indices for row in rows]
        llm = self._scores(histories, [[items[i] for i in top] for items, top in zip(asked, tops, strict=True)])
        lists = zip(rows, llm, tops, strict=True)
        return torch.cat([rerank(r[None], s.to(r.device)[None], t[None], self.rerank_weight)[0] for r, s, t in lists])

    def full_sort_predict(self, interaction: Interaction, hidden: Sequence[np.ndarray] = ()) -> torch.Tensor:
        """Scores of all items ``[B * n_items]``, by ``full_ranking``.

        *rerank*: the base recommender's top-K in the LLM's order, the rest behind. *exact*: the LLM's score of every
        item. *exact_topk*: of the best ``max(topk)`` alone, all others alike behind them.

        Args:
            hidden: for each row, items that are no answers and take no place in the top-K.

        Raises:
            UserError: rerank without a base recommender; exact_topk with ``attention`` sdpa or eager.
        """
        lengths = interaction[self.ITEM_SEQ_LEN].tolist()
        histories = [h[:n] for h, n in zip(interaction[self.ITEM_SEQ].tolist(), lengths, strict=True)]
        if self.config["full_ranking"] == "rerank":
            return self._reranked(interaction, histories, hidden).view(-1)
        if self.exact is None:
            prompt = cast(Prompt, self.prompt)  # checked with the configuration
            self.exact = ExactRanking(self.config, self.policy, prompt)
        scores = self.exact.rank([self.prompt.fit(h, self.llm.context) for h in histories], hidden)
        return scores.view(-1).to(interaction[self.ITEM_SEQ].device)

    def _reranked(
        self, interaction: Interaction, histories: Sequence[Sequence[int]], hidden: Sequence[np.ndarray]
    ) -> torch.Tensor:
        base = self._base_scores(interaction).clone()
        base[:, 0] = -torch.inf
        for row, items in enumerate(hidden):
            base[row, torch.as_tensor(items, device=base.device)] = -torch.inf
        # Of items that tie at the cut a seeded draw is in: ids follow the file, in which popular items come early.
        drawn = np.random.default_rng(self.config["candidate_seed"]).permutation(base.shape[1])
        order = torch.as_tensor(drawn, device=base.device)
        top = order[base[:, order].topk(min(self.config["rerank_topk"], base.shape[1] - 1), dim=1).indices]
        llm = torch.stack(self._scores(histories, top.tolist())).to(base.device)
        return rerank(base, llm, top, self.rerank_weight)

    def _base_scores(self, interaction: Interaction) -> torch.Tensor:
        """The base recommender's scores of all items ``[B, n_items]``; some models give them on the CPU."""
        scores = self._base().full_sort_predict(interaction).view(len(interaction), -1)
        # A base that reads columns of items has, behind those that someone met, more that are no answers.
        return scores[:, : self.n_items].float().to(interaction[self.ITEM_SEQ].device)

    def _base(self) -> AbstractRecommender:
        if self.base is None:
            raise UserError("--rerank_model: re-ranking needs a trained base recommender (`rerank_with`).")
        return self.base

    def rerank_with(self, base: AbstractRecommender) -> None:
        """Reorder this trained recommender's top items: in full ranking, and with ``rerank_candidates`` everywhere."""
        object.__setattr__(self, "base", base.eval())  # not a submodule: it is neither trained nor saved with us

    def _scores(self, histories: Sequence[Sequence[int]], items: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        if self._remembered is None:
            return self._computed_scores(histories, items)
        keys = [(tuple(h), tuple(i)) for h, i in zip(histories, items, strict=True)]
        if any(key not in self._remembered for key in keys):
            self._remembered.update(zip(keys, self._computed_scores(histories, items), strict=True))
        return [self._remembered[key] for key in keys]

    @contextmanager
    def scores_remembered(self) -> Iterator[None]:
        """Inside, whoever is asked the same list again gets the same scores at once; the weights must stay."""
        self._remembered = {}
        try:
            yield
        finally:
            self._remembered = None

    def _computed_scores(
        self, histories: Sequence[Sequence[int]], items: Sequence[Sequence[int]]
    ) -> list[torch.Tensor]:
        fitted = [self.prompt.fit(h, self.llm.context) for h in histories]
        logps = self.budget.run(
            lambda tokens: candidate_logps(self.policy, self.prompt, fitted, items, token_budget=tokens)
        )
        norm = self.config["score_norm"]
        prior = self._title_prior() if norm == "pmi" else None
        return [normalise(p, i, self.prompt, norm, prior) for p, i in zip(logps, items, strict=True)]

    def _title_prior(self) -> torch.Tensor:
        """Log-prob of every title after an empty history ``[n_items]``; kept for one evaluation."""
        if self.prior is None:
            everything = list(range(1, self.n_items))
            (logps,) = self.budget.run(
                lambda tokens: candidate_logps(self.policy, self.prompt, [[]], [everything], token_budget=tokens)
            )
            self.prior = torch.cat([logps.new_zeros(1), logps])
        return self.prior

    def train(self, mode: bool = True) -> LLMRanker:
        """As torch's, ``eval`` too; after either the weights may be others, so what was kept of them is dropped."""
        self.prior = None
        if self.exact is not None:
            self.exact.weights_changed()
        return super().train(mode)
