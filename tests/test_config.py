"""Settings: which wins, what each key may hold, and how all wrong ones are told at once."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recbole.utils import argument_list

from recbole_llm import checks, config, keys
from recbole_llm.cli import parse_flags
from recbole_llm.config import LLMConfig
from recbole_llm.data.template import load_template
from recbole_llm.errors import ConfigError
from recbole_llm.report.entries import parse_models, split_options
from recbole_llm.report.grid import cells
from recbole_llm.report.search_space import search_space
from recbole_llm.settings import PROPERTIES, parse_value, read_yaml, read_yamls
from recbole_llm.wrong_keys import wrong_values
from tests.conftest import write_dataset

COMMAND = '__import__("os").system("touch run")'


def problems(model: str = "LLMRanker", files: list[str] | None = None, **settings: Any) -> list[str]:
    """What is told about these settings."""
    with pytest.raises(ConfigError) as told:
        LLMConfig(model, config_file_list=files, config_dict=settings)
    for problem in told.value.problems:
        assert "\n" not in problem and problem.endswith((".", "?")), problem
    return told.value.problems


def recbole_keys() -> set[str]:
    listed = {
        key
        for name in ("general", "training", "evaluation", "dataset")
        for key in getattr(argument_list, f"{name}_arguments")
    }
    return listed | checks.shared_keys(PROPERTIES) - set(keys.PROTOCOL_KEYS)


# Which setting wins


def test_precedence(toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole < our overall < our model < our data set < the user's files, the last most < a flag."""
    folder = tmp_path / "properties"
    shutil.copytree(PROPERTIES, folder)
    monkeypatch.setattr(config, "PROPERTIES", folder)
    layers = [folder / "overall.yaml", folder / "model" / "SASRec.yaml", folder / "dataset" / "toy.yaml"]
    files = [tmp_path / "first.yaml", tmp_path / "second.yaml"]
    assert LLMConfig("SASRec", config_dict=toy)["stopping_step"] == 10
    for value, file in enumerate([*layers, *files], start=11):
        with open(file, "a", encoding="utf-8") as out:
            out.write(f"\nstopping_step: {value}\n")
        given_files = [str(f) for f in files if f.exists()]
        assert LLMConfig("SASRec", None, given_files, toy)["stopping_step"] == value, file
    flags = parse_flags(["--stopping_step=99"])
    assert LLMConfig("SASRec", None, [str(f) for f in files], {**toy, **flags})["stopping_step"] == 99


