"""A finished LLMRanker run, from its folder: settings, data, the LLM with its adapter, and what it was before."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.config import LLMConfig
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.data.seeds import seeded
from recbole_llm.errors import UserError
from recbole_llm.explain.history_logps import History, answer_token_logps, summed
from recbole_llm.explain.ranked import Ranked
from recbole_llm.explain.run_files import read_per_user, read_record, run_settings, runs_there_are
from recbole_llm.llm.adapter import adapter_state, load_adapter, set_adapter_state
from recbole_llm.llm.identity import prompt_hash
from recbole_llm.llm_evaluation import LLMEvaluation
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.read_keys import reranks
from recbole_llm.recommender import train_recommender
from recbole_llm.run_log import explained
from recbole_llm.scoring import normalise
from recbole_llm.transfer import eval_config_of


class FinishedRun(LLMEvaluation):
    """An LLMRanker run as it lies in its folder; it ranks test rows as its evaluation did.

    Args:
        folder: the run folder.
        changes: of ``MOVABLE`` keys.

    Attributes:
        record: ``result.json``.
        rows: the test rows.
        per_user: the run's own table of them.

    Raises:
        UserError: no finished LLMRanker run, or data that have changed since.
    """

    def __init__(self, folder: Path, changes: dict[str, Any] | None = None) -> None:
        self.folder = folder = folder if folder.name else folder.resolve()  # the name of `.` tells no parent
        self.record = read_record(folder)
        if self.record["model"] != "LLMRanker":
            raise UserError(
                f"{folder}: a run of {self.record['model']}; explain reads runs of LLMRanker, which score titles. "
                f"{runs_there_are(folder.parent)}"
            )
        self.config = LLMConfig(config_dict=run_settings(folder, changes or {}))
        self.asked_config = eval_config_of(self.config)
        self.device = self.config["device"]
        with explained(self.config, None, "reading the data"):
            self.trained_on: Protocol = prepare_data(self.config)
            self.protocol = self.trained_on if self.asked_config is self.config else prepare_data(self.asked_config)
        self.rows: EvalRows = self.protocol.test
        if self.protocol.candidate_hash != self.record["candidate_hash"]:
            raise UserError(
                f"{folder}: the data give other test rows today (candidate hash {self.protocol.candidate_hash[:12]}) "
                f"than when it ran ({self.record['candidate_hash'][:12]}). Restore the data (--data_path names their "
                "folder), or run it again."
            )
        self.per_user = read_per_user(folder)
        self.item_tokens = self.rows.item_tokens

    # ---- rows

    def row_of(self, user: str) -> int:
        """The number of a user's test row, the last where there are several.

        Raises:
            UserError: no test user of this token.
        """
        tokens = [str(t) for t in self.rows.user_tokens[self.rows.users]]
        if user not in tokens:
            some = ", ".join(list(dict.fromkeys(tokens))[:5])
            raise UserError(f"--user={user}: not a test user; there are {len(set(tokens))}, for example {some}.")
        return len(tokens) - 1 - tokens[::-1].index(user)

    def user_token(self, row: int) -> str:
        """Whose row it is."""
        return str(self.rows.user_tokens[self.rows.users[row]])

    def sample(self, number: int) -> list[int]:
        """Rows of so many users, drawn by user token; a larger number adds users to those of a smaller one.

        Raises:
            UserError: there are fewer.
        """
        users = sorted({self.user_token(row) for row in range(len(self.rows))})
        if number > len(users):
            raise UserError(f"--users={number}: the run has {len(users)} test users. Ask for fewer.")
        place = {user: seeded(self.config["candidate_seed"], "explain", user).random() for user in users}
        return [self.row_of(user) for user in sorted(users, key=place.__getitem__)[:number]]

    def history(self, row: int) -> History:
        """The items that the LLM reads, oldest first: the last ``MAX_ITEM_LIST_LENGTH``, or as many as fit."""
        visible = self.rows.visible[torch.tensor([row])]
        items = visible[self.model.ITEM_SEQ][0, : visible[self.model.ITEM_SEQ_LEN][0]].tolist()
        return tuple(self.model.prompt.fit(items, self.model.llm.context))

    def stored_rank(self, row: int) -> float:
        """The target's rank in the run's own table, ties at their mean.

        Raises:
            UserError: the table has other rows than the data.
        """
        line = self.per_user.iloc[row] if self.per_user is not None and len(self.per_user) == len(self.rows) else None
        wanted = (self.user_token(row), " ".join(self.rows.target_tokens(row)))
        if line is None or (line["user"], line["target"]) != wanted:
            file = self.folder / "per_user.csv.gz"
            raise UserError(f"{file}: its rows are not those of the run's data; run it again.")
        return float(line["rank"])

    # ---- the LLM

    @cached_property
    def model(self) -> LLMRanker:
        """The ranker with the run's adapter, in evaluation mode; loaded when it is first asked for.

        Raises:
            UserError: the base model is another than the run's or cannot be had, titles or tokenizer have changed, or
                the adapter cannot be read.
        """
        try:
            with explained(self.config, None, "building the model"):
                model = LLMRanker(self.config, self.trained_on.train_data._dataset).to(self.device)
        except UserError as error:
            ran_over = f"{self.record['llm']} with weights {self.record['llm_revision']}"
            raise UserError(f"{self.folder}: it ran over {ran_over}, which must be there again: {error}") from error
        if model.llm.revision != self.record["llm_revision"]:
            raise UserError(
                f"{self.folder}: it ran over {self.record['llm']} with weights {self.record['llm_revision']}; "
                f"--llm={model.llm.name} has others ({model.llm.revision}). Name the model it ran over."
            )
        # Runs of older versions did not keep it.
        if self.record.get("prompt_hash", now := prompt_hash(model.prompt)) != now:
            raise UserError(
                f"{self.folder}: its titles are other tokens today ({now}) than when it was trained "
                f"({self.record['prompt_hash']}): the .item file, the tokenizer, its chat template or the prompt file "
                "has changed. Restore it, or run it again."
            )
        if self.asked_config is not self.config:
            model.rank_items_of(model.read_items(self.asked_config, self.protocol.dataset))
        if self.config["finetune"] == "lora":
            self._untrained = adapter_state(model.llm)  # of full weights this would be a second LLM
        if self.config["finetune"] != "none":
            load_adapter(model.llm, self.folder)
        model.rerank_weight = self.record.get("rerank_weight", model.rerank_weight)
        if reranks(self.config, self.rows.mode):
            model.rerank_with(train_recommender(self.asked_config, self.config["rerank_model"]).model)
        return model.eval()

    @torch.no_grad()
    def ranking(self, row: int) -> Ranked:
        """A row's answers as the evaluation ranks them, by the LLM as it is now."""
        scores, items = self.score_rows(self.rows, np.array([row]))
        return Ranked.of(scores[0].cpu().numpy(), items[0].cpu().numpy())

    def token_logps(
        self, histories: Sequence[History], items: Sequence[int], show_progress: bool = False
    ) -> list[list[torch.Tensor]]:
        """As ``answer_token_logps``, by the LLM as it is now."""
        model = self.model
        return model.budget.run(
            lambda tokens: answer_token_logps(
                model.policy, model.prompt, histories, items, token_budget=tokens, show_progress=show_progress
            )
        )

    def answer_logps(
        self, histories: Sequence[History], items: Sequence[int], show_progress: bool = False
    ) -> np.ndarray:
        """Log-probs of whole answers ``[H, I]``, nats."""
        found = self.token_logps(histories, items, show_progress)
        return np.array([summed(row) for row in found])

    def normed(self, logps: np.ndarray, items: Sequence[int]) -> np.ndarray:
        """Scores of titles from their log-probs ``[I]``, by ``score_norm``, whatever re-ranks them afterwards."""
        norm, found = self.config["score_norm"], torch.as_tensor(logps)
        if norm == "pmi":
            return (found - torch.as_tensor(self.answer_logps([()], items)[0])).numpy()
        return normalise(found, items, self.model.prompt, norm, None).numpy()

    def scores(self, history: History, items: Sequence[int]) -> np.ndarray:
        """``normed`` of items after a history ``[I]``."""
        return self.normed(self.answer_logps([history], items)[0], items)

    # ---- what it was before

    @property
    def reference_name(self) -> str | None:
        """What the last stage started from: "SFT", "base LLM", or None for a zero-shot run."""
        stages = [stage["loss"] for stage in self.record["stages"]]
        return None if not stages else "SFT" if len(stages) > 1 else "base LLM"

    @cached_property
    def sft_folder(self) -> Path | None:
        """The folder of the run's SFT stage; None where it is gone.

        Found by its record, which the run keeps a copy of: its name hangs on the version of the code.
        """
        wanted = next((_comparable(stage) for stage in self.record["stages"] if stage["loss"] == "SFT"), None)
        for file in sorted(self.folder.parent.glob("stages/SFT-*/stage.json")):
            try:
                found = _comparable(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError, KeyError):
                continue
            if found == wanted:
                return file.parent
        return None

    @property
    def lacks_reference(self) -> str | None:
        """Why the reference cannot be had; None where it can."""
        if self.reference_name is None:
            return "this run is zero-shot: nothing was trained, so there is nothing to compare it with"
        if self.reference_name == "SFT" and self.sft_folder is None:
            return f"the SFT stage of this run is not in {self.folder.parent / 'stages'} any more"
        if self.reference_name != "SFT" and self.config["finetune"] == "full":
            return "finetune=full changed the weights themselves, and a second LLM is not loaded to compare with"
        return None

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Inside, the LLM has the weights that the last stage started from; they are in the place of its own."""
        llm = self.model.llm
        try:
            if self.reference_name == "SFT":
                assert self.sft_folder is not None  # see lacks_reference
                load_adapter(llm, self.sft_folder)
            else:
                set_adapter_state(llm, self._untrained)
            self.model.eval()  # what was kept of the weights before is dropped
            yield
        finally:
            load_adapter(llm, self.folder)
            self.model.eval()


def _comparable(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage's record without what changes when the same stage is trained again."""
    return {key: value for key, value in stage.items() if key not in ("run", "seconds", "cpu_seconds", "reused")}
