"""Explanations of finished runs: equal to the obvious code, to the run's own table, and to what a known scorer does."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from recbole_llm import cli, files
from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.data.pair_prompt import PairPrompt, make_prompt
from recbole_llm.data.prompt import Prompt
from recbole_llm.data.template import load_template
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.explain import agreement, command, faithful_users
from recbole_llm.explain.agreement import agrees
from recbole_llm.explain.explain import explain_user
from recbole_llm.explain.explanation import Explanation
from recbole_llm.explain.faithfulness import SIZES, Deletion, deletion_tests, influences, over_users
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.explain.history_logps import History, answer_token_logps, history_tree, question
from recbole_llm.explain.other_ranks import other_ranks
from recbole_llm.explain.ranked import Ranked
from recbole_llm.explain.run_files import run_settings
from recbole_llm.llm.adapter import adapter_state, digest
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.explain_html import explanation_html
from recbole_llm.report.explain_tables import effects, reading_notes
from recbole_llm.report.explain_text import explanation_text, faithfulness_text
from recbole_llm.run_folder import run_folder_of
from tests.conftest import toy_settings, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

TEXTS = ["", "red cat", "red cow", "blue cat", "a much longer title of a film", "red", "owl (1999)", "red cat (2)"]
LEARNS = {"learning_rate": 0.01, "preference_learning_rate": 0.01}  # enough for ranks to move


# ---- many histories in one tree


@pytest.fixture(scope="module")
def llm() -> tuple[torch.nn.Module, Any]:
    return tiny_llm()


def prompt_of(family: str, tokenizer: Any) -> Prompt | PairPrompt:
    return make_prompt(load_template(family, PROPERTIES), TEXTS, tokenizer)


def one_at_a_time(model: torch.nn.Module, before: list[int], answer: list[int]) -> torch.Tensor:
    """The obvious code: a full forward of prompt and answer, log-softmax of all logits."""
    logps = model(input_ids=torch.tensor([before + answer])).logits[0].log_softmax(-1)
    return torch.stack([logps[len(before) - 1 + i, token] for i, token in enumerate(answer)])


def asked_of(prompt: Prompt | PairPrompt, history: History, items: list[int]) -> list[tuple[list[int], list[int]]]:
    """Prompt and answer of each item, by the prompt's own methods."""
    if isinstance(prompt, PairPrompt):
        before = prompt.trunk(history) + prompt.listing(*items)
        return [(before, prompt.answer(a, b)) for a, b in (items, items[::-1])]
    return [(prompt.trunk(history), prompt.answers[item]) for item in items]


def without_each(history: History) -> list[History]:
    return [history, *(history[:place] + history[place + 1 :] for place in range(len(history)))]


@torch.no_grad()
def check_equal(model: torch.nn.Module, prompt: Any, histories: list[History], items: list[int], budget: int) -> None:
    found = answer_token_logps(model, prompt, histories, items, token_budget=budget)
    assert len(found) == len(histories)
    for history, mine in zip(histories, found, strict=True):
        for (before, answer), logps in zip(asked_of(prompt, history, items), mine, strict=True):
            torch.testing.assert_close(logps, one_at_a_time(model, before, answer), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["stream", "instruct", "pair"])
@pytest.mark.parametrize("budget", [64, 4096])
def test_leave_one_out_in_one_tree_equals_one_prompt_at_a_time(llm: Any, family: str, budget: int) -> None:
    """An item that stands twice, neighbours that begin with the same tokens, more histories than one pass holds."""
    model, tokenizer = llm
    check_equal(model, prompt_of(family, tokenizer), without_each((1, 2, 1, 4, 5, 6)), [3, 7], budget)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=8),
    st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True),
    st.integers(1, 200),
)
def test_any_histories(llm: Any, histories: list[History], items: list[int], budget: int) -> None:
    """Repeated, empty, and one the beginning of another."""
    model, tokenizer = llm
    check_equal(model, prompt_of("stream", tokenizer), histories, items, budget)


def test_what_begins_alike_is_computed_once(llm: Any) -> None:
    """A history of n items: its own prompt, and behind each beginning of it the part after the item left out."""
    prompt = prompt_of("instruct", llm[1])
    history = (1, 2, 3, 4)
    tree = history_tree(prompt, sorted(set(without_each(history))), question(prompt, [5, 6]))
    lines = [len(prompt.lines[item]) for item in history]
    tails = sum(sum(lines[place + 1 :]) for place in range(4))
    ends = 5 * (len(prompt.suffix) + sum(len(prompt.answers[i]) - 1 for i in (5, 6)))
    # (1, 2, 3) is a beginning of the whole history, so it costs its question alone.
    assert tree.fed == len(prompt.prefix) + sum(lines) + tails + ends


def test_a_pair_prompt_takes_two(llm: Any) -> None:
    with pytest.raises(ValueError, match="ranks two candidates, not 3"):
        question(prompt_of("pair", llm[1]), [1, 2, 3])


# ---- leave-one-out and deletion tests, by scorers whose reasons are known

HISTORY = (11, 12, 13, 14, 15, 16, 17, 18, 19, 20)


def decided_by_17(histories: list[History]) -> np.ndarray:
    """Two titles: item 17 gives the first one 5 nats, and takes 1 from the second."""
    has = np.array([17 in history for history in histories], dtype=float)
    return np.stack([-20 + 5 * has, -20 - has], axis=1)


def additive(histories: list[History]) -> np.ndarray:
    return np.array([[sum((item - 10) ** 2 for item in history)] for history in histories], dtype=float)