def test_model_and_dataset_may_stand_in_a_file(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model: SASRec\ndataset: toy\n", encoding="utf-8")
    toy.pop("dataset")
    found = LLMConfig(config_file_list=[str(tmp_path / "run.yaml")], config_dict=toy)
    assert (found["model"], found["dataset"]) == ("SASRec", "toy")


@pytest.mark.parametrize(
    ("given_args", "expected"),
    [
        ({}, {"valid": "uni19", "test": "uni99"}),
        ({"group_by": "none"}, {"valid": "uni19", "test": "uni99"}),
        ({"mode": "full"}, {"valid": "full", "test": "full"}),
        ({"mode": {"test": "uni50"}}, {"valid": "uni19", "test": "uni50"}),
    ],
)
def test_partial_eval_args_keep_the_rest(
    toy: dict[str, Any], given_args: dict[str, Any], expected: dict[str, str]
) -> None:
    found = LLMConfig("SASRec", config_dict={**toy, "eval_args": given_args})["eval_args"]
    assert found["mode"] == expected
    assert found["split"] == {"LS": "valid_and_test"} and found["order"] == "TO"
    assert found["group_by"] == given_args.get("group_by", "user")


def test_the_users_tables_stay_as_they_are(toy: dict[str, Any]) -> None:
    """RecBole fills them in place."""
    toy["train_neg_sample_args"] = {"distribution": "popularity"}
    assert LLMConfig("BPR", config_dict=toy)["train_neg_sample_args"]["sample_num"] == 1
    assert toy["train_neg_sample_args"] == {"distribution": "popularity"}


# The keys themselves


def test_every_key_of_overall_is_known() -> None:
    listed = read_yaml(str(PROPERTIES / "overall.yaml"))
    assert set(listed) <= recbole_keys() | set(keys.PROTOCOL_KEYS)
    assert set(keys.PROTOCOL_KEYS) <= set(listed)


def test_every_key_of_the_llm_is_known() -> None:
    listed = read_yaml(str(PROPERTIES / "model" / "LLMRanker.yaml"))
    assert set(listed) <= recbole_keys() | set(keys.LLM_KEYS)
    assert set(keys.LLM_KEYS) <= set(listed)


def test_every_key_of_dpo4rec_is_known() -> None:
    listed = read_yaml(str(PROPERTIES / "model" / "DPO4Rec.yaml"))
    assert set(listed) <= recbole_keys() | {"loss_type"} | set(keys.LLM_KEYS) | set(keys.DPO4REC_KEYS)
    assert set(keys.DPO4REC_KEYS) <= set(listed)


def test_every_check_is_of_a_key_that_something_reads() -> None:
    assert set(keys.RECBOLE_KEYS) <= recbole_keys() | keys.UNLISTED_KEYS
    assert not recbole_keys() & (set(keys.PROTOCOL_KEYS) | set(keys.LLM_KEYS) | set(keys.DPO4REC_KEYS))


@pytest.mark.parametrize("model", ["LLMRanker", "DPO4Rec", "SASRec", "Pop", "NeuMF"])
def test_every_default_passes_its_own_check(toy: dict[str, Any], model: str) -> None:
    found = LLMConfig(model, config_dict=toy)
    assert wrong_values(found.internal_config_dict, found.recbole_defaults) == []


@pytest.mark.parametrize("file", sorted(PROPERTIES.glob("**/*.yaml")), ids=lambda file: file.stem)
def test_every_properties_file_loads(file: Path, tmp_path: Path) -> None:
    settings = read_yaml(str(file))
    kind = file.parent.name
    if kind == "prompt":
        key = "reasoning_prompt" if settings["family"] == "reasoning" else "prompt"
        load_template(file.stem, PROPERTIES, key)
    elif kind == "compare":
        while "dataset" not in settings:  # laid over another file, which its head names
            under = re.search(r"(\S+)\.yaml properties/compare/" + file.name, file.read_text(encoding="utf-8"))
            assert under, file
            file = file.with_name(f"{Path(under[1]).name}.yaml")
            settings = read_yaml(str(file)) | settings
        entries = parse_models(settings.pop("models"))
        needed = {settings["dataset"], *(entry.settings.get("dataset", "ml-100k") for entry in entries)}
        for name in needed - {"ml-100k"}:  # the only one that comes with RecBole
            settings["data_path"] = str(write_dataset(tmp_path, name=name))
        options, shared = split_options(settings)
        runs = [1 if "seed" in entry.settings else len(options.seeds or (1,)) for entry in entries]
        assert len(cells(entries, options, shared)) == sum(runs) * len(options.modes or (1,))
    elif file.stem == "comparison":
        assert split_options(settings)[1] == {"few_shot": None}
    elif kind == "model":
        LLMConfig(file.stem, "ml-100k")
    else:
        LLMConfig("Pop", file.stem if kind == "dataset" else "ml-100k")


def test_files_of_the_package_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As README's commands name them; a file of that name here comes first."""
    ours = read_yaml(str(PROPERTIES / "compare" / "quick.yaml"))
    monkeypatch.chdir(tmp_path)
    assert read_yamls(["properties/compare/quick.yaml"]) == ours
    space = {p.key for p in search_space(LLMConfig("BPR", "ml-100k"), "properties/search")}
    assert space == set(read_yaml(str(PROPERTIES / "search" / "BPR.yaml")))
    with pytest.raises(ConfigError, match="cannot read `compare/quick.yaml`"):
        read_yaml("compare/quick.yaml")
    (tmp_path / "properties" / "compare").mkdir(parents=True)
    (tmp_path / "properties" / "compare" / "quick.yaml").write_text("seed: 7", encoding="utf-8")
    assert read_yamls(["properties/compare/quick.yaml"]) == {"seed": 7}


def test_numbers_in_yaml(tmp_path: Path) -> None:
    """YAML 1.1 calls them texts."""
    text = "a: 1e-4\nb: 2E5\nc: -1.5e+3\nd: .5e-1\ne: 1.e2\nf: 12\ng: e5\nh: 1e\n"
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    assert read_yaml(str(tmp_path / "a.yaml")) == {
        "a": 1e-4,
        "b": 2e5,
        "c": -1500.0,
        "d": 0.05,
        "e": 100.0,
        "f": 12,
        "g": "e5",
        "h": "1e",
    }


# Nothing is run


@pytest.mark.parametrize("text", [COMMAND, f"[{COMMAND}]", f"lambda: {COMMAND}", "os", "Enum", "1+1"])
def test_texts_are_never_run(toy: dict[str, Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(f"wandb_project: '{text}'\n", encoding="utf-8")
    assert parse_value(text) == text
    assert LLMConfig("Pop", config_dict={**toy, "wandb_project": text})["wandb_project"] == text
    assert LLMConfig("Pop", None, [str(tmp_path / "a.yaml")], toy)["wandb_project"] == text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch run']",
        "seed: !!python/name:os.system",
        "!!python/object/new:os.system ['touch run']",
        "seed: !unknown 3",
        "- a\n- b",
        "seed",
        "seed: [1",
        "a: 2020-13-45",
        "a: 0b_",
        "? {a: b}\n: c\n",
        "\x00",
        "[" * 5000,
    ],
)
def test_yaml_that_is_no_settings(toy: dict[str, Any], tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    told = problems("Pop", [str(file)], **toy)
    assert len(told) == 1 and told[0].startswith("--config_files: ") and str(file) in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("epochs: 1\nseed: 2\nepochs: 3\n", "line 3: `epochs` stands there a second time."),
        ("eval_args: {mode: full, split: {LS: test_only}, mode: uni9}\n", "line 1: `mode` stands there a second time."),
        ("a: [{b: 1}, {b: 1, c: {d: 1,\n d: 1}}]\n", "line 2: `d` stands there a second time."),
    ],
)
def test_a_key_that_stands_twice(tmp_path: Path, text: str, told: str) -> None:
    """YAML would take the last of them, and say nothing."""
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=re.escape(f"`{file}` is not plain YAML: {told}")):
        read_yaml(str(file))


