"""Comparisons: one table over the same candidates, finished runs kept, failures told, nothing mixed."""

from __future__ import annotations

import json
import statistics
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from recbole_llm import cli
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.report import jobs
from recbole_llm.report.caption import caption
from recbole_llm.report.compare import compare
from recbole_llm.report.entries import TYPED, Entry, Options, parse_models, split_options
from recbole_llm.report.grid import cells
from recbole_llm.settings import PROPERTIES, laid_over, read_yaml

SASREC = "SASRec[hidden_size=8,inner_size=8,n_layers=1,n_heads=1]"


pytestmark = pytest.mark.usefixtures("one_thread")


# Models as typed


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("Pop,SASRec", [("Pop", "Pop", {}), ("SASRec", "SASRec", {})]),
        (" Pop , ,SASRec,", [("Pop", "Pop", {}), ("SASRec", "SASRec", {})]),
        (
            "Pop,LLMRanker[loss=DMPO,beta=0.5],BPR",
            [
                ("Pop", "Pop", {}),
                ("LLMRanker[loss=DMPO,beta=0.5]", "LLMRanker", {"loss": "DMPO", "beta": 0.5}),
                ("BPR", "BPR", {}),
            ],
        ),
        (
            "NeuMF[mlp_hidden_size=[64,32], dropout_prob = 0.1]",
            [
                (
                    "NeuMF[mlp_hidden_size=[64,32], dropout_prob = 0.1]",
                    "NeuMF",
                    {"mlp_hidden_size": [64, 32], "dropout_prob": 0.1},
                )
            ],
        ),
        (
            "BPR[eval_args={'mode': {'valid': 'uni9', 'test': 'uni9'}}],Pop",
            [
                (
                    "BPR[eval_args={'mode': {'valid': 'uni9', 'test': 'uni9'}}]",
                    "BPR",
                    {"eval_args": {"mode": {"valid": "uni9", "test": "uni9"}}},
                ),
                ("Pop", "Pop", {}),
            ],
        ),
        (
            "LLMRanker[item_text={title} ({year}), few_shot=none]",
            [
                (
                    "LLMRanker[item_text={title} ({year}), few_shot=none]",
                    "LLMRanker",
                    {"item_text": "{title} ({year})", "few_shot": None},
                )
            ],
        ),
        ("Pop[]", [("Pop[]", "Pop", {})]),
        (
            "Pop[item_inter_num_interval=[9,inf],topk=[1,5],metrics=[NDCG,Hit]]",
            [
                (
                    "Pop[item_inter_num_interval=[9,inf],topk=[1,5],metrics=[NDCG,Hit]]",
                    "Pop",
                    {"item_inter_num_interval": "[9,inf]", "topk": [1, 5], "metrics": ["NDCG", "Hit"]},
                )
            ],
        ),
        (["Pop", "SASRec[epochs=3]"], [("Pop", "Pop", {}), ("SASRec[epochs=3]", "SASRec", {"epochs": 3})]),
    ],
)
def test_models(text: Any, entries: list[tuple[str, str, dict[str, Any]]]) -> None:
    assert parse_models(text) == [Entry(*entry) for entry in entries]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "name at least one"),
        (",", "name at least one"),
        ([], "name at least one"),
        ("Pop[", "`Pop[` must look like"),
        ("Pop]", "`Pop]` must look like"),
        ("Pop[epochs]", "must look like"),
        ("Pop[=3]", "must look like"),
        ("Pop[epochs=3]x", "must look like"),
        ("a b", "`a b` must look like"),
        (["Pop", 3], "must be text or a list of texts"),
        (3, "must be text or a list of texts"),
        ([{"LLMRanker": {"loss": "SFT"}}], "must be text or a list of texts"),
        (None, "must be text or a list"),
    ],
)
def test_what_is_no_model(text: Any, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_models(text)
    assert told in str(error.value) and "--models" in str(error.value)


@given(st.text("Pop,[]{}()=' 1a", max_size=25))
def test_any_models_parse_or_are_told(text: str) -> None:
    try:
        assert all(entry.label.startswith(entry.model) and entry.model for entry in parse_models(text))
    except ConfigError as error:
        assert all(problem.startswith("--models: ") for problem in error.problems)


# What is told before the first run


def told_by(settings: dict[str, Any], models: Any, **more: Any) -> list[str]:
    with pytest.raises(ConfigError) as error:
        compare(models, None, {**settings, **more})
    assert not Path(settings["checkpoint_dir"]).exists()
    return error.value.problems


def test_wrong_settings_of_all_models_are_told_together(toy: dict[str, Any]) -> None:
    """What all share is told once, the rest with its label."""
    told = told_by({**toy, "few_shot": 0}, ["Pop", "SASRec[n_heads=x]", "BPR[loss=DMPO]", "Nope"])
    assert told[0] == "--few_shot=0: must be a whole number >= 1 or empty."
    assert told[1].startswith("SASRec[n_heads=x]: --n_heads='x': must be a whole number")
    assert told[2].startswith("BPR[loss=DMPO]: --loss: BPR does not read it; it is a key of LLMRanker")
    assert told[3].startswith("Nope: --model=Nope: no such model here or in RecBole;")
    assert len(told) == 4


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ("eval_users=5", "eval_users"),
        ("eval_args={'mode': 'uni5'}", "eval_args"),
        ("candidate_seed=1", "candidate_seed"),
        ("mask_history=False", "mask_history"),
        ("few_shot_seed=1", "few_shot_seed"),
        ("dataset=ml-100k", "dataset"),
    ],
)
def test_what_all_must_share(toy: dict[str, Any], changes: str, key: str) -> None:
    """Else they would only be found out when all runs are done."""
    told = told_by({**toy, "few_shot": 10}, ["Pop", f"BPR[{changes}]"])
    assert told[0].startswith(f"--{key}: must be the same for every model of a comparison: Pop ")


