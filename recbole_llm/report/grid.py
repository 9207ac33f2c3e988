"""Every run of a comparison: models x data sets x few-shot sizes x modes x seeds, checked before the first one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.files import content_hash
from recbole_llm.recommender import check_recommenders
from recbole_llm.report.entries import Entry, Options
from recbole_llm.run_folder import run_folder_of
from recbole_llm.settings import laid_over
from recbole_llm.transfer import eval_config_of

# Two models whose values of these differ are never asked the same.
SHARED = (
    "dataset",
    "data_path",
    "eval_args",
    "next_items",
    "eval_users",
    "candidate_seed",
    "mask_history",
    "liked_only",
    "rating_threshold",
    "min_disliked",
    "disjoint_users",
    "encoder",
    "look_alikes",
    "TIME_FIELD",
    "USER_ID_FIELD",
    "ITEM_ID_FIELD",
    "user_inter_num_interval",
    "item_inter_num_interval",
    "val_interval",
    "rm_dup_inter",
)


@dataclass(frozen=True)
class Setting:
    """What the lines of one table share: the value of each axis, None where the runs' own settings say it.

    ``few_shot`` is None for all users too; ``few_shot_given`` tells them apart.
    """

    dataset: str | None
    few_shot: int | None
    few_shot_given: bool
    mode: str | None

    def told(self) -> str:
        """The values of the axes in words, those not given left out."""
        users = "all training users" if self.few_shot is None else f"{self.few_shot} training users"
        parts = [self.dataset, users if self.few_shot_given else None, self.mode]
        return ", ".join(p for p in parts if p)


@dataclass(frozen=True)
class Cell:
    """One run: an entry in a setting, with a seed (None = as its settings have it)."""

    entry: Entry
    setting: Setting
    seed: int | None
    settings: dict[str, Any]
    config: LLMConfig

    @property
    def label(self) -> str:
        """The entry, the setting and the seed, as a log names them."""
        seed = "" if self.seed is None else f"seed {self.seed}"
        return " · ".join(p for p in (self.entry.label, self.asked(), seed) if p)

    def asked(self) -> str:
        """The setting in words, with the entry's own training users where it names them."""
        own = self.config["few_shot"] if self.setting.few_shot_given else self.setting.few_shot
        return replace(self.setting, few_shot=own).told()

    @cached_property
    def folder(self) -> Path:
        """Where the run lands."""
        return run_folder_of(self.config)


def settings_of(options: Options, dataset: str | None) -> list[Setting]:
    """The settings in the order of the tables; ``dataset`` is the one that the runs' own settings name."""
    few_shots = options.few_shots or (None,)
    return [
        Setting(name, few_shot, options.few_shots is not None, mode)
        for name in options.datasets or (dataset,)
        for few_shot in few_shots
        for mode in options.modes or (None,)
    ]


def cells(
    entries: Iterable[Entry],
    options: Options,
    shared: dict[str, Any],
    dataset: str | None = None,
    chosen: dict[tuple[str, Setting], dict[str, Any]] | None = None,
) -> list[Cell]:
    """All runs, every configuration checked, those of one table after each other.

    Args:
        shared: settings of all runs; an entry's win over ``per_model``, which wins over these.
        chosen: (label, setting) -> tuned settings, which win over all.

    Raises:
        ConfigError: what is wrong with all of them together.
    """
    entries, found = list(entries), []
    problems: dict[str, list[str]] = {}
    unlike: list[str] = []
    for setting in settings_of(options, dataset):
        asked = {}
        for entry in entries:
            own = laid_over((options.per_model or {}).get(entry.model, {}), entry.settings)
            own |= (chosen or {}).get((entry.label, setting), {})
            # A seed of its own is one run, and counts as one.
            for seed in (own["seed"],) if "seed" in own else options.seeds or (None,):
                mine = laid_over(_of_axes(shared, setting, seed), own)
                try:
                    config = LLMConfig(entry.model, mine.get("dataset", setting.dataset), None, mine)
                    check_recommenders(config)
                    of_test = eval_config_of(config)
                    asked[entry.label] = {key: of_test[key] for key in SHARED}
                    if config["few_shot"]:  # the seed says who is trained on
                        asked[entry.label]["few_shot_seed"] = config["few_shot_seed"]
                    _check_mode(setting, of_test)
                except ConfigError as error:
                    for problem in error.problems:
                        problems.setdefault(problem, []).append(entry.label)
                    continue
                found.append(Cell(entry, setting, seed, mine, config))
        unlike += [p for p in _unlike(asked) if p not in unlike]
    told = [
        p if set(labels) == {e.label for e in entries} else f"{', '.join(dict.fromkeys(labels))}: {p}"
        for p, labels in problems.items()
    ]
    if told or unlike:
        raise ConfigError(told + unlike)
    return found


def _of_axes(shared: dict[str, Any], setting: Setting, seed: int | None) -> dict[str, Any]:
    mine = dict(shared)
    if setting.few_shot_given:
        mine["few_shot"] = setting.few_shot
    if seed is not None:
        mine["seed"] = seed
    if setting.mode is not None:
        mine = laid_over(mine, {"eval_args": {"mode": {"test": setting.mode}}})
    return mine


def _check_mode(setting: Setting, asked: LLMConfig) -> None:
    """Raises ConfigError where a run would be asked otherwise than its table says."""
    mode = asked["eval_args"]["mode"]["test"]
    if setting.mode not in (None, mode):
        told = f"--modes={setting.mode}: eval_args of the model's own (or of --eval_config) ask {mode}"
        raise ConfigError([f"{told}; leave out its mode."])


def _unlike(asked: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What the models of one table are asked differently, or are trained on other users."""
    for key in (*SHARED, "few_shot_seed"):
        values = {label: settings[key] for label, settings in asked.items() if key in settings}
        if len(set(map(content_hash, values.values()))) > 1:
            each = "; ".join(f"{label} {value!r}" for label, value in values.items())
            yield f"--{key}: must be the same for every model of a comparison: {each}."
