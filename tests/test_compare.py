"""Comparisons: one table over the same candidates, finished runs kept, failures told, nothing mixed."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm import cli
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.report import compare as comparing
from recbole_llm.report.compare import Entry, compare, parse_models
from recbole_llm.report.table import comparison, to_markdown, write_comparison

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


def told_by(settings: dict[str, Any], models: Any, per_model: Any = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        compare(models, None, settings, per_model)
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
        ("dataset=ml-100k", "dataset"),
    ],
)
def test_what_all_must_share(toy: dict[str, Any], changes: str, key: str) -> None:
    """Else they would only be found out when all runs are done."""
    told = told_by(toy, ["Pop", f"BPR[{changes}]"])
    assert told[0].startswith(f"--{key}: must be the same for every model of a comparison: Pop ")


@pytest.mark.parametrize(
    ("per_model", "told"),
    [
        (3, "--per_model=3: must be a table of tables"),
        ({"Pop": 3}, "must be a table of tables"),
        ({"SASrec": {"epochs": 3}}, "--per_model: SASrec: no such model here or in RecBole; did you mean"),
    ],
)
def test_wrong_per_model(toy: dict[str, Any], per_model: Any, told: str) -> None:
    assert told in told_by(toy, "Pop,BPR", per_model)[0]


# Runs


def test_two_models_in_one_table(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    per_model = {"SASRec": {"learning_rate": 0.01}, "GRU4Rec": {"epochs": 2}}
    done = compare(f"Pop,{SASREC}", None, toy, per_model)
    markdown, table = (file.read_text(encoding="utf-8") for file in done["files"])
    assert [file.suffix for file in done["files"]] == [".md", ".csv"] and markdown == done["markdown"]
    assert "toy · all training users, 400 training interactions · test: 40 rows, uni9" in markdown
    assert "| Pop " in markdown and f"| {SASREC} " in markdown and "**" in markdown
    assert "| note" not in markdown
    csv = pd.read_csv(done["files"][1])
    assert csv["model"].tolist() == ["Pop", SASREC] and "ndcg@10" in csv and table.startswith("model,hit@1,")
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
    real = comparing.run_recbole_llm
    monkeypatch.setattr(comparing, "run_recbole_llm", lambda *args: (ran.append(args[0]), real(*args)))
    clock = time.perf_counter()
    again = compare(["Pop", "BPR"], None, toy)
    assert time.perf_counter() - clock < 2 and ran == []
    assert [f.stat().st_mtime_ns for f in results] == before and len(results) == 2
    assert again["markdown"] == first["markdown"] and again["files"] == first["files"]
    compare(["Pop", "BPR[embedding_size=8]"], None, toy)
    assert ran == ["BPR"]


def test_a_model_that_fails_stops_no_other(
    toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In RecBole, by our own word, and in any other way; the status is 1."""
    real = comparing.run_recbole_llm

    def run(model: str, *rest: Any) -> Any:
        if model == "BPR":
            raise UserError("--x: a | b.\nmore")
        if model == "ItemKNN":
            raise RuntimeError("planted\nover | lines")
        return real(model, *rest)

    monkeypatch.setattr(comparing, "run_recbole_llm", run)
    words = [f"--{key}={value}" for key, value in toy.items()]
    assert cli.main(["compare", "--models=BPR,SASRec[n_heads=7],ItemKNN,Pop", *words]) == 1
    told = capsys.readouterr()
    assert "failed : BPR, SASRec[n_heads=7], ItemKNN (see the log in log/)" in told.err
    lines = {line.split("|")[1].strip(): line for line in told.out.splitlines() if line.startswith("| ")}
    assert "failed: --x: a \\| b." in lines["BPR"]
    assert "failed: RuntimeError: planted over \\| lines" in lines["ItemKNN"]
    assert "The hidden size (64) is not a multiple" in lines["SASRec[n_heads=7]"]
    assert "failed" not in lines["Pop"] and "**" in lines["Pop"]
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
    assert "| Pop " in told and "| BPR" not in told and "· seed 7 ·" in told and "test: 20 rows" in told
    assert "next   : the same command with --eval_users=none" in told
    assert cli.main([*words, "--eval_users=none"]) == 0
    assert "test: 40 rows" in capsys.readouterr().out


