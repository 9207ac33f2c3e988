"""RecBole's Config with our properties, every key checked, and nothing evaluated as code."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml
from recbole.config import Config
from recbole.utils import ModelType

from recbole_llm import compat, keys
from recbole_llm.data.atomic import inter_columns
from recbole_llm.errors import ConfigError
from recbole_llm.model import model_class

HERE = Path(__file__).resolve().parent
PROPERTIES = next(p for p in (HERE / "properties", HERE.parent / "properties") if p.is_dir())
METRIC = re.compile(r"\w+@\d+|GAUC", re.IGNORECASE)


def parse_value(text: str) -> Any:
    """A value as typed on the command line: a Python literal, true/false/none in any case, else text. Never run as code.

    >>> parse_value("1e-3"), parse_value("[1, 5]"), parse_value("True"), parse_value("none"), parse_value("{title}")
    (0.001, [1, 5], True, None, '{title}')
    """
    named = {"true": True, "false": False, "none": None, "null": None, "~": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return text if isinstance(value, (set, bytes, complex)) or value is ... else value


def read_yaml(file: str) -> dict[str, Any]:
    """Settings of a YAML file; only plain values, no object tags.

    Raises:
        ConfigError: no such file, or not plain ``key: value`` YAML.
    """
    try:
        loaded = yaml.load(Path(file).read_text(encoding="utf-8"), Loader=SettingsLoader) or {}
    except OSError as error:
        raise ConfigError([f"--config_files: cannot read `{file}` ({error.strerror})."]) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError([f"--config_files: `{file}` is not plain YAML: {error}"]) from None
    if not isinstance(loaded, dict):
        raise ConfigError([f"--config_files: `{file}` must hold `key: value` lines, not {type(loaded).__name__}."])
    return {str(key): value for key, value in loaded.items()}


class SettingsLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-4`` as text; RecBole's users write it as a number."""


SettingsLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


class LLMConfig(Config):
    """RecBole's Config; ours differs in four ways.

    Our ``properties/`` come after RecBole's defaults and before the user's settings. Strings are never run as
    code (RecBole ``eval``s them) and ``sys.argv`` is not read: the command line passes ``config_dict``. Every
    key and value is checked at once, before any work. ``eval_args`` given in part keeps the other parts.

    Args:
        model: RecBole's or our model name; or the ``model`` key of a file or of ``config_dict``.
        dataset: data set name, likewise.
        config_file_list: YAML files, later ones win.
        config_dict: settings that win over files.

    Raises:
        ConfigError: names every wrong key at once.
    """

    def __init__(self, model: str | None = None, dataset: str | None = None,
                 config_file_list: list[str] | None = None, config_dict: dict[str, Any] | None = None) -> None:
        super().__init__(model=model, dataset=dataset, config_file_list=config_file_list, config_dict=config_dict)

    properties = PROPERTIES

    def compatibility_settings(self) -> None:
        """RecBole's version fails on numpy 2."""
        compat.add_numpy_aliases()

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return SettingsLoader

    def _load_config_files(self, file_list: list[str] | None) -> dict[str, Any]:
        return {key: value for file in file_list or [] for key, value in read_yaml(file).items()}

    def _load_variable_config_dict(self, config_dict: dict[str, Any] | None) -> dict[str, Any]:
        return dict(config_dict or {})

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple[str, type, str]:
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        problems = [f"--{key}: name one, for example --{key}={example}." for key, value, example in
                    (("model", model, "LLMRanker"), ("dataset", dataset, "ml-100k")) if not value]
        if problems:
            raise ConfigError(problems)
        return super()._get_model_and_dataset(model_class(model), dataset)

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self.recbole_defaults = dict(self.internal_config_dict)
        for name in ("overall", f"model/{model}", f"dataset/{dataset}"):
            if (PROPERTIES / f"{name}.yaml").is_file():
                self._update_internal_config_dict(PROPERTIES / f"{name}.yaml")

    def _get_final_config_dict(self) -> dict[str, Any]:
        self._check_keys()
        final = super()._get_final_config_dict()
        given = self.external_config_dict.get("eval_args", {})
        final["eval_args"] = {**self.internal_config_dict["eval_args"], **given}
        # A model that scores all items at once in its loss draws no negatives: RecBole's default makes it refuse.
        if final.get("loss_type") == "CE" and "train_neg_sample_args" not in self.external_config_dict \
                and final["MODEL_TYPE"] == ModelType.SEQUENTIAL:
            final["train_neg_sample_args"] = None
        if "load_col" not in self.external_config_dict and not (PROPERTIES / f"dataset/{self.dataset}.yaml").is_file():
            final["load_col"] = {"inter": inter_columns(final, self.dataset)}
        return final

    def _check_keys(self) -> None:
        """Every unknown key, wrong type and wrong range at once."""
        given = {k: v for k, v in self.external_config_dict.items() if k not in ("model", "dataset")}
        listed = {key for group in self.parameters.values() for key in group}
        known = set(self.internal_config_dict) | listed | keys.UNLISTED_RECBOLE_KEYS | set(keys.PROTOCOL_KEYS)
        problems = keys.unknown_keys(given, known)
        problems += keys.wrong_values({k: v for k, v in given.items() if k in known}, self.recbole_defaults)
        problems += _wrong_evaluation({**self.internal_config_dict, **given})
        problems += _wrong_together({**self.internal_config_dict, **given})
        if problems:
            raise ConfigError(problems)