def test_no_data_set_is_told(toy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--dataset=\[\]: must be one or several different values"):
        compare("Pop,BPR", [], {key: value for key, value in toy.items() if key != "dataset"})


@pytest.mark.parametrize(
    ("per_model", "told"),
    [
        (3, "--per_model=3: must be a table of tables"),
        ({"Pop": 3}, "must be a table of tables"),
        ({"SASrec": {"epochs": 3}}, "--per_model: SASrec: no such model here or in RecBole; did you mean"),
    ],
)
def test_wrong_per_model(toy: dict[str, Any], per_model: Any, told: str) -> None:
    assert told in told_by(toy, "Pop,BPR", per_model=per_model)[0]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"seeds": "1,1"}, "--seeds='1,1': must be one or several different values"),
        ({"seeds": "1,x"}, "--seeds='1,x': must be a whole number >= 0"),
        ({"seeds": []}, "--seeds=[]: must be one or several"),
        ({"few_shot": [5, 0]}, "--few_shot=[5, 0]: must be a whole number >= 1 or empty"),
        ({"modes": "uni9,half"}, "--modes='uni9,half': must be full, uniN, popN or lowN"),
        ({"baseline": "SASRec"}, "--baseline=SASRec: not one of the models; there are Pop, BPR."),
        ({"alternative": "less"}, "--alternative='less': must be one of two-sided, better"),
        ({"alpha": 0}, "--alpha=0: must be a number > 0 and <= 0.5"),
        ({"test": "wilcoxon"}, "--test='wilcoxon': must be one of t, randomization"),
        ({"jobs": 0}, "--jobs=0: must be a whole number >= 1"),
        ({"names": {"Pop": 3}}, "--names={'Pop': 3}: must be a table of labels"),
        ({"names": {"Pop": "BPR"}}, "--names={'Pop': 'BPR'}: two lines of a table would be called BPR."),
        ({"out": __file__}, f"--out={__file__}: {__file__} is a file; name a folder."),
        ({"out": f"{__file__}/x"}, f"--out={__file__}/x: {__file__} is a file; name a folder."),
        ({"table_metrics": "NDCG"}, "--table_metrics: no run has NDCG; there are hit@1, "),
        ({"table_metrics": "gini@7"}, "--table_metrics: no run has gini@7; there are hit@1, "),
        ({"table_metrics": "auc_global"}, "--table_metrics: no run has auc_global"),
        ({"table_metrics": "hallucination_base", "encoder": "none"}, "no run has hallucination_base; there are"),
        ({"table_metrics": "NDCG@10,NDCG@7"}, "--table_metrics: no run has NDCG@7; there are hit@1, "),
        ({"table_metrics": "coverage@5", "metrics": ["NDCG", "ItemCoverage"]}, "no run has coverage@5; there are"),
        (
            {"modes": "uni9,full", "per_model": {m: {"eval_args": {"mode": "uni9"}} for m in ("Pop", "BPR")}},
            "--modes=full: eval_args of the model's own (or of --eval_config) ask uni9; leave out its mode.",
        ),
    ],
)
def test_wrong_options(toy: dict[str, Any], more: dict[str, Any], told: str) -> None:
    assert told in told_by(toy, "Pop,BPR", **more)[0]


