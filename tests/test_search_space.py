"""Search spaces: those of the package, files of the user's, RecBole's text form, and what is proposed from them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm import keys
from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.report.proposals import Proposals
from recbole_llm.report.search_space import Parameter, parameter, read_hyper, search_space
from recbole_llm.report.tune import tune
from recbole_llm.run_folder import run_hash

MODELS = sorted(file.stem for file in (PROPERTIES / "search").glob("*.yaml"))
PREFERENCE = ("learning_rate", "preference_learning_rate", "beta")


def searched(toy: dict[str, Any], model: str, search: Any = None, **changes: Any) -> list[str]:
    """Keys that are searched for a model."""
    config = LLMConfig(model, config_dict={**toy, **changes})
    return [p.key for p in search_space(config, None if search is None else str(search))]


def told_by(toy: dict[str, Any], model: str, search: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        searched(toy, model, search)
    return error.value.problems


# The spaces that come with the package


def test_models_of_the_usual_comparison_have_a_space() -> None:
    usual = "Pop ItemKNN EASE BPR LightGCN NeuMF GRU4Rec SASRec NARM Caser BERT4Rec LLMRanker DPO4Rec"
    assert set(usual.split()) <= set(MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_defaults_lie_in_the_space(toy: dict[str, Any], model: str) -> None:
    """So the first trial teaches the sampler something; given by hand, they are the same run."""
    del toy["epochs"]
    config = LLMConfig(model, config_dict=toy)
    space = search_space(config)
    assert [p.key for p in space if p.drawn(config[p.key]) is None] == []
    laid_over = LLMConfig(model, config_dict={**toy, **{p.key: config[p.key] for p in space}})
    assert run_hash(laid_over) == run_hash(config)
    assert (model in ("Pop", "Random")) == (space == [])


@pytest.mark.parametrize("loss", keys.LOSSES)
def test_what_an_llm_is_searched_over(toy: dict[str, Any], loss: str) -> None:
    """Only what its stages read; every new loss has to be thought of."""
    del toy["epochs"]
    changes = {"loss": loss, "rejected_num": 1 if loss == "DPO" else 3}
    sft = ["learning_rate", "epochs", "lora_r", "MAX_ITEM_LIST_LENGTH", "score_norm"]
    assert searched(toy, "LLMRanker", **changes) == (sft if loss == "SFT" else list(PREFERENCE))


def test_what_is_not_trained_is_not_searched(toy: dict[str, Any]) -> None:
    read = ["MAX_ITEM_LIST_LENGTH", "score_norm"]
    del toy["epochs"]
    assert searched(toy, "LLMRanker", finetune="none") == read
    assert searched(toy, "LLMRanker", epochs=0) == read
    assert searched(toy, "LLMRanker", finetune="full") == ["epochs", *read]
    assert searched(toy, "DPO4Rec", knowledge="none") == ["learning_rate"]
    adaptor = ["learning_rate", "adaptor_dropout", "adaptor_width"]
    assert searched(toy, "DPO4Rec", knowledge="placebo") == searched(toy, "DPO4Rec", iterations=0) == adaptor
    assert searched(toy, "DPO4Rec", alignment="SFT") == [*adaptor, "align_learning_rate"]


def test_what_the_user_gave_is_not_searched(toy: dict[str, Any]) -> None:
    assert searched(toy, "BPR") == ["learning_rate", "embedding_size", "weight_decay"]
    assert searched(toy, "BPR", embedding_size=64) == ["learning_rate", "weight_decay"]


# Files of the user's


def test_folder_file_and_fallback(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "BPR.hyper").write_text("embedding_size choice [8,16]\n", encoding="utf-8")
    (tmp_path / "hyper.test").write_text("learning_rate uniform 0.1,0.2\n", encoding="utf-8")
    (tmp_path / "ItemKNN.yaml").write_text("k: [5, 7]\n", encoding="utf-8")
    assert searched(toy, "BPR", tmp_path) == searched(toy, "BPR", tmp_path / "BPR.hyper") == ["embedding_size"]
    assert searched(toy, "ItemKNN", tmp_path) == ["k"]
    assert searched(toy, "NeuMF", tmp_path) == searched(toy, "NeuMF", tmp_path / "BPR.hyper") == searched(toy, "NeuMF")
    assert searched(toy, "NeuMF", tmp_path / "hyper.test") == ["learning_rate"]


def test_no_space(toy: dict[str, Any], tmp_path: Path) -> None:
    assert "--tune: there is no search space for FPMC. Write one" in told_by(toy, "FPMC", None)[0]
    assert "--tune: there is no search space for FPMC" in told_by(toy, "FPMC", tmp_path)[0]
    assert told_by(toy, "BPR", tmp_path / "none") == [f"--search={tmp_path / 'none'}: no such file or folder."]
    for suffix in ("yaml", "hyper"):
        (tmp_path / f"BPR.{suffix}").touch()
    assert "it holds two spaces for BPR" in told_by(toy, "BPR", tmp_path)[0]


def test_everything_wrong_with_a_space_is_told_at_once(toy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "SASRec.yaml"
    lines = (
        "n_layer: [1, 2]",  # no such key
        "beta: [1, 2]",  # another model's
        "candidate_seed: [1, 2]",  # the same for every model
        "learning_rate: [-1.0, 0.1]",  # out of range
        "n_heads: {int: [2, 1]}",
        "n_layers: 3",
        "hidden_size: {choice: [8, 16], unless: {hiden_act: gelu}}",
        "inner_size: {choice: [8, 16], unless: {hidden_size: two}}",
    )
    file.write_text("\n".join(lines), encoding="utf-8")
    told = told_by(toy, "SASRec", file)
    assert all(problem.startswith(f"--search: `{file}`: ") for problem in told) and len(told) == len(lines)
    together = "\n".join(told)
    assert "n_layer: no such key; did you mean `n_layers`?" in together
    assert "beta: SASRec does not read it; it is a key of LLMRanker" in together
    assert "candidate_seed: it is the same for every model" in together
    assert "learning_rate=-1.0: must be a number > 0" in together
    assert "n_heads: [2, 1] must be low before high" in together
    assert "n_layers: 3 must be a list of values, or a table" in together
    assert "hidden_size='two': must be a whole number" in together
    assert "hiden_act: no such key; did you mean `hidden_act`?" in together


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({}, "must be a list of values"),
        ([], "must be a list of values"),
        ({"log": [1, 2], "int": [1, 2]}, "must be a list of values"),
        ({"loguniform": [1, 2]}, "must be a list of values"),
        ({"log": 3}, "must be a list of values"),
        ({"choice": [1, 2], "unless": 3}, "must be a list of values"),
        ([1, 2, 1], "names a value twice"),
        ({"log": [0, 1]}, "must be above 0"),
        ({"log": [1, 2, 3]}, "must be two numbers, low and high"),
        ({"int": [1.5, 2]}, "must be two whole numbers"),
        ({"int": [True, 2]}, "must be two whole numbers"),
        ({"uniform": ["a", 2]}, "must be two numbers"),
        ({"uniform": [0, math.inf]}, "must be two numbers"),
        ({"uniform": [1, 1]}, "must be low before high"),
        ({"uniform": [0, 1, 0.3]}, "has a step that does not lead from low to high"),
        ({"int": [1, 4, 2]}, "has a step that does not lead from low to high"),
    ],
)
def test_what_is_no_range(form: Any, told: str) -> None:
    with pytest.raises(ValueError) as error:
        parameter("key", form)
    assert told in str(error.value)


# RecBole's text form


def test_hyper_by_hand(tmp_path: Path) -> None:
    """The example of RecBole's documentation, and each of its types: e^-8 = .00033546, e^0 = 1."""
    file = tmp_path / "BPR.hyper"
    lines = (
        "learning_rate loguniform -8,0",
        "",
        "# a comment",
        "embedding_size choice [64, 96, 128]",
        "mlp_hidden_size choice ['[64,64,64]','[128,128]']",
        "loss_type choice ['BPR', 'CE']",
        "dropout_prob uniform 0.0, 0.5",
        "n_layers quniform 1,4,1",
        "reg_weight quniform 0.1,1,0.25",  # multiples: round(.4) = 0, round(4) = 4
        "k quniform 5,100,10",  # hyperopt rounds half to even: 5 / 10 -> 0
    )
    file.write_text("\n".join(lines), encoding="utf-8")
    assert read_hyper(file) == {
        "learning_rate": {"log": [0.0003355, 1.0]},
        "embedding_size": [64, 96, 128],
        "mlp_hidden_size": [[64, 64, 64], [128, 128]],
        "loss_type": ["BPR", "CE"],
        "dropout_prob": {"uniform": [0.0, 0.5]},
        "n_layers": {"int": [1, 4, 1]},
        "reg_weight": {"uniform": [0.0, 1.0, 0.25]},
        "k": {"int": [0, 100, 10]},
    }
    assert all(parameter(key, form).key == key for key, form in read_hyper(file).items())