def blind(histories: list[History]) -> np.ndarray:
    return np.full((len(histories), 1), -12.0)


def either_of_two(histories: list[History]) -> np.ndarray:
    """Item 13 or item 19 gives 3 nats; both give no more. Leave-one-out cannot see that."""
    return np.array([[3.0 * bool({13, 19} & set(history))] for history in histories])


def deletions_of(score: Any, user: int = 0) -> list[list[Deletion]]:
    return deletion_tests(score, HISTORY, influences(score, HISTORY), np.random.default_rng(user))


def test_the_item_that_decides_is_found() -> None:
    found = influences(decided_by_17, HISTORY)
    assert found[:, 0].tolist() == [0, 0, 0, 0, 0, 0, 5, 0, 0, 0]
    assert found[:, 1].tolist() == [0, 0, 0, 0, 0, 0, -1, 0, 0, 0]
    tests, others = deletions_of(decided_by_17)
    for test in tests:
        assert 6 in test.places and len(test.places) == test.size
        assert (test.removed, test.kept) == (5, 0)
        assert set(test.removed_random) | set(test.kept_random) == {0.0, 5.0}
    # What takes from the second title is the last to be removed, and nothing else matters to it.
    assert all(6 not in test.places and test.removed == 0 and test.kept == -1 for test in others)
    comparisons = {
        (c.test, c.size): c for c in over_users([deletions_of(decided_by_17, user)[0] for user in range(40)])
    }
    for size in SIZES:
        one, other = comparisons["removed", size], comparisons["kept", size]
        assert one.influential == 5 and one.random == pytest.approx(5 * size / 10, abs=0.2) and one.wins == 1
        assert other.influential == 0 and other.random == pytest.approx(5 * (10 - size) / 10, abs=0.2)
        assert other.wins == 1 and one.p < 1e-10 > other.p and other.difference < 0 < one.difference


def test_a_scorer_that_ignores_the_history_shows_no_difference() -> None:
    assert not influences(blind, HISTORY).any()
    for comparison in over_users([deletions_of(blind, user)[0] for user in range(5)]):
        assert comparison.influential == comparison.random == comparison.difference == comparison.wins == 0
        assert comparison.ties == 1 and comparison.p is comparison.low is comparison.high is None
    assert "–" in faithfulness_text(over_users([deletions_of(blind)[0]]))


def test_deletion_of_an_additive_scorer_by_hand() -> None:
    """Weights 1, 4, ..., 100: the three largest are 100 + 81 + 64."""
    weights = np.arange(1, 11) ** 2
    assert influences(additive, HISTORY)[:, 0].tolist() == weights.tolist()
    (tests,) = deletions_of(additive)
    assert [test.removed for test in tests] == [100, 181, 245]
    assert [test.kept for test in tests] == [285, 204, 140]
    assert [test.places for test in tests] == [(9,), (8, 9), (7, 8, 9)]
    for test in tests:
        assert len(test.removed_random) == len(test.kept_random) == 20
        # Removing a set and keeping it alone share out what there is.
        assert np.allclose(np.add(test.removed_random, test.kept_random), weights.sum())
        assert np.mean(test.removed_random) == pytest.approx(38.5 * test.size, abs=16 * test.size)


def test_the_deletion_test_can_fail() -> None:
    """Two items that stand in for each other: leave-one-out sees neither, and removes nothing that matters."""
    tests = [deletions_of(either_of_two, user)[0] for user in range(30)]
    comparisons = {(c.test, c.size): c for c in over_users(tests)}
    assert comparisons["removed", 2].influential == 0 < comparisons["removed", 2].random
    assert comparisons["removed", 3].difference < 0 and comparisons["removed", 3].wins == 0
    assert comparisons["kept", 2].wins == 0


def test_draws_depend_on_the_seed_alone() -> None:
    one, other, third = (deletions_of(additive, seed)[0] for seed in (1, 1, 2))
    assert one == other and one != third


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_histories_have_smaller_tests(length: int) -> None:
    history = HISTORY[:length]
    (tests,) = deletion_tests(additive, history, influences(additive, history), np.random.default_rng(0))
    assert [test.size for test in tests] == list(range(1, length))


def test_paired_t_test_by_hand() -> None:
    """t = mean / (sd / sqrt(n)) of the differences, and its interval."""
    removed, random = np.array([3.0, 1.0, 2.5, 0.5, 4.0]), np.array([1.0, 1.5, 2.0, 0.25, 1.0])
    users = [[Deletion(2, (0, 1), a, (b - 0.5, b + 0.5), 0.0, (0.0,))] for a, b in zip(removed, random, strict=True)]
    found = over_users(users)[0]
    difference = removed - random
    error = difference.std(ddof=1) / np.sqrt(5)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(difference.mean() / error), 4))
    half = stats.t.ppf(0.975, 4) * error
    assert (found.low, found.high) == pytest.approx((difference.mean() - half, difference.mean() + half))
    assert (found.users, found.wins, found.ties) == (5, 0.8, 0)
    assert over_users(users[:1])[0].p is None


# ---- ranks


