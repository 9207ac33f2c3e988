"""The command line: flags, commands, exit statuses; never a traceback, and 0 for success alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recbole_llm import __version__, cli, environment, keys, machine, quick_start
from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.processes import world_size
from recbole_llm.report import compare as comparing
from recbole_llm.report.entries import parse_models, split_options
from recbole_llm.report.grid import cells
from tests.conftest import accuracy

ROOT = Path(__file__).resolve().parents[1]


def flags(given_settings: dict[str, Any], **changes: Any) -> list[str]:
    return [f"--{key}={value}" for key, value in {**given_settings, **changes}.items()]


# Flags


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["-m", "SASRec", "-d", "toy"], {"model": "SASRec", "dataset": "toy"}),
        (["--model=SASRec", "--dataset", "toy"], {"model": "SASRec", "dataset": "toy"}),
        (["-m=SASRec"], {"model": "SASRec"}),
        (["--epochs=3", "--learning_rate", "1e-3"], {"epochs": 3, "learning_rate": 1e-3}),
        (["--rating_threshold", "-1"], {"rating_threshold": -1}),
        (["--item_text={title} ({year})"], {"item_text": "{title} ({year})"}),
        (["--item_text", "a=b=c"], {"item_text": "a=b=c"}),
        (["--llm=org/model=x"], {"llm": "org/model=x"}),
        (["--eval_args={'mode': {'test': 'uni9'}}"], {"eval_args": {"mode": {"test": "uni9"}}}),
        (["--models=Pop,LLMRanker[loss=DMPO,beta=0.5]"], {"models": "Pop,LLMRanker[loss=DMPO,beta=0.5]"}),
        (["--config_files=a.yaml b.yaml"], {"config_files": ["a.yaml", "b.yaml"]}),
        (["--config_files="], {"config_files": []}),
        (["--gpu_id=0"], {"gpu_id": "0"}),
        (["--gpu_id="], {"gpu_id": ""}),
        (["--user", "196"], {"user": "196"}),
        (["--data_path=2020"], {"data_path": "2020"}),
        (["--few_shot=none"], {"few_shot": None}),
        (["--user_inter_num_interval=[5,10]"], {"user_inter_num_interval": "[5,10]"}),
        (["--keys"], {"keys": True}),
        (["--seed=1", "--seed=1"], {"seed": 1}),
        (["-k", "5", "--item=007"], {"k": 5, "item": "007"}),
        (["--metrics=NDCG,Hit"], {"metrics": ["NDCG", "Hit"]}),
        (
            ["--metrics=['NDCG','Hit']", "--lora_target_modules=q_proj, v_proj"],
            {"metrics": ["NDCG", "Hit"], "lora_target_modules": ["q_proj", "v_proj"]},
        ),
        (
            ["--lora_target_modules=.*_(q|v){1,2}", "--item_text={title},{genre}"],
            {"lora_target_modules": ".*_(q|v){1,2}", "item_text": "{title},{genre}"},
        ),
        ([], {}),
    ],
)
def test_flags(words: list[str], found: dict[str, Any]) -> None:
    assert cli.parse_flags(words) == found


def test_the_record_of_a_run_is_no_file_of_settings(toy: dict[str, Any]) -> None:
    folder = Path(quick_start.run_recbole_llm("Pop", config_dict=toy)["run_folder"])
    with pytest.raises(ConfigError, match=r"config.yaml` is the record of a run.*its README.md has its command"):
        LLMConfig("Pop", config_file_list=[str(folder / "config.yaml")])


@pytest.mark.parametrize("words", [["a/b", "--user=1"], ["--user=1", "a/b"], ["--user", "1", "a/b"]])
def test_a_word_without_a_flag(words: list[str]) -> None:
    assert cli.parse_flags(words, "run_folder") == {"run_folder": "a/b", "user": "1"}
    with pytest.raises(ConfigError, match="`c`: flags look like"):
        cli.parse_flags([*words, "c"], "run_folder")
    with pytest.raises(ConfigError, match="`a/b`: flags look like"):
        cli.parse_flags(words)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["epochs=3"], ["`epochs=3`: flags look like --key=value."]),
        (["--"], ["`--`: flags look like --key=value."]),
        (["--val_interval={1: 'x', 'a': 'y'}"], ["--val_interval: the key 1 is not text; put it in quotes."]),
        (["--=3"], ["`--=3`: flags look like --key=value."]),
        (["-x"], ["`-x`: flags look like --key=value."]),
        (["--epochs"], ["--epochs: give it a value, for example --epochs=..."]),
        (["--epochs", "--seed=1"], ["--epochs: give it a value, for example --epochs=..."]),
        (["-m", "-d", "toy"], ["-m: give it a value, for example -m=..."]),
        (["--seed=1", "--seed=2"], ["--seed: given twice with different values, 1 and 2."]),
        (["--few_shot=none", "--few_shot=2"], ["--few_shot: given twice with different values, None and 2."]),
        (["-m", "Pop", "--model=BPR"], ["--model: given twice with different values, 'Pop' and 'BPR'."]),
        (["a", "--b", "--c"], ["`a`: flags look", "--b: give it a value", "--c: give it a value"]),
    ],
)
def test_wrong_flags(words: list[str], told: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        cli.parse_flags(words)
    assert len(error.value.problems) == len(told)
    assert all(p.startswith(t) for p, t in zip(error.value.problems, told, strict=True))


# Commands


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"], ["run", "--help"], ["compare", "-h"]])
def test_help(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert cli.main(words) == 0
    told = capsys.readouterr().out
    assert __version__ in told and all(f"recbole-llm {command}" in told for command in cli.COMMANDS)


def test_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["ls"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("models: LLMRanker, DPO4Rec, ") and "SASRec" in told and "xgboost" not in told
    assert (
        "prompt: instruct, instruct_games, pair, reasoning, stream, stream_games" in told and "dataset: ml-100k" in told
    )
    assert (
        "compare: dmpo, dpo4rec, dpo4rec-few-shot, dpo4rec-full, dpo4rec-texts, few-shot-games, "
        "few-shot-games-uni99, few-shot-ml-100k, full-llm-ml-100k, full-ml-100k, full-ranking-few-shot, "
        "full-ranking-losses, full-ranking-ml-100k, losses-games, losses-games-uni99, losses-ml-100k, "
        "losses-prompt-games, model-size, prompts-games, quick, rerank_lists, rosepo-games, rosepo-ml-100k, "
        "rosepo-seeds, transfer-to-films, transfer-to-games\n"
        in told
        and "search: BERT4Rec, BPR, " in told
    )
    assert cli.main(["ls", "--keys"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n{key}:" in told for key in keys.PROTOCOL_KEYS | keys.LLM_KEYS | keys.DPO4REC_KEYS)


def test_env(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cli.main(["env"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["recbole_llm"] == __version__ and told["versions"]["torch"] == torch.__version__
    assert told["versions"]["python"] == platform.python_version() and "tqdm" in told["other_versions"]
    assert told["cores"] == os.cpu_count() and told["torch_threads"] == torch.get_num_threads()
    assert 0 < told["memory_bytes"] <= psutil.virtual_memory().total
    assert len(told["gpus"]) == torch.cuda.device_count() and told["platform"] == platform.platform()
    assert told["variables"]["OMP_NUM_THREADS"] == "3" and told["variables"]["HF_HUB_OFFLINE"] == "1"
    assert "CUDA_VISIBLE_DEVICES" not in told["variables"]
    assert {"git_commit", "processor", "gpu_driver", "cuda_toolkit"} <= set(told)


def test_env_tells_no_secret(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    keys_of_services = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY", "WANDB_ENTITY")
    for name in (*keys_of_services, "USER", "LOGNAME", "HOME", "HF_HOME", "RECBOLE_LLM_CACHE", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "alice-s3cret")
    assert cli.main(["env"]) == 0
    told = capsys.readouterr().out
    assert "s3cret" not in told and not [name for name in keys_of_services if name in told]
    variables = json.loads(told)["variables"]
    assert {variables[name] for name in ("HF_HOME", "RECBOLE_LLM_CACHE", "HTTPS_PROXY")} == {"(set)"}
    assert platform.node() not in told or len(platform.node()) < 4
    assert str(Path(__file__).resolve().parents[1]) not in told


def test_gpu_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As nvidia-smi tells it; nothing where there is no such program, or no GPU."""
    monkeypatch.setenv("PATH", str(tmp_path))
    try:
        machine.gpu_driver.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine.gpu_driver() is None
        machine.gpu_driver.cache_clear()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert machine.gpu_driver() is None
        machine.gpu_driver.cache_clear()
        (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nif [ $# = 2 ]; then echo 550.54.15; echo 550.54.15; fi\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert machine.gpu_driver() == "550.54.15"
    finally:
        machine.gpu_driver.cache_clear()


def test_commit_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed below someone's repository, the package does not name that repository's commit."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    for home, found in ((tmp_path / "venv" / "lib", None), (tmp_path, head[:12])):
        (home / "recbole_llm").mkdir(parents=True)
        monkeypatch.setattr(environment, "__file__", str(home / "recbole_llm" / "environment.py"))
        assert environment.git_commit() == found


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runn"], "`runn`: no such command; use run, compare, plan, preview, explain, ls, env."),
        (["-m", "SASRec"], "`-m`: no such command"),
        (["run"], "--model: name one, for example --model=LLMRanker."),
        (["run", "-m", "Pop"], "--dataset: name one, for example --dataset=ml-100k."),
        (["compare"], "--models: name at least one"),
        (["compare", "--models="], "--models: name at least one"),
        (["compare", "--models=Pop"], "--dataset: name one"),
        (["preview"], "--dataset: name one"),
        (["env", "--seed=1"], "--seed: env takes no flags."),
        (["ls", "--model=Pop"], "--model: ls takes --keys, --runs and --checkpoint_dir alone."),
        (["run", "--config_files=none.yaml"], "--config_files: cannot read `none.yaml` (No such file or"),
    ],
)
def test_wrong_commands(capsys: pytest.CaptureFixture[str], words: list[str], told: str) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("\nrecbole-llm: ") and "Traceback" not in error