def test_tables_laid_over_others_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    text = "a: {b: &x {c: 1}, d: &y {<<: *x, c: 2}}\ne: {<<: *y, c: 3}\nf: {<<: *x, <<: &z {g: 4}}\n"
    file.write_text(text, encoding="utf-8")
    assert read_yaml(str(file)) == {"a": {"b": {"c": 1}, "d": {"c": 2}}, "e": {"c": 3}, "f": {"c": 1, "g": 4}}


@pytest.mark.parametrize("key", ["config_file", "config_files"])
def test_files_that_nothing_would_read(toy: dict[str, Any], key: str) -> None:
    told = problems("Pop", **toy, **{key: "a.yaml"})
    assert len(told) == 1 and told[0].startswith(f"--{key}='a.yaml': ") and '--config_files="a.yaml b.yaml"' in told[0]


def test_home(toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves `~` in --key=~/x, and a file has no shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.yaml").write_text("checkpoint_dir: ~/runs\nitem_text: ~/no path\n", encoding="utf-8")
    assert read_yamls(["~/a.yaml"]) == {"checkpoint_dir": f"{tmp_path}/runs", "item_text": "~/no path"}
    flags = parse_flags(["--checkpoint_dir=~/x", "--data_path=~", "--out", "~/y", "--search=a~b", "--prompt=~no one/z"])
    assert flags == {
        "checkpoint_dir": f"{tmp_path}/x",
        "data_path": str(tmp_path),
        "out": f"{tmp_path}/y",
        "search": "a~b",
        "prompt": "~no one/z",
    }
    assert LLMConfig("Pop", config_dict={**toy, "checkpoint_dir": "~/x"})["checkpoint_dir"] == f"{tmp_path}/x"


def test_all_wrong_files_are_told(toy: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("# nothing\n", encoding="utf-8")
    (tmp_path / "latin.yaml").write_bytes("seed: é".encode("latin-1"))
    assert read_yamls([str(tmp_path / "empty.yaml")]) == {}
    told = problems("Pop", [str(tmp_path / f) for f in ("none.yaml", "latin.yaml", ".")], **toy)
    assert [t.split(" (")[0].split(" is not")[0].removeprefix("--config_files: ") for t in told] == [
        f"cannot read `{tmp_path}/none.yaml`",
        f"`{tmp_path}/latin.yaml`",
        f"cannot read `{tmp_path}`",
    ]


def test_what_no_setting_can_be_is_told_at_once(tmp_path: Path) -> None:
    """YAML 1.1 reads dates and numbers where texts are meant, RecBole's intervals among them."""
    text = (
        "val_interval: {timestamp: 2001-01-01, 1: x, y: [{no: z}]}\nout: !!set {a}\n2: 3\nseed: 2001-01-01 10:00:00\n"
    )
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as told:
        read_yaml(str(file))
    start = f"--config_files: `{file}`, "
    assert told.value.problems == [
        f"{start}val_interval.timestamp: `2001-01-01` is read as a date; put it in quotes.",
        f"{start}val_interval: the key 1 is not text; put it in quotes.",
        f"{start}val_interval.y: the key False is not text; put it in quotes.",
        f"{start}out: `{{'a'}}` is read as a set; put it in quotes.",
        f"{start}at the top: the key 2 is not text; put it in quotes.",
        f"{start}seed: `2001-01-01 10:00:00` is read as a datetime; put it in quotes.",
    ]


@given(st.text(max_size=30) | st.from_regex(r"[\[\]{}(),'\"0-9eE:.\-+ _xobj]{0,20}", fullmatch=True))
def test_any_text_is_a_value(text: str) -> None:
    value = parse_value(text)
    assert value is None or isinstance(value, (bool, int, float, str, list, dict))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("7", 7),
        ("TRUE", True),
        ("false", False),
        ("None", None),
        ("~", None),
        ("null", None),
        ("[1, 5]", [1, 5]),
        ("1,5", [1, 5]),
        ("[NDCG, Hit]", ["NDCG", "Hit"]),
        ("[NDCG@10,1,true]", ["NDCG@10", 1, True]),
        ("[q_proj]", ["q_proj"]),
        ("[50,inf)", "[50,inf)"),
        ("[{title}]", "[{title}]"),
        ("{'a': [1]}", {"a": [1]}),
        ("{title}", "{title}"),
        ("{[]: 1}", "{[]: 1}"),
        ("uni99", "uni99"),
        ("", ""),
        ("a=b", "a=b"),
        ("...", "..."),
        ("1j", "1j"),
        ("{1, 2}", "{1, 2}"),
        ("01", "01"),
    ],
)
def test_values_as_typed(text: str, value: Any) -> None:
    found = parse_value(text)
    assert found == value and type(found) is type(value)