def test_ranks_and_near_ties() -> None:
    """The lists are worked out by hand; item 9 is no answer."""
    ranked = Ranked.of(np.array([1.0, 3.0, -np.inf, 2.0, 2.0]), np.array([5, 6, 9, 7, 8]))
    assert ranked.items.tolist() == [6, 7, 8, 5]
    assert [ranked.rank([item]) for item in (6, 7, 8, 5, 9)] == [1, 2.5, 2.5, 4, None]
    assert ranked.rank([7, 8]) == 2 and ranked.rank([5, 6]) == 1
    assert ranked.score(9) is None and ranked.score(5) == 1
    assert ranked.may_be([7], 2.5, 1e-3) and ranked.may_be([7], 2, 1e-3) and not ranked.may_be([7], 4, 1e-3)
    assert ranked.may_be([5], 3, 1.1) and not ranked.may_be([5], 3, 0.9)


# ---- finished runs


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the made-up data, in which a module's runs lie."""
    return write_dataset(tmp_path_factory.mktemp("explain") / "data", users=25).parent


@pytest.fixture(scope="module")
def given_settings(place: Path) -> dict[str, Any]:
    few = {"few_shot": 12, "eval_users": 8, "encoder": "none"}
    return {**toy_settings(place / "data", place / "saved"), **few}


def run(place: Path, settings: dict[str, Any], **changes: Any) -> Path:
    """Run a model where RecBole may leave its logs; returns the run folder."""
    own = {"model": "LLMRanker", "llm": "tiny", "train_batch_size": 32, **LEARNS} if "model" not in changes else {}
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        return Path(run_recbole_llm(config_dict={**settings, **own, **changes})["run_folder"])


@pytest.fixture(scope="module")
def sasrec(place: Path, given_settings: dict[str, Any]) -> Path:
    return run(place, given_settings, model="SASRec", few_shot=None)


@pytest.fixture(scope="module")
def sft(place: Path, given_settings: dict[str, Any]) -> Path:
    return run(place, given_settings)


@pytest.fixture(scope="module")
def dpo(place: Path, given_settings: dict[str, Any], sft: Path, sasrec: Path) -> Path:
    """A DPO run that shares its SFT stage with the SFT run; both lie beside a run of SASRec."""
    return run(place, given_settings, loss="DPO", rejected_num=1)


def row_of(folder: Path, user: str) -> pd.Series:
    return pd.read_csv(folder / "per_user.csv.gz", dtype={"user": str, "target": str}).set_index("user").loc[user]


def users_of(folder: Path) -> list[str]:
    return pd.read_csv(folder / "per_user.csv.gz", dtype={"user": str})["user"].tolist()


@pytest.fixture(scope="module")
def finished(dpo: Path) -> FinishedRun:
    return FinishedRun(dpo)


@pytest.fixture(scope="module")
def explained(finished: FinishedRun) -> Explanation:
    """Of a user whose target is not at the top, so that two titles are explained."""
    table = finished.per_user
    return explain_user(finished, table["user"][table["rank"] > 1].iloc[-1], k=5)


def test_the_settings_are_those_of_the_run(dpo: Path, sft: Path) -> None:
    """The hash of everything that determines a run, from what its folder says, is the one in its name."""
    for folder in (dpo, sft):
        assert run_folder_of(LLMConfig(config_dict=run_settings(folder, {}))) == folder


def test_every_rank_is_that_of_the_run(finished: FinishedRun) -> None:
    for user in users_of(finished.folder):
        found = explain_user(finished, user, k=1)
        assert found.agrees and found.target.rank == found.stored_rank == row_of(finished.folder, user)["rank"]
        assert found.target.item == row_of(finished.folder, user)["target"]


def test_history_and_prompt_are_what_the_llm_read(finished: FinishedRun, explained: Explanation) -> None:
    """Against the data file: all of the user's items but the last, by time."""
    inter = pd.read_csv(finished.config["data_path"] + "/toy.inter", sep="\t", dtype=str)
    mine = inter[inter["user_id:token"] == explained.user].sort_values("timestamp:float")["item_id:token"].tolist()
    titles = pd.read_csv(finished.config["data_path"] + "/toy.item", sep="\t", dtype=str).set_index("item_id:token")
    texts = [f"{titles.loc[i, 'title:token_seq']} ({titles.loc[i, 'release_year:token']})" for i in mine]
    assert list(explained.history) == texts[:-1] and explained.target.text == texts[-1] and explained.left_out == 0
    assert explained.prompt == "Titles that one person chose, in order:\n" + "".join(f"{t}\n" for t in texts[:-1])
    assert "".join(explained.prompt_tokens) == explained.prompt


@torch.no_grad()
def test_log_probs_by_token_equal_one_sequence_at_a_time(finished: FinishedRun, explained: Explanation) -> None:
    model, history = finished.model, finished.history(finished.row_of(explained.user))
    item_of = {str(token): i for i, token in enumerate(finished.item_tokens)}
    assert [title.rank for title in explained.titles[:5]] == [1, 2, 3, 4, 5]
    for title in explained.titles:
        answer = model.prompt.answers[item_of[title.item]]
        expected = one_at_a_time(model.policy, model.prompt.trunk(history), answer)
        assert list(title.logps) == pytest.approx(expected.tolist(), abs=1e-4)
        assert title.score == pytest.approx(title.logp, abs=1e-4)
        assert "".join(title.tokens) == f"{title.text}\n"