def test_interrupted(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(quick_start, "prepare_data", stopped)
    assert cli.main(["run", "-m", "Pop", *flags(toy)]) == 130
    assert "recbole-llm: stopped." in capsys.readouterr().err
    assert cli.main(["compare", "--models=Pop,BPR", *flags(toy)]) == 130
    assert not list(Path(toy["checkpoint_dir"]).glob("*/result.json"))


# Preview


def test_preview_shows_prompt_and_pair(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", *flags(tiny, loss="DMPO", rejected_num=2), "--user=u3"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("user u3: 10 training items, 9 of them in this prompt, ")
    assert "Titles that one person chose, in order:\n" in told and "\nall 60 titles: 0 cut; longest " in told
    kinds = [line.split()[0] for line in told.splitlines() if line.startswith(("chosen ", "rejected "))]
    assert kinds == ["chosen", "rejected", "rejected"]
    assert not list(Path(tiny["checkpoint_dir"]).glob("*"))


def test_preview_of_a_file(tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{key}: {value!r}\n" for key, value in {**tiny, "prompt": "instruct"}.items()]
    (tmp_path / "a.yaml").write_text("".join(lines), encoding="utf-8")
    assert cli.main(["preview", f"--config_files={tmp_path}/a.yaml"]) == 0
    told = capsys.readouterr().out
    assert "<|im_start|>user\n" in told and "chosen " in told and "rejected" not in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"user": "nobody"}, "--user=nobody: not a training user; there are 40, for example u0, "),
        ({"model": "SASRec", "llm": None, "train_batch_size": 9}, "--llm: SASRec does not read it"),
        ({"prompt": "none"}, "--prompt=none: no such template"),
        ({"few_shot": 99}, "--few_shot=99: only 40 users"),
        ({"loss": "DMPO", "rejected_num": 60}, "--rejected_num=60: user u0 has only 50 items"),
        ({"val_interval": "{'rating': '[9,inf)'}"}, "reading the data failed: ValueError: Some feat is empty"),
    ],
)
def test_wrong_previews(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], told: str
) -> None:
    assert cli.main(["preview", *flags(tiny, **changes)]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error


def test_only_an_llm_has_a_preview(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["preview", *flags(toy, model="Pop")]) == 2
    assert "--model=Pop: only LLMRanker and DPO4Rec read prompts." in capsys.readouterr().err


# Whatever is typed

WORDS = st.sampled_from(
    [
        *cli.COMMANDS,
        "-m",
        "-d",
        "SASRec",
        "LLMRanker",
        "FM",
        "toy",
        "--model=Pop",
        "--model=foo.bar",
        "-x",
        "--",
        "",
        "--dataset=toy",
        "--dataset=../toy",
        "--models=Pop,BPR",
        "--models=Pop[",
        "--models=Pop[a=[1,2],b]",
        "--epochs=3",
        "--epochs=x",
        "--topk=5",
        "--topk=[1,",
        "--eval_args={}",
        "--eval_args=[]",
        "--metrics=AUC",
        "--eval_args={'mode':{}}",
        "--metrics=[[]]",
        "--valid_metric=@",
        "--few_shot=none",
        "--seed=1e400",
        "--keys",
        "--keys=1",
        "--runs",
        "--checkpoint_dir=\x00",
        "--config_files=none.yaml",
        "--config_files=.",
        "--user=1",
        "--per_model={}",
        "--per_model=3",
        "--per_model={'Pop':3}",
        "--load_col={}",
        "--load_col=3",
        "--item_text={",
        "--llm=tiny",
        "--loss=DPO",
        "--beta=-1",
        "--prompt=\x00",
        "--rerank_model=.",
        "--data_path=\x00",
        "--USER_ID_FIELD=None",
        "--=",
        "=",
        "--field_separator=",
        "--field_separator=,",
        "--train_neg_sample_args={'distribution':3}",
        "--learner=[]",
    ]
)
KEYS = st.sampled_from([*sorted(keys.CHECKS), "topk", "metrics", "valid_metric", "eval_args", "load_col"])
TABLES = st.dictionaries(st.sampled_from(["mode", "order", "split"]), st.text(max_size=5), max_size=2)
LISTS = st.lists(st.integers(), max_size=2)
VALUES = st.none() | st.booleans() | st.integers() | st.floats() | LISTS | TABLES | st.text(max_size=5)
FLAG = "--{}={}".format
ANY = (
    WORDS
    | st.text(max_size=8)
    | st.builds(FLAG, st.text(max_size=8), st.text(max_size=8))
    | st.builds(FLAG, KEYS, VALUES)
)
COMMAND = st.sampled_from([*cli.COMMANDS, None])


@pytest.mark.injects
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(COMMAND, st.booleans(), st.lists(ANY, max_size=5))
def test_any_words_end_well(toy: dict[str, Any], command: str | None, whole: bool, words: list[str]) -> None:
    """A status of 0 only where a run would have begun, and no exception ever. Nothing is run."""
    began = []

    def run(*args: Any) -> dict[str, Any]:
        began.append(LLMConfig(*args))
        return {"test_result": {}, "run_folder": ""}

    def run_all(models: Any, dataset: Any, shared: Any) -> dict[str, Any]:
        options, rest = split_options({**shared, **({"dataset": dataset} if dataset else {})})
        began.append(cells(parse_models(models), options, rest))
        return {"markdown": "", "costs": "", "files": [], "failed": []}

    words = ([command] if command else []) + (["-m", "Pop", *flags(toy)] if whole else []) + words
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quick_start, "run_recbole_llm", run)
        patch.setattr(comparing, "compare", run_all)
        patch.setattr("recbole_llm.preview.preview_user", lambda config, user: began.append(config))
        patch.setattr("recbole_llm.plan.plan", lambda config, probe: began.append(config))
        patch.setattr("recbole_llm.report.plan_table.plan_text", lambda found: "")
        status = cli.main(words)
    assert status in (0, 2)
    helped = not words or words[0] == "help" or "-h" in words or "--help" in words
    assert (status == 0) == bool(began or helped or (words[0] in ("ls", "env") and status == 0))


