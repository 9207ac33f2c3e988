"""Bad data, models and disks: told in one paragraph, exit status 2, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors import safe_open

from recbole_llm import cli, files, run_log, run_record
from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.files import write_table, write_tensors, write_text
from recbole_llm.llm import adapter
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.quick_start import run_recbole_llm

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
GOOD = [f"u{u}\ti{i}\t5\t{u * 100 + i}" for u in range(3) for i in range(5)]
FULL = OSError(errno.ENOSPC, "No space left on device")
SMALL = {"few_shot": 6, "eval_users": 6}


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.injects]


@pytest.fixture(autouse=True)
def counted(case: Callable[..., None]) -> None:
    """Each test gives one bad input or breaks one disk, at least."""
    case("faults injected")


def argv(settings: dict[str, Any], **changes: Any) -> list[str]:
    return ["run", *(f"--{key}={value}" for key, value in {**settings, **changes}.items())]


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """What the command line says about a command that fails, in one paragraph."""
    capsys.readouterr()
    assert cli.main(words) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "\n\n" not in told.strip()
    return told.strip()


def write_inter(settings: dict[str, Any], *lines: str, header: str = HEADER, end: str = "\n") -> Path:
    file = Path(settings["data_path"]) / "toy" / "toy.inter"
    file.write_bytes("".join(line + end for line in (header, *lines)).encode("utf-8", "surrogateescape"))
    return file


# Data


def test_no_inter_file(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    told = refused(capsys, argv(toy, model="Pop", dataset="nope"))
    assert f"--dataset=nope: no file {toy['data_path']}/nope/nope.inter." in told and "--data_path=" in told
    own = refused(capsys, argv(toy, model="Pop", data_path=f"{toy['data_path']}/toy"))  # a folder too far
    assert f"no file {toy['data_path']}/toy/toy/toy.inter" in own
    assert not Path(toy["checkpoint_dir"]).exists()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("u1\ti1\t5", "line 17: 3 fields where the header has 4: 'u1\\\\ti1\\\\t5\\\\n'"),
        ("u1\ti1\t5\t1\t2", "line 17: 5 fields where the header has 4"),
        ("u1,i1,5,1", "line 17: 1 fields where the header has 4"),
        ("u1\ti1\t5\tyesterday", "line 17: the time or the rating is no number"),
        ("u1\ti1\t5\t", "line 17: the time or the rating is no number"),
        ("u1\ti1\t5\tnan", "line 17: the time 'nan' is no number"),
        ("u1\ti1\t5\tinf", "line 17: the time 'inf' is no number"),
        ("u1\ti1\tgood\t1", "line 17: the time or the rating is no number"),
        ("NA\ti1\t5\t1", "line 17: RecBole cannot read 'NA' as the id of a user or item"),
        ("u1\tnull\t5\t1", "line 17: RecBole cannot read 'null'"),
        ("\ti1\t5\t1", "line 17: RecBole cannot read ''"),
        ('u1\t"i1\t5\t1', "line 17: RecBole cannot read '\"i1'"),
        ("u1\ti\udce9\t5\t1", "line 17: not UTF-8 text"),
    ],
)
def test_lines_that_cannot_be_read(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    """pandas would take each as something else, or fail far away; blank lines are fine."""
    file = write_inter(toy, *GOOD, line, "", *GOOD)
    found = refused(capsys, argv(toy, model="Pop"))
    assert f"{file}, {told}".replace("\\\\", "\\") in found and "Mend the line or leave it out." in found
    assert not Path(toy["checkpoint_dir"]).exists()


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ("user_id:token\titem_id:token\trating:float\ttime:float", "--TIME_FIELD=timestamp: "),
        ("user:token\titem:token\trating:float\ttimestamp:float", "--USER_ID_FIELD=user_id, --ITEM_ID_FIELD="),
        ("user_id:token\titem_id:token\trating:float\ttimestamp:token", "--TIME_FIELD=timestamp: "),
        ("user_id:token\titem_id:token\trating:token\ttimestamp:float", "--RATING_FIELD=rating: "),
        ("user_id:float\titem_id:token\trating:float\ttimestamp:float", "--USER_ID_FIELD=user_id: "),
        ("user_id,item_id,rating,timestamp", "is no header of an atomic file; each column needs a type"),
        ("user_id\titem_id\trating\ttimestamp", "is no header of an atomic file; each column needs a type"),
        ("\ufeff" + HEADER, "begins with a byte-order mark"),
        ("", "line 1: '' is no header"),
    ],
)
def test_headers(toy: dict[str, Any], capsys: pytest.CaptureFixture[str], header: str, told: str) -> None:
    file = write_inter(toy, *GOOD, header=header)
    found = refused(capsys, argv(toy, model="Pop"))
    assert told in found and str(file) in found


def test_columns_of_other_names(toy: dict[str, Any]) -> None:
    write_inter(toy, *GOOD, header="who:token\twhat:token\trating:float\twhen:float")
    names = {"USER_ID_FIELD": "who", "ITEM_ID_FIELD": "what", "TIME_FIELD": "when"}
    config = LLMConfig("Pop", config_dict={**toy, **names})
    assert config["load_col"] == {"inter": ["who", "what", "when", "rating"]}


def test_empty_files(toy: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    file = write_inter(toy)
    assert f"{file} holds a header and no interactions." in refused(capsys, argv(toy, model="Pop"))
    file.write_bytes(b"")
    assert "is no header" in refused(capsys, argv(toy, model="Pop"))
    write_inter(toy, *GOOD)  # a mended file is read again
    assert LLMConfig("Pop", config_dict=toy)["dataset"] == "toy"
    write_inter(toy, *GOOD, "broken")  # and so is one that was fine
    assert "line 17: 1 fields" in refused(capsys, argv(toy, model="Pop"))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('i7\t"Quoted\t1957', "line 9: a field begins with a quote and does not end with its pair"),
        ('i7\t"Weird Al" Yankovic\t1957', "line 9: a field begins with a quote and does not end with its pair"),
        ('i7\t"a" and "b"\t1957', "line 9: a field begins with a quote and does not end with its pair"),
        ("i7\ta title", "line 9: 2 fields where the header has 3"),
        ("i7\ta title\t1957\tmore", "line 9: 4 fields where the header has 3"),
        ("i7\ti\udce9\t1957", "line 9: not UTF-8 text"),
        ("i7\ta title\rof two\t1957", "line 9: RecBole ends a line or a field at a carriage return"),
    ],
)
def test_files_beside_the_interactions_that_recbole_would_misread(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], line: str, told: str
) -> None:
    """With a quote that nothing closes RecBole drops all items up to the next one, and says nothing."""
    file = Path(toy["data_path"], "toy", "toy.item")
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[8] = line
    file.write_text("\n".join(lines), encoding="utf-8", errors="surrogateescape", newline="\n")
    reads = argv(toy, model="FDSA", selected_features=["release_year"])
    assert f"{file}, {told}" in refused(capsys, reads)
    assert f"{file}, {told}" in refused(capsys, argv(toy, model="Pop", load_col=None))  # every file and column
    assert LLMConfig("Pop", config_dict=toy)["dataset"] == "toy"  # which does not read it
    assert not Path(toy["checkpoint_dir"]).exists()


def test_titles_that_cannot_be_read_are_told_before_the_llm_is_loaded(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path(tiny["data_path"], "toy", "toy.item")
    text = file.read_text(encoding="utf-8")
    file.write_text(text + "i7\tanother title\t1957\n", encoding="utf-8")
    for settings in (tiny, {**tiny, "model": "DPO4Rec", "item_knowledge": False}):
        told = refused(capsys, argv(settings, llm="no/such-model"))
        assert f"{file}, line 62: item 'i7' stands in line 9 with other text. Leave one out." in told
        assert "in the configuration" in told and "no/such-model" not in told
    file.write_text(text, encoding="utf-8")  # a mended file is read again
    assert LLMConfig(config_dict=tiny)["dataset"] == "toy"


@pytest.mark.parametrize("title", ['"Weird Al"', '"Weird ""Al"" Yankovic"', '5" disk', 'say "x"', '""'])
def test_quotes_that_recbole_reads(toy: dict[str, Any], title: str) -> None:
    """Every item has its line, whatever RecBole makes of the title."""
    file = Path(toy["data_path"], "toy", "toy.item")
    lines = file.read_text(encoding="utf-8").split("\n")
    lines[8] = f"i7\t{title}\t1957"
    file.write_text("\n".join(lines), encoding="utf-8")
    features = prepare_data(LLMConfig("Pop", config_dict={**toy, "load_col": None})).dataset.item_feat
    assert len(features) == 61


def test_items_without_a_row_keep_their_interactions(toy: dict[str, Any]) -> None:
    """Models that read `.item` train on, and are asked, what all others are."""
    file = Path(toy["data_path"], "toy", "toy.item")
    lines = file.read_text(encoding="utf-8").split("\n")
    file.write_text("\n".join(lines[:1] + lines[4:]), encoding="utf-8")
    found = [
        prepare_data(LLMConfig(model, config_dict={**toy, **own}))
        for model, own in (("SASRec", {}), ("FDSA", {"selected_features": ["release_year"]}))
    ]
    sizes = [len(protocol.train_data.dataset) for protocol in found]
    assert sizes[0] == sizes[1] and found[0].test.digest == found[1].test.digest


def test_windows_line_ends_change_nothing(tiny: dict[str, Any], tmp_path: Path) -> None:
    results = []
    for end in (b"\n", b"\r\n"):
        for suffix in ("inter", "item"):
            file = Path(tiny["data_path"]) / "toy" / f"toy.{suffix}"
            file.write_bytes(file.read_bytes().replace(b"\r", b"").replace(b"\n", end))
        results.append(run_recbole_llm(config_dict={**tiny, **SMALL}))
    assert results[0]["test_result"] == results[1]["test_result"]
    assert results[0]["candidate_hash"] == results[1]["candidate_hash"]


def test_users_and_candidates(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--few_shot=41: only 40 users have training" in refused(capsys, argv(tiny, few_shot=41))
    assert "--eval_users=0: must be a whole number >= 1" in refused(capsys, argv(tiny, eval_users=0))
    told = refused(capsys, argv(tiny, eval_args={"mode": "uni59"}))
    assert "mode uni59 needs 59 items that user u0 never met, but there are 48. Use mode uni48 or" in told
    tiny.pop("llm")
    result = run_recbole_llm("Pop", config_dict=tiny | {"eval_users": 1000})
    assert json.loads((Path(result["run_folder"]) / "result.json").read_text())["rows"] == 40


def test_low_ratings_need_ratings(tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    file = Path(tiny["data_path"]) / "toy" / "toy.inter"
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join("\t".join((u, i, t)) + "\n" for u, i, _, t in rows), encoding="utf-8")
    told = refused(capsys, argv(tiny, **SMALL, loss="DMPO", rejected="low_rating"))
    assert "--rejected=low_rating: toy.inter has no rating column" in told
    pair = {"prompt": "pair", "rejected": "low_rating", "eval_args": {"mode": "uni1"}, "next_items": 1}
    told = refused(capsys, argv(tiny, **SMALL, **pair))  # whose SFT lists a rejected title beside the chosen one
    assert "--rejected=low_rating: toy.inter has no rating column" in told


@pytest.mark.parametrize(
    ("model", "changes", "told"),
    [
        ("SASRec", {"n_heads": 7}, "building the model failed: ValueError: The hidden size (64) is not"),
        ("BPR", {"val_interval": {"rating": "[9,inf)"}}, "reading the data failed: ValueError: Some feat is"),
        ("BPR", {"user_inter_num_interval": "[50,60]"}, "reading the data failed: ValueError: Some feat is"),
    ],
)
def test_what_recbole_finds_late(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], model: str, changes: dict[str, Any], told: str
) -> None:
    """Settings that RecBole checks by failing where it first uses them; the traceback is kept in a file."""
    found = refused(capsys, argv(toy, model=model, **changes))
    assert found.startswith(f"recbole-llm: --model={model} --dataset=toy: {told}")
    (folder,) = Path(toy["checkpoint_dir"]).iterdir()
    assert "Traceback" in (folder / "traceback.txt").read_text(encoding="utf-8")
    assert not (folder / "result.json").exists()


# LLMs


def test_folders_that_are_no_causal_lm(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert "is a folder without config.json" in refused(capsys, argv(tiny, llm=folder))
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    assert "an adapter: give its base model" in refused(capsys, argv(tiny, llm=folder))
    bert = {"architectures": ["BertModel"], "model_type": "bert"}
    (folder / "config.json").write_text(json.dumps(bert), encoding="utf-8")
    told = refused(capsys, argv(tiny, llm=folder))
    assert f"--llm={folder} is a BertModel, not a causal language model" in told
    (folder / "config.json").write_text("{", encoding="utf-8")
    assert f"--llm={folder} could not be loaded" in refused(capsys, argv(tiny, llm=folder))
    assert f"--llm={tmp_path}/no.gguf: no such folder or .gguf file" in refused(
        capsys, argv(tiny, llm=tmp_path / "no.gguf")
    )
    assert not list(Path(tiny["checkpoint_dir"]).glob("*/result.json"))


# Disks


def left_over(folder: str) -> list[str]:
    """What must not be there after a run that could not be saved."""
    files = [f for f in Path(folder).rglob("*") if f.is_file()]
    return [f.name for f in files if f.name == "result.json" or f.suffix == ".tmp" or ".saving-" in str(f)]


@pytest.mark.parametrize(
    ("model", "file"),
    [
        ("Pop", "config.yaml"),
        ("Pop", "Pop.pth"),
        ("Pop", "env.json"),
        ("Pop", "per_user.csv.gz"),
        ("Pop", "top.csv.gz"),
        ("Pop", "candidates-valid.jsonl.gz"),
        ("Pop", "candidates-test.jsonl.gz"),
        ("Pop", "README.md"),
        ("Pop", "result.json"),
        ("LLMRanker", "adapter_model.safetensors"),
        ("LLMRanker", "stage.json"),
    ],
)
def test_disk_full_at_any_file(
    toy: dict[str, Any],
    tiny: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    file: str,
) -> None:
    rename = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == file:
            raise FULL
        rename(source, target)

    monkeypatch.setattr(os, "replace", full)
    told = refused(capsys, argv(toy | SMALL if model == "Pop" else tiny | SMALL, model=model))
    assert "--checkpoint_dir" in told and "No space left on device" in told
    assert left_over(toy["checkpoint_dir"]) == []


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (torch, "save"),
        (os, "fsync"),
        (run_record, "write_table"),
        (run_log, "init_logger"),
        (run_record, "write_json"),
    ],
)
def test_disk_full_while_writing(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr(module, name, full)
    told = refused(capsys, argv(toy, model="Pop"))
    assert f"--checkpoint_dir={toy['checkpoint_dir']}: " in told and "No space left on device" in told
    assert left_over(toy["checkpoint_dir"]) == []


@pytest.mark.parametrize(("module", "name"), [(files, "save_file"), (LLMTrainer, "_log_step")])
def test_disk_full_in_training(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise FULL

    monkeypatch.setattr(module, name, full)
    told = refused(capsys, argv(tiny | SMALL))
    assert "--checkpoint_dir" in told and "No space left on device" in told and "ree some space" in told
    assert left_over(tiny["checkpoint_dir"]) == []


def test_a_failed_run_takes_the_old_result_with_it(
    toy: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(run_recbole_llm("Pop", config_dict=toy)["run_folder"])
    assert (folder / "result.json").is_file()

    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(run_record, "write_table", full)
    refused(capsys, argv(toy, model="Pop"))
    assert left_over(toy["checkpoint_dir"]) == []


def test_folders_that_cannot_be_written(
    toy: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "/proc/none"):
        told = refused(capsys, argv(toy, model="Pop", checkpoint_dir=folder))
        assert "--checkpoint_dir: cannot make " in told and str(folder) in told
        assert "Name a folder that can be written." in told

    def denied(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "./log/")

    monkeypatch.setattr(run_log, "init_logger", denied)  # RecBole logs where the command runs
    told = refused(capsys, argv(toy, model="Pop"))
    assert "could not write ./log/ (Permission denied)" in told
    assert "run in a folder that can be written" in told


def test_two_processes_may_write_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of two equal comparisons that end together: each process writes beside by a name of its own."""
    beside, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda one, other: (beside.append(one), real(one, other)))
    frame = pd.DataFrame({"a": [1]})
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_text(tmp_path / "table.md", "text")
        write_table(tmp_path / "table.csv.gz", frame)
    assert len(set(beside)) == 4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["table.csv.gz", "table.md"]


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is forced to the disk and what gets its name from now on, with its inode."""
    done: list[tuple[str, int]] = []
    rename = os.replace

    def named(*names: Any) -> None:
        done.append(("named", os.stat(names[0]).st_ino))
        rename(*names)

    monkeypatch.setattr(os, "fsync", lambda number: done.append(("fsync", os.fstat(number).st_ino)))
    monkeypatch.setattr(os, "replace", named)
    return done


def test_a_table_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[tuple[str, int]]) -> None:
    """``result.json`` follows it, and says that the run is whole."""
    file = tmp_path / "a.csv.gz"
    write_table(file, pd.DataFrame({"a": range(1000)}))
    assert order == [("fsync", file.stat().st_ino), ("named", file.stat().st_ino)]


def test_an_adapter_is_on_the_disk_before_it_has_its_name(tmp_path: Path, order: list[tuple[str, int]]) -> None:
    """``stage.json`` follows it, and says that the stage is whole."""
    adapter.save_adapter(load_llm(llm="tiny", device=torch.device("cpu"), seed=0), tmp_path)
    kept = {file.stat().st_ino for file in tmp_path.iterdir()}
    assert len(kept) == 3
    assert all(order.index(("fsync", file)) < order.index(("named", file)) for file in kept)


@pytest.mark.parametrize(("umask", "mode"), [(0o027, 0o640), (0o002, 0o664)])
def test_weights_can_be_read_by_who_may_read_all_else(tmp_path: Path, umask: int, mode: int) -> None:
    """By the group that shares a folder: safetensors makes files for their owner alone. A killed process's too."""
    file = tmp_path / "a.safetensors"
    file.with_name("a.safetensors.tmp").touch(0o600)
    before = os.umask(umask)
    try:
        write_tensors(file, {"a": torch.arange(3)}, {"sha256": "b"})
        adapter.save_adapter(load_llm(llm="tiny", device=torch.device("cpu"), seed=0), tmp_path / "adapter")
    finally:
        os.umask(before)
    made = [file, *(tmp_path / "adapter").iterdir()]
    assert [file.stat().st_mode & 0o777 for file in made] == [mode] * 4
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata() == {"sha256": "b"} and stored.get_tensor("a").tolist() == [0, 1, 2]