@torch.no_grad()
def test_influences_equal_one_sequence_at_a_time(finished: FinishedRun, explained: Explanation) -> None:
    model, history = finished.model, finished.history(finished.row_of(explained.user))
    item_of = {str(token): i for i, token in enumerate(finished.item_tokens)}
    for influence in explained.influences:
        answer = model.prompt.answers[item_of[influence.title.item]]
        sums = [float(one_at_a_time(model.policy, model.prompt.trunk(h), answer).sum()) for h in without_each(history)]
        assert list(influence.by_item) == pytest.approx([sums[0] - one for one in sums[1:]], abs=2e-4)
        first = influence.tests[0]
        assert first.removed == pytest.approx(max(influence.by_item), abs=2e-4)
        assert first.places == (int(np.argmax(influence.by_item)),)
    assert len({influence.role for influence in explained.influences}) == len(explained.influences)


def test_reference_is_the_sft_policy(finished: FinishedRun, sft: Path) -> None:
    """Against a run of SFT alone, whose own evaluation ranked by these weights, and whose adapter scores the titles."""
    before = FinishedRun(sft)
    moved = []
    for user in users_of(sft):
        found, alone = explain_user(finished, user, k=9), explain_user(before, user, k=9)
        assert found.reference == "SFT" and found.target.reference_rank == row_of(sft, user)["rank"]
        own = {title.item: title for title in alone.titles}
        for title in found.titles:
            if title.item in own:
                assert title.reference_logp == pytest.approx(own[title.item].logp, abs=1e-4)
            assert title.reward == pytest.approx(0.1 * (title.logp - title.reference_logp))
            moved.append(abs(title.change))
    assert max(moved) > 0.01


def test_reference_has_a_prior_of_its_own(place: Path, given_settings: dict[str, Any]) -> None:
    """score_norm=pmi takes off what the weights of the moment say without history; the ranks are those of SFT."""
    sft = run(place, given_settings, score_norm="pmi")
    dpo = FinishedRun(run(place, given_settings, score_norm="pmi", loss="DPO", rejected_num=1))
    for user in users_of(sft):
        row = dpo.row_of(user)
        before = dpo.ranking(row)
        with dpo.as_reference():
            found = dpo.ranking(row)
        assert found.rank([int(dpo.rows.targets[row])]) == row_of(sft, user)["rank"]
        assert found.scores != pytest.approx(before.scores, abs=1e-3)
        assert dpo.ranking(row).scores == pytest.approx(before.scores, abs=1e-5)


def test_the_runs_own_weights_are_back(finished: FinishedRun, explained: Explanation) -> None:
    weights = digest(adapter_state(finished.model.llm))
    again = explain_user(finished, explained.user, k=5)
    assert digest(adapter_state(finished.model.llm)) == weights and again == explained


def test_other_models_ranks_are_read(explained: Explanation, sasrec: Path, dpo: Path, sft: Path) -> None:
    (found,) = explained.others
    assert (found.model, found.folder, found.trained_on) == ("SASRec", str(sasrec), None)
    assert found.rank == row_of(sasrec, explained.user)["rank"]
    assert any("on as many users" in note for note in explained.notes)
    named = explain_user(FinishedRun(dpo), explained.user, k=1, baseline=sft).others
    assert [(o.model, o.rank) for o in named] == [("LLMRanker", row_of(sft, explained.user)["rank"])]


def test_another_item(finished: FinishedRun, explained: Explanation) -> None:
    """One that is no candidate has log-probs, and no rank."""
    row = finished.row_of(explained.user)
    known = set(finished.rows.candidates[row].tolist()) | set(finished.rows.history[row].tolist())
    item = next(i for i in range(1, 61) if i not in known)
    found = explain_user(finished, explained.user, k=2, item=str(finished.item_tokens[item]))
    asked = found.titles[-1]
    assert asked.text == finished.model.texts[item] and asked.rank is asked.score is asked.reference_rank is None
    assert found.influences[-1].role == "asked" and found.influences[-1].title == asked
    assert "asked: " in explanation_text(found)


def test_sft_run(sft: Path) -> None:
    """The change is since before training; there is no reward, and no SFT stage to compare with."""
    found = explain_user(FinishedRun(sft), users_of(sft)[0])
    assert found.reference == "base LLM" and all(title.reward is None for title in found.titles)
    assert any(note.startswith("This run is SFT") for note in found.notes)
    text = explanation_text(found)
    assert "reward" not in text.split("Notes")[0] and "rank, base LLM" in text


def test_an_sft_stage_that_is_gone(dpo: Path, tmp_path: Path) -> None:
    (tmp_path / "saved").mkdir()
    shutil.copytree(dpo, tmp_path / "saved" / dpo.name)
    found = explain_user(FinishedRun(tmp_path / "saved" / dpo.name), users_of(dpo)[0])
    assert found.reference is None and found.others == () and found.agrees
    assert any("SFT stage of this run is not in" in note for note in found.notes)
    assert any("run SASRec with this run's data" in note for note in found.notes)
    assert "change" not in explanation_html(found).split("<h2>Notes")[0]


KINDS = [
    {"prompt": "instruct", "loss": "SDPO", "rejected_num": 2, "score_norm": "mean"},
    {"loss": "RosePO", "smoothing": 0.2, "score_norm": "pmi"},
    {"loss": "DMPO", "reference_free": True, "epochs": 0, "next_items": 2},
    {"prompt": "pair", "loss": "DMPO", "sft_positions": 3, "preference_positions": 2, "eval_args": {"mode": "uni1"}},
    {"finetune": "none"},
    {"finetune": "full", "learning_rate": 1e-3, "MAX_ITEM_LIST_LENGTH": 4},
    {"full_ranking": "rerank", "rerank_topk": 5, "eval_args": {"mode": "full"}},
    {"full_ranking": "exact_topk", "eval_args": {"mode": {"valid": "uni9", "test": "full"}}},
    {"eval_args": {"split": {"RS": [0.6, 0.2, 0.2]}, "mode": {"valid": "uni9", "test": "uni9"}}},
]
TOLD = [
    ("SFT", "score"),
    ("SFT", "score"),
    ("base LLM", "epochs=0: the reference is the LLM before training"),
    ("SFT", "Pair prompt:"),
    (None, "this run is zero-shot"),
    (None, "finetune=full changed the weights themselves"),
    ("base LLM", "the LLM ordered the top 5 of Pop alone"),
    ("base LLM", "items behind the best 10 tie"),
    ("base LLM", "test rows; the last one is explained"),
]


