"""Lines of a comparison that start from the values chosen for another line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from recbole_llm.errors import ConfigError
from recbole_llm.report import tune_lines
from recbole_llm.report.compare import compare
from recbole_llm.report.entries import Options, parse_models, split_options
from recbole_llm.report.grid import Cell, cells
from recbole_llm.report.tune import Tuned, tuned_frame
from recbole_llm.report.tune_lines import tune_all
from recbole_llm.settings import read_yaml

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[dict[str, Any], Tuned]]:
    """Label -> what its search was given and what it found, in the order of the searches."""
    found: dict[str, tuple[dict[str, Any], Tuned]] = {}
    real = tune_lines.tune

    def tune(model: str, dataset: str | None, settings: dict[str, Any], *rest: Any, **named: Any) -> Tuned:
        found[rest[-1]] = settings, real(model, dataset, settings, *rest, **named)
        return found[rest[-1]][1]

    monkeypatch.setattr(tune_lines, "tune", tune)
    return found


def config_of(record: dict[str, Any]) -> dict[str, Any]:
    return read_yaml(Path(record["run_folder"]) / "config.yaml")


def test_a_line_takes_what_was_chosen_for_another(
    toy: dict[str, Any], searched: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """What it states stays its own, what nothing settles is searched; lines may stand before those they build on."""
    lines = ["BPR[epochs=2]", "BPR[learning_rate=0.02]", "BPR"]
    toy |= {"tune": 4, "out": "out", "plots": False, "train_batch_size": 64}
    del toy["epochs"]
    toy["per_model"] = {"BPR": {"epochs": 1}}
    table = {"BPR[epochs=2]": "BPR[learning_rate=0.02]", "BPR[learning_rate=0.02]": "BPR", "Pop[x=1]": "gone"}
    result = compare(lines, None, {**toy, "tuned_from": table})
    assert "--tuned_from: none of --models is called Pop[x=1]; passed over." in capsys.readouterr().out
    assert list(searched) == ["BPR", "BPR[learning_rate=0.02]", "BPR[epochs=2]"]
    chosen = searched["BPR"][1].settings
    assert set(chosen) == {"learning_rate", "embedding_size", "weight_decay"} and len(searched["BPR"][1].trials) == 4
    assert searched["BPR[learning_rate=0.02]"][1].space == {}
    last = searched["BPR[epochs=2]"][1]
    assert set(last.space) == {"learning_rate"}  # stated, not chosen, by the line before
    configs = [config_of(record) for record in result["runs"]]
    assert [c["learning_rate"] for c in configs] == [last.settings["learning_rate"], 0.02, chosen["learning_rate"]]
    assert {c["embedding_size"] for c in configs} == {chosen["embedding_size"]}
    assert [c["epochs"] for c in configs] == [2, 1, 1]
    assert "BPR[epochs=2] takes the values chosen for BPR[learning_rate=0.02]." in result["markdown"]
    assert "gone" not in result["markdown"]
    told = pd.read_csv("out/trials.csv")
    assert Path("out/trials.csv") in result["files"]
    assert told["score"].tolist() == pytest.approx([t.score for line in lines for t in searched[line][1].trials])
    assert told["model"].value_counts(sort=False).tolist() == [len(searched[line][1].trials) for line in lines]


def test_a_line_says_which_search_it_is(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Where one line has several, by what tells them; and whose values it starts from."""
    toy |= {"tune": 2, "few_shot": [10, None], "modes": ["uni9", "full"], "seeds": [1, 2], "names": {"BPR": "tuned"}}
    toy["per_model"] = {"BPR": {"embedding_size": 8, "weight_decay": 0.0}}
    lines = ["Pop", "BPR", "BPR[learning_rate=0.02]"]
    grid, options = grid_of(lines, {**toy, "tuned_from": {"BPR[learning_rate=0.02]": "BPR"}})
    _, told = tune_all(grid, options)
    text = capsys.readouterr().out
    for users in ("10 training users", "all training users"):
        assert f"[tune Pop · {users} 1/1] (as given) valid" in text
        assert f"[tune BPR · {users} 1/2] learning_rate=0.001 (as given) valid" in text
        assert f"[tune BPR[learning_rate=0.02] · {users} 1/1] (as chosen for tuned) valid" in text
    chosen = tuned_frame(told)["chosen"].tolist()
    assert chosen[::3] == ["nothing to search"] * 2
    assert chosen[2::3] == ["nothing to search, as chosen for tuned"] * 2


