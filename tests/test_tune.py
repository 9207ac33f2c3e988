"""Tuning: the same number of trials for all, chosen on validation alone, kept, resumed, and told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import SafetensorError

from recbole_llm.costs import waiting
from recbole_llm.errors import ConfigError, NotAtHand, UserError
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report import trials as tuning
from recbole_llm.report.trials import Trial
from recbole_llm.report.tune import Tuned, check_search, trials_frame, tune, tuned_frame
from recbole_llm.trainer import ProtocolEvaluation
from recbole_llm.validation import validate

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def bpr(toy: dict[str, Any]) -> dict[str, Any]:
    """BPR, which learns this data in some epochs and under some rates alone."""
    return {**toy, "epochs": 6, "train_batch_size": 64}


def raised(error: Exception) -> Any:
    raise error


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Settings of the trials that are run, not read."""
    found: list[dict[str, Any]] = []
    real = tuning.validate
    monkeypatch.setattr(tuning, "validate", lambda *args: (found.append(args[3]), real(*args))[1])
    return found


def trial_files(settings: dict[str, Any]) -> list[Path]:
    return sorted(path for path in (Path(settings["checkpoint_dir"]) / "trials").iterdir() if path.name != ".locks")


def without_seconds(tuned: Tuned) -> Tuned:
    return replace(tuned, trials=[replace(trial, seconds=0.0) for trial in tuned.trials])


# Validation


@pytest.mark.parametrize("changes", [{}, {"eval_step": 2, "epochs": 5}, {"valid_metric": "MRR@5"}])
def test_validation_is_that_of_a_run(bpr: dict[str, Any], changes: dict[str, Any]) -> None:
    """The run saves the best epoch and tests it; validation knows its score without either."""
    found, run = validate("BPR", None, None, {**bpr, **changes}), run_recbole_llm("BPR", None, None, {**bpr, **changes})
    assert found == {key: run[key] for key in found} and len(found) == 3
    assert found["best_valid_score"] == found["best_valid_result"][changes.get("valid_metric", "NDCG@10").lower()]


@pytest.mark.parametrize("model", ["BPR", "LLMRanker"])
def test_without_validation_on_the_way_the_last_state_is_scored(bpr: dict[str, Any], model: str) -> None:
    """With one validation after the last of two epochs, both are of the same weights."""
    settings = {**bpr, "epochs": 2, **({"llm": "tiny"} if model == "LLMRanker" else {})}
    never, once = (validate(model, None, None, {**settings, "eval_step": step}) for step in (0, 2))
    assert never == once
    assert never["best_valid_score"] != validate(model, None, None, {**settings, "epochs": 1})["best_valid_score"]


def test_validation_leaves_nothing(bpr: dict[str, Any], tiny: dict[str, Any]) -> None:
    """But stages that runs share."""
    validate("BPR", None, None, bpr)
    validate("ItemKNN", None, None, bpr)
    assert trial_files(bpr) == []
    with pytest.raises(UserError):
        validate("SASRec", None, None, {**bpr, "n_heads": 7})
    validate("LLMRanker", None, None, tiny)
    assert trial_files(bpr) == []
    assert [file.name[:4] for file in Path(bpr["checkpoint_dir"]).iterdir() if file.name != "trials"] == ["stag"]