def test_an_axis_of_modes_meets_a_split_of_a_models_own(toy: dict[str, Any]) -> None:
    """``eval_args`` in part, shared or of a model, changes only what it names."""
    own = {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}}}
    options, shared = split_options({**toy, "modes": "uni9,full", "per_model": {"Pop": own, "BPR": own}})
    grid = cells(parse_models("Pop,BPR[eval_args={'mode': {'valid': 'uni9'}}]"), options, shared, "toy")
    asked = [cell.config["eval_args"] for cell in grid]
    assert [a["mode"]["test"] for a in asked] == [cell.setting.mode for cell in grid] == ["uni9"] * 2 + ["full"] * 2
    assert all(a["split"] == {"RS": [0.8, 0.1, 0.1]} for a in asked)
    assert laid_over({"eval_args": {"mode": "uni9"}}, {"eval_args": {"mode": {"valid": "uni3"}}}) == {
        "eval_args": {"mode": {"valid": "uni3", "test": "uni9"}}
    }


def test_defaults_are_those_of_the_yaml() -> None:
    """What ``ls --keys`` tells of a comparison's keys is what happens."""
    told = read_yaml(str(PROPERTIES / "comparison.yaml"))
    assert set(told) == {TYPED.get(field.name, field.name) for field in fields(Options)}
    defaults = Options()
    for field in fields(Options):
        assert told[TYPED.get(field.name, field.name)] == getattr(defaults, field.name), field.name


def test_options_as_typed() -> None:
    flags = ["--dataset=a,b", "--few_shot=5,none", "--modes=uni9,full", "--seeds=1,2", "--alpha=1e-2", "--out=1"]
    options, rest = split_options(cli.parse_flags([*flags, "--epochs=3"]))
    assert rest == {"epochs": 3} and options.datasets == ("a", "b") and options.few_shots == (5, None)
    assert options.modes == ("uni9", "full") and options.seeds == (1, 2) and options.alpha == 0.01
    assert options.out == "1"
    assert split_options({"dataset": "ml-100k,2019"})[0].datasets == ("ml-100k", "2019")  # a name, not a number
    assert split_options({"few_shot": [20, "none"]})[0].few_shots == (20, None)  # as YAML reads [20, none]
    options, rest = split_options({"few_shot": None, "seeds": 3})  # one size is a setting of the runs
    assert options.few_shots is None and options.seeds == (3,) and rest == {"few_shot": None}


# The grid