@pytest.mark.parametrize(
    "line",
    [
        "k",
        "k choice",
        "k choice 5",
        "k choice [5",
        "k choice [i for i in range(3)]",
        "k uniform 1",
        "k uniform 1,2,3",
        "k uniform a,b",
        "k quniform 1,2,0",
        "k loguniform 1,1000000",
        "k normal 1,2",
        "k choice __import__('os').mkdir('run')",
    ],
)
def test_what_is_no_line(toy: dict[str, Any], tmp_path: Path, line: str) -> None:
    """Told with its number; nothing is run."""
    file = tmp_path / "ItemKNN.hyper"
    file.write_text(f"shrink choice [0.0]\n{line}\n", encoding="utf-8")
    told = told_by(toy, "ItemKNN", file)
    assert len(told) == 1 and f"`{file}`, line 2: `{line}` must look like" in told[0]
    assert not Path("run").exists()


def test_a_key_twice(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "ItemKNN.hyper").write_text("k choice [1]\nk choice [2]\n", encoding="utf-8")
    assert "line 2" in told_by(toy, "ItemKNN", tmp_path)[0]


# Proposals


def space_of(**forms: Any) -> list[Parameter]:
    return [parameter(key, form) for key, form in forms.items()]


def proposed(proposals: Proposals, number: int, score: Any) -> list[dict[str, Any]]:
    """So many proposals at most, each told its score."""
    found = []
    while len(found) < number and (values := proposals.next()) is not None:
        found.append(values)
        proposals.tell(score(values))
    return found