@pytest.mark.parametrize(("changes", "told"), zip(KINDS, TOLD, strict=True))
def test_every_kind_of_run(
    place: Path, given_settings: dict[str, Any], changes: dict[str, Any], told: tuple[str | None, str]
) -> None:
    """The rank is the run's own, and what cannot be had is said."""
    folder = run(place, given_settings, **changes)
    finished = FinishedRun(folder)
    with pytest.MonkeyPatch.context() as patch:  # a recommender that served the run is found, not trained again
        patch.setattr(files, "write_json", lambda *args: pytest.fail("trained again"))
        for user in users_of(folder)[:2]:
            found = explain_user(finished, user, k=3)
            assert found.agrees and found.reference == told[0]
            text, page = explanation_text(found), explanation_html(found)
            assert told[1] in text and "as in per_user.csv.gz" in page
            assert all(influence.tests for influence in found.influences)
            if found.reference is not None and "SFT" in finished.record["stages"][0]["loss"]:
                assert found.titles[0].change != 0
    if "MAX_ITEM_LIST_LENGTH" in changes:
        assert len(found.history) == 4 and found.left_out == 7 and "7 older items" in text


def test_a_run_over_another_data_set(place: Path, given_settings: dict[str, Any]) -> None:
    write_dataset(place / "data", users=15, seed=5, name="other")
    folder = run(place, given_settings, eval_dataset="other", epochs=1)
    found = explain_user(FinishedRun(folder), users_of(folder)[0])
    assert found.agrees and found.run["dataset"] == "other" and found.reference == "base LLM"


def test_a_run_whose_data_lie_in_two_places(place: Path, given_settings: dict[str, Any]) -> None:
    """ml-100k lies in RecBole's package, the data that are ranked where `data_path` says."""
    films = {"dataset": "ml-100k", "few_shot": 5, "eval_users": 5, "item_text": "{movie_title}", "sft_positions": 5}
    write_dataset(place / "data", users=15, seed=5, name="other")
    own = {"eval_config": {"eval_users": 9}}
    folder = run(place, given_settings, **films, **own, eval_dataset="other", epochs=1)
    found = explain_user(FinishedRun(folder), users_of(folder)[0])
    assert found.agrees and found.run["dataset"] == "other" and len(users_of(folder)) == 9
    moved = place / "moved" / "other"
    shutil.copytree(place / "data" / "other", moved)
    shutil.rmtree(place / "data" / "other")
    with pytest.raises(UserError, match="--eval_dataset=other"):
        FinishedRun(folder)
    assert explain_user(FinishedRun(folder, {"data_path": str(moved.parent)}), users_of(folder)[0]).agrees


# ---- over users


def test_kept_lines_of_any_token(tmp_path: Path) -> None:
    """U+2028 and U+0085 end no line of JSON."""
    file = tmp_path / "faithfulness.jsonl"
    users = ["a", "b\u2028c", "d\u0085"]
    file.write_text("".join("\n" + json.dumps({"user": user}, ensure_ascii=False) for user in users), "utf-8")
    assert list(faithful_users._read(file)) == users


def test_a_kept_line_cut_within_a_character(tmp_path: Path) -> None:
    """By a full disk or a kill; the lines before and after it are whole."""
    file = tmp_path / "faithfulness.jsonl"
    lines = [json.dumps({"user": user}, ensure_ascii=False).encode() for user in ("a", "é", "b")]
    cut = lines[1][: lines[1].index("é".encode()) + 1]
    file.write_bytes(b"\n" + b"\n".join((lines[0], cut, lines[2])))
    assert list(faithful_users._read(file)) == ["a", "b"]
    file.write_bytes(b"\n" + b"\n".join((lines[0], cut)))
    assert list(faithful_users._read(file)) == ["a"]