def test_every_combination_once(toy: dict[str, Any]) -> None:
    """Settings by data set, size and mode; in each the entries, in each of those the seeds."""
    shared = {k: v for k, v in toy.items() if k != "dataset"}
    options, rest = split_options({**shared, "few_shot": [5, None], "modes": "uni9,full", "seeds": [1, 2]})
    grid = cells(parse_models("Pop,BPR[few_shot=7]"), options, rest, "toy")
    assert len(grid) == 2 * 2 * 2 * 2
    assert [cell.label for cell in grid[:3]] == [
        "Pop · toy, 5 training users, uni9 · seed 1",
        "Pop · toy, 5 training users, uni9 · seed 2",
        "BPR[few_shot=7] · toy, 7 training users, uni9 · seed 1",
    ]
    runs = {(cell.label, cell.folder) for cell in grid}
    assert len(runs) == len({label for label, _ in runs}) == len({folder for _, folder in runs})
    configs = [cell.config for cell in grid]
    assert [c["few_shot"] for c in configs] == [5, 5, 7, 7] * 2 + [None, None, 7, 7] * 2  # an entry's own key wins
    assert [c["eval_args"]["mode"]["test"] for c in configs] == (["uni9"] * 4 + ["full"] * 4) * 2
    assert {c["eval_args"]["mode"]["valid"] for c in configs} == {"uni9"} and [c["seed"] for c in configs] == [1, 2] * 8
    assert (
        len({cell.folder for cell in grid}) == 4 * 2 + 2 * 2
    )  # the entry with a size of its own is asked in two modes


def test_a_seed_of_its_own_is_one_run(toy: dict[str, Any]) -> None:
    """Not the same run once a seed, whose spread would be 0."""
    options, rest = split_options({**toy, "seeds": "1,2,3", "per_model": {"SASRec": {"seed": 5}}})
    grid = cells(parse_models("Pop,BPR[seed=7],SASRec"), options, rest)
    assert [(c.entry.model, c.seed, c.config["seed"]) for c in grid] == [
        *[("Pop", seed, seed) for seed in (1, 2, 3)],
        ("BPR", 7, 7),
        ("SASRec", 5, 5),
    ]


def test_chosen_values_win(toy: dict[str, Any]) -> None:
    options, rest = split_options({**toy, "per_model": {"BPR": {"learning_rate": 0.1, "embedding_size": 4}}})
    entries = parse_models("BPR[learning_rate=0.2],Pop")
    (setting,) = {cell.setting for cell in cells(entries, options, rest)}
    grid = cells(entries, options, rest, chosen={("BPR[learning_rate=0.2]", setting): {"learning_rate": 0.3}})
    assert grid[0].config["learning_rate"] == 0.3 and grid[0].config["embedding_size"] == 4


# Runs