@pytest.mark.parametrize("bigger", [True, False])
def test_proposals_are_those_of_optuna(bigger: bool) -> None:
    """A study that optimises by itself, with the same seed, begun at the same point, asks for the same values."""
    space = space_of(rate={"log": [1e-4, 1e-1]}, layers={"int": [1, 40]}, drop={"uniform": [0.0, 1.0]})
    first = {"rate": 0.01, "layers": 3, "drop": 0.5}

    def score(values: dict[str, Any]) -> float:
        distance = (math.log10(values["rate"]) + 3) ** 2 + values["drop"] + values["layers"] / 40
        return -distance if bigger else distance

    def objective(trial: optuna.Trial) -> float:
        rate, layers = trial.suggest_float("rate", 1e-4, 1e-1, log=True), trial.suggest_int("layers", 1, 40)
        drop = trial.suggest_float("drop", 0.0, 1.0)
        return score({"rate": float(f"{rate:.4g}"), "layers": layers, "drop": float(f"{drop:.4g}")})

    sampler = optuna.samplers.TPESampler(seed=7)
    study = optuna.create_study(direction="maximize" if bigger else "minimize", sampler=sampler)
    study.enqueue_trial(first)
    study.optimize(objective, n_trials=16)
    ours = proposed(Proposals(space, first, 7, bigger), 16, score)
    theirs = [t.params for t in study.trials]
    assert [v["layers"] for v in ours] == [t["layers"] for t in theirs]
    assert [v["rate"] for v in ours] == [float(f"{t['rate']:.4g}") for t in theirs]
    best = (max if bigger else min)(map(score, ours))
    assert best == study.best_value