def test_faithfulness_over_users(dpo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds what the comparisons are made of; a user is asked once, whatever was cut short."""
    folder = tmp_path / dpo.name
    shutil.copytree(dpo, folder)
    finished = FinishedRun(folder)
    comparisons, file = faithful_users.faithfulness(finished, 4)
    told = json.loads(file.read_text())
    assert [(c.test, c.size) for c in comparisons] == [(t, s) for t in ("removed", "kept") for s in SIZES]
    assert told["users"] == len(told["rows"]) == 4 and told["draws"] == 20
    for comparison, record in zip(comparisons, told["comparisons"], strict=True):
        mine = [row["tests"][comparison.size - 1] for row in told["rows"]]
        means = [np.mean(one[f"{comparison.test}_random"]) for one in mine]
        expected = stats.ttest_rel([one[comparison.test] for one in mine], means)
        assert comparison.p == record["p"] == pytest.approx(expected.pvalue)
    for row in told["rows"]:  # the same as in that user's explanation
        influence = explain_user(finished, row["user"], k=1).influences[0]
        assert row["item"] == influence.title.item and row["by_item"] == pytest.approx(influence.by_item, abs=1e-4)
        for test, own in zip(row["tests"], influence.tests, strict=True):
            assert test["places"] == list(own.places) and test["removed"] == pytest.approx(own.removed, abs=1e-4)
            assert test["kept_random"] == pytest.approx(own.kept_random, abs=1e-4)

    (kept,) = folder.glob("faithfulness-*.jsonl")
    lines = kept.read_text().splitlines()
    kept.write_text("\n".join([*lines[:-1], lines[-1][:30]]))  # a kill within the last line
    asked = []
    real = faithful_users.history_effects
    monkeypatch.setattr(faithful_users, "history_effects", lambda *a: asked.append(a[1]) or real(*a))
    again, _ = faithful_users.faithfulness(FinishedRun(folder), 4)
    assert again == comparisons and len(asked) == 1
    more, _ = faithful_users.faithfulness(FinishedRun(folder), 5)
    assert len(asked) == 2 and more[0].users == 5
    with pytest.raises(UserError, match="--users=9: the run has 8 test users"):
        faithful_users.faithfulness(FinishedRun(folder), 9)


def test_sample_is_seeded_and_grows(finished: FinishedRun) -> None:
    assert finished.sample(3) == finished.sample(5)[:3] and len(set(finished.sample(8))) == 8


# ---- text and HTML


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


HOSTILE = "\"><script>alert('x')</script><img src=x onerror=alert(1)>&amp;\x1b[31m\u202e"


def hostile(found: Explanation) -> Explanation:
    """Every text of it one that would be markup, an attribute's end, or a terminal's command."""
    titles = tuple(
        replace(t, item=f"{HOSTILE}{i}", text=HOSTILE, tokens=(HOSTILE,) * len(t.tokens))
        for i, t in enumerate(found.titles)
    )
    return replace(
        found,
        user=HOSTILE,
        history=(HOSTILE,) * len(found.history),
        prompt=HOSTILE,
        prompt_tokens=(HOSTILE,),
        titles=titles,
        notes=(HOSTILE,),
        reference=HOSTILE,
        run={**found.run, "dataset": HOSTILE, "llm": HOSTILE, "folder": HOSTILE, "stages": [HOSTILE]},
        others=tuple(replace(o, model=HOSTILE, folder=HOSTILE) for o in found.others),
        influences=tuple(replace(i, title=titles[0], role=HOSTILE) for i in found.influences),
    )


def test_hostile_texts_are_text(explained: Explanation) -> None:
    tame, page = Page(explanation_html(explained)), Page(explanation_html(hostile(explained)))
    assert {tag for tag, _ in page.tags} == {tag for tag, _ in tame.tags}
    assert "script" not in {tag for tag, _ in page.tags}
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "style", "open"}
    shown = HOSTILE.replace("\x1b", "\\x1b").replace("\u202e", "\\x202e")
    assert page.text.count(shown) > 20
    text = explanation_text(hostile(explained))
    assert "\x1b" not in text and "\u202e" not in text and shown in text


def test_page_asks_for_nothing(explained: Explanation) -> None:
    page = explanation_html(explained)
    assert not any(word in page for word in ("http:", "https:", "src=", "href=", "url(", "@import", "<script"))
    assert "default-src 'none'" in page
    parsed = Page(page)
    for title in explained.titles:
        assert title.text in parsed.text and f"({title.logp:.3f})" in parsed.text
    bars = [a["style"] for tag, a in parsed.tags if tag == "i"]
    assert len(bars) == sum(len(title.tokens) for title in explained.titles)
    assert "height:4.00rem" in bars  # the least likely token of all


def test_text_says_what_was_found(explained: Explanation) -> None:
    text = explanation_text(explained)
    for title in explained.titles:
        assert title.text in text and f"{title.logp:.3f}" in text and f"{title.reward:+.4f}" in text
    for influence in explained.influences:
        assert all(f"{value:+.3f}" in text for value in influence.by_item)
    first, second = (influence.by_item for influence in explained.influences)
    assert all(f"{a - b:+.3f}" in text for a, b in zip(first, second, strict=True))
    assert "top 1 rather than target" in text
    assert f"chose {explained.target.text}: rank {explained.target.rank:g} of 10, as in per_user.csv.gz" in text
    assert "SASRec" in text and "SFT, before the last stage" in text


# ---- the command


def test_command(dpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    user, file = users_of(dpo)[0], tmp_path / "page.html"
    assert cli.main(["explain", str(dpo), f"--user={user}", "-k", "3", f"--html={file}", "--users=2"]) == 0
    told = capsys.readouterr().out
    assert told.startswith(f"user {user}\n") and "Top 3 of 10" in told and "Faithfulness: " in told
    assert file.read_text(encoding="utf-8").startswith("<!doctype html>") and f"written: {file}" in told
    assert (dpo / "faithfulness-2-users.json").is_file()
    assert cli.main(["explain", "--user", user, str(dpo)]) == 0
    assert (dpo / f"explain-{user}.html").is_file()


def test_a_page_cannot_be_a_folder(
    dpo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before the ranking is explained."""
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        assert cli.main(["explain", str(dpo), f"--user={users_of(dpo)[0]}", f"--html={folder}"]) == 2
        told = capsys.readouterr()
        assert f"--html={folder}: it is a folder; name a file in it." in told.err and "Top " not in told.out


def test_a_file_name_of_any_user() -> None:
    assert command._file_name("../a/b c") == ".._a_b_c" and len(command._file_name("x" * 300)) == 80


def test_a_ranking_that_is_not_the_runs(dpo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the table was changed; weights or prompts that differ do the same."""
    folder = tmp_path / dpo.name
    shutil.copytree(dpo, folder)
    table = pd.read_csv(folder / "per_user.csv.gz")
    table["rank"] = 11 - table["rank"]
    table.to_csv(folder / "per_user.csv.gz", index=False)
    user = users_of(dpo)[0]
    assert cli.main(["explain", str(folder), f"--user={user}"]) == 1
    told = capsys.readouterr()
    assert "this is NOT the ranking of the run" in told.out and f"user {user}: rank" in told.err
    assert "class='warning'" in (folder / f"explain-{user}.html").read_text(encoding="utf-8")
    table["user"] = "someone"
    table.to_csv(folder / "per_user.csv.gz", index=False)
    assert cli.main(["explain", str(folder), f"--user={user}"]) == 2
    assert "its rows are not those of the run's data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--user=u1"], "name the run folder, for example recbole-llm explain saved/LLMRanker-"),
        (["nowhere", "--user=u1"], "nowhere: no such folder."),
        (["RUN", "--user=nobody"], "--user=nobody: not a test user; there are 8, for example "),
        (["RUN"], "--user: name a test user of the run, for example "),
        (["RUN", "more", "--user=u1"], "`more`: flags look like --key=value."),
        (["RUN", "--user=u1", "-k", "0"], "--k=0: must be a whole number >= 1."),
        (["RUN", "--user=u1", "-k", "none"], "--k=None: must be a whole number >= 1."),
        (["RUN", "--users=many"], "--users='many': must be a whole number"),
        (["RUN", "--user=USER", "--users=9"], "--users=9: the run has 8 test users. Ask for fewer."),
        (["RUN", "--users=3", "--item=i1"], "--item: it belongs to --user; name one."),
        (["RUN", "--user=USER", "--item=i999"], "--item=i999: no such item; there are 60, for example "),
        (["RUN", "--user=USER", "--beta=3"], "--beta: explain takes it from the run; only data_path, llm, "),
        (["RUN", "--user=USER", "--baseline=nowhere"], "nowhere: no such folder."),
        (["RUN", "--user=USER", "--llm=there/is/none"], "--llm"),
        (["RUN", "--user=USER", "--data_path=none"], "--data_path"),
        (["RUN", "--user=USER", "--html=none/x.html"], "--html=none/x.html: there is no folder none."),
        (
            ["SASREC", "--user=u1"],
            "a run of SASRec; explain reads runs of LLMRanker, which score titles. Finished runs",
        ),
    ],
)
def test_wrong_commands(
    dpo: Path, sasrec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, words: list[str], told: str
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"RUN": str(dpo), "SASREC": str(sasrec)}
    words = [names.get(word, word.replace("USER", users_of(dpo)[0])) for word in words]
    assert cli.main(["explain", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())


def changed(dpo: Path, folder: Path, name: str, text: str | None) -> Path:
    """A copy of the run with one file changed, or without it."""
    shutil.copytree(dpo, folder)
    (folder / name).unlink()
    if text is not None:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("result.json", None, "no finished run, its result.json cannot be read"),
        ("result.json", "{", "no finished run, its result.json cannot be read"),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: !!python/object/apply:os.system ['true']", "is not plain YAML"),
        ("per_user.csv.gz", None, "per_user.csv.gz cannot be read"),
        ("per_user.csv.gz", "a,b\n1,2\n", "per_user.csv.gz cannot be read"),
        ("adapter_model.safetensors", "none", "holds no adapter that can be read"),
    ],
)
def test_damaged_folders(dpo: Path, tmp_path: Path, name: str, text: str | None, told: str) -> None:
    folder = changed(dpo, tmp_path / dpo.name, name, text)
    with pytest.raises(UserError, match=told):
        explain_user(FinishedRun(folder), users_of(dpo)[0])


def test_changed_data_are_told(dpo: Path, place: Path, tmp_path: Path) -> None:
    """Without the user's last event another item is the target."""
    (tmp_path / "toy").mkdir()
    lines = (place / "data" / "toy" / "toy.inter").read_text().splitlines()
    (tmp_path / "toy" / "toy.inter").write_text("\n".join(lines[:-1]) + "\n")
    shutil.copy(place / "data" / "toy" / "toy.item", tmp_path / "toy")
    with pytest.raises(UserError, match=r"the data give other test rows today \(candidate hash"):
        FinishedRun(dpo, {"data_path": str(tmp_path)})


def test_another_base_model_is_told(dpo: Path, tmp_path: Path) -> None:
    record = json.loads((dpo / "result.json").read_text())
    folder = changed(dpo, tmp_path / dpo.name, "result.json", json.dumps({**record, "llm_revision": "another"}))
    with pytest.raises(UserError, match="it ran over tiny with weights another; --llm=tiny has others"):
        explain_user(FinishedRun(folder), users_of(dpo)[0])


def test_a_baseline_that_was_asked_something_else(dpo: Path, place: Path, given_settings: dict[str, Any]) -> None:
    other = run(place, given_settings, model="Pop", candidate_seed=1)
    with pytest.raises(UserError, match=r"--baseline=.*: it ranked other candidates"):
        explain_user(FinishedRun(dpo), users_of(dpo)[0], baseline=other)
    assert all(o.model != "Pop" for o in explain_user(FinishedRun(dpo), users_of(dpo)[0], k=1).others)


def test_wrong_keys_are_told_together(dpo: Path) -> None:
    with pytest.raises(ConfigError) as error:
        FinishedRun(dpo, {"beta": 1, "loss": "SFT"})
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("ranked", "explained_in", "most"),
    [
        ("float32", "float32", 1e-3),
        ("bfloat16", "bfloat16", 0.1),
        ("bfloat16", "float32", 0.5),
        ("float32", "bfloat16", 0.5),
    ],
)
def test_the_looser_type_says_how_near_scores_must_be(
    finished: FinishedRun, monkeypatch: pytest.MonkeyPatch, ranked: str, explained_in: str, most: float
) -> None:
    """A GPU's run in half precision may be explained on a CPU."""
    monkeypatch.setitem(finished.record, "dtype", ranked)
    monkeypatch.setattr(finished.model, "llm", replace(finished.model.llm, dtype=explained_in))
    assert agreement._rounding(finished) == most


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({"full_ranking": "rerank", "rerank_topk": 5, "score_norm": "pmi"}, "pmi"),
        ({"full_ranking": "exact_topk", "topk": [3], "valid_metric": "NDCG@3", "score_norm": "mean"}, "mean"),
    ],
)
def test_orders_without_scores(place: Path, given_settings: dict[str, Any], changes: dict[str, Any], unit: str) -> None:
    """Re-ranking and a search tell an order: shown are the LLM's scores, and agreement goes by these."""
    folder = run(place, given_settings, **changes, epochs=1, eval_args={"mode": {"valid": "uni9", "test": "full"}})
    finished = FinishedRun(folder)
    for user in users_of(folder)[:3]:
        found = explain_user(finished, user, k=8)
        assert found.agrees and found.k == (3 if unit == "mean" else 8)
        history = finished.history(finished.row_of(user))
        for title in found.titles:
            item = int(np.flatnonzero(finished.item_tokens == title.item)[0])
            alone = finished.answer_logps([()], [item])[0, 0]
            wanted = title.logp / len(title.tokens) if unit == "mean" else title.logp - alone
            assert title.score == pytest.approx(wanted, abs=1e-4)
            assert title.score == pytest.approx(finished.scores(history, [item])[0], abs=1e-4)
        row = finished.row_of(user)
        ranked, target = finished.ranking(row), finished.rows.relevant[row].tolist()
        order, own = ranked.items.tolist(), finished.scores(history, ranked.items.tolist())
        for place_of in (0, 1, 2):  # were another title the target: its neighbours' ranks, as near as scores are
            item = order[place_of]
            assert agrees(finished, row, ranked, [item], place_of + 1)
            gap = np.abs(own[: 3 if unit == "mean" else 5] - own[place_of])
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("recbole_llm.explain.agreement.ROUNDING", float(gap.max()) + 1e-3)
                assert agrees(finished, row, ranked, [item], 3)
            # What comes behind a search's last is unknown: it may be as near as can be.
            assert agrees(finished, row, ranked, [item], len(order)) == (unit == "mean" and place_of == 2)
        assert agrees(finished, row, ranked, target, found.stored_rank)


