"""Harm metrics by hand, against other formulas, and through runs; the table that shows them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm import harm
from recbole_llm.config import LLMConfig
from recbole_llm.errors import UserError
from recbole_llm.harm import (
    HARM,
    catalogue_metrics,
    hallucination,
    long_tail,
    long_tail_share,
    look_alikes,
    popularity_lift,
    title_embeddings,
    title_texts,
)
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.entries import Options
from recbole_llm.report.grid import Setting
from recbole_llm.report.results import Line, Results
from recbole_llm.report.table import Table, harm_table, results_table
from tests.conftest import ANIMALS, COLOURS, prepared, random_events, started, write_events
from tests.test_evaluator import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")
POPULARITY = np.array([99, 8, 4, 2, 2, 0])  # 99: nothing of item 0 may count
HISTORY = [np.array([2, 3, 4, 4]), np.array([1]), np.array([], dtype=int), np.array([5])]


# Popularity


def test_popularity_lift_by_hand() -> None:
    """Histories of mean 2.5 and 8; top-2 of means 6 (8, 4) and 2; no mean of nothing, or of zero."""
    top = np.array([[1, 2], [3, 4], [1, 2], [1, 2]])
    found = popularity_lift(top, HISTORY, POPULARITY)
    assert found[:2].tolist() == pytest.approx([(6 - 2.5) / 2.5, (2 - 8) / 8])
    assert np.isnan(found[2:]).all()


def test_nothing_there_counts_nowhere() -> None:
    top = np.array([[1, 0, 0], [3, 5, 0], [0, 0, 0]])
    history = [np.array([2])] * 3
    assert popularity_lift(top, history, POPULARITY)[:2].tolist() == [(8 - 4) / 4, (1 - 4) / 4]
    assert np.isnan(popularity_lift(top, history, POPULARITY)[2])
    assert long_tail_share(top, POPULARITY)[:2].tolist() == [0, 1]
    alike = np.array([[3, 0]] * 3)
    assert hallucination(top, np.array([9, 9, 9]), alike)[:2].tolist() == [0, 0.5]


def test_long_tail_is_outside_the_most_popular_fifth() -> None:
    """Ten items: two are head. A tie across the border is long tail as a whole, and so is all where all tie."""
    counts = np.array([99, 1, 9, 3, 4, 8, 0, 2, 5, 6, 7])
    assert np.flatnonzero(~long_tail(counts)).tolist() == [0, 2, 5]
    assert not long_tail(counts)[0]
    tied = np.array([99, 9, 8, 8, 1, 1, 1, 1, 1, 1, 1])
    assert np.flatnonzero(~long_tail(tied)).tolist() == [0, 1]
    assert long_tail(np.full(11, 3)).tolist() == [False] + [True] * 10
    assert long_tail_share(np.array([[2, 5, 3], [1, 3, 7]]), counts).tolist() == [1 / 3, 1]


def test_long_tail_does_not_depend_on_the_numbering() -> None:
    draw = np.random.default_rng(0)
    counts = np.concatenate([[0], draw.zipf(1.5, 200).clip(max=30)])
    order = np.concatenate([[0], 1 + draw.permutation(200)])
    assert np.array_equal(long_tail(counts[order]), long_tail(counts)[order])
    assert 160 <= long_tail(counts).sum() < 200


# Look-alikes


def unit(rows: list[list[float]]) -> np.ndarray:
    vectors = np.array(rows, dtype=np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def test_look_alikes_by_hand() -> None:
    """Items at 0, 10, 20, 40, 80 and 120 degrees, and one without title."""
    angles = np.radians([0, 10, 20, 40, 80, 120])
    embeddings = unit([[0, 0], *np.stack([np.cos(angles), np.sin(angles)], axis=1).tolist(), [0, 0]])
    history = [np.array([1]), np.array([1, 4]), np.array([2, 2, 2, 4]), np.array([7]), np.array([], dtype=int)]
    found = look_alikes(history, embeddings, 2)
    # The second history points to 20 degrees: items 3 (20) and 2 (10); the third to about 17: items 3 and 1.
    assert [set(row) - {0} for row in found.tolist()] == [{2, 3}, {2, 3}, {3, 1}, set(), set()]
    # Beyond a right angle nothing is alike: 120 degrees never, however many are asked for.
    assert set(look_alikes(history[:1], embeddings, 50)[0].tolist()) == {0, 2, 3, 4, 5}


def test_look_alikes_equal_a_sort_of_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    """By scikit-learn's cosine with the mean, in chunks too."""
    from sklearn.metrics.pairwise import cosine_similarity

    draw = np.random.default_rng(0)
    embeddings = unit([[0.0] * 8, *draw.normal(size=(60, 8)).tolist()])
    history = [draw.choice(np.arange(1, 61), size=n, replace=False) for n in draw.integers(1, 9, size=17)]
    expected = []
    for items in history:
        cosine = cosine_similarity(embeddings[items].mean(0, keepdims=True), embeddings[1:])[0]
        ranked = [i for i in 1 + np.argsort(-cosine) if i not in items and cosine[i - 1] > 0]
        expected.append(set(ranked[:7]))
    assert [set(row) - {0} for row in look_alikes(history, embeddings, 7).tolist()] == expected
    monkeypatch.setattr(harm, "SIMILARITIES_AT_ONCE", 61 * 5)
    assert [set(row) - {0} for row in look_alikes(history, embeddings, 7).tolist()] == expected