@pytest.mark.parametrize("bigger", [True, False])
def test_a_finite_space_is_tried_once_and_whole(bigger: bool) -> None:
    space = space_of(a=[[1, 2], [3]], b={"int": [1, 9, 4]}, c={"uniform": [0.0, 0.2, 0.1]}, d=["x"])
    whole = set(itertools.product(("[1, 2]", "[3]"), (1, 5, 9), (0.0, 0.1, 0.2), ("x",)))
    proposals = Proposals(space, {"a": [3], "b": 5, "c": 0.1, "d": "x"}, 1, bigger)
    found = proposed(proposals, 1000, lambda values: values["c"])
    assert proposals.most() == len(found) == len(whole) == 18
    assert {(str(v["a"]), v["b"], v["c"], v["d"]) for v in found} == whole
    assert found[0] == {"a": [3], "b": 5, "c": 0.1, "d": "x"}


def test_fine_steps_and_other_spellings_of_a_number_are_told_apart() -> None:
    """Steps below the digits that are printed elsewhere; 0 as given is 0.0 of the space."""
    found = proposed(Proposals(space_of(a={"uniform": [1.0, 1.0005, 0.0001]}), {"a": 1.0}, 1, True), 10, lambda v: 1.0)
    assert sorted(v["a"] for v in found) == [1.0, 1.0001, 1.0002, 1.0003, 1.0004, 1.0005]
    for seed in range(5):
        found = proposed(Proposals(space_of(a=[0.0, 0.2]), {"a": 0}, seed, True), 10, lambda values: 1.0)
        assert [v["a"] for v in found] == [0, 0.2]


def test_values_as_given_may_lie_outside() -> None:
    proposals = Proposals(space_of(a=[1, 2], b=["x", "y"]), {"a": 7, "b": None}, 1, True)
    found = proposed(proposals, 10, lambda values: 1.0)
    assert found[0] == {"a": 7, "b": None} and len(found) == 5 == proposals.most()
    assert len(proposals.study.trials) == 4 + sum(t.state.name == "FAIL" for t in proposals.study.trials)


def test_nothing_to_search() -> None:
    assert proposed(Proposals([], {}, 1, True), 10, lambda values: 1.0) == [{}]


@pytest.mark.parametrize("bounds", [{"uniform": [0.99, 0.999]}, {"log": [0.001, 0.001002]}])
def test_close_real_numbers_run_out(bounds: dict[str, Any]) -> None:
    """They are told apart by four digits: 91 and 3 values, all of them tried, each once."""
    found = proposed(Proposals(space_of(a=bounds), {"a": 0.99 if "uniform" in bounds else 0.001}, 1, True), 200, peak)
    values = sorted(v["a"] for v in found)
    assert len(values) == len(set(values)) == (91 if "uniform" in bounds else 3)


def test_a_search_that_runs_out_says_so(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "BPR.yaml").write_text("learning_rate: {log: [0.001, 0.001002]}")
    found = tune("BPR", None, {**toy, "train_batch_size": 64}, 8, str(tmp_path))
    assert len(found.trials) == 3 and "[tune BPR] there is no more to try, so 3 trials" in capsys.readouterr().out


def peak(values: dict[str, Any]) -> float:
    return -abs(values["a"] - 0.995)


def test_failed_trials_are_not_proposed_again() -> None:
    proposals = Proposals(space_of(a=[1, 2, 3]), {"a": 1}, 1, True)
    found = proposed(proposals, 10, lambda values: None)
    assert sorted(v["a"] for v in found) == [1, 2, 3]


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=14, max_size=14))
def test_the_same_scores_give_the_same_proposals(seed: int, scores: list[float | None]) -> None:
    space = space_of(a=["x", "y"], b={"log": [1e-5, 1e-2]}, c={"int": [1, 3]})

    def run() -> list[dict[str, Any]]:
        left = iter(scores)
        return proposed(Proposals(space, {"a": "x", "b": 1e-3, "c": 2}, seed, True), 14, lambda values: next(left))

    assert run() == run()


@settings(max_examples=30, deadline=None)
@given(st.floats(-8, 0), st.floats(0.01, 5), st.integers(0, 99))
def test_numbers_stay_within_their_bounds_and_can_be_printed(low: float, width: float, seed: int) -> None:
    bounds = [math.exp(low), math.exp(low + width)]
    (rate,) = space_of(rate={"log": bounds})
    for values in proposed(Proposals([rate], {"rate": None}, seed, True), 4, lambda values: 0.5)[1:]:
        assert bounds[0] <= values["rate"] <= bounds[1]
        assert values["rate"] in (*bounds, float(f"{values['rate']:.4g}"))