# The real thing


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=200, check=False, env=env
    )


def test_script_from_start_to_end(tiny: dict[str, Any], tmp_path: Path) -> None:
    few = {"few_shot": 8, "eval_users": 8, "loss": "DMPO"}
    done = command(tmp_path, str(ROOT / "run_recbole_llm.py"), *flags(tiny, **few))
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.split("run folder: ")[1].strip())
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert set(accuracy(record["metrics"])) == {f"{m}@{k}" for m in ("hit", "ndcg", "mrr") for k in (1, 5, 10)}
    assert len(record["candidate_hash"]) == 64 and record["candidate_seed"] == record["seed"] == 2020
    assert (record["model"], record["dataset"]) == ("LLMRanker", "toy")
    assert record["few_shot"] == record["rows"] == 8
    assert {"recbole_llm", "recbole", "torch", "transformers", "python"} <= set(record["versions"])
    assert record["timings"]["total_s"] > 0 and [s["loss"] for s in record["stages"]] == ["SFT", "DMPO"]
    for file in ("config.yaml", "env.json", "train.log", "per_user.csv.gz", "candidates-test.jsonl.gz"):
        assert (folder / file).is_file()


@pytest.mark.parametrize("words", [["ls", "--keys"], ["--help"]])
def test_nobody_reads_on(words: list[str], tmp_path: Path) -> None:
    """As under ``| head -1``."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "recbole_llm", *words], stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_no_output_at_all(tmp_path: Path) -> None:
    """Standard output closed, as a daemon's: nothing to tell, nothing wrong."""
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m recbole_llm --help >&-"], stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_of_ones_own_is_no_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> int:
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "env", broken)
    with pytest.raises(BrokenPipeError):
        cli.main(["env"])


def test_module_with_bad_input(toy: dict[str, Any], tmp_path: Path) -> None:
    wrong = {"model": "SASRec", "loss": "DMPO", "epochs": "many"}
    done = command(tmp_path, "-m", "recbole_llm", "run", *flags(toy, **wrong))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "2 problems in the configuration:" in done.stderr
    assert "--epochs='many': must be a whole number" in done.stderr


@pytest.mark.parametrize("others", [{}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "1"}])
def test_a_rank_of_a_scheduler_silences_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, others: dict[str, str]
) -> None:
    """RANK alone is no torchrun's."""
    for name, value in {"RANK": "1", **others}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["runn"]) == 2
    assert "`runn`: no such command" in capsys.readouterr().err
    assert world_size() == 1