# What is told


@pytest.mark.parametrize(
    ("model", "settings", "told"),
    [
        ("LLMRanker", {"few_short": 3}, "--few_short: no such key; did you mean `few_shot`?"),
        ("LLMRanker", {"Learning_Rate": 3}, "did you mean `learning_rate`?"),
        ("LLMRanker", {"qqqqqq": 3}, "--qqqqqq: no such key; `recbole-llm ls --keys` lists ours, RecBole's"),
        ("LLMRanker", {"tune": 3}, "--tune: a key of `recbole-llm compare`, not of a run; leave it out."),
        ("SASRec", {"models": "Pop"}, "--models: a key of `recbole-llm compare`, not of a run"),
        ("LLMRanker", {"saved": False}, "--saved: no such key"),
        ("SASRec", {"loss": "DMPO"}, "--loss: SASRec does not read it; it is a key of LLMRanker."),
        ("SASRec", {"beta": 0.5}, "it is a key of LLMRanker, "),
        ("LLMRanker", {"loss_type": "CE"}, "--loss_type: LLMRanker does not read it; it is a key of "),
        ("Pop", {"llm": "tiny"}, "in a comparison give it to that model alone: LLMRanker[llm=tiny]."),
        ("SASRec", {"nproc": 2}, "--nproc=2: torchrun sets it"),
        ("SASRec", {"local_rank": 0}, "--local_rank=0: torchrun sets it"),
        ("SASRec", {"MODEL_TYPE": None}, "--MODEL_TYPE: no such key"),
        ("SASRec", {"benchmark_filename": ["a", "b"]}, "pre-split files are not supported"),
        ("BPR", {"threshold": {"rating": 4}}, "liked_only with rating_threshold leaves low ratings out"),
        ("BPR", {"repeatable": True}, "--repeatable=True: negatives could then be items that the user met"),
        ("BPR", {"valid_metric_bigger": False}, "--valid_metric_bigger=False: of NDCG@10 more is better; leave it out"),
    ],
)
def test_keys_nothing_reads(toy: dict[str, Any], model: str, settings: dict[str, Any], told: str) -> None:
    (problem,) = problems(model, **toy, **settings)
    assert told in problem


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"few_shot": 0}, "--few_shot=0: must be a whole number >= 1 or empty."),
        ({"few_shot": 1.5}, "must be a whole number >= 1 or empty."),
        ({"few_shot": True}, "must be a whole number >= 1 or empty."),
        ({"eval_users": "all"}, "--eval_users='all': must be a whole number >= 1 or empty."),
        ({"candidate_seed": -1}, "must be a whole number >= 0."),
        ({"seed": 2**32}, "must be a whole number >= 0 and <= 4294967295."),
        ({"mask_history": 1}, "--mask_history=1: must be True or False."),
        ({"beta": 0}, "--beta=0: must be a number > 0."),
        ({"beta": float("inf")}, "must be a number > 0."),
        ({"beta": float("nan")}, "must be a number > 0."),
        ({"beta": "0.1"}, "--beta='0.1': must be a number > 0."),
        ({"lora_dropout": 1}, "must be a number >= 0 and <= 0.99."),
        ({"rating_threshold": None}, "--rating_threshold=None: must be a number."),
        ({"loss": "dpo"}, "--loss='dpo': must be one of SFT, DPO, DMPO, SDPO, RosePO, MultDPO."),
        ({"quantization": "8bit"}, "must be one of (empty), 4bit."),
        ({"llm": ""}, "--llm='': must be text."),
        ({"lora_target_modules": []}, "must be text or a list of texts."),
        ({"lora_target_modules": [1]}, "must be text or a list of texts."),
        ({"gpu_id": [0]}, "--gpu_id=[0]: must be the number of a GPU"),
        ({"clip_grad_norm": {"norm": 1}}, "must be a table such as {'max_norm': 1.0}, or empty."),
        ({"item_inter_num_interval": 5}, "--item_inter_num_interval=5: must be an interval such as '[5,inf)'"),
        ({"user_inter_num_interval": "[5,"}, "--user_inter_num_interval='[5,': must be an interval"),
        ({"user_inter_num_interval": "[9,5]"}, "--user_inter_num_interval='[9,5]': must be an interval"),
        ({"normalize_all": True}, "--normalize_all=True: ratings and times are compared as they stand in the file"),
        ({"normalize_field": ["rating"]}, "--normalize_field=['rating']: ratings and times are compared"),
        ({"learner": "adamm"}, "must be one of adam, adamw, "),
        ({"learning_rate": "1e-3"}, "--learning_rate='1e-3': must be a number > 0."),
        ({"train_batch_size": 0}, "must be a whole number >= 1."),
        ({"MAX_ITEM_LIST_LENGTH": 0}, "--MAX_ITEM_LIST_LENGTH=0: must be a whole number >= 1."),
        ({"checkpoint_dir": 3}, "--checkpoint_dir=3: must be text."),
        ({"data_path": None}, "--data_path=None: must be text."),
        ({"show_progress": "yes"}, "--show_progress='yes': must be True or False."),
        ({"require_pow": 0}, "must be True or False."),
        ({"additional_feat_suffix": 5}, "--additional_feat_suffix=5: must be text, or a list of it."),
        ({"additional_feat_suffix": ["ent", 5]}, "must be text, or a list of it."),
        ({"numerical_features": "a"}, "must be a list"),
        ({"train_neg_sample_args": 3}, "must be a table"),
        ({"wandb_project": 3}, "--wandb_project=3: must be text."),
        ({"loss": "DMPO", "rejected_num": 0}, "--rejected_num=0: DMPO needs a rejected item in each pair"),
        ({"enable_amp": True}, "--enable_amp=True: the training of an LLM does not read it."),
        ({"finetune": "full", "dtype": "float16"}, "--dtype=float16: weights of this type become no numbers"),
        ({"shuffle": False}, "--shuffle=False: the training of an LLM does not read it."),
        ({"loss": "DPO"}, "--rejected_num=3: DPO compares one pair; set --rejected_num=1, or --loss="),
        ({"loss": "SDPO", "preference_epochs": 0}, "--preference_epochs=0: SDPO would never be trained"),
        ({"quantization": "4bit", "finetune": "full", "llm": "embedded"}, "--finetune=full: 4-bit weights"),
        ({"quantization": "4bit"}, "--llm=tiny cannot be quantised"),
        ({"loss": "DPO", "rejected_num": 1, "finetune": "none"}, "--finetune=none: DPO trains weights"),
        ({"rerank_model": "Popp"}, "--rerank_model=Popp: no such model here or in RecBole; did you mean `Pop`"),
        ({"rerank_model": "LLMRanker"}, "--rerank_model=LLMRanker: "),
        ({"rerank_model": "DPO4Rec"}, "--rerank_model=DPO4Rec: "),
        ({"learner": "sparse_adam"}, "--learner=sparse_adam: gradients of an LLM are not sparse"),
        ({"loss": "RosePO", "robust": True, "smoothing": 0.49999999999}, "--robust=True divides by 1 - 2 epsilon"),
        ({"load_col": {"inter": ["user_id"]}}, "--load_col: inter lacks item_id, timestamp"),
        ({"load_col": {"item": ["item_id"]}}, "--load_col: inter lacks user_id, item_id, timestamp"),
        ({"load_col": {"inter": "user_id"}}, "--load_col={'inter': 'user_id'}: must be a table such as"),
        (
            {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "itm": "*"}},
            "--load_col names the file toy.itm, and there is none",
        ),
        ({"load_col": {"inter": "*", "item": ["titel"]}}, "--load_col: toy.item has no column titel; it has item_id, "),
        ({"load_col": None, "unload_col": {"inter": ["timestamp"]}}, "--unload_col: inter lacks timestamp"),
        ({"load_col": None, "unload_col": {"inter": ["rating"]}, "liked_only": True}, "column 'rating' is not read"),
        ({"val_interval": {"rating": "3,5"}}, "--val_interval={'rating': '3,5'}: must be a table such as"),
        ({"val_interval": 3}, "--val_interval=3: must be a table such as"),
        ({"val_interval": {"rating": [3]}}, "--val_interval: rating is of type float; give an interval"),
        ({"val_interval": {"item_id": "[3,5]"}}, "--val_interval: item_id is of type token; give a list of"),
        ({"val_interval": {"ratng": "[3,5]"}}, "--val_interval: no column 'ratng' is read; look at its name"),
        ({"val_interval": {"title": ["A"]}}, "--val_interval: no column 'title' is read; look at its name"),
        (
            {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "unload_col": {"inter": ["rating"]}},
            "both name",
        ),
        ({"unload_col": {"inter": ["rating"]}, "min_disliked": 1}, "--min_disliked: the rating column 'rating' is not"),
        ({"numerical_features": ["rating"]}, "--numerical_features=['rating']: ratings and times are compared"),
        (
            {"discretization": {"timestamp": {"method": "LD"}}},
            "ratings and times are compared as they stand in the file",
        ),
        ({"encoding": "latin-1"}, "--encoding='latin-1': must be one of utf-8"),
        ({"rm_dup_inter": True}, "--rm_dup_inter=True: must be one of (empty), first, last."),
        ({"filter_inter_by_user_or_item": True}, "--filter_inter_by_user_or_item=True: must be False, for it takes"),
        ({"train_neg_sample_args": {"sample_nums": 5}}, "must have no entry 'sample_nums'; there are distribution, "),
        ({"train_neg_sample_args": {"alpha": "x"}}, "its alpha must be a number >= 0."),
        ({"LIST_SUFFIX": ""}, "--LIST_SUFFIX='': must be text."),
    ],
)
def test_wrong_values(tiny: dict[str, Any], settings: dict[str, Any], told: str) -> None:
    (problem,) = problems(**{**tiny, **settings})
    assert told in problem


