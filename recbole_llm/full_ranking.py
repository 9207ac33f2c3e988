"""``full_ranking`` exact and exact_topk: scores of a whole catalogue for several users, in the order of its items."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from recbole.config import Config

from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.data.prompt import Prompt
from recbole_llm.errors import UserError
from recbole_llm.llm.budget import TokenBudget
from recbole_llm.llm.prompt_cache import cannot_go_on
from recbole_llm.llm.sharded import is_sharded
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.types import CausalLM
from recbole_llm.read_keys import asked_modes
from recbole_llm.scoring import candidate_logps
from recbole_llm.title_scores import TitleScores, title_scores
from recbole_llm.topk_search import Found, SearchStats

USERS_AT_ONCE = {"cpu": 16, "cuda": 64}  # of a search; 8 nodes of each fill matrix products well enough
# Prompt tokens and trie nodes whose keys and values a search holds for each token of a pass: less than autograd keeps.
KEPT = 8


def users_at_once(token_budget: int, longest: int, device: torch.device) -> int:
    """Users that share a search: as many as fill half of what may be kept by their prompts, 16 at most, 64 on a GPU.

    Args:
        token_budget: tokens of one forward pass.
        longest: tokens of the longest prompt.
        device: of the model.
    """
    return max(1, min(USERS_AT_ONCE["cuda" if device.type == "cuda" else "cpu"], KEPT * token_budget // 2 // longest))


def users_together(config: Config) -> int:
    """Users of a batch of an evaluation: more where searches share passes, and one that ends makes room for others."""
    return 64 if config["full_ranking"] == "exact_topk" and "full" in asked_modes(config) else 16


def check_search(config: Config, model: CausalLM) -> None:
    """Whether exact_topk can work with the model and the attention back end that it was loaded with.

    Raises:
        UserError: it cannot.
    """
    if (reason := cannot_go_on(model)) is not None:
        raise UserError(
            f"--full_ranking=exact_topk: it goes on from what is kept of a prompt, and there --llm={config['llm']} "
            f"{reason} (--attention={config['attention']}); set --full_ranking=exact."
        )


class ExactRanking:
    """Ranks one catalogue by one LLM.

    Args:
        config: of the run: ``full_ranking``, ``score_norm``, ``topk``, ``token_budget``.
        model: a causal LM.
        prompt: prompts and answers of the catalogue.

    Attributes:
        stats: what the searches of exact_topk cost so far; None before the first.

    Raises:
        UserError: exact_topk with an LLM or an attention back end that cannot go on from what is kept of a prompt.
    """

    def __init__(self, config: Config, model: CausalLM, prompt: Prompt) -> None:
        self.kind, self.norm, self.k = config["full_ranking"], config["score_norm"], max(config["topk"])
        self.model, self.prompt = model, prompt
        # Its own: what a search lacks, training passes may have.
        self.budget = TokenBudget(config["token_budget"], shrinks=not is_sharded(model))
        self.trie = title_trie(prompt.answers)
        self.goes_on = cannot_go_on(model) is None
        self.stats: SearchStats | None = None
        self._scores: TitleScores | None = None
        self._log = logging.getLogger(__name__)
        if self.kind == "exact_topk":
            check_search(config, model)
        else:
            told = f"--full_ranking=exact: {len(self.trie.inner)} tokens of titles go through the LLM for every user."
            if self.goes_on:
                told += " --full_ranking=exact_topk gives the same metrics for a fraction, once the LLM is trained."
            self._log.warning(told)

    def rank(self, histories: Sequence[Sequence[int]], hidden: Sequence[np.ndarray]) -> torch.Tensor:
        """Scores of all items ``[B, n_items]``, on the CPU.

        exact_topk knows those of all items no worse than the K-th best, K = ``max(topk)``, and puts all others one
        below these.

        Args:
            histories: item ids for each user, oldest first, already cut to fit.
            hidden: for each user, items that are no answers and take no place; none at all where it is empty.
        """
        if self.kind == "exact":
            keys = [tuple(history) for history in histories]
            found = {key: self._full_pass(key, self.scores) for key in dict.fromkeys(keys)}
            return torch.stack([found[key] for key in keys])
        seen = [tuple(sorted(map(int, items))) for items in hidden] or [()] * len(histories)
        asked = [(tuple(h), s) for h, s in zip(histories, seen, strict=True)]
        rows = self._topk(list(dict.fromkeys(asked)))
        return torch.stack([rows[one] for one in asked])

    def _topk(self, asked: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> dict[Hashable, torch.Tensor]:
        """(History, hidden items) -> scores ``[n_items]``."""
        prompts = [self.prompt.trunk(history) for history, _ in asked]
        hidden = [np.array(items, dtype=np.int64) for _, items in asked]
        longest, device, scores = max(map(len, prompts)), next(self.model.parameters()).device, self.scores

        def search(tokens: int) -> tuple[list[Found], SearchStats]:
            users = min(len(prompts), users_at_once(tokens, longest, device))
            return exact_topk(
                self.model,
                prompts,
                self.trie,
                scores,
                k=self.k,
                hidden=hidden,
                token_budget=tokens,
                users_at_once=users,
                most_kept=max(0, KEPT * tokens - users * longest),
            )

        found, stats = self.budget.run(search)
        self._count(stats)
        return {one: self._row(mine, one[1]) for one, mine in zip(asked, found, strict=True)}

    def _row(self, found: Found, hidden: Sequence[int]) -> torch.Tensor:
        """Scores of all items ``[n_items]``; NaN, which evaluation tells, where fewer were found than there are."""
        enough = len(found.items) >= min(self.k, self.trie.n_items - len({0, *hidden}))
        behind = float(found.scores.min(initial=0)) - 1 if enough else torch.nan
        row = torch.full((self.trie.n_items,), behind)
        row[found.items] = torch.as_tensor(found.scores)
        return row

    def weights_changed(self) -> None:
        """The prior of ``score_norm=pmi`` is stale."""
        self._scores = None

    @property
    def scores(self) -> TitleScores:
        """How log-probs become scores; for pmi with the log-prob of every title after an empty history."""
        if self._scores is None:
            prior = self._full_pass((), title_scores(self.trie)).numpy() if self.norm == "pmi" else None
            self._scores = title_scores(self.trie, self.norm, prior)
        return self._scores

    def _full_pass(self, history: Sequence[int], scores: TitleScores) -> torch.Tensor:
        prompt = self.prompt.trunk(history)
        if self.goes_on:
            return self.budget.run(
                lambda tokens: exact_scores(self.model, prompt, self.trie, scores, token_budget=tokens)
            )
        items = list(range(1, self.trie.n_items))
        (logps,) = self.budget.run(
            lambda tokens: candidate_logps(self.model, self.prompt, [history], [items], token_budget=tokens)
        )
        found = scores.of_items(logps.float().cpu().numpy(), np.array(items))
        return torch.cat([torch.tensor([-torch.inf]), torch.as_tensor(found)])

    def _count(self, stats: SearchStats) -> None:
        if stats.given_up and not (self.stats and self.stats.given_up):
            self._log.warning(
                f"--full_ranking=exact_topk: {stats.given_up} of {len(stats.expansions)} users need so many titles for "
                "their best that they got a full pass, which gives the same; the LLM spreads its probability over too "
                "many titles. If that is so for most users, --full_ranking=exact costs less."
            )
        self.stats = stats if self.stats is None else self.stats + stats