def test_test_rows_are_never_scored(bpr: dict[str, Any], tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run would."""
    scored = []
    real = ProtocolEvaluation.score_rows

    def score_rows(self: Any, data: Any, rows: Any) -> Any:
        scored.append(data.split)
        assert data.split != "test"
        return real(self, data, rows)

    monkeypatch.setattr(ProtocolEvaluation, "score_rows", score_rows)
    found = [tune("BPR", None, bpr, 2), tune("ItemKNN", None, bpr, 2), tune("LLMRanker", None, tiny, 2)]
    assert all(trial.error is None for tuned in found for trial in tuned.trials)
    assert set(scored) == {"valid"}
    with pytest.raises(UserError, match="ranking the test rows failed: AssertionError"):
        run_recbole_llm("BPR", None, None, bpr)


# The choice


def test_the_best_on_validation_is_chosen(bpr: dict[str, Any]) -> None:
    tuned = tune("BPR", None, bpr, 6)
    scores = [trial.score for trial in tuned.trials]
    assert [trial.number for trial in tuned.trials] == list(range(6)) and len(set(scores)) > 3
    best = tuned.trials[scores.index(max(scores))]
    assert best.number > 0  # else this test would not see a choice of the first
    assert (tuned.settings, tuned.score) == (best.values, best.score) and tuned.bigger
    assert tuned.trials[0].values == {"learning_rate": 0.001, "embedding_size": 64, "weight_decay": 0.0}
    run, given = run_recbole_llm("BPR", None, None, {**bpr, **tuned.settings}), run_recbole_llm("BPR", None, None, bpr)
    assert (run["best_valid_score"], given["best_valid_score"]) == (max(scores), scores[0])
    records = [json.loads(file.read_text(encoding="utf-8")) for file in trial_files(bpr)]
    assert sorted(record["score"] for record in records) == sorted(scores)
    assert {file.stem for file in trial_files(bpr)} >= {Path(run["run_folder"]).name, Path(given["run_folder"]).name}


def test_a_smaller_score_may_be_better(bpr: dict[str, Any]) -> None:
    settings = {**bpr, "metrics": ["NDCG", "GiniIndex"], "valid_metric": "GiniIndex@5"}
    tuned = tune("BPR", None, settings, 5)
    scores = [trial.score for trial in tuned.trials]
    assert not tuned.bigger and min(scores) < max(scores)
    assert tuned.score == min(scores) and tuned.settings == tuned.trials[scores.index(min(scores))].values


def test_one_trial_is_no_tuning(bpr: dict[str, Any]) -> None:
    tuned = tune("BPR", None, bpr, 1)
    run = run_recbole_llm("BPR", None, None, bpr)
    assert len(tuned.trials) == 1 and tuned.score == run["best_valid_score"]
    tuned_run = run_recbole_llm("BPR", None, None, {**bpr, **tuned.settings})
    assert tuned_run["run_folder"] == run["run_folder"]


def test_all_models_get_as_many_trials(bpr: dict[str, Any], ran: list[dict[str, Any]]) -> None:
    """Where their spaces hold as many."""
    counts = {}
    for model in ("BPR", "ItemKNN", "EASE", "Pop"):
        before = len(ran)
        counts[model] = (len(tune(model, None, bpr, 3).trials), len(ran) - before)
    assert counts == {"BPR": (3, 3), "ItemKNN": (3, 3), "EASE": (3, 3), "Pop": (1, 1)}


def test_a_finite_space_ends_early_and_that_is_said(
    bpr: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "EASE.yaml").write_text("reg_weight: [1.0, 100.0]\n", encoding="utf-8")
    tuned = tune("EASE", None, bpr, 9, str(tmp_path))
    assert [trial.values["reg_weight"] for trial in tuned.trials][0] == 250.0
    assert {trial.values["reg_weight"] for trial in tuned.trials} == {1.0, 100.0, 250.0} and len(tuned.trials) == 3
    assert "there is no more to try, so 3 of 9 trials" in capsys.readouterr().out


def test_what_the_user_gave_stays(bpr: dict[str, Any], ran: list[dict[str, Any]]) -> None:
    tuned = tune("BPR", None, {**bpr, "learning_rate": 0.02, "weight_decay": 0.0}, 9)
    assert {settings["learning_rate"] for settings in ran} == {0.02}
    assert list(tuned.space) == ["embedding_size"] and len(tuned.trials) == 3


# What fails


def test_a_failing_trial_counts_and_stops_nothing(
    bpr: dict[str, Any], tmp_path: Path, ran: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """RecBole's SASRec wants a hidden size that its heads divide."""
    (tmp_path / "SASRec.yaml").write_text("n_heads: [2, 7, 16]\n", encoding="utf-8")
    settings = {**bpr, "epochs": 1, "hidden_size": 16, "inner_size": 8, "n_layers": 1}
    tuned = tune("SASRec", None, settings, 3, str(tmp_path))
    failed = [trial for trial in tuned.trials if trial.error]
    assert [(trial.values, trial.score) for trial in failed] == [({"n_heads": 7}, None)]
    assert "The hidden size (16) is not a multiple of the number of attention heads (7)" in failed[0].error
    assert tuned.score == max(trial.score for trial in tuned.trials if not trial.error)
    assert "n_heads=7 failed: --model=SASRec --dataset=toy: building the model failed" in capsys.readouterr().out
    record = next(r for f in trial_files(bpr) if (r := json.loads(f.read_text(encoding="utf-8")))["error"])
    assert "Traceback" in record["traceback"] and record["score"] is None and len(trial_files(bpr)) == 3
    assert len(ran) == 3
    again = tune("SASRec", None, settings, 3, str(tmp_path))
    assert again == tuned and len(ran) == 3


def test_values_that_are_wrong_together_count(tiny: dict[str, Any], tmp_path: Path) -> None:
    """DPO takes one rejected item: told by the configuration's own checks, before any work."""
    (tmp_path / "LLMRanker.yaml").write_text("rejected_num: [1, 2]\n", encoding="utf-8")
    settings = {k: v for k, v in tiny.items() if k != "model"} | {"loss": "DPO", "epochs": 0}
    with pytest.raises(ConfigError):  # as given: 3
        tune("LLMRanker", None, settings, 3, str(tmp_path))
    (tmp_path / "LLMRanker.yaml").write_text("loss: [SDPO, DPO]\n", encoding="utf-8")
    tuned = tune("LLMRanker", None, {**settings, "loss": "SDPO"}, 3, str(tmp_path))
    assert tuned.space == {} and len(tuned.trials) == 1  # given, so not searched
    (tmp_path / "LLMRanker.yaml").write_text("robust: [False, True]\n", encoding="utf-8")
    tuned = tune("LLMRanker", None, {**settings, "loss": "SDPO"}, 3, str(tmp_path))
    assert [trial.error is None for trial in tuned.trials] == [True, False]
    assert tuned.trials[1].error.startswith("--robust=True: SDPO does not read it") and tuned.trials[1].seconds == 0


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_score_that_is_none(bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch, score: float) -> None:
    """All trials fail; as given is then all there is."""
    monkeypatch.setattr(tuning, "validate", lambda *args: {"best_valid_score": score, "best_valid_result": {}})
    tuned = tune("BPR", None, bpr, 3)
    assert (tuned.settings, tuned.score) == ({}, None)
    assert [trial.error for trial in tuned.trials] == [f"the validation score is {score}"] * 3


def test_a_full_disk_is_no_trial(bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It says nothing about the values that were tried."""
    real, calls = tuning.validate, []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise UserError("--checkpoint_dir: could not write") from OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(tuning, "validate", full)
    with pytest.raises(UserError, match="could not write"):
        tune("BPR", None, bpr, 3)
    assert len(trial_files(bpr)) == 1
    assert [trial.error for trial in tune("BPR", None, bpr, 3).trials] == [None] * 3


def test_two_searches_do_a_trial_once(bpr: dict[str, Any], ran: list[dict[str, Any]]) -> None:
    """Of two that meet at a trial one does it; the other waits and reads what it found."""
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda number: tuning.run_trial(number, "BPR", "toy", bpr, {}), (0, 0))
    assert one == other and one.error is None and len(ran) == 1
    assert [file.suffix for file in trial_files(bpr)] == [".json"]


def test_a_lock_that_cannot_be_opened(bpr: dict[str, Any]) -> None:
    config, _ = check_search("BPR", None, bpr)
    file = tuning.trial_file(config)
    (file.parent / ".locks" / f"{file.stem}.lock").mkdir(parents=True)
    with pytest.raises(UserError, match="--checkpoint_dir: cannot open .*lock"):
        tuning.run_trial(0, "BPR", "toy", bpr, {})


@pytest.mark.parametrize("what", [NotAtHand("no network"), OSError(28, "No space left on device")])
def test_what_says_nothing_about_the_values_is_no_trial(
    bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: Exception
) -> None:
    """Told through another error, as a missing encoder is; the next try has it."""

    def fails(*_: Any) -> Any:
        try:
            raise UserError("--encoder=minilm") from what
        except UserError as error:
            raise UserError("--text_encoder=minilm") from error

    real = tuning.validate
    monkeypatch.setattr(tuning, "validate", fails)
    with pytest.raises(UserError, match="--text_encoder"):
        tune("BPR", None, bpr, 2)
    monkeypatch.setattr(tuning, "validate", real)
    assert [trial.error for trial in tune("BPR", None, bpr, 2).trials] == [None] * 2


@pytest.mark.parametrize(
    "what",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_trial_that_lacks_memory_beside_others_is_tried_alone(
    bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch, what: Exception
) -> None:
    """What the machine had left for it says nothing about its values; alone it does."""

    def fails(*_: Any) -> Any:
        raise UserError("--model=BPR: it failed") from what

    with monkeypatch.context() as broken:
        broken.setattr(tuning, "validate", fails)
        settings = {k: v for k, v in bpr.items() if k != "dataset"}
        assert tuning.trial_once("BPR", bpr["dataset"], settings, {}) is None
        assert trial_files(bpr) == []
        assert [trial.error for trial in tune("BPR", None, bpr, 1).trials] == ["--model=BPR: it failed"]
    assert len(trial_files(bpr)) == 1


def test_a_gpu_that_broke_is_no_trial(bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this process would try after it fails; where the values broke it, the next process goes on."""
    kept = {"CUDA error: unspecified launch failure": 0, "CUDA error: device-side assert triggered": 1}
    for told, files in kept.items():
        with monkeypatch.context() as broken:
            broken.setattr(tuning, "validate", lambda *_: raised(torch.AcceleratorError(told)))  # noqa: B023
            with pytest.raises(UserError, match=f"a trial was stopped by AcceleratorError: {told}"):
                tune("BPR", None, bpr, 2)
        assert len(trial_files(bpr)) == files
    first, second = tune("BPR", None, bpr, 2).trials
    assert "device-side assert" in str(first.error) and second.error is None


def test_a_trial_does_not_count_what_it_waited(bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """For a stage that another trial trains."""

    def waits(*_: Any) -> dict[str, Any]:
        with waiting():
            time.sleep(0.5)
        return {"best_valid_score": 0.5}

    monkeypatch.setattr(tuning, "validate", waits)
    assert tune("BPR", None, bpr, 1).trials[0].seconds < 0.25


@pytest.mark.parametrize(
    ("where", "what"),
    [
        ("recbole_llm.llm.adapter.write_tensors", SafetensorError("Error while serializing: I/O error: No space left")),
        ("recbole_llm.resume.write_tensors", SafetensorError("Error while serializing: I/O error: No space left")),
        ("recbole_llm.reference.write_tensors", SafetensorError("Error while serializing: I/O error: No space left")),
        ("recbole_llm.trainer.torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0")),
        ("recbole_llm.llm_trainer.load_adapter", OSError(24, "Too many open files")),
    ],
)
def test_what_the_machine_does_is_no_trial(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str, what: Exception
) -> None:
    """A disk that is full while a stage, or what serves it, is saved; as safetensors and torch tell it."""
    settings = {k: v for k, v in tiny.items() if k != "model"} | {"loss": "DPO", "rejected": "from_model"}
    settings |= {"rejected_num": 1, "epochs": 1, "from_model": "SASRec", "save_every": 1e-9}

    def fails(*_: Any, **__: Any) -> Any:
        raise what

    with monkeypatch.context() as broken:
        broken.setattr(where, fails)
        told = "--checkpoint_dir|a trial was stopped by OSError: .*Too many open files"
        with pytest.raises(UserError, match=told) as error:
            tune("LLMRanker", None, settings, 1)
        assert error.value.__cause__ is what
    assert trial_files(settings) == []
    assert [trial.error for trial in tune("LLMRanker", None, settings, 1).trials] == [None]


@pytest.mark.parametrize("damage", [lambda data: data[:-20] + b"\1" + data[-19:], lambda data: data[:100]])
def test_a_damaged_stage_is_no_trial(tiny: dict[str, Any], damage: Callable[[bytes], bytes]) -> None:
    """It is told, and what other trials share is not held against their values."""
    settings = {k: v for k, v in tiny.items() if k != "model"} | {"epochs": 1}
    validate("LLMRanker", None, None, settings)
    (adapter,) = (Path(tiny["checkpoint_dir"]) / "stages").glob("SFT-*/adapter_model.safetensors")
    sound = adapter.read_bytes()
    adapter.write_bytes(damage(sound))
    with pytest.raises(UserError, match="is damaged|holds no adapter that can be read"):
        tune("LLMRanker", None, settings, 1)
    assert trial_files(settings) == []
    adapter.write_bytes(sound)
    assert [trial.error for trial in tune("LLMRanker", None, settings, 1).trials] == [None]


def test_records_that_cannot_be_written(bpr: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning, "write_json", full)
    with pytest.raises(UserError, match="--checkpoint_dir=.*finished trials are kept"):
        tune("BPR", None, bpr, 2)


@pytest.mark.parametrize("trials", [0, -1, 2.5, "x", True])
def test_wrong_number_of_trials(toy: dict[str, Any], trials: Any) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"--tune={trials!r}: must be a whole number >= 1")):
        tune("BPR", None, toy, trials)
    assert not Path(toy["checkpoint_dir"]).exists()