def test_epochs_zero_is_for_the_llm_alone(tiny: dict[str, Any], toy: dict[str, Any]) -> None:
    assert LLMConfig(config_dict={**tiny, "epochs": 0})["epochs"] == 0
    assert problems("SASRec", **{**toy, "epochs": 0}) == ["--epochs=0: must be a whole number >= 1."]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"eval_args": None}, "--eval_args=None: must be a table"),
        ({"eval_args": {"order": "RO"}}, "order RO has no next item to rank; use order TO."),
        ({"eval_args": {"mode": "uni0"}}, "mode 'uni0' must be full, uniN, popN or lowN"),
        ({"eval_args": {"mode": "labeled"}}, "mode 'labeled' must be full, uniN, popN or lowN"),
        ({"eval_args": {"mode": {"valid": "nonsense"}}}, "mode 'nonsense' must be full, uniN, popN or lowN"),
        ({"eval_args": {"mode": {"valid": "uni٣"}}}, "must be full, uniN, popN or lowN"),
        ({"eval_args": {"mode": {"val": "uni9"}}}, "mode has the entries valid and test, not 'val'."),
        ({"eval_args": {"mode": 9}}, "mode 9 must be full, uniN, popN or lowN"),
        ({"eval_args": {"modes": "uni9"}}, "--eval_args: no entry 'modes'; did you mean `mode`?"),
        ({"eval_args": {"split": {"LS": "valid_only"}}}, "--eval_args: split {'LS': 'valid_only'} must be "),
        ({"eval_args": {"split": {"RS": [0.8, 0.2]}}}, "must be {'LS': 'valid_and_test'} (leave one out)"),
        ({"eval_args": {"group_by": "item"}}, "group_by 'item' must be user or none."),
        ({"topk": []}, "--topk=[]: must be a list of whole numbers >= 1."),
        ({"topk": [1, "5"]}, "must be a list of whole numbers >= 1."),
        ({"topk": True}, "must be a list of whole numbers >= 1."),
        (
            {"metrics": ["NDCG", "ItemCoverage"], "eval_args": {"mode": {"valid": "full", "test": "uni4"}}},
            "--metrics: ItemCoverage would count empty places, for uni4 asks among 5 items",
        ),
        ({"valid_metric": "NDCG@3"}, "--valid_metric='NDCG@3': its K is not in --topk=[1, 5, 10]"),
        ({"valid_metric": "Recall@10"}, "--valid_metric='Recall@10': not among --metrics=['Hit', 'NDCG', 'MRR']"),
        ({"valid_metric": "NDCG"}, "--valid_metric='NDCG': must look like NDCG@10, or be GAUC."),
        ({"valid_metric": "GAUC@10"}, "must look like NDCG@10, or be GAUC."),
        ({"valid_metric": "NDCG@010"}, "must look like NDCG@10, or be GAUC."),
        ({"valid_metric": None}, "must look like NDCG@10, or be GAUC."),
        ({"valid_metric": "LogLoss"}, "--valid_metric='LogLoss': LogLoss is no ranking metric"),
        ({"metrics": ["NDCG", "Ndgc"]}, "--metrics: Ndgc is no ranking metric of RecBole; did you mean `ndcg`?"),
        ({"metrics": ["NDCG", 3]}, "--metrics: 3 is no ranking metric of RecBole"),
        ({"metrics": ["NDCG", "AUC"]}, "--metrics: AUC is no ranking metric: it needs labels"),
        *(({"metrics": ["NDCG", m]}, "GAUC is the AUC of such") for m in ("AUC", "LogLoss", "RMSE", "mae")),
    ],
)
def test_wrong_evaluation(toy: dict[str, Any], settings: dict[str, Any], told: str) -> None:
    (problem,) = problems("SASRec", **{**toy, **settings})
    assert told in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 10},
        {"topk": (1, 10)},
        {"metrics": "NDCG"},
        {"metrics": ["GAUC"], "valid_metric": "gauc"},
        {"valid_metric": "ndcg@5"},
        {"load_col": None},
        {"load_col": {"inter": "*", "item": ["item_id"]}},
        {"val_interval": {"rating": "[3,inf)", "user_id": ["u1", "u2"]}},
        {"val_interval": {"rating": [3, 5]}},
        {"train_neg_sample_args": {"sample_num": 2}, "loss_type": "BPR"},
        {"rm_dup_inter": "first"},
        {"unload_col": {"inter": ["rating"]}},
        {"val_interval": {"title": ["A"]}, "load_col": {"inter": "*", "item": "*"}},
        {"valid_metric_bigger": True},
        {"metrics": ["GiniIndex"], "valid_metric": "GiniIndex@10", "valid_metric_bigger": False},
        {"repeatable": True},
        {"gpu_id": 0},
        {"gpu_id": "0,1"},
        {"eval_args": {"split": {"TS": [0.8, 0.1, 0.1]}}},
        {"benchmark_filename": None},
        {"learner": "SGD"},
        *({"item_inter_num_interval": i} for i in ("[1e0,inf)", "(0, 2];[.5,Infinity)", "[+0,inf]", [0, 100], None)),
        {"loss_type": "BPR"},
        {"hidden_dropout_prob": 0},
    ],
)
def test_what_recbole_takes_is_taken(toy: dict[str, Any], settings: dict[str, Any]) -> None:
    assert LLMConfig("SASRec", config_dict={**toy, **settings})["topk"]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("SASRecc", "did you mean `SASRec`?"),
        ("sasrec", "did you mean `SASRec`?"),
        ("llmranker", "did you mean `LLMRanker`?"),
        ("Qqqq", "`recbole-llm ls` lists them."),
        ("Qqqq", ". A model of your own is recbole_llm/model/<lower-case name>.py and properties/model/<Name>.yaml"),
        ("foo.bar", "no such model"),
        ("../SASRec", "no such model"),
        ("__init__", "no such model"),
        ("xgboost", "decision trees"),
        ("FM", "it predicts clicks"),
        ("", "--model: name one"),
        (5, "--model=5: must be text, for example --model=LLMRanker."),
        (dict, "--model=<class 'dict'>: must be text, for example --model=LLMRanker. A model of your own is"),
    ],
)
def test_unknown_model(toy: dict[str, Any], name: Any, told: str) -> None:
    (problem,) = problems(name, **toy)
    assert told in problem and "--model" in problem