def test_titles_in_several_passes(finished: FinishedRun) -> None:
    """However few tokens a pass may have; the same log-probs."""
    history, items = finished.history(0), list(range(1, 9))
    model, asked = finished.model, [finished.history(0), finished.history(0)[2:]]
    whole, parts = (
        answer_token_logps(model.policy, model.prompt, asked, items, token_budget=tokens) for tokens in (4096, 8)
    )
    assert len(history) > 2 and len(parts) == 2 and len(parts[0]) == len(items)
    for some, other in zip(whole, parts, strict=True):
        for one, two in zip(some, other, strict=True):
            torch.testing.assert_close(one, two, atol=1e-4, rtol=0)


def test_what_moves_the_order_is_in_its_unit(explained: Explanation) -> None:
    """Summed log-probs, log-probs by token, or nothing where another model's scores move it too."""
    first, second = (influence.by_item for influence in explained.influences)
    sizes = [len(influence.title.tokens) for influence in explained.influences]
    (head, by_sum) = effects(explained)[-1]
    assert head.endswith("rather than target") and by_sum == tuple(a - b for a, b in zip(first, second, strict=True))
    mean = replace(explained, run=explained.run | {"score_norm": "mean"})
    (_, by_token) = effects(mean)[-1]
    assert by_token == tuple(a / sizes[0] - b / sizes[1] for a, b in zip(first, second, strict=True))
    assert any("divided by its title's tokens" in note for note in reading_notes(mean))
    mixed = replace(explained, run=explained.run | {"mixed": True})
    assert len(effects(mixed)) == len(explained.influences)
    assert any("the other model's scores too" in note for note in reading_notes(mixed))


def test_a_damaged_run_beside_is_left_out(
    dpo: Path, sasrec: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is an error where it was named."""
    for folder in (dpo, sasrec):
        shutil.copytree(folder, tmp_path / folder.name)
    (tmp_path / sasrec.name / "per_user.csv.gz").unlink()
    record = json.loads((dpo / "result.json").read_text())
    user = users_of(dpo)[0]
    target = str(row_of(dpo, user)["target"])
    assert other_ranks(tmp_path / dpo.name, record, user, target) == []
    assert f"{sasrec.name} is left out" in caplog.text
    with pytest.raises(UserError):
        other_ranks(tmp_path / dpo.name, record, user, target, tmp_path / sasrec.name)