def test_two_models_in_one_table(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    per_model = {"SASRec": {"learning_rate": 0.01}, "GRU4Rec": {"epochs": 2}}
    done = compare(f"Pop,{SASREC}", None, {**toy, "per_model": per_model})
    files = {file.name: file.read_text(encoding="utf-8") for file in done["files"]}
    assert {"table.md", "table.tex", "table.csv", "table.html", "table.json", "tests.csv", "costs.md"} <= set(files)
    markdown = files["table.md"]
    assert markdown == done["markdown"] and markdown.startswith("### toy, all training users, uni9\n")
    asked = "the next item among 9 others drawn uniformly from those that the user never met"
    assert f"400 training interactions. Test: 40 rows, {asked}" in markdown
    assert "| Pop " in markdown and f"| {SASREC} (a) " in markdown and "**" in markdown and "failed" not in markdown
    csv = pd.read_csv(StringIO(files["table.csv"]))
    assert csv["model"].tolist() == ["Pop", SASREC]
    told = json.loads(files["table.json"])[0]
    assert told["models"][0]["runs"][0]["metrics"]["ndcg@10"] == csv["ndcg@10"][0]
    saved = Path(toy["checkpoint_dir"])
    records = [json.loads(f.read_text(encoding="utf-8")) for f in saved.glob("*-toy-*/result.json")]
    assert len({record["candidate_hash"] for record in records}) == 1 and len(records) == 2
    config = next(saved.glob("SASRec-toy-*/config.yaml")).read_text(encoding="utf-8")
    assert "learning_rate: 0.01\n" in config and "hidden_size: 8\n" in config
    assert "[2/2]" in capsys.readouterr().out


def test_finished_runs_are_not_run_again(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(["Pop", "BPR"], None, toy)
    results = sorted(Path(toy["checkpoint_dir"]).glob("*/result.json"))
    before = [f.stat().st_mtime_ns for f in results]
    ran = []
    real = jobs.run_recbole_llm
    monkeypatch.setattr(jobs, "run_recbole_llm", lambda *args: (ran.append(args[0]), real(*args)))
    again = compare(["Pop", "BPR"], None, toy)
    assert ran == []
    assert [f.stat().st_mtime_ns for f in results] == before and len(results) == 2
    assert again["markdown"] == first["markdown"] and again["files"] == first["files"]
    compare(["Pop", "BPR[embedding_size=8]"], None, toy)
    assert ran == ["BPR"]


def test_a_model_that_fails_stops_no_other(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In RecBole, by our own word, and in any other way; the status is 1."""
    real = jobs.run_recbole_llm

    def run(model: str, *rest: Any) -> Any:
        if model == "BPR":
            raise UserError("--x: a | b.\nmore")
        if model == "ItemKNN":
            raise RuntimeError("planted\nover | lines")
        return real(model, *rest)

    monkeypatch.setattr(jobs, "run_recbole_llm", run)
    words = [f"--{key}={value}" for key, value in toy.items()]
    assert cli.main(["compare", "--models=BPR,SASRec[n_heads=7],ItemKNN,Pop", *words]) == 1
    told = capsys.readouterr()
    assert "failed : BPR, SASRec[n_heads=7], ItemKNN (see the log in log/)" in told.err
    assert "- BPR: failed: --x: a \\| b.\n" in told.out and "more" not in told.out
    assert "- ItemKNN: failed: RuntimeError: planted over \\| lines" in told.out
    assert "The hidden size (64) is not a multiple" in told.out
    lines = {line.split("|")[1].strip(): line for line in told.out.splitlines() if line.startswith("| ")}
    assert " failed |" in lines["BPR"] and "failed" not in lines["Pop"] and "**" in lines["Pop"]
    assert "next   :" not in told.out


def test_all_models_fail(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"--{key}={value}" for key, value in toy.items()]
    assert cli.main(["compare", "--models=SASRec[n_heads=7]", *words]) == 1
    assert "No run finished." in capsys.readouterr().out


def test_file_and_flags(toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file's models and tables; flags win; what to try next names the sample of users."""
    lines = [f"{key}: {value!r}" for key, value in {**toy, "eval_users": 20}.items()]
    lines += ["models: [Pop, BPR]", "per_model: {BPR: {epochs: 2}, GRU4Rec: {epochs: 3}}"]
    (tmp_path / "a.yaml").write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "b.yaml").write_text("seed: 7\n", encoding="utf-8")
    words = ["compare", f"--config_files={tmp_path}/a.yaml {tmp_path}/b.yaml", "--models=Pop"]
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert "| Pop " in told and "| BPR" not in told and "One seed (7)." in told and "Test: 20 rows" in told
    assert "next   : the same command with --eval_users=none" in told
    assert cli.main([*words, "--eval_users=none"]) == 0
    assert "Test: 40 rows" in capsys.readouterr().out


def test_table_that_cannot_be_written(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recbole_llm.report.compare.write_text", full)
    with pytest.raises(UserError, match="--out=.*could not write the tables .*runs are kept"):
        compare("Pop", None, toy)
    assert list(Path(toy["checkpoint_dir"]).glob("Pop-*/result.json"))


@pytest.mark.parametrize("name", ["table.tex", "trials.csv", "report.html", "plots/cost.pdf"])
def test_files_of_something_else_are_not_overwritten(toy: dict[str, Any], tmp_path: Path, name: str) -> None:
    file = tmp_path / "paper" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=f"--out=.*: {name} there would be overwritten"):
        compare("Pop", None, {**toy, "out": str(tmp_path / "paper")})
    assert file.read_text() == "mine" and not list(tmp_path.glob("saved/Pop*"))


def test_what_an_earlier_comparison_left_goes(toy: dict[str, Any], tmp_path: Path) -> None:
    """Its trials and plots, where this one has none; the user's own files stay."""
    out = tmp_path / "out"
    compare("BPR", None, {**toy, "out": str(out), "tune": 2, "epochs": 1, "plots": True})
    (out / "notes.txt").write_text("mine")
    (out / "plots" / "mine.png").write_text("mine")
    assert (out / "trials.csv").is_file() and (out / "plots" / "metric.png").is_file()
    compare("Pop", None, {**toy, "out": str(out), "plots": False})
    assert not (out / "trials.csv").exists() and (out / "notes.txt").is_file()
    assert [file.name for file in (out / "plots").iterdir()] == ["mine.png"]


def test_lines_of_the_same_runs_and_a_baseline_that_failed_are_told(toy: dict[str, Any]) -> None:
    told = compare(
        ["BPR[learning_rate=1e30]", "Pop", "Pop[]"], None, {**toy, "epochs": 2, "train_batch_size": 64, "plots": False}
    )
    assert "Pop and Pop[] are the same runs, and count twice." in told["markdown"]
    assert "No test against BPR[learning_rate=1e30]: no run of it finished." in told["markdown"]
    assert "are the same runs" not in compare("Pop,BPR", None, {**toy, "epochs": 1, "plots": False})["markdown"]


def test_seeds_and_out(toy: dict[str, Any], tmp_path: Path) -> None:
    """One run a seed; the table has their mean and spread, by hand; the folder is the one asked for."""
    done = compare("Pop,BPR", None, {**toy, "seeds": "1,2,3", "out": str(tmp_path / "DIR"), "epochs": 2})
    assert sorted(file.suffix for file in (tmp_path / "DIR").glob("table.*")) == [
        ".csv",
        ".html",
        ".json",
        ".md",
        ".tex",
    ]
    scores = [run["metrics"]["ndcg@10"] for run in done["runs"] if run["label"] == "BPR"]
    assert len(scores) == 3 and len(set(scores)) == 3
    row = done["table"].set_index("model").loc["BPR"]
    assert row["ndcg@10"] == pytest.approx(statistics.mean(scores), rel=1e-12)
    assert row["ndcg@10 std"] == pytest.approx(statistics.stdev(scores), rel=1e-12) and row["seeds"] == "1 2 3"
    assert (
        f"{statistics.mean(scores):.4f}" in done["markdown"] and f"± {statistics.stdev(scores):.4f}" in done["markdown"]
    )
    assert "standard deviation over seeds 1, 2, 3." in done["markdown"]


def test_one_seed_of_several_fails(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    real = jobs.run_recbole_llm

    def run(model: str, dataset: Any, files: Any, settings: dict[str, Any]) -> Any:
        if model == "BPR" and settings["seed"] == 2:
            raise RuntimeError("planted")
        return real(model, dataset, files, settings)

    monkeypatch.setattr(jobs, "run_recbole_llm", run)
    done = compare("Pop,BPR", None, {**toy, "seeds": "1,2,3"})
    assert "- BPR: 1 of 3 runs failed: RuntimeError: planted" in done["markdown"] and done["failed"] == ["BPR"]
    assert done["table"].set_index("model").loc["BPR", "seeds"] == "1 3"
    assert set(done["tests"]["seeds"]) == {2} and set(done["tests"]["baseline_seeds"]) == {3}


def test_tests_are_those_of_the_rows(toy: dict[str, Any]) -> None:
    """The table of tests against scipy on the users' rows as the run folders have them."""
    done = compare("BPR,Pop", None, {**toy, "seeds": "1,2", "baseline": "Pop"})
    rows: dict[str, list[pd.Series]] = {}
    for run in done["runs"]:
        users = pd.read_csv(Path(run["run_folder"]) / "per_user.csv.gz").set_index("user").sort_index()
        rows.setdefault(run["label"], []).append(users["ndcg@10"])
    ours, base = (sum(rows[model]) / 2 for model in ("BPR", "Pop"))
    expected = scipy_stats.ttest_rel(ours, base)
    (found,) = done["tests"][done["tests"]["metric"] == "ndcg@10"].to_dict("records")
    assert (found["t"], found["p_t"]) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-10)
    assert found["p_holm"] == found["p_t"] and found["users"] == 40  # one comparison
    assert found["difference"] == pytest.approx((ours - base).mean())
    # Rows have ten digits, so means over seeds that are equal may differ in the last.
    assert (found["wins"], found["losses"]) == ((ours - base > 1e-8).sum(), (base - ours > 1e-8).sum())


# Candidates


def test_different_candidates_share_no_table(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told when the runs are there too: a record that came from elsewhere, with rows that agree with it."""
    compare("Pop,BPR", None, toy)
    monkeypatch.setattr("recbole_llm.report.results.check_saved_rows", lambda *_: None)
    (file,) = Path(toy["checkpoint_dir"]).glob("BPR-*/result.json")
    record = json.loads(file.read_text())
    file.write_text(json.dumps({**record, "candidate_hash": "b" * 64}))
    with pytest.raises(UserError, match="different candidates.*Pop .*BPR bbbbbbbbbbbb.*candidate_seed"):
        compare("Pop,BPR", None, toy)


def test_a_caption_names_lines_that_reorder(toy: dict[str, Any]) -> None:
    """They share the leanings of the model whose top they order; in modes without re-ranking none is named."""
    asked = {"eval_users": 5, "modes": "uni9,full", "plots": False}
    asked["per_model"] = {"LLMRanker": {"llm": "tiny", "finetune": "none"}}
    models = ["Pop", "LLMRanker[full_ranking=rerank,rerank_topk=7]", "LLMRanker[full_ranking=exact]"]
    sampled, full = compare(models, None, {**toy, **asked})["results"]
    told = caption(full, ["ndcg@10"], pd.DataFrame(), [], Options(), {})
    assert f"Reordering the top 7 of Pop, and what that misses cannot be found: {models[1]}." in told
    assert "Reordering" not in caption(sampled, ["ndcg@10"], pd.DataFrame(), [], Options(), {})
    asked |= {"modes": "uni9"}
    for most in (9, 10):  # of ten candidates nothing is missed where all are ordered
        models = ["Pop", f"LLMRanker[rerank_candidates=True,rerank_topk={most}]"]
        (found,) = compare(models, None, {**toy, **asked})["results"]
        told = caption(found, ["ndcg@10"], pd.DataFrame(), [], Options(), {})
        assert ("Reordering the top 9 of Pop" in told) == (most == 9) and ("Reordering" in told) == (most == 9)


def test_a_damaged_record_is_a_failed_run(toy: dict[str, Any]) -> None:
    compare("Pop,BPR", None, toy)
    (file,) = Path(toy["checkpoint_dir"]).glob("BPR-*/result.json")
    for damaged in (file.read_text()[:100], "[1]", "{}"):
        file.write_text(damaged)
        assert compare("Pop,BPR", None, toy)["failed"] == ["BPR"]
    file.unlink()
    assert not compare("Pop,BPR", None, toy)["failed"]


def test_a_damaged_trial_is_done_again(toy: dict[str, Any]) -> None:
    asked = {**toy, "tune": 1}
    before = compare("Pop,BPR", None, asked)["table"]
    (file,) = Path(toy["checkpoint_dir"]).glob("trials/BPR-*.json")
    file.write_text("[1]")
    pd.testing.assert_frame_equal(compare("Pop,BPR", None, asked)["table"], before)


def test_rows_that_are_gone(toy: dict[str, Any]) -> None:
    compare("Pop,BPR", None, toy)
    (file,) = Path(toy["checkpoint_dir"]).glob("BPR-*/per_user.csv.gz")
    file.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="per_user.csv.gz cannot be read .* Remove that folder"):
        compare("Pop,BPR", None, toy)


def test_a_seed_beside_seeds_is_refused(toy: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"--seed=7: --seeds=1,2 says those of a comparison"):
        compare("Pop", None, {**toy, "seed": 7, "seeds": "1,2"})