def test_all_at_once(toy: dict[str, Any]) -> None:
    wrong = {
        "loss": "XPO",
        "beta": -1,
        "few_short": 1,
        "topk": [0],
        "seed": -1,
        "metrics": ["AUC"],
        "eval_args": {"order": "RO", "mode": "uni0"},
        "item_text": "{titel}",
        "prompt": "none",
        "n_heads": 2,
    }
    told = problems("LLMRanker", **{**toy, **wrong})
    named = [
        "few_short",
        "n_heads",
        "loss",
        "beta",
        "seed",
        "eval_args",
        "eval_args",
        "metrics",
        "topk",
        "item_text",
        "prompt",
    ]
    assert [t[2:].split(":")[0].split("=")[0] for t in told] == named


def test_unknown_model_hides_nothing_else(toy: dict[str, Any]) -> None:
    toy["dataset"] = None
    told = problems("SASRecc", **toy, loss="XPO", seeed=3, n_heads=2)
    assert [t.split(":")[0].split("=")[0] for t in told] == ["--dataset", "--model", "--seeed", "--loss"]


def test_what_recbole_refuses_is_told(toy: dict[str, Any]) -> None:
    (told,) = problems("SASRec", **toy, train_neg_sample_args={"distribution": "uniform"})
    assert "RecBole refuses these settings" in told and "train_neg_sample_args" in told