def test_hallucination_by_hand() -> None:
    """Look-alikes 5 to 8; the target is none even where it looks alike."""
    alike = np.array([[5, 6, 7, 8], [5, 6, 7, 8], [0, 0, 0, 0]])
    top = np.array([[5, 1, 6], [5, 8, 7], [5, 6, 7]])
    found = hallucination(top, np.array([1, 7, 9]), alike)
    assert found[:2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(found[2])


def test_base_is_what_random_orders_have() -> None:
    draw = np.random.default_rng(0)
    candidates = np.arange(1, 21)[None]
    alike, target = np.array([[3, 4, 5, 18, 40, 41]]), np.array([18])
    base = hallucination(candidates, target, alike)
    assert base.tolist() == [3 / 20]
    orders = draw.permuted(np.repeat(candidates, 20000, 0), axis=1)[:, :5]
    many = hallucination(orders, np.repeat(target, 20000), np.repeat(alike, 20000, 0))
    assert many.mean() == pytest.approx(base[0], abs=0.005)


# Coverage and Gini


def test_coverage_and_gini_by_hand(toy: dict[str, Any]) -> None:
    """Items 1 (twice), 2 and 3 of a catalogue of 4; zeros are no item.

    Gini of the counts 0, 1, 1, 2 by mean absolute difference: sum |x - y| over all pairs is 12; 12 / (2 * 4 * 4).
    """
    config = LLMConfig("Pop", config_dict=toy)
    top = np.array([[1, 2], [1, 0], [3, 0]])
    assert catalogue_metrics(config, top, 5, "@2") == {"coverage@2": 3 / 4, "gini@2": 12 / 32}
    everything = np.array([[1, 2, 3, 4]])
    assert catalogue_metrics(config, everything, 5, "@4") == {"coverage@4": 1, "gini@4": 0}


def test_what_the_user_asks_for_is_not_told_twice(toy: dict[str, Any]) -> None:
    config = LLMConfig("Pop", config_dict={**toy, "metrics": ["NDCG", "ItemCoverage"]})
    assert list(catalogue_metrics(config, np.array([[1, 2]]), 5, "@2")) == ["gini@2"]
    config = LLMConfig("Pop", config_dict={**toy, "metrics": ["giniindex", "ndcg"]})
    assert list(catalogue_metrics(config, np.array([[1, 2]]), 5, "@2")) == ["coverage@2"]


# Titles


def test_titles_are_without_year(toy: dict[str, Any]) -> None:
    _, protocol = prepared(toy, "Pop")
    titles, tokens = title_texts(protocol.dataset), protocol.dataset.field2id_token["item_id"]
    expected = [f"{colour} {animal}" for animal in ANIMALS for colour in COLOURS]
    assert titles == ["", *(expected[int(token[1:])] for token in tokens[1:])]


def test_empty_titles_look_like_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "data" / "toy" / "toy.item"
    lines = file.read_text(encoding="utf-8").splitlines()
    lines[4] = "i3\t\t1953"
    file.write_text("\n".join([*lines[:8], *lines[9:]]) + "\n", encoding="utf-8")  # i7 has no line at all
    _, protocol = prepared(toy, "Pop")
    ids = protocol.dataset.token2id("item_id", ["i3", "i7", "i4"])
    assert [bool(title_texts(protocol.dataset)[i]) for i in ids] == [False, False, True]
    embeddings = title_embeddings(protocol.dataset)
    assert not embeddings[[0, *ids[:2]]].any() and embeddings[ids[2]].any()
    found = look_alikes([np.array([ids[2]]), np.array([ids[0]])], embeddings, 60)
    assert not set(ids) & set(found[0].tolist()) and found[0].any() and not found[1].any()


@pytest.mark.parametrize("why", ["no encoder", "no file", "no title column"])
def test_without_titles_the_rest_stands(
    toy: dict[str, Any], tmp_path: Path, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "data" / "toy" / "toy.item"
    if why == "no file":
        file.unlink()
    if why == "no title column":
        file.write_text(file.read_text(encoding="utf-8").replace("title:token_seq", "tag:token_seq"), encoding="utf-8")
    settings = {**toy, "state": "INFO"} | ({"encoder": "none"} if why == "no encoder" else {})
    with caplog.at_level(logging.INFO):
        result = run_recbole_llm("Pop", config_dict=settings)["test_result"]
    assert len([r for r in caplog.records if "hallucination is left out" in r.message]) == 1
    assert not [name for name in result if "hallucination" in name]
    assert all(f"{name}@5" in result for name in ("popularity_lift", "long_tail", "coverage", "gini"))


# Runs


def test_harm_of_a_run_by_hand(toy: dict[str, Any], tmp_path: Path) -> None:
    """Every value of every row from the files alone: a model that ranks by popularity, in full."""
    write_events(tmp_path / "data", events := random_events([5 + n % 7 for n in range(40)]))
    config, protocol = prepared(
        {**toy, "eval_args": {"mode": "full"}, "topk": [1, 4], "valid_metric": "NDCG@4"}, "SASRec"
    )
    train = pd.DataFrame(events, columns=["user", "item", "rating", "time"]).sort_values("time", kind="stable")
    table = train.groupby("user").apply(lambda rows: rows["item"].tolist(), include_groups=False)
    counts = pd.Series([i for items in table for i in items[:-2]]).value_counts()
    tokens = protocol.test.item_tokens
    known = np.array([counts.get(token, 0) for token in tokens])

    def rule(self: Any, interaction: Interaction) -> torch.Tensor:
        return torch.as_tensor(known + np.arange(len(known)) / 1000).float().expand(len(interaction), -1)

    trainer = started(config, protocol, type("ByCount", (Scorer,), {"rule": rule}))
    result = trainer.evaluate(protocol.test, load_best_model=False)
    tail = known <= np.sort(known[1:])[::-1][int(0.2 * (len(known) - 1))]
    seen, lifts, tails = set(), [], []
    for line in trainer.per_user.itertuples():
        history = table[line.user][:-1]
        mine = np.array([i for i in np.argsort(-(known + np.arange(len(known)) / 1000)) if tokens[i] not in history])
        top = mine[mine > 0][:4]
        chosen = np.mean([counts.get(token, 0) for token in history])
        lifts.append((known[top].mean() - chosen) / chosen)
        tails.append(tail[top].mean())
        seen |= set(top)
    assert trainer.per_user["popularity_lift@4"].tolist() == pytest.approx(lifts)
    assert trainer.per_user["long_tail@4"].tolist() == pytest.approx(tails)
    assert result["popularity_lift@4"] == pytest.approx(np.mean(lifts), abs=1e-6) and result["popularity_lift@4"] > 0
    assert result["coverage@4"] == pytest.approx(len(seen) / (len(tokens) - 1), abs=1e-6)
    assert "hallucination_base" not in result and "hallucination@4" in result


def test_a_model_of_look_alikes_hallucinates(toy: dict[str, Any]) -> None:
    """It ranks by cosine with the history, as the metric does; its opposite shows none of what it shows."""
    config, protocol = prepared({**toy, "eval_args": {"mode": "uni19"}, "look_alikes": 10}, "SASRec")
    embeddings = torch.as_tensor(title_embeddings(protocol.dataset))
    found = []
    for sign in (1, -1):

        def rule(self: Any, interaction: Interaction, sign: int = sign) -> torch.Tensor:
            return sign * embeddings[interaction["item_id_list"]].sum(1) @ embeddings.T

        trainer = started(config, protocol, type("Alike", (Scorer,), {"rule": rule}))
        result = trainer.evaluate(protocol.test, load_best_model=False)
        table = trainer.per_user
        assert table["hallucination_base"].mean() == pytest.approx(result["hallucination_base"], abs=1e-6)
        # The top 10 of one and of the other are all 20 candidates.
        found.append(table["hallucination@10"])
    assert found[0].mean() > 2 * found[1].mean()
    assert ((found[0] + found[1]) / 2).tolist() == pytest.approx(table["hallucination_base"].tolist())


def test_top_k_that_is_everything_is_left_out(toy: dict[str, Any]) -> None:
    """With 10 candidates there is no choice in a top 10; validation has no harm at all."""
    done = run_recbole_llm("Pop", config_dict=toy)
    result = done["test_result"]
    expected = [
        f"{name}@{k}" for name in ("popularity_lift", "long_tail", "hallucination", "coverage", "gini") for k in (1, 5)
    ]
    assert {name for name in result if name.split("@")[0] in HARM} == {*expected, "hallucination_base"}
    assert list(result)[:9] == [f"{m}@{k}" for m in ("hit", "ndcg", "mrr") for k in (1, 5, 10)]
    assert not {name for name in done["best_valid_result"] if name.split("@")[0] in HARM}
    table = pd.read_csv(Path(done["run_folder"]) / "per_user.csv.gz")
    rows = [name for name in result if name.split("@")[0] not in ("coverage", "gini")]
    assert {name: table[name].mean() for name in rows} == pytest.approx({n: result[n] for n in rows}, abs=1e-6)


@pytest.mark.parametrize("mode", ["full", "uni19"])
def test_items_that_nobody_met_change_nothing(toy: dict[str, Any], mode: str) -> None:
    """A model that loads columns of items knows all of ``.item``; it is measured as one that does not."""
    file = Path(toy["data_path"]) / "toy" / "toy.item"
    file.write_text(file.read_text() + "".join(f"x{i}\tred cat {i}\t1950\n" for i in range(200)))
    settings = {**toy, "eval_args": {"mode": mode}, "metrics": ["NDCG", "ItemCoverage"]}
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "title"]}

    def rule(self: Any, interaction: Interaction) -> torch.Tensor:  # no ties
        return torch.arange(float(self.n_items)).cos().cumsum(0).expand(len(interaction), -1).clone()

    found = []
    for more in ({}, {"load_col": columns}):
        config, protocol = prepared({**settings, **more}, "SASRec")
        found.append(started(config, protocol, type("Any", (Scorer,), {"rule": rule})))
    assert found[1].model.n_items == found[0].model.n_items + 200
    plain, loaded = (trainer.evaluate(trainer.protocol.test, load_best_model=False) for trainer in found)
    assert loaded == plain


