"""Whole runs of DPO4Rec: iterations, controls, shared stages, and kills in the middle of each stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock, Timeout
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerFast

from recbole_llm.cli import main
from recbole_llm.config import LLMConfig
from recbole_llm.dpo4rec import align, loop
from recbole_llm.dpo4rec import text_vectors as text_vectors_module
from recbole_llm.dpo4rec.align import Reasoner, policy_config
from recbole_llm.dpo4rec.loop import DPO4RecTrainer
from recbole_llm.dpo4rec.text_vectors import text_vectors
from recbole_llm.errors import UserError
from recbole_llm.llm.logps import base_model
from recbole_llm.llm.sampling import Written
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.plan import plan
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.plot_data import run_seconds
from tests.conftest import accuracy, toy_settings, write_dataset
from tests.test_dpo4rec import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {*SMALL, "align_learning_rate"}


@pytest.fixture
def small(toy: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of DPO4Rec on the made-up data with the random LLM."""
    return {**toy, **SMALL, "align_learning_rate": 0.01}


def record_of(run: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(run["run_folder"]) / "dpo4rec.json").read_text(encoding="utf-8"))


def is_held(folder: Path) -> bool:
    """Whether another process would have to wait for a folder."""

    def tried() -> bool:
        try:
            with FileLock(folder.resolve() / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    with ThreadPoolExecutor() as other:
        return other.submit(tried).result()


def texts_of(run: dict[str, Any], iteration: int) -> list[str]:
    lines = (Path(run["run_folder"]) / f"texts-{iteration}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line)["text"] for line in lines]


def test_ladder(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rungs share what they have in common, and each differs where it should."""
    trained: list[Any] = []
    fit = DPO4RecTrainer._begin

    def counted(self: DPO4RecTrainer, folder: Path) -> None:
        trained.append(folder)
        fit(self, folder)

    monkeypatch.setattr(DPO4RecTrainer, "_begin", counted)
    last = {**small, "select_iteration": "last"}
    kar = run_recbole_llm("DPO4Rec", None, None, {**last, "iterations": 0})
    assert len(trained) == 1
    one = run_recbole_llm("DPO4Rec", None, None, {**last, "iterations": 1})
    assert len(trained) == 2  # the first recommender is KAR's
    two = run_recbole_llm("DPO4Rec", None, None, {**last, "iterations": 2})
    assert len(trained) == 3
    sft = run_recbole_llm("DPO4Rec", None, None, {**last, "iterations": 1, "alignment": "SFT"})
    placebo = run_recbole_llm("DPO4Rec", None, None, {**last, "knowledge": "placebo"})
    assert len(trained) == 5
    assert [len(record_of(run)["iterations"]) for run in (kar, one, two, sft, placebo)] == [1, 2, 3, 2, 1]
    assert texts_of(kar, 0) == texts_of(two, 0) != texts_of(one, 1)
    assert texts_of(kar, 0) != texts_of(placebo, 0)
    assert sorted(texts_of(kar, 0)) == sorted(texts_of(placebo, 0))  # each text once, with another user
    assert texts_of(one, 1) == texts_of(two, 1) not in (texts_of(two, 2), texts_of(sft, 1))
    losses = [record_of(run)["iterations"][-1]["train_loss"] for run in (kar, placebo, one, sft)]
    assert len({tuple(loss) for loss in losses}) == 4
    aligned = record_of(two)["iterations"][0]["align"]
    assert aligned["loss"] == "DPO"
    assert aligned["train_loss"]["0"] == pytest.approx(np.log(2), abs=0.05)  # the reference is the policy at the start
    assert aligned["train_loss"]["2"] < 0.6


def test_second_round_has_its_own_reference(small: dict[str, Any]) -> None:
    """In each round DPO's loss begins at ln 2: the reference is the LLM as the round before left it."""
    run = run_recbole_llm("DPO4Rec", None, None, {**small, "select_iteration": "last", "align_batch_size": 10})
    first = [r["align"]["train_loss"]["0"] for r in record_of(run)["iterations"][:2]]
    assert first == pytest.approx([np.log(2)] * 2, abs=1e-4)  # one step an epoch


def test_best_iteration_is_kept(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Validation falls after the first round: no second one, and recommender, texts and LLM are those before it."""
    teach = DPO4RecTrainer.teach_recommender

    def worse(self: DPO4RecTrainer, iteration: int, *args: Any) -> tuple[Path, dict[str, Any]]:
        folder, record = teach(self, iteration, *args)
        return folder, {**record, "best_valid_score": 0.9 - iteration / 10}

    kar = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 0})
    monkeypatch.setattr(DPO4RecTrainer, "teach_recommender", worse)
    loaded, load = [], align.load_llm
    monkeypatch.setattr(align, "load_llm", lambda **how: (loaded.append(how), load(**how))[1])
    run = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 2})
    record = record_of(run)
    assert (len(record["iterations"]), record["selected_iteration"]) == (2, 0)
    assert len(loaded) == 1  # there may be no room for a second
    assert run["test_result"] == kar["test_result"]
    mine, theirs = (load_file(Path(r["run_folder"]) / "adapter_model.safetensors") for r in (run, kar))
    assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_nothing_to_select_by(small: dict[str, Any]) -> None:
    """Without validation the last iteration is kept, not the first."""
    run = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 2, "eval_step": 0})
    assert (record_of(run)["selected_iteration"], run["best_valid_result"]) == (2, None)


def test_no_pairs(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A gap that no pair has: the LLM stays, its texts too, and the run says so."""
    earlier: list[Any] = []
    monkeypatch.setattr(DPO4RecTrainer, "count_earlier", lambda self, *seconds: earlier.append(seconds))
    run = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 1, "reward_gap": 1.5, "state": "WARNING"})
    assert not earlier and not record_of(run)["found"]  # the one recommender of both iterations counts once
    record = record_of(run)["iterations"][0]
    assert record["judged"]["pairs"] == 0
    assert "align" not in record
    assert texts_of(run, 0) == texts_of(run, 1)
    assert "no pair differs by --reward_gap=1.5" in (Path(run["run_folder"]) / "train.log").read_text()


def test_preview(small: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair user's prompt, texts, rewards and pair, as the run has them; a run waits while preview works there."""

    def alone(work: Any) -> Any:
        def held(self: DPO4RecTrainer, *args: Any, **more: Any) -> Any:
            assert is_held(self.run_folder)
            return work(self, *args, **more)

        return held

    run = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 1})
    flags = [f"--{key}={value}" for key, value in {**small, "iterations": 1}.items()]
    line = json.loads((Path(run["run_folder"]) / "judged-0.jsonl").read_text(encoding="utf-8").split("\n")[2])
    monkeypatch.setattr(DPO4RecTrainer, "teach_recommender", alone(DPO4RecTrainer.teach_recommender))
    assert main(["preview", "--model=DPO4Rec", *flags, f"--user={line['user']}"]) == 0
    shown = capsys.readouterr().out
    assert f"user {line['user']}: 8 items known" in shown
    assert "Say in a few sentences" in shown
    for number, text in enumerate(line["texts"]):
        mark = {line["best"]: "  best", line["worst"]: "  worst"}.get(number, "")
        assert f"[{number + 1}] NDCG@5 {text['ndcg']:.3f}" in shown
        assert f"{text['tokens']} tokens{mark}\n" in shown
    assert main(["preview", "--model=DPO4Rec", *flags, "--user=nobody"]) == 2
    assert "--user=nobody: not a pair user; there are 10" in capsys.readouterr().err


def test_parameters_trained_are_the_llms_too(small: dict[str, Any]) -> None:
    """Where alignment trained them; the recommender's alone where texts of the untuned LLM are read."""
    trained = []
    for iterations in (0, 1):
        run = run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": iterations})
        folder = Path(run["run_folder"])
        trained.append(json.loads((folder / "result.json").read_text())["trainable_parameters"])
    adapter = sum(weight.size for weight in load_file(folder / "adapter_model.safetensors").values())
    assert trained[1] == trained[0] + adapter > adapter


def test_what_others_did_is_counted(small: dict[str, Any]) -> None:
    """A run that finds texts, recommender and aligned LLM costs what they took where they were made."""
    runs = []
    for iterations, topk in ((0, [1, 5, 10]), (1, [1, 5, 10]), (1, [1, 10])):
        run = run_recbole_llm(
            "DPO4Rec", None, None, {**small, "iterations": iterations, "topk": topk, "valid_metric": "NDCG@10"}
        )
        runs.append(json.loads((Path(run["run_folder"]) / "result.json").read_text(encoding="utf-8")))
    first, second, again = ([part["what"] for part in run["found"]] for run in runs)
    assert first == [] and second == ["Write texts, iteration 0", "recommender"]
    assert again == ["Write texts, iteration 0", "Sample texts", "alignment", "Write texts, iteration 1"]
    again = runs[-1]
    for cpu, name in ((False, "seconds"), (True, "cpu_seconds")):
        parts = sum(part[name] for part in again["found"])
        assert run_seconds(again, cpu) == again["timings"]["total_cpu_s" if cpu else "total_s"] + parts > parts > 0


def test_stages_of_an_earlier_process_are_the_runs_own(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off in the alignment, and given again when it was whole: recommenders and alignment are in its seconds."""
    settings, real, steps = {**small, "iterations": 1, "save_every": 1e-9}, LLMTrainer._step, []

    def slow_then_dead(self: LLMTrainer, *args: Any) -> Any:
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        time.sleep(1)
        return real(self, *args)

    monkeypatch.setattr(LLMTrainer, "_step", slow_then_dead)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm("DPO4Rec", None, None, settings)
    monkeypatch.setattr(LLMTrainer, "_step", real)
    for _ in range(2):
        run = run_recbole_llm("DPO4Rec", None, None, settings)
        record = json.loads((Path(run["run_folder"]) / "result.json").read_text(encoding="utf-8"))
        assert not {"recommender", "alignment"} & {part["what"] for part in record["found"]}
        took = sum(one["train_s"] for one in record["iterations"]) + record["iterations"][0]["align"]["seconds"]
        assert record["timings"]["train_s"] > took > 2


# ---- several at a time


def test_one_run_works_on_a_stage(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts, recommender and alignment are each held while they are worked on, and nothing else is."""
    stages, worked = Path(small["checkpoint_dir"]) / "stages", []

    def watched(what: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def work(*args: Any, **more: Any) -> Any:
            held = [folder.name for folder in stages.glob("DPO4Rec-*") if is_held(folder)]
            worked.append((what, [name.rsplit("-", 1)[0] for name in held]))
            return real(*args, **more)

        return work

    monkeypatch.setattr(Reasoner, "write", watched("write", Reasoner.write))
    monkeypatch.setattr(DPO4RecTrainer, "_begin", watched("train", DPO4RecTrainer._begin))
    monkeypatch.setattr(loop, "align", watched("align", loop.align))
    run_recbole_llm("DPO4Rec", None, None, {**small, "iterations": 1})
    kinds = {"write": ["DPO4Rec-texts"], "train": ["DPO4Rec-recommender"], "align": ["DPO4Rec-align"]}
    assert {what for what, _ in worked} == set(kinds)
    assert all(held == kinds[what] for what, held in worked)


def test_two_seeds_at_a_time(small: dict[str, Any], tmp_path: Path) -> None:
    """They share the untuned texts, which one of them writes, and find what they find one after the other."""
    settings = {**small, "iterations": 1, "checkpoint_dir": str(tmp_path / "together")}
    flags = [f"--{key}={value}" for key, value in settings.items()]
    words = [sys.executable, "-m", "recbole_llm", "compare", "--models=DPO4Rec", "--seeds=1,2", "--jobs=2", *flags]
    subprocess.run([*words, "--plots=False"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    found = {}
    for file in (tmp_path / "together").glob("DPO4Rec-toy-*/result.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        found[record["seed"]] = record["metrics"]
    for seed in (1, 2):
        alone = {**small, "iterations": 1, "seed": seed}
        assert accuracy(run_recbole_llm("DPO4Rec", None, None, alone)["test_result"]) == accuracy(found[seed])
    kept = sorted(path.name for path in (tmp_path / "together/stages").iterdir())
    assert kept == sorted(path.name for path in (Path(small["checkpoint_dir"]) / "stages").iterdir())
    assert len([name for name in kept if "texts" in name]) == 1 + 2 * 2


# ---- kills


def texts_half_written(stages: Path) -> bool:
    return any(0 < file.stat().st_size < 6000 for file in stages.glob("DPO4Rec-texts-*/texts.jsonl"))


def recommender_begun(stages: Path) -> bool:
    return any(not (folder / "stage.json").is_file() for folder in stages.glob("DPO4Rec-recommender-*"))


def samples_half_written(stages: Path) -> bool:
    whole = [file for file in stages.glob("DPO4Rec-texts-*/texts.jsonl") if b'"number": 2' in file.read_bytes()]
    return any(file.read_bytes().count(b"\n") < 30 for file in whole)


def alignment_begun(stages: Path) -> bool:
    return any(not (folder / "stage.json").is_file() for folder in stages.glob("DPO4Rec-align-*"))


KILLED = {"texts": texts_half_written, "recommender": recommender_begun, "samples": samples_half_written,
          "alignment": alignment_begun}  # fmt: skip


@pytest.fixture(scope="module")
def killed_settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("killed")
    settings = {**toy_settings(write_dataset(folder / "data"), folder / "saved"), **SMALL}
    # Long enough in each stage for a kill to meet it.
    return {**settings, "epochs": 4, "align_epochs": 8, "reasoning_tokens": 24, "generation_batch": 3, "iterations": 1}


@pytest.fixture(scope="module")
def unbroken(killed_settings: dict[str, Any]) -> dict[str, Any]:
    here = Path.cwd()
    os.chdir(killed_settings["data_path"])
    try:
        return run_recbole_llm("DPO4Rec", None, None, killed_settings)
    finally:
        os.chdir(here)


def kill_in(stage: Callable[[Path], bool], settings: dict[str, Any], folder: Path) -> None:
    """Start a run as a process and kill it where the stage is in the middle."""
    flags = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "recbole_llm", "run", "--model=DPO4Rec", *flags]
    child = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    stages, until = Path(settings["checkpoint_dir"]) / "stages", time.monotonic() + 300
    while not stage(stages):
        assert child.poll() is None, "the run ended before the stage was met"
        assert time.monotonic() < until
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()


@pytest.mark.faults
@pytest.mark.parametrize("stage", KILLED)
def test_kill_and_go_on(
    killed_settings: dict[str, Any],
    unbroken: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    """Killed by SIGKILL in a stage and started again: texts, rewards, LLM and results of an unbroken run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {**killed_settings, "checkpoint_dir": str(tmp_path / "saved")}
    kill_in(KILLED[stage], settings, tmp_path)
    before = {file: file.read_bytes() for file in (tmp_path / "saved" / "stages").glob("DPO4Rec-texts-*/texts.jsonl")}
    assert not list((tmp_path / "saved").glob("*/result.json"))
    again = run_recbole_llm("DPO4Rec", None, None, settings)
    assert again["test_result"] == unbroken["test_result"]
    assert again["best_valid_result"] == unbroken["best_valid_result"]
    for file, told in before.items():  # what was written before the kill was not written again
        kept = told[: told.rfind(b"\n") + 1]
        assert file.read_bytes().startswith(kept)
    assert sum(map(len, before.values())) > 0
    mine, theirs = Path(again["run_folder"]), Path(unbroken["run_folder"])
    for name in ("texts-0.jsonl", "judged-0.jsonl", "texts-1.jsonl", "per_user.csv.gz"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (mine, theirs))
    assert all(np.array_equal(one[name], other[name]) for name in other)


# ---- other protocols, and the plan


@pytest.mark.parametrize(
    "asked",
    [
        {"eval_args": {"mode": "full"}},
        {"eval_args": {"split": {"RS": [0.7, 0.1, 0.2]}, "mode": "uni9"}},
        {"liked_only": True, "user_inter_num_interval": "[5,inf)"},
        {"disjoint_users": True, "few_shot": 20, "eval_users": 8, "pair_users": 6},
        {"next_items": 2, "eval_args": {"mode": "uni6"}, "metrics": ["MAP"], "topk": [5], "valid_metric": "MAP@5"},
    ],
    ids=["full", "shares", "liked", "disjoint", "lists"],
)
def test_other_protocols(small: dict[str, Any], asked: dict[str, Any]) -> None:
    """Full ranking, and lists of several next items: asked as every model is, with GRU4Rec inside."""
    settings = {**small, **asked, "iterations": 1, "reward_others": 3}
    ours = run_recbole_llm("DPO4Rec", None, None, {**settings, "recommender_model": "GRU4Rec"})
    other = run_recbole_llm("Pop", None, None, {key: v for key, v in {**small, **asked}.items() if key not in OWN})
    assert ours["candidate_hash"] == other["candidate_hash"]
    assert set(ours["test_result"]) == set(other["test_result"])


def test_plan(small: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Counts are those of the run, times are there, and nothing is written."""
    settings = {**small, "iterations": 1, "show_progress": False}
    found = plan(LLMConfig("DPO4Rec", config_dict=settings))
    assert not Path(small["checkpoint_dir"]).exists()
    read, judge, align, recommender = found["work"]
    assert all(part["seconds"] > 0 for part in found["work"])
    run = run_recbole_llm("DPO4Rec", None, None, {**settings, "select_iteration": "last"})
    records = record_of(run)["iterations"]
    assert read["rounds"] * read["positions"] == sum(len(texts_of(run, i)) for i in range(2))
    lines = (Path(run["run_folder"]) / "judged-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert judge["rounds"] * judge["positions"] == sum(len(json.loads(line)["texts"]) for line in lines)
    assert align["positions"] == records[0]["align"]["positions"]
    assert align["steps"] == records[0]["align"]["steps"]
    # The random LLM writes broken characters, which take more tokens to read than they took to write.
    assert 1.1 * align["tokens"] * align["rounds"] >= records[0]["align"]["tokens"]
    assert recommender["rounds"] == len(records) * small["epochs"]
    assert main(["plan", "--model=DPO4Rec", "--probe=False", *[f"--{k}={v}" for k, v in settings.items()]]) == 0
    assert "texts to judge" in capsys.readouterr().out


def test_another_catalogue_is_another_recommender(small: dict[str, Any]) -> None:
    """Titles of items that nobody met are items where their column is loaded, and the rows are the same."""
    file = Path(small["data_path"]) / "toy" / "toy.item"
    with file.open("a", encoding="utf-8") as items:
        items.write("".join(f"x{i}\tnew film {i}\t1990\n" for i in range(5)))
    columns = {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id"]}
    for changes in ({}, {"load_col": columns}):
        run_recbole_llm("DPO4Rec", None, None, {**small, "knowledge": "none", "iterations": 0, **changes})
    assert len(list(Path(small["checkpoint_dir"]).glob("stages/DPO4Rec-recommender-*"))) == 2


def test_a_stage_that_lost_its_checkpoint_is_told(small: dict[str, Any]) -> None:
    settings = {**small, "knowledge": "none", "iterations": 0}
    run_recbole_llm("DPO4Rec", None, None, settings)
    (file,) = Path(small["checkpoint_dir"]).glob("stages/DPO4Rec-recommender-*/recommender.pth")
    file.unlink()
    with pytest.raises(UserError, match=rf"recommender.pth is no checkpoint .* Remove {file.parent}, and what lies"):
        run_recbole_llm("DPO4Rec", None, None, settings)
    shutil.rmtree(file.parent)
    run_recbole_llm("DPO4Rec", None, None, settings)


def test_vectors_by_the_llm_are_those_of_its_tokenizer(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer over the same weights finds no vectors of the first."""
    config = LLMConfig("DPO4Rec", config_dict=small)
    before = text_vectors(config, ["red cat", "blue dog"])
    text_vectors_module._encoding_llm.cache_clear()
    tokenizer = PreTrainedTokenizerFast
    plain = tokenizer.__call__
    monkeypatch.setattr(tokenizer, "__call__", lambda self, text, **more: plain(self, upper(text), **more))
    assert np.abs(text_vectors(config, ["red cat", "blue dog"]) - before).max() > 1e-3


def upper(text: str | list[str]) -> str | list[str]:
    return text.upper() if isinstance(text, str) else [one.upper() for one in text]


def test_a_text_is_trained_with_the_token_that_ended_it(small: dict[str, Any]) -> None:
    """Where the LLM ends a turn by another token than its tokenizer's end of text, which is that of a server's."""
    reasoner = Reasoner(LLMConfig("DPO4Rec", config_dict=small))
    assert reasoner.answer(Written("good", 1, True, 300))[-1] == 300
    assert reasoner.answer(Written("good", 1, True))[-1] == reasoner.llm.tokenizer.eos_token_id
    assert reasoner.answer(Written("good", 1, False))[-1] not in (300, reasoner.llm.tokenizer.eos_token_id)
    assert reasoner.answer(Written("", 0, True, 300)) == [300]
    author = reasoner.author
    base_model(reasoner.llm.model).generation_config.eos_token_id = [300]
    assert reasoner.author != author


def test_alignment_reads_how_often_to_save(small: dict[str, Any]) -> None:
    config = policy_config(LLMConfig("DPO4Rec", config_dict={**small, "save_every": 0, "resume": False}))
    assert (config["save_every"], config["resume"]) == (0, False)