def test_table_that_cannot_be_written(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("recbole_llm.report.table.write_text", full)
    with pytest.raises(UserError, match="--checkpoint_dir=.*could not write the table .*runs are kept"):
        compare("Pop", None, toy)
    assert list(Path(toy["checkpoint_dir"]).glob("Pop-*/result.json"))


# The table


def record(label: str, candidates: str = "a" * 64, **metrics: float) -> dict[str, Any]:
    """As much of a ``result.json`` as the table reads."""
    return {
        "label": label,
        "metrics": {k.replace("_", "@"): v for k, v in metrics.items()},
        "rows": 10,
        "candidate_hash": candidates,
        "dataset": "toy",
        "mode": "uni9",
        "few_shot": None,
        "training_users": None,
        "training_interactions": 1234,
        "seed": 1,
        "versions": {"recbole_llm": "1", "torch": "2"},
        "trainable_parameters": 12345,
        "timings": {"train_s": 1.25, "test_s": 0.5},
    }


def cells(runs: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Model -> the cells of its line, and the header under ``model``."""
    lines = to_markdown(comparison(runs), runs).split("\n\n")[1].strip().splitlines()
    parsed = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {line[0]: line[1:] for line in parsed if not line[0].startswith(":")}


def test_different_candidates_share_no_table() -> None:
    with pytest.raises(UserError, match="different candidates.*A aaaaaaaaaaaa, B bbbbbbbbbbbb.*_seed"):
        comparison([record("A", hit_1=0.5), record("B", "b" * 64, hit_1=0.5)])
    comparison([record("A", hit_1=0.5), {"label": "B", "error": "x"}])


def test_best_in_bold() -> None:
    """With ties, and where less is better; a failed run is never the best."""
    runs = [
        record("A", hit_1=0.5, giniindex_1=0.1, averagepopularity_1=3),
        {"label": "F", "error": "x"},
        record("B", hit_1=0.5, giniindex_1=0.3, averagepopularity_1=2),
        record("C", hit_1=0.25, giniindex_1=0.2, averagepopularity_1=2),
    ]
    found = cells(runs)
    assert found["A"][:3] == ["**0.5000**", "**0.1000**", "3.0000"]
    assert found["B"][:3] == ["**0.5000**", "0.3000", "**2.0000**"]
    assert found["C"][:3] == ["0.2500", "0.2000", "**2.0000**"]
    assert found["F"] == ["", "", "", "", "", "", "", "failed: x"]
    assert found["A"][3:] == ["12,345", "1.2", "0.5", "", ""]


def test_metrics_that_all_have() -> None:
    table = comparison([record("A", hit_1=0.5, mrr_1=0.5), record("B", hit_1=0.5)])
    assert [c for c in table.columns if "@" in c] == ["hit@1"]


def test_pipes_and_lines_break_no_table() -> None:
    runs = [record("A[x=a|b]", hit_1=0.5), {"label": "B", "error": "one | two\nthree"}]
    markdown = to_markdown(comparison(runs), runs)
    assert "A[x=a\\|b]" in markdown and "failed: one \\| two three" in markdown
    lines = markdown.split("\n\n")[1].strip().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines}) == 1


def test_conditions_name_what_differs(tmp_path: Path) -> None:
    few = {"few_shot": 100, "training_users": 100, "training_interactions": 99, "seed": 2}
    runs = [record("A", hit_1=0.123456789), record("B", hit_1=0.5) | few]
    told = to_markdown(comparison(runs), runs).splitlines()[0]
    assert "all training users / few-shot: 100 training users, 1,234 / 99 training" in told
    assert "seed 1 / 2 ·" in told
    files = write_comparison(comparison(runs), runs, tmp_path / "new", "name")
    assert [f.name for f in files] == ["name.md", "name.csv"] and "0.123456789" in files[1].read_text()
    assert files[0].read_text(encoding="utf-8").startswith("toy · ")
