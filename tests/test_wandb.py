"""RecBole's `log_wandb` with a stand-in for the package, and that nothing else is told to anyone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from recbole_llm.cli import main
from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.compare import compare
from recbole_llm.validation import validate
from tests.test_dpo4rec import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parents[1]
# As much of W&B as RecBole's logger and ours use, and as strict: nothing is logged where no run is open.
STAND_IN = """
run = None
runs = []


class Run:
    def __init__(self, **given):
        self.given, self.lines, self.summary, self.steps, self.exit_code = given, [], {}, {}, None


def init(**given):
    global run
    assert run is None
    run = Run(**given)
    runs.append(run)
    return run


def log(metrics, commit=True):
    run.lines.append(dict(metrics))


def define_metric(name, step_metric):
    run.steps[name] = step_metric


def finish(exit_code=None):
    global run
    run.exit_code = exit_code
    run = None
"""


@pytest.fixture
def wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The stand-in, installed."""
    home = tmp_path / "installed"
    home.mkdir()
    (home / "wandb.py").write_text(STAND_IN, encoding="utf-8")
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    import wandb

    monkeypatch.setitem(sys.modules, "wandb", wandb)  # taken away with the fixture
    return wandb


def logged(run: Any, name: str) -> list[float]:
    return [line[name] for line in run.lines if name in line]


def record_of(result: dict[str, Any], file: str = "result.json") -> Any:
    return json.loads((Path(result["run_folder"]) / file).read_text(encoding="utf-8"))


def test_recbole_model(toy: dict[str, Any], wandb: ModuleType) -> None:
    settings = {**toy, "epochs": 3, "train_batch_size": 64, "log_wandb": True, "wandb_project": "mine"}
    result = run_recbole_llm("BPR", config_dict=settings)
    (run,) = wandb.runs
    assert run.given["project"] == "mine" and run.given["config"]["model"] == "BPR"
    assert len(logged(run, "train/train_loss")) == 3 and logged(run, "train_step") == [0, 1, 2]
    scores = logged(run, "valid/ndcg@10")
    assert len(scores) == 3 and max(scores) == result["best_valid_result"]["ndcg@10"]
    assert run.summary == {f"eval/{name}": value for name, value in result["test_result"].items()}
    assert run.steps["train/*"] == "train_step" and run.steps["valid/*"] == "valid_step"
    assert run.exit_code == 0 and wandb.run is None


