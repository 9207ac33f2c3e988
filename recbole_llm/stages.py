"""Which stages a run has, what each trains on, and where its best epoch is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from recbole.config import Config

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.data.rejected import Policy, RejectedItems, Sources
from recbole_llm.data.template import load_template
from recbole_llm.data.windows import training_windows
from recbole_llm.environment import versions
from recbole_llm.files import content_hash
from recbole_llm.harm import title_vectors
from recbole_llm.llm.identity import NAMES_STAGES, identity, local_weights, prompt_hash
from recbole_llm.llm.types import LLM
from recbole_llm.oracle import train_oracle
from recbole_llm.read_keys import SFT_KEYS, needed_recommenders, reranks, unread
from recbole_llm.recommender import train_recommender
from recbole_llm.run_folder import NOT_IN_HASH, data_hash

SELECTION_KEYS = ("score_norm", "stopping_step", "valid_metric", "metric_decimal_place")  # where validation selects
# Where validation selects epochs by a re-ranking.
RERANK_KEYS = (
    "rerank_model",
    "rerank_topk",
    "rerank_candidates",
    "rerank_weight",
    "full_ranking",
    "recommender_config",
    "worker",
)
# What names a stage under some settings alone: `_sometimes`, and of a preference stage its folder, say when.
SOMETIMES = {*SELECTION_KEYS, *RERANK_KEYS, "attention", "token_budget", "encoder"}
ASKS_TEST = {"eval_users", "metrics", "topk", "generate_users", "eval_dataset", "eval_config", "look_alikes"}
ASKS_TEST |= {"eval_args", "test_neg_sample_args", "mask_history"}  # which say how validation asks too: its digest
LAST_BITS = {"gradient_checkpointing", "fast_linears"}  # what they move no two machines share

LentPolicy = Callable[[], AbstractContextManager[Policy]]  # log-probs by the policy as it is then


@dataclass(frozen=True)
class Stage:
    """One training stage: ``loss`` over ``windows``, its best epoch kept in ``folder``; ``facts`` go to its record.

    Args:
        make: gives the windows and facts. It is asked when the first of them is read: never, where the stage is found
            finished.
    """

    loss: str
    epochs: int
    learning_rate: float
    folder: Path
    make: Callable[[], tuple[list[Window], dict[str, Any]]]

    @cached_property
    def _made(self) -> tuple[list[Window], dict[str, Any]]:
        return self.make()

    @property
    def windows(self) -> list[Window]:
        """What the stage trains on."""
        return self._made[0]

    @property
    def facts(self) -> dict[str, Any]:
        """What made them."""
        return self._made[1]


def stages(
    config: Config,
    protocol: Protocol,
    prompt: Prompt | PairPrompt,
    *,
    context: int,
    base: str,
    policy: LentPolicy,
) -> Iterator[Stage]:
    """SFT (``epochs`` > 0), then the preference loss (``preference_epochs`` > 0); none where nothing is trained.

    The pairs of the preference stage are made when they are asked for, by the policy as it is then.

    Args:
        context: tokens of a prompt with its answer at most.
        base: fingerprint of the base LLM and the item texts, which name a stage together with the settings.
        policy: lends the log-probs of windows by the policy as it is then.
    """
    if config["finetune"] == "none":
        return
    if config["epochs"] > 0:
        windows = sft_windows(config, protocol, prompt, context)
        folder = sft_folder(config, protocol, base, windows)
        yield Stage("SFT", config["epochs"], config["learning_rate"], folder, lambda: (windows, {}))
    if _prefers(config):
        folder, rate = preference_folder(config, protocol, base), config["preference_learning_rate"]
        make = partial(preference_windows, config, protocol, prompt, context, policy)
        yield Stage(config["loss"], config["preference_epochs"], rate, folder, make)


def sft_windows(
    config: Config,
    protocol: Protocol,
    prompt: Prompt | PairPrompt,
    context: int,
    users: Collection[int] | None = None,
) -> list[Window]:
    """What SFT trains on, of some users or all; a prompt that lists two candidates needs one rejected item for each."""
    windows = _windows(config, protocol, prompt, context, users, last=config["sft_positions"])
    if not isinstance(prompt, PairPrompt):
        return windows
    strategy = "low_rating" if "low_rating" in config["rejected"].split("+") else "uniform"
    return RejectedItems(config, protocol, Sources(), strategies=(strategy,), number=1).fill(windows)


def _windows(
    config: Config,
    protocol: Protocol,
    prompt: Prompt | PairPrompt,
    context: int,
    users: Collection[int] | None,
    *,
    last: int,
    chosen: int = 1,
) -> list[Window]:
    sequences = protocol.training_sequences()
    kept = sequences if users is None else {u: sequences[u] for u in users}
    history = config["MAX_ITEM_LIST_LENGTH"]
    return training_windows(kept, prompt, history=history, last=last, most_tokens=context, chosen=chosen)


def _pair_windows(
    config: Config,
    protocol: Protocol,
    prompt: Prompt | PairPrompt,
    context: int,
    users: Collection[int] | None = None,
) -> list[Window]:
    """What the preference stage chooses, with nothing rejected yet."""
    chosen = config["chosen_num"] if config["loss"] == "MultDPO" else 1
    last = config["preference_positions"]
    return _windows(config, protocol, prompt, context, users, last=last, chosen=chosen)


def check_pairs(config: Config, protocol: Protocol, prompt: Prompt | PairPrompt, context: int) -> None:
    """What the preference stage would tell only after SFT: nothing to choose, or too few items to reject.

    Raises:
        UserError: names the key.
    """
    if _prefers(config):
        RejectedItems(config, protocol, Sources()).usable(_pair_windows(config, protocol, prompt, context))


def _prefers(config: Config) -> bool:
    """Whether there is a preference stage."""
    return config["finetune"] != "none" and config["loss"] != "SFT" and config["preference_epochs"] > 0


def preference_windows(
    config: Config,
    protocol: Protocol,
    prompt: Prompt | PairPrompt,
    context: int,
    policy: LentPolicy,
    users: Collection[int] | None = None,
) -> tuple[list[Window], dict[str, Any]]:
    """The pairs of the preference stage, with RosePO's epsilon where an oracle gives it, and what made them.

    Args:
        policy: lends the log-probs of windows by the SFT policy, where a strategy asks it.
    """
    windows = _pair_windows(config, protocol, prompt, context, users)
    strategies = config["rejected"].split("+")
    models = [train_recommender(config, config["from_model"])] if "from_model" in strategies else []
    vectors = title_vectors(config, protocol.dataset) if "semantic" in strategies else None
    with policy() if "self_hard" in strategies else nullcontext() as borrowed:
        sources = Sources(policy=borrowed, vectors=vectors, recommend=models[0].scores if models else None)
        windows = RejectedItems(config, protocol, sources).fill(windows, config["show_progress"])
    facts: dict[str, Any] = {}
    if config["loss"] == "RosePO" and config["smoothing"] == "oracle":
        oracle = train_oracle(config, protocol)
        models += oracle.judges
        smoothing = oracle.smoothing(windows)
        mean = [e for window in smoothing for target in window for e in target]
        facts["oracle"] = {**asdict(oracle.calibration), "mean_epsilon": sum(mean) / len(mean)}
        windows = [replace(w, smoothing=s) for w, s in zip(windows, smoothing, strict=True)]
    return windows, {**facts, "recommenders": [model.told for model in models]}


def base_hash(llm: LLM, texts: list[str], prompt: Prompt | PairPrompt) -> str:
    """Fingerprint of the base weights, their type and configuration, and of the item texts, as letters and tokens."""
    known = identity(llm)
    return content_hash([llm.dtype, texts, prompt_hash(prompt), *(known[part] for part in NAMES_STAGES)])


def sft_folder(config: Config, protocol: Protocol, base: str, windows: list[Window]) -> Path:
    """``<checkpoint_dir>/stages/SFT-<hash of everything that determines the stage>``."""
    named_by = {*SFT_KEYS, *_sometimes(config, protocol)} - unread(config.final_config_dict)
    settings = {key: _as_trained(config, key) for key in named_by}
    selected_on = None
    if config["eval_step"]:  # histories too: settings that the stage does not read may change them
        selected_on = content_hash([protocol.valid.digest, [history.tolist() for history in protocol.valid.history]])
    return _folder("SFT", config, settings, base, content_hash([w.told() for w in windows]), selected_on)


def preference_folder(config: Config, protocol: Protocol, base: str) -> Path:
    """``<checkpoint_dir>/stages/<loss>-<hash>`` of all that is read but how the trained model is asked."""
    read, others = _sometimes(config, protocol), [protocol.valid.digest]
    if {"oracle_model", "from_model"} & set(needed_recommenders(config)):  # which validate, whether or not we do
        read += ["recommender_config", "worker", "valid_metric", "metric_decimal_place"]
        others.append(config["device"].type)  # a GPU trains another recommender
    chooses_by_text = "semantic" in config["rejected"].split("+")
    read += ["encoder"] if chooses_by_text else []
    left_out = NOT_IN_HASH | ASKS_TEST | LAST_BITS | unread(config.final_config_dict) | (SOMETIMES - set(read))
    settings = {key: _as_trained(config, key) for key in config.final_config_dict if key not in left_out}
    if chooses_by_text:
        settings["encoder weights"] = local_weights(config["encoder"])
    users = {int(user): list(map(int, items)) for user, items in protocol.training_sequences().items()}
    return _folder(config["loss"], config, settings, base, users, *others)


def _folder(name: str, config: Config, settings: dict[str, Any], *others: Any) -> Path:
    """``<checkpoint_dir>/stages/<name>-<hash>`` of settings and others, data, prompt and code."""
    template = load_template(config["prompt"], config.properties)  # its name may be that of a file that changes
    what = [settings | {"eval_args": split_of(config)}, data_hash(config), template, versions(), *others]
    return Path(config["checkpoint_dir"]) / "stages" / f"{name}-{content_hash(what)[:12]}"


def split_of(config: Config) -> dict[str, Any]:
    """``eval_args`` without how rows are asked: the test's way trains nothing, validation's is in its rows' digest."""
    return {key: value for key, value in config["eval_args"].items() if key != "mode"}


def _as_trained(config: Config, key: str) -> Any:
    """A setting while the model is trained: the share of a mixture that is chosen in the end is 1 until then."""
    return 1.0 if key == "rerank_weight" and config[key] == "auto" else config[key]


def _sometimes(config: Config, protocol: Protocol) -> list[str]:
    """Keys that determine what a stage trains under some settings alone.

    ``exact`` and ``exact_topk`` select the same epoch. Back ends and passes move the last bits, which no two machines
    share; under dropout they move what is dropped.
    """
    keys = list(SELECTION_KEYS) if config["eval_step"] else []
    keys += RERANK_KEYS if config["eval_step"] and reranks(config, protocol.valid.mode) else []
    drops = config["finetune"] == "lora" and config["lora_dropout"] > 0
    return keys + (["attention", "token_budget"] if drops else [])