def test_a_loss_takes_its_sft(tiny: dict[str, Any], searched: dict[str, Any], tmp_path: Path) -> None:
    """So both lines share one SFT stage, and the loss is searched over its own keys alone."""
    settings = {k: v for k, v in tiny.items() if k not in ("model", "epochs")}
    settings |= {"eval_step": 0, "lora_r": 8, "score_norm": "sum", "MAX_ITEM_LIST_LENGTH": 5, "rejected_num": 1}
    space = tmp_path / "LLMRanker.yaml"
    space.write_text("learning_rate: [0.001, 0.002]\nepochs: [1]\nbeta: {choice: [0.2, 0.3], unless: {loss: SFT}}\n")
    result = compare(
        ["LLMRanker", "LLMRanker[loss=DPO]"],
        None,
        {
            **settings,
            "tune": 3,
            "search": str(space),
            "tuned_from": {"LLMRanker[loss=DPO]": "LLMRanker"},
            "out": str(tmp_path / "out"),
            "plots": False,
        },
    )
    sft, (asked, dpo) = searched["LLMRanker"][1], searched["LLMRanker[loss=DPO]"]
    assert set(sft.space) == {"learning_rate", "epochs"} and set(dpo.space) == {"beta"}
    assert {key: asked[key] for key in sft.settings} == sft.settings
    first, second = (config_of(record) for record in result["runs"])
    assert first["learning_rate"] == second["learning_rate"] == sft.settings["learning_rate"]
    assert second["beta"] == dpo.settings["beta"]
    stages = [json.loads(f.read_text())["loss"] for f in Path(tiny["checkpoint_dir"]).glob("stages/SFT-*/stage.json")]
    assert len(stages) == len({t.values["learning_rate"] for t in sft.trials})


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"BPR": "SASRec"}, "--tuned_from: BPR: SASRec is none of --models"),
        ({"BPR": "Pop"}, "--tuned_from: BPR: Pop is another model, whose keys mean something else; name a line of BPR"),
        ({"BPR": "BPR"}, "--tuned_from: BPR: BPR builds on BPR in turn"),
        ({"BPR": "BPR[epochs=2]", "BPR[epochs=2]": "BPR"}, "--tuned_from: BPR: BPR[epochs=2] builds on BPR in turn"),
        ({"BPR": 3}, "--tuned_from={'BPR': 3}: must be a table of labels, as in {'LLMRanker[loss=DMPO]': 'LLMRanker'}"),
        ("BPR", "--tuned_from='BPR': must be a table of labels"),
    ],
)
def test_what_a_line_cannot_build_on(toy: dict[str, Any], table: Any, told: str) -> None:
    """Told before any trial."""
    with pytest.raises(ConfigError) as error:
        compare(["Pop", "BPR", "BPR[epochs=2]"], None, {**toy, "tune": 2, "tuned_from": table})
    assert told in str(error.value)
    assert not Path(toy["checkpoint_dir"]).exists()


def test_without_tune_nothing_is_taken(toy: dict[str, Any]) -> None:
    result = compare(["BPR", "BPR[epochs=2]"], None, {**toy, "tuned_from": {"BPR[epochs=2]": "BPR"}, "out": "out"})
    assert "takes the values" not in result["markdown"] and not result["failed"]


@pytest.mark.parametrize("killed", [False, True])
def test_trials_in_processes_are_those_of_one_search(
    toy: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    killed: bool,
) -> None:
    """The same trials and choices, past the proposals that no score decides too; a dead process loses nothing."""
    lines = ["BPR", "BPR[epochs=2]"]
    toy |= {"tune": 11, "plots": False, "train_batch_size": 64, "tuned_from": {"BPR[epochs=2]": "BPR"}}
    del toy["epochs"]
    toy["per_model"] = {"BPR": {"epochs": 1, "embedding_size": 8}}
    if killed:
        monkeypatch.setenv("PYTHONHOME", str(tmp_path / "gone"))  # no process of ours can start
    found = []
    for jobs in (1, 2):
        where = {"checkpoint_dir": str(tmp_path / f"saved{jobs}"), "out": str(tmp_path / f"out{jobs}")}
        grid, options = grid_of(lines, {**toy, **where, "jobs": jobs})
        _, told = tune_all(grid, options)
        found.append([(label, [(t.values, t.score, t.error) for t in tuned.trials]) for label, _, tuned in told])
    assert found[0] == found[1]
    assert [len(trials) for _, trials in found[0]] == [11, 1]
    told = capfd.readouterr().out
    assert told.startswith("[tune] 2 searches, at most 12 trials, about ") and "[tune 10/10]" in told
    logs = list((tmp_path / "saved2" / "trials").glob("*.log"))
    assert len(logs) == (10 if killed else 0)


def grid_of(lines: list[str], given: dict[str, Any]) -> tuple[list[Cell], Options]:
    entries = parse_models(lines)
    options, shared = split_options(given)
    return cells(entries, options, shared), options


def test_how_the_test_asks_names_no_trial(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Other modes, test users or harm metrics read the trials that are there, a mode that cannot be asked too."""
    toy |= {"tune": 3, "out": "out", "plots": False, "epochs": 1, "valid_users": 9, "eval_users": 8}
    toy["eval_args"] = {"mode": {"valid": "uni9", "test": "uni9"}}
    compare("BPR", None, toy)
    before = {file.name for file in Path(toy["checkpoint_dir"]).glob("trials/*.json")}
    assert len(before) == 3
    capsys.readouterr()
    for changed in ({"modes": "uni999,full"}, {"modes": "uni5"}, {"eval_users": 10}, {"look_alikes": 5}):
        done = compare("BPR", None, {**toy, **changed})
        assert {file.name for file in Path(toy["checkpoint_dir"]).glob("trials/*.json")} == before
        assert "no trial succeeded" not in done["markdown"]
    assert {file.name for file in Path("out").glob("*.csv")} == {"table.csv", "tests.csv", "trials.csv"}


def test_what_nothing_searches_is_told(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    compare("Pop", None, {**toy, "search": "nowhere.yaml", "tuned_from": {"BPR": "Pop"}, "plots": False})
    assert "--search and --tuned_from: nothing is searched without --tune; passed over." in capsys.readouterr().out