def _wrong_evaluation(settings: dict[str, Any]) -> list[str]:
    """What is wrong with the evaluation settings."""
    problems = []
    eval_args = settings["eval_args"]
    if not isinstance(eval_args, dict):
        return [f"--eval_args={eval_args!r}: must be a table, for example \"{{'mode': 'uni99'}}\"."]
    if eval_args.get("order", "TO") != "TO":
        problems.append(f"--eval_args: order={eval_args['order']} has no next item to rank; use order TO.")
    modes = eval_args.get("mode", "full")
    for mode in modes.values() if isinstance(modes, dict) else [modes]:
        if not re.fullmatch(r"full|(uni|pop)[1-9]\d*", str(mode)):
            problems.append(f"--eval_args: mode {mode!r} must be full, uniN or popN (N whole, >= 1), for example uni99.")
    if settings.get("benchmark_filename"):
        problems.append("--benchmark_filename: pre-split files are not supported; give one .inter file.")
    topk = settings["topk"] if isinstance(settings["topk"], (list, tuple)) else [settings["topk"]]
    if not topk or any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in topk):
        problems.append(f"--topk={settings['topk']!r}: must be a list of whole numbers >= 1.")
    if not METRIC.fullmatch(str(settings["valid_metric"])):
        problems.append(f"--valid_metric={settings['valid_metric']!r}: must look like NDCG@10.")
    elif "@" in settings["valid_metric"] and int(settings["valid_metric"].split("@")[1]) not in topk:
        problems.append(f"--valid_metric={settings['valid_metric']}: its K is not in --topk={list(topk)}.")
    return problems


def _wrong_together(settings: dict[str, Any]) -> list[str]:
    """Settings that are fine alone and wrong together."""
    problems = []
    loss, rejected_num = settings.get("loss"), settings.get("rejected_num")
    if loss in keys.LOSSES and loss != "SFT" and rejected_num == 0:
        problems.append(f"--rejected_num=0: {loss} needs at least one rejected item a pair; set --rejected_num=3, or --loss=SFT.")
    if loss == "DPO" and isinstance(rejected_num, int) and rejected_num > 1:
        problems.append(f"--rejected_num={rejected_num}: DPO compares one pair; set --rejected_num=1, or --loss=DMPO or SDPO.")
    if settings.get("quantization") and settings.get("finetune") == "full":
        problems.append("--finetune=full: 4-bit weights cannot be trained; use --finetune=lora, or drop --quantization.")
    if loss != "SFT" and settings.get("finetune") == "none":
        problems.append(f"--finetune=none: {loss} trains weights; use --finetune=lora, or --loss=SFT for a zero-shot ranking.")
    return problems if loss else []
