"""What the stages of a DPO4Rec run share: the LLM, its questions, who is asked about, and the judging of texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.config import LLMConfig
from recbole_llm.costs import found_done
from recbole_llm.data.protocol import Protocol
from recbole_llm.data.seeds import seeded
from recbole_llm.dpo4rec.align import Reasoner, TextPair
from recbole_llm.dpo4rec.endpoint import endpoint_writer
from recbole_llm.dpo4rec.places import Places
from recbole_llm.dpo4rec.question import Question, described_items
from recbole_llm.dpo4rec.reasoning import Asked, write_texts
from recbole_llm.dpo4rec.reward import (
    BestAndWorst,
    ReadsTexts,
    Reward,
    RewardList,
    choose_pairs,
    reward_lists,
    rewards_of,
)
from recbole_llm.dpo4rec.text_vectors import text_vectors
from recbole_llm.files import content_hash
from recbole_llm.llm.sampling import Sampling, Written


@dataclass(frozen=True)
class Judged:
    """What the texts about pair users were worth to a recommender.

    Attributes:
        lists: what they were judged by.
        texts, rewards: of each user's N texts.
        pairs: best and worst.
    """

    lists: list[RewardList]
    texts: list[list[Written]]
    rewards: list[list[Reward]]
    pairs: list[BestAndWorst]


class Work:
    """What every stage of a run works with: the LLM, its questions, and who is asked about.

    Args:
        config, protocol, places: of the run.

    Raises:
        UserError: an LLM, a template or titles that cannot be had.
    """

    def __init__(self, config: LLMConfig, protocol: Protocol, places: Places) -> None:
        self.config, self.protocol, self.places = config, protocol, places
        self.stages = Path(config["checkpoint_dir"]) / "stages"
        self.user_tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
        self.reasoner = None if config["endpoint"] else Reasoner(config)
        llm = self.reasoner.llm if self.reasoner else None
        texts = described_items(config, protocol.dataset, llm.tokenizer if llm else None)
        self.found: list[dict[str, Any]] = []  # what was found done, and the seconds that it took
        self.counted: set[tuple[str, Sampling]] = set()  # texts whose seconds are in the record, by whom and how
        self.question = Question(config, texts, llm.tokenizer if llm else None, llm.context if llm else 0)

    @property
    def author(self) -> str:
        """What identifies who writes now."""
        if self.reasoner:
            return self.reasoner.author
        return content_hash([self.config["endpoint"], self.config["endpoint_model"]])

    def asked(self, places: Sequence[tuple[int, int]]) -> list[Asked]:
        """The prompt at each place (user, items known)."""
        make: Any = self.question.tokens if self.reasoner else self.question.text
        items = self.protocol.events.items_of
        return [Asked(str(self.user_tokens[u]), known, make(items(u)[:known])) for u, known in places]

    def write(self, places: Sequence[tuple[int, int]], sampling: Sampling, what: str) -> list[list[Written]]:
        """Texts at each place, by the LLM as it is now."""
        config = self.config
        written = write_texts(
            self.asked(places),
            self.reasoner.write if self.reasoner else endpoint_writer(config),
            sampling,
            folder=self.stages,
            author=self.author,
            seed=config["seed"],
            together=config["generation_batch"],
            what=what,
            apart=self.reasoner is None,
            show_progress=config["show_progress"],
        )
        texts = (self.author, sampling)
        if any(written.found) and texts not in self.counted:
            self.found.append(found_done(what, *written.found))
        self.counted.add(texts)
        return written.texts

    def judge(self, judge: ReadsTexts, pairs: dict[int, int]) -> Judged:
        """N texts about each pair user, and what each is worth to the recommender.

        Args:
            judge: the recommender.
            pairs: user -> items known.
        """
        config = self.config
        sampling = Sampling(config["samples"], config["reasoning_tokens"], config["temperature"], config["top_p"])
        texts = self.write(list(pairs.items()), sampling, "Sample texts")
        words = [[text.text for text in mine] for mine in texts]
        flat = text_vectors(config, [word for mine in words for word in mine])
        vectors = flat.reshape(len(words), config["samples"], -1)
        lists = reward_lists(config, self.protocol, pairs)
        rewards = rewards_of(judge, lists, list(vectors))
        return Judged(lists, texts, rewards, choose_pairs(rewards, words, config["reward_gap"]))

    def text_pairs(self, judged: Judged) -> list[TextPair]:
        """The chosen pairs as the LLM is trained on them."""
        asked, found = self.asked(list(self.places.pairs.items())), []
        for pair in judged.pairs:
            texts = judged.texts[pair.row]
            found.append(
                TextPair(
                    judged.lists[pair.row].user, list(asked[pair.row].prompt), (texts[pair.best], texts[pair.worst])
                )
            )
        return found


def others_in_place(users: Sequence[int], seed: int) -> list[int]:
    """For each place the number of a place of another user, each once, where there are others enough.

    Args:
        users: of each place.
    """
    names = sorted(set(users))
    ring = dict(zip(names, seeded(seed, "placebo").permutation(len(names)).tolist(), strict=True))
    order = sorted(range(len(users)), key=lambda place: (ring[users[place]], place))
    longest = max(Counter(users).values())  # a user's places lie side by side; this step leaves them
    found = [0] * len(users)
    for at, place in enumerate(order):
        found[place] = order[(at + longest) % len(order)]
    return found


def judged_lines(judged: Judged, user_tokens: np.ndarray) -> str:
    """One JSON line a pair user: the N texts with their rewards, and the numbers of best and worst."""
    chosen = {pair.row: pair for pair in judged.pairs}
    lines = []
    for row, (one, texts, rewards) in enumerate(zip(judged.lists, judged.texts, judged.rewards, strict=True)):
        pair = chosen.get(row)
        told = [{"text": t.text, "tokens": t.tokens, **r._asdict()} for t, r in zip(texts, rewards, strict=True)]
        line: dict[str, Any] = {"user": str(user_tokens[one.user]), "texts": told}
        line |= {"best": pair.best, "worst": pair.worst} if pair else {}
        lines.append(json.dumps(line, ensure_ascii=False))
    return "\n".join(lines) + "\n"


def judged_facts(judged: Judged) -> dict[str, Any]:
    """Means over pair users: reward of the best, the worst and any text, and how many pairs there are."""
    ndcg = np.array([[reward.ndcg for reward in mine] for mine in judged.rewards])
    texts = [text for mine in judged.texts for text in mine]
    return {
        "users": len(ndcg),
        "pairs": len(judged.pairs),
        "all_alike": int((ndcg.max(1) == ndcg.min(1)).sum()),
        "ndcg_best": float(ndcg.max(1).mean()),
        "ndcg_mean": float(ndcg.mean()),
        "ndcg_worst": float(ndcg.min(1).mean()),
        "tokens": float(np.mean([text.tokens for text in texts])),
        "ended": float(np.mean([text.ended for text in texts])),
    }