def test_a_wrong_space_is_told_before_any_work(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "BPR.yaml").write_text("embeding_size: [8]\n", encoding="utf-8")
    for told in (
        lambda: check_search("BPR", None, toy, str(tmp_path)),
        lambda: tune("BPR", None, toy, 3, str(tmp_path)),
    ):
        with pytest.raises(ConfigError, match="embeding_size: no such key; did you mean `embedding_size`"):
            told()
    assert not Path(toy["checkpoint_dir"]).exists()


# Cut off


def test_killed_and_resumed(bpr: dict[str, Any], ran: list[dict[str, Any]], tmp_path: Path) -> None:
    """The process dies within trial 3: the others are read, and nothing is other than in an unbroken search."""
    broken = {**bpr, "checkpoint_dir": str(tmp_path / "broken")}
    script = f"""
import os
from recbole_llm.report import trials as tuning
from recbole_llm.report.tune import tune
from recbole_llm.trainer import ProtocolEvaluation
real, calls = tuning.validate, []
def validate(*args):
    calls.append(args)
    if len(calls) == 3:
        ProtocolEvaluation.evaluate = lambda *args, **kwargs: os._exit(9)
    return real(*args)
tuning.validate = validate
tune("BPR", None, {broken!r}, 4)
"""
    died = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert died.returncode == 9, died.stderr
    assert len([file for file in trial_files(broken) if file.is_file()]) == 2
    resumed = tune("BPR", None, broken, 4)
    assert len(ran) == 2 and len(trial_files(broken)) == 4  # the folder of the one that died is gone
    unbroken = tune("BPR", None, bpr, 4)
    assert len(ran) == 6
    assert without_seconds(resumed) == without_seconds(unbroken)
    assert tune("BPR", None, bpr, 5).trials[:4] == unbroken.trials and len(ran) == 7


