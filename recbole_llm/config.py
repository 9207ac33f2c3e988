"""RecBole's Config with our properties, every key checked, and nothing evaluated as code."""

from __future__ import annotations

import copy
from typing import Any

import yaml
from recbole.config import Config
from recbole.utils import ModelType

from recbole_llm import checks, compat, distributed, eval_checks, keys
from recbole_llm.data.atomic import dataset_folder, inter_columns
from recbole_llm.data_checks import READ_WITH, wrong_data
from recbole_llm.errors import ConfigError, problems_of
from recbole_llm.key_checks import file_name
from recbole_llm.model import YOUR_OWN, model_class
from recbole_llm.processes import world_size
from recbole_llm.settings import PROPERTIES, SettingsLoader, at_home, laid_over, read_yamls
from recbole_llm.wrong_keys import unknown_keys, wrong_values


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

    def __init__(
        self,
        model: str | None = None,
        dataset: str | None = None,
        config_file_list: list[str] | None = None,
        config_dict: dict[str, Any] | None = None,
    ) -> None:
        try:
            super().__init__(model, dataset, config_file_list, config_dict)
        except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, RuntimeError) as error:
            told = f"{type(error).__name__}: {error}"
            raise ConfigError([f"RecBole refuses these settings ({told}); mend what it names."]) from error

    properties = PROPERTIES

    def compatibility_settings(self) -> None:
        """RecBole's version fails on numpy 2."""
        compat.add_numpy_aliases()

    def _build_yaml_loader(self) -> type[yaml.SafeLoader]:
        return SettingsLoader

    def _load_config_files(self, file_list: list[str] | None) -> dict[str, Any]:
        return read_yamls(file_list or [])

    def _load_variable_config_dict(self, config_dict: dict[str, Any] | None) -> dict[str, Any]:
        # RecBole adds lists to lists; it knows a tuple of GPUs alone.
        given = at_home(copy.deepcopy(config_dict or {}))  # RecBole fills tables in place
        given |= {k: "none" for k in keys.NONE_IS_A_CHOICE if k in given and given[k] is None}
        return {k: list(v) if isinstance(v, tuple) and k != "gpu_id" else v for k, v in given.items()}

    def _merge_external_config_dict(self) -> None:
        # RecBole's, but what stands in a file under eval_args is not lost to a flag that names another part of it.
        self.external_config_dict = laid_over(self.file_config_dict, self.variable_config_dict)

    def _load_cmd_line(self) -> dict[str, Any]:
        return {}

    def _get_model_and_dataset(self, model: str | None, dataset: str | None) -> tuple[str, type, str]:
        model = model or self.external_config_dict.get("model")
        dataset = dataset or self.external_config_dict.get("dataset")
        problems, found = [], None
        for key, value, example in (("model", model, "LLMRanker"), ("dataset", dataset, "ml-100k")):
            if not value:
                problems.append(f"--{key}: name one, for example --{key}={example}.")
            elif not isinstance(value, str):
                own = f" {YOUR_OWN}." if key == "model" and isinstance(value, type) else ""
                problems.append(f"--{key}={value!r}: must be text, for example --{key}={example}.{own}")
            elif key == "dataset" and (told := file_name(value)):
                folder = "--data_path is the folder that holds the data set's folder"
                problems.append(f"--dataset={value!r}: {told}; {folder}.")
        if isinstance(model, str) and model:
            try:
                found = model_class(model)
            except ConfigError as error:
                problems += error.problems
        if problems:
            raise ConfigError(problems + self._wrong_for_any_model())
        return super()._get_model_and_dataset(found, dataset)

    def _load_internal_config_dict(self, model: str, model_class: type, dataset: str) -> None:
        super()._load_internal_config_dict(model, model_class, dataset)
        self.recbole_defaults = dict(self.internal_config_dict)
        for name in ("overall", f"model/{model}", f"dataset/{dataset}"):
            if (PROPERTIES / f"{name}.yaml").is_file():
                self._update_internal_config_dict(PROPERTIES / f"{name}.yaml")

    def _get_final_config_dict(self) -> dict[str, Any]:
        self._check_keys()
        final = super()._get_final_config_dict()
        final["eval_args"] = self._eval_args()
        # A model that scores all items in its loss draws no negatives: RecBole's default makes it refuse.
        if (
            final.get("loss_type") == "CE"
            and "train_neg_sample_args" not in self.external_config_dict
            and final["MODEL_TYPE"] == ModelType.SEQUENTIAL
        ):
            final["train_neg_sample_args"] = None
        if "load_col" not in self.external_config_dict:
            final["load_col"] = self._load_col(final)
        return final

    def _load_col(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What is read where ``load_col`` is not given: the protocol's columns, and what RecBole names for the model (a
        graph, vectors of entities, features); of a file of ``unload_col`` all columns but those.

        Raises:
            UserError: as ``inter_columns``.
        """
        of_model = dict(settings["load_col"])
        features = settings.get("selected_features")
        if isinstance(features, list):
            known = of_model.get("item", [settings["ITEM_ID_FIELD"]])
            of_model["item"] = list(dict.fromkeys([*known, *features]))
        found = of_model | {"inter": inter_columns(self._in_its_folder(settings), self.dataset)}
        return found | dict.fromkeys(settings["unload_col"] or {}, "*")

    def _init_device(self) -> None:
        """RecBole's, on the GPU of this process where there are several; then what ``auto`` means on the device."""
        settings = self.final_config_dict
        named = settings["gpu_id"]
        if world_size() > 1 and "gpu_id" not in self.external_config_dict:
            settings["gpu_id"] = distributed.visible_gpus()
        if settings["use_gpu"] is False:  # which RecBole does not read
            settings["gpu_id"] = ""
        super()._init_device()
        if world_size() > 1:
            # What names the run is as in a single process.
            settings |= {"gpu_id": str(named), "device": distributed.own_device(settings["device"])}
        if not distributed.is_first():
            settings |= {"show_progress": False, "log_wandb": False}
        if self.final_config_dict.get("token_budget") == "auto":
            self.final_config_dict["token_budget"] = keys.TOKEN_BUDGET[self.final_config_dict["device"].type]

    def _in_its_folder(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings with ``data_path`` as RecBole will change it: the data set's own folder."""
        return {**settings, "data_path": str(dataset_folder(settings["data_path"], self.dataset))}

    def _set_eval_neg_sample_args(self, phase: str) -> None:
        """RecBole's, which does not know lowN; its sampler draws nothing here, the rows are frozen by ours."""
        mode = self.final_config_dict["eval_args"]["mode"][phase]
        if mode.startswith("low"):
            args = {"distribution": "uniform", "sample_num": int(mode[3:])}
            self.final_config_dict[f"{phase}_neg_sample_args"] = args
        else:
            super()._set_eval_neg_sample_args(phase)

    def _eval_args(self) -> dict[str, Any]:
        """RecBole's four entries; what the user leaves out stays, in ``mode`` as well."""
        default = {"eval_args": self.internal_config_dict["eval_args"]}
        merged: dict[str, Any] = laid_over(default, self.external_config_dict)["eval_args"]
        return merged

    def _given(self) -> dict[str, Any]:
        return {k: v for k, v in self.external_config_dict.items() if k not in ("model", "dataset")}

    def _known(self) -> set[str]:
        """Keys that every model reads."""
        listed = {key for group in self.parameters.values() for key in group}
        return listed | checks.shared_keys(PROPERTIES) | keys.UNLISTED_KEYS | set(keys.PROTOCOL_KEYS)

    def _wrong_for_any_model(self) -> list[str]:
        """What is wrong whichever model is meant."""
        given, everyone = self._given(), checks.model_keys(PROPERTIES)
        problems = unknown_keys(given, self._known() | set(everyone), "", dict)
        return problems + wrong_values({k: v for k, v in given.items() if k in keys.CHECKS}, {})

    def known_keys(self) -> set[str]:
        """Keys that this model or its protocol reads."""
        own = set(self.internal_config_dict) - {"MODEL_TYPE"}  # it follows from the model
        return self._known() | own | keys.UNLISTED_MODEL_KEYS.get(self.model, set())

    def _check_keys(self) -> None:
        """Every unknown key, wrong type and wrong range at once."""
        given, known = self._given(), self.known_keys()
        problems = unknown_keys(given, known, self.model, lambda: checks.model_keys(PROPERTIES))
        read = {k: v for k, v in given.items() if k in known}
        problems += wrong_values(read, self.recbole_defaults)
        settings = self.internal_config_dict | read
        if isinstance(settings["eval_args"], dict):
            settings["eval_args"] = self._eval_args()
        problems += eval_checks.wrong_evaluation(settings)
        problems += checks.wrong_together(settings)
        problems += checks.wrong_model(self.model, self.model_class.type, settings)
        if not wrong_values({k: settings[k] for k in READ_WITH if k in settings}, {}):
            folder = self._in_its_folder(settings)
            if "load_col" not in given and not problems_of(lambda: inter_columns(folder, self.dataset)):
                folder["load_col"] = self._load_col(settings)
            problems += wrong_data(folder, self.dataset, PROPERTIES)
        if problems:
            raise ConfigError(problems)