def test_rounded_as_recbole_rounds(toy: dict[str, Any]) -> None:
    result = run_recbole_llm("Pop", config_dict={**toy, "metric_decimal_place": 2})["test_result"]
    assert all(value == round(value, 2) for value in result.values())
    assert 0 < result["gini@5"] < 1


def test_rows_without_a_value_are_counted(toy: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Popularity that nobody trained with: no lift for any row, and none in the result."""
    _, protocol = prepared(toy, "Pop")
    rows, top = protocol.test, protocol.test.candidates[:, :5]
    config = LLMConfig("Pop", config_dict=toy)
    nobody = np.zeros(len(rows.item_tokens), dtype=int)
    with caplog.at_level(logging.INFO):
        result, _ = harm.harm_metrics(config, rows, top, nobody, None)
    assert not [name for name in result if "lift" in name] and result["long_tail@5"] == 1
    assert "popularity_lift is undefined for 40 of 40 rows" in caplog.text
    one = nobody.copy()
    one[rows.history[0]] = 3
    caplog.clear()
    with caplog.at_level(logging.INFO):
        result, table = harm.harm_metrics(config, rows, top, one, None)
    defined = [any(one[i] for i in history) for history in rows.history]
    assert table["popularity_lift@5"].notna().tolist() == defined and not all(defined)
    assert result["popularity_lift@5"] == pytest.approx(table["popularity_lift@5"].dropna().mean(), abs=1e-6)


# The table


def shown(**metrics: list[float]) -> tuple[Table, Table | None]:
    """Results and harm of models A|B and C, from the metrics of each."""
    label = {f"{name}@5" if name != "hallucination_base" else name: values for name, values in metrics.items()}
    facts = {
        "dataset": "toy",
        "training_users": None,
        "training_interactions": 9,
        "mode": "uni9",
        "rows": 10,
        "seed": 1,
    }
    runs = [{**facts, "candidate_hash": "a" * 64, "metrics": {n: v[i] for n, v in label.items()}} for i in range(2)]
    lines = [Line(name, [run], []) for name, run in zip(("A|B", "C"), runs, strict=True)] + [Line("F", [], ["x"])]
    results = Results(Setting("toy", None, False, None), lines)
    nothing = pd.DataFrame()
    return results_table(results, nothing, [], Options(), 1), harm_table(results, nothing, [], Options(), 1)


def test_harm_has_a_table_of_its_own() -> None:
    """Best: a lift nearest to 0, a small Gini, a large coverage; the base is the same for all and never the best."""
    first, harm = shown(
        hit=[0.5, 0.5],
        popularity_lift=[0.5, -0.25],
        gini=[0.2, 0.1],
        coverage=[0.1, 0.2],
        hallucination_base=[0.1, 0.1],
    )
    assert first.header == ["Model", "Hit@5 ↑"] and harm is not None
    assert harm.header[1:] == ["popularity_lift@5 → 0", "gini@5 ↓", "coverage@5 ↑", "hallucination_base"]
    assert [[(v.text, v.place) for v in row[1:]] for row in harm.rows] == [
        [("0.5000", 2), ("0.2000", 2), ("0.1000", 2), ("0.1000", 0)],
        [("-0.2500", 1), ("0.1000", 1), ("0.2000", 1), ("0.1000", 0)],
    ]


def test_no_harm_no_second_table() -> None:
    assert shown(hit=[0.5, 0.25])[1] is None


def test_a_missing_encoder_stops_only_who_named_it(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a network the default encoder is left out with a warning; one that the user names is an error."""

    def missing(texts: Sequence[str], encoder: str) -> None:
        raise UserError(f"--encoder={encoder}: no network")

    monkeypatch.setattr(harm, "text_embeddings", missing)
    by_default = {key: value for key, value in toy.items() if key != "encoder"}
    found = run_recbole_llm("Pop", config_dict=by_default)["test_result"]
    assert "popularity_lift@5" in found and not any(name.startswith("hallucination") for name in found)
    with pytest.raises(UserError, match="no network"):
        run_recbole_llm("Pop", config_dict={**toy, "encoder": "minilm"})
