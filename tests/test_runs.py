"""`recbole-llm ls`: what there is, and the finished runs below a folder; no torch, and no file that breaks it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import cli
from recbole_llm.keys import LOSSES
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.runs import runs_text

ROOT = Path(__file__).resolve().parents[1]


def kept(folder: Path, name: str, *, at: int = 0, **changes: Any) -> Path:
    """A run folder with a record as ``save_run`` writes it."""
    record = {
        "model": "SASRec",
        "dataset": "ml-100k",
        "training_dataset": "ml-100k",
        "metrics": {"ndcg@10": 0.43794, "hit@1": 0.18},
        "valid_metric": "ndcg@10",
        "seed": 2020,
        "few_shot": None,
        "mode": "uni99",
        "next_items": 1,
    }
    home = folder / name
    home.mkdir(parents=True)
    (home / "config.yaml").touch()
    (home / "result.json").write_text(json.dumps({**record, **changes}), encoding="utf-8")
    os.utime(home / "result.json", (at, at))
    return home / "result.json"


def cells(text: str) -> list[list[str]]:
    """The rows of the table, cut where the columns begin."""
    header, rule, *rows = text.splitlines()
    starts = [i for i, c in enumerate(rule) if c == "-" and (i == 0 or rule[i - 1] == " ")]
    ends = [*starts[1:], None]
    return [[row[a:b].strip() for a, b in zip(starts, ends, strict=True)] for row in (header, *rows)]


def test_finished_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")
    ranker = {"model": "LLMRanker", "loss": "DMPO", "stages": [{"loss": "SFT"}, {"loss": "DMPO"}], "few_shot": 100}
    kept(tmp_path, "b", at=86400 + 60, **ranker)
    kept(tmp_path, "c", at=60, seed=7, next_items=4, mode="uni6")
    kept(tmp_path, "a", at=3 * 86400, model="LLMRanker", loss="SFT", stages=[], dataset="games")
    header, *rows = cells(runs_text(tmp_path))
    assert header == ["run", "model", "data set", "seed", "few-shot", "mode", "on test", "finished"]
    assert [row[:7] for row in rows] == [
        ["c", "SASRec", "ml-100k", "7", "", "uni6, next 4", "ndcg@10 0.4379"],
        ["b", "LLMRanker (DMPO)", "ml-100k", "2020", "100", "uni99", "ndcg@10 0.4379"],
        ["a", "LLMRanker (zero-shot)", "ml-100k -> games", "2020", "", "uni99", "ndcg@10 0.4379"],
    ]
    assert all(row[7][:5] in ("1969-", "1970-") and len(row[7]) == 16 for row in rows)


def test_older_records(tmp_path: Path) -> None:
    file = kept(tmp_path, "old")
    record = json.loads(file.read_text())
    for key in ("valid_metric", "next_items", "training_dataset"):
        del record[key]
    file.write_text(json.dumps(record))
    assert cells(runs_text(tmp_path))[1][:7] == ["old", "SASRec", "ml-100k", "2020", "", "uni99", ""]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"{", "no JSON"),
        (b"", "no JSON"),
        (b"\xff\xfe{}", "no JSON"),
        (b"[]", "no record of a run"),
        (b"3", "no record of a run"),
        (b"null", "no record of a run"),
        (b"{}", "no record of a run"),
        (b'"x"', "no record of a run"),
        (b"[" * 100000, "no JSON"),
        (b'{"model": "x", "metrics": 3}', "no record of a run"),
    ],
)
def test_unreadable_records(tmp_path: Path, content: bytes, why: str) -> None:
    kept(tmp_path, "fine")
    kept(tmp_path, "broken").write_bytes(content)
    *table, last = runs_text(tmp_path).splitlines()
    assert [row[0] for row in cells("\n".join(table))] == ["run", "fine"]
    assert last == f"cannot be read: {tmp_path / 'broken' / 'result.json'} ({why})"


def test_no_metric_of_that_name(tmp_path: Path) -> None:
    kept(tmp_path, "x", valid_metric="hit@3")
    kept(tmp_path, "y", metrics={"ndcg@10": None})
    told = runs_text(tmp_path)
    assert told.startswith("no finished run in ") and told.count("(no record of a run)") == 2


def test_folders_that_are_no_finished_runs(tmp_path: Path) -> None:
    assert runs_text(tmp_path / "none") == f"no finished run in {tmp_path / 'none'}"
    for name in ("p", "q"):
        kept(tmp_path, name).unlink()
    (tmp_path / "stages" / "SFT-1").mkdir(parents=True)  # shared by runs, and none
    (tmp_path / "compare-ml-100k-1.md").touch()
    assert runs_text(tmp_path).splitlines() == [f"no finished run in {tmp_path}", "unfinished: 2"]
    kept(tmp_path, "r").unlink()
    (tmp_path / "r" / "result.json").mkdir()
    assert runs_text(tmp_path).endswith("result.json (Is a directory)")


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    kept(tmp_path, "x", model="a\x1b[31m\nb")
    assert cells(runs_text(tmp_path))[1][1] == "a?[31m?b"


def test_real_run(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_recbole_llm("Pop", config_dict=toy)
    capsys.readouterr()
    assert cli.main(["ls", "--runs", f"--checkpoint_dir={toy['checkpoint_dir']}"]) == 0
    (line,) = cells(capsys.readouterr().out)[1:]
    score = f"ndcg@10 {run['test_result']['ndcg@10']:.4f}"
    assert line[:7] == [Path(run["run_folder"]).name, "Pop", "toy", "2020", "", "uni9", score]


def test_without_torch(tmp_path: Path) -> None:
    """It loads in a second what a run loads in five."""
    kept(tmp_path / "saved", "x")
    code = (
        "import sys; from recbole_llm.cli import main; main(['ls']); main(['ls', '--keys']);"
        "print(sorted({'torch', 'transformers', 'recbole.config'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"losses: {', '.join(LOSSES)}\n" in done.stdout and "\nx      SASRec" in done.stdout