def test_stages_of_an_llm(tiny: dict[str, Any], wandb: ModuleType) -> None:
    """Each step under its stage's name as in metrics.jsonl; epochs of both stages in one row, none twice."""
    settings = {**tiny, "few_shot": 8, "eval_users": 8, "epochs": 2, "stopping_step": 20, "log_wandb": True}
    result = run_recbole_llm(config_dict={**settings, "loss": "DMPO", "rejected_num": 2, "preference_epochs": 3})
    (run,) = wandb.runs
    sft, dmpo = record_of(result)["stages"]
    losses = [*sft["train_loss"].values(), *dmpo["train_loss"].values()]
    assert logged(run, "train/train_loss") == losses and len(losses) == 5
    assert logged(run, "train_step") == logged(run, "valid_step") == [0, 1, 2, 3, 4]
    assert max(logged(run, "valid/ndcg@10")[2:]) == result["best_valid_result"]["ndcg@10"]
    lines = (Path(result["run_folder"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines]
    for stage, name in (("SFT", "loss"), ("DMPO", "loss"), ("DMPO", "rewards/margins"), ("SFT", "learning_rate")):
        mine = [step[name] for step in steps if step["stage"] == stage]
        assert logged(run, f"{stage}/{name}") == mine != []
        assert logged(run, f"{stage}_step") == list(range(len(mine)))
        assert run.steps[f"{stage}/*"] == f"{stage}_step"
    assert run.summary["eval/ndcg@10"] == result["test_result"]["ndcg@10"]


def test_dpo4rec(toy: dict[str, Any], wandb: ModuleType) -> None:
    """Recommenders of all iterations in one row, and the LLM's alignment between them."""
    settings = {**toy, **SMALL, "align_learning_rate": 0.01, "iterations": 1, "select_iteration": "last"}
    result = run_recbole_llm("DPO4Rec", config_dict={**settings, "log_wandb": True})
    (run,) = wandb.runs
    first, second = record_of(result, "dpo4rec.json")["iterations"]
    aligned = list(first["align"]["train_loss"].values())
    expected = [*first["train_loss"], *aligned, *second["train_loss"]]
    assert logged(run, "train/train_loss") == expected
    assert logged(run, "train_step") == list(range(len(expected)))
    assert len(logged(run, "DPO/loss")) == first["align"]["steps"]
    assert logged(run, "valid_step") == list(range(first["epochs"] + second["epochs"]))
    assert run.summary["eval/ndcg@10"] == result["test_result"]["ndcg@10"]


def test_models_that_serve_a_run_log_nothing(tiny: dict[str, Any], wandb: ModuleType) -> None:
    settings = {**tiny, "few_shot": 8, "eval_users": 8, "loss": "DPO", "rejected_num": 1, "rejected": "from_model"}
    run_recbole_llm(config_dict={**settings, "recommender_config": {"epochs": 4}, "log_wandb": True})
    (run,) = wandb.runs
    assert len(logged(run, "train/train_loss")) == 2  # SFT and DPO, one epoch each


def test_every_run_of_a_comparison_has_its_own(toy: dict[str, Any], wandb: ModuleType) -> None:
    done = compare("Pop,BPR", None, {**toy, "log_wandb": True})
    assert done["failed"] == []
    assert [run.given["config"]["model"] for run in wandb.runs] == ["Pop", "BPR"]
    assert [run.exit_code for run in wandb.runs] == [0, 0]
    assert [logged(run, "train_step") for run in wandb.runs] == [[0], [0]]


def test_trials_on_validation_are_no_runs(toy: dict[str, Any], wandb: ModuleType) -> None:
    settings = {**toy, "log_wandb": True, "epochs": 1}
    validate("BPR", config_dict=settings)
    run_recbole_llm("BPR", config_dict=settings)
    (run,) = wandb.runs
    assert logged(run, "train_step") == [0] and run.exit_code == 0 and wandb.run is None


def test_a_run_that_is_open_is_used_and_left_open(toy: dict[str, Any], wandb: ModuleType) -> None:
    mine = wandb.init(project="sweep")
    result = run_recbole_llm("Pop", config_dict={**toy, "log_wandb": True})
    assert wandb.run is mine and wandb.runs == [mine] and mine.exit_code is None
    assert mine.summary["eval/ndcg@10"] == result["test_result"]["ndcg@10"]


def test_a_failed_run_is_told(toy: dict[str, Any], wandb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    bpr = LLMConfig("BPR", config_dict=toy).model_class

    def fail(*_: Any) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(bpr, "calculate_loss", fail)
    with pytest.raises(UserError, match="training failed: RuntimeError: planted"):
        run_recbole_llm("BPR", config_dict={**toy, "log_wandb": True})
    assert wandb.runs[0].exit_code == 1 and wandb.run is None


def test_off_by_default(toy: dict[str, Any], wandb: ModuleType) -> None:
    assert LLMConfig("Pop", config_dict=toy)["log_wandb"] is False
    run_recbole_llm("Pop", config_dict=toy)
    assert wandb.runs == []


def test_the_same_run_with_and_without(toy: dict[str, Any], wandb: ModuleType) -> None:
    plain, told = (run_recbole_llm("BPR", config_dict={**toy, "log_wandb": on}) for on in (False, True))
    assert plain["run_folder"] == told["run_folder"] and plain["test_result"] == told["test_result"]


def test_w_and_b_that_cannot_start(toy: dict[str, Any], wandb: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    class UsageError(Exception):
        pass

    def init(**_: Any) -> None:
        raise UsageError("api_key not configured\n(no-tty)")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError) as error:
        run_recbole_llm("Pop", config_dict={**toy, "log_wandb": True})
    told = str(error.value)
    assert told.startswith("--log_wandb=True: W&B could not start (UsageError: api_key not configured (no-tty)). Run ")
    assert not Path(toy["checkpoint_dir"]).exists()


def test_not_installed(
    toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Told before any work; the folder that W&B leaves where runs are started does not pass for the package."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    elsewhere = [p for p in sys.path if not (Path(p or ".") / "wandb").exists()]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    flags = [f"--{key}={value}" for key, value in {**toy, "log_wandb": True}.items()]
    for _ in range(2):
        assert main(["run", "-m", "Pop", *flags]) == 2
        told = "--log_wandb=True: the package wandb is not installed; `pip install wandb`, or leave it out."
        assert told in capsys.readouterr().err
        (tmp_path / "wandb" / "run-1").mkdir(parents=True, exist_ok=True)
    assert not Path(toy["checkpoint_dir"]).exists()
    with pytest.raises(ConfigError, match="must be true or false|must be True or False"):
        LLMConfig("Pop", config_dict={**toy, "log_wandb": "yes"})


# ---- nothing else is told to anyone


@pytest.mark.parametrize(("given", "off"), [(None, True), ("0", False), ("1", True)])
def test_telemetry_of_the_hub_is_off(given: str | None, off: bool) -> None:
    """Unless the user says otherwise, before any of the hub's code is loaded."""
    code = "import recbole_llm; from huggingface_hub import constants; print(constants.HF_HUB_DISABLE_TELEMETRY)"
    env = {name: v for name, v in os.environ.items() if name not in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")}
    env |= {"PYTHONPATH": str(ROOT)} | ({} if given is None else {"HF_HUB_DISABLE_TELEMETRY": given})
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(off)]


def test_a_run_opens_no_connection(
    toy: dict[str, Any], tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    def refused(*given: Any, **_: Any) -> None:
        asked.append(given)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    with pytest.raises(OSError, match="no network"):  # the trap works
        socket.create_connection(("localhost", 9))
    asked.clear()
    run_recbole_llm("SASRec", config_dict={**toy, "train_batch_size": 64, "train_neg_sample_args": None})
    run_recbole_llm(config_dict={**tiny, "few_shot": 8, "eval_users": 8, "loss": "DMPO", "rejected_num": 2})
    assert main(["env"]) == main(["ls"]) == 0
    assert asked == []