def test_another_seed_asks_for_other_values(bpr: dict[str, Any]) -> None:
    one, two = (tune("BPR", None, {**bpr, "epochs": 1, "seed": seed}, 2) for seed in (1, 2))
    assert one.trials[1].values != two.trials[1].values


# LLMs


def test_preference_trials_share_their_sft_stage(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is trained once, whatever the preference stage tries."""
    trained = []
    real = LLMTrainer._run_stage
    monkeypatch.setattr(
        LLMTrainer, "_run_stage", lambda self, stage, *rest: (trained.append(stage.loss), real(self, stage, *rest))[1]
    )
    settings = {k: v for k, v in tiny.items() if k != "model"}
    settings |= {"loss": "DPO", "rejected_num": 1, "learning_rate": 0.0005, "eval_step": 0}
    tuned = tune("LLMRanker", None, settings, 3)
    assert list(tuned.space) == ["preference_learning_rate", "beta"]
    assert all(trial.score is not None for trial in tuned.trials)
    assert trained == ["SFT", "DPO", "DPO", "DPO"]
    assert len(list((Path(tiny["checkpoint_dir"]) / "stages").glob("SFT-*"))) == 1


# What is told


def test_a_line_a_trial(bpr: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    tuned = tune("BPR", None, bpr, 3, label="BPR[epochs=6]")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[tune BPR[epochs=6]")]
    assert lines[0] == "[tune BPR[epochs=6]] over learning_rate, embedding_size, weight_decay"
    best = 0.0
    for number, (line, trial) in enumerate(zip(lines[1:], tuned.trials, strict=True), 1):
        best = max(best, trial.score)
        values = " ".join(f"{key}={value}" for key, value in trial.values.items())
        given = " (as given)" if number == 1 else ""
        told = f"[tune BPR[epochs=6] {number}/3] {values}{given} valid NDCG@10 {trial.score:.4f}, best {best:.4f}"
        assert re.fullmatch(re.escape(told) + ("" if number == 3 else r", about \d+ (s|min) left"), line)


def test_appendix_by_hand() -> None:
    trials = [
        Trial(0, {"k": 100}, 0.25, 30.0),
        Trial(1, {"k": 7}, 0.5, 60.0),
        Trial(2, {"k": 9}, None, 30.0, "ValueError: no"),
    ]
    tuned = Tuned({"k": 7}, 0.5, trials, {"k": {"int": [5, 1000]}}, "NDCG@10", True)
    pop = Tuned({}, 0.125, [Trial(0, {}, 0.125, 6.0)], {}, "NDCG@10", True)
    lost = Tuned({}, None, [Trial(0, {"k": 100}, None, 0.0, "no")], {"k": {"int": [5, 1000]}}, "NDCG@10", True)
    frame = tuned_frame([("ItemKNN", "toy", tuned), ("Pop", "toy", pop), ("KNN", "toy", lost)])
    taken = tuned_frame([("A", "toy", replace(pop, source="B")), ("C", "toy", replace(lost, source="B"))])
    assert taken["chosen"].tolist() == ["nothing to search, as chosen for B", "as chosen for B: no trial succeeded"]
    columns = ["model", "data set", "trials", "failed", "valid metric", "best", "as given", "min", "chosen"]
    expected = [
        ["ItemKNN", "toy", 3, 1, "NDCG@10", 0.5, 0.25, 2.0, "k=7"],
        ["Pop", "toy", 1, 0, "NDCG@10", 0.125, 0.125, 0.1, "nothing to search"],
        ["KNN", "toy", 1, 1, "NDCG@10", None, None, 0.0, "as given: no trial succeeded"],
    ]
    pd.testing.assert_frame_equal(frame, pd.DataFrame(expected, columns=columns))
    columns = ["model", "data set", "trial", "values", "valid metric", "score", "error"]
    expected = [
        ["ItemKNN", "toy", 1, "k=100", "NDCG@10", 0.25, ""],
        ["ItemKNN", "toy", 2, "k=7", "NDCG@10", 0.5, ""],
        ["ItemKNN", "toy", 3, "k=9", "NDCG@10", None, "ValueError: no"],
        ["Pop", "toy", 1, "", "NDCG@10", 0.125, ""],
    ]
    every = trials_frame([("ItemKNN", "toy", tuned), ("Pop", "toy", pop)])
    pd.testing.assert_frame_equal(every, pd.DataFrame(expected, columns=columns))