def test_use_gpu_is_obeyed(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole lists the key and does not read it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for use, device in ((True, "cuda"), (False, "cpu")):
        assert LLMConfig("Pop", config_dict={**toy, "gpu_id": "0", "use_gpu": use})["device"].type == device


def test_none_is_a_choice_on_the_command_line(tiny: dict[str, Any]) -> None:
    """``--finetune=none --encoder=none`` arrive as empty values, as ``--eval_users=none`` does."""
    given = {key: parse_value("none") for key in ("finetune", "encoder", "eval_users")}
    config = LLMConfig(config_dict={**tiny, **given})
    assert (config["finetune"], config["encoder"], config["eval_users"]) == ("none", "none", None)


def test_recbole_does_not_slow_autograd_down() -> None:
    """One of its models turns torch's anomaly detection on where it is imported; a fresh process imports it."""
    code = (
        "import recbole_llm, sys, torch; from recbole_llm.model import model_class; model_class('SASRec');"
        "print('recbole.model.sequential_recommender.sine' in sys.modules, torch.is_anomaly_enabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PROPERTIES.parent, check=True
    )
    assert done.stdout.split() == ["True", "False"]


def test_token_budget_follows_the_device(toy: dict[str, Any]) -> None:
    """And a number stays; RecBole's models have none."""
    assert LLMConfig("LLMRanker", config_dict=toy)["token_budget"] == 2048
    assert LLMConfig("LLMRanker", config_dict={**toy, "token_budget": 100})["token_budget"] == 100
    assert LLMConfig("SASRec", config_dict=toy)["token_budget"] is None
    for wrong in ("most", 63, 2048.0):
        with pytest.raises(ConfigError, match="token_budget.*must be a whole number >= 64, or auto"):
            LLMConfig("LLMRanker", config_dict={**toy, "token_budget": wrong})


def test_a_flag_changes_of_eval_args_what_it_names(toy: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("eval_args: {split: {TS: [0.8, 0.1, 0.1]}, mode: {valid: uni9, test: uni9}}")
    given = {key: value for key, value in toy.items() if key != "eval_args"}
    config = LLMConfig("Pop", None, [str(file)], {**given, "eval_args": {"mode": {"test": "full"}}})
    assert config["eval_args"]["split"] == {"TS": [0.8, 0.1, 0.1]}
    assert config["eval_args"]["mode"] == {"valid": "uni9", "test": "full"}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"eval_args": "uni19"}, "--eval_args='uni19': must be a table"),
        ({"TIME_FIELD": [1]}, "--TIME_FIELD=[1]"),
        (
            {"eval_args": {"mode": {"valid": "uni9", "test": "full"}}, "full_ranking": "exact",
             "rerank_candidates": True, "rerank_weight": 0.5},
            "--rerank_weight=0.5: the test is not re-ranked",
        ),
        (
            {"prompt": "pair", "rerank_candidates": True, "eval_args": {"mode": {"valid": "uni1", "test": "uni1"}}},
            "--rerank_candidates: a pair prompt's LLM ranks the only two candidates",
        ),
    ],
)  # fmt: skip
def test_what_an_llm_cannot_be_asked(tiny: dict[str, Any], given: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as error:
        LLMConfig(config_dict={**tiny, **given})
    assert told in str(error.value)
