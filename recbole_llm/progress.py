"""How long a comparison will still take: a guess before the first run, corrected by every run that ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from recbole.config import Config
from recbole.utils import ModelType
from tqdm import tqdm as plain_tqdm

from recbole_llm.data.atomic import atomic_file, read_header, read_items
from recbole_llm.dpo4rec.setting_checks import alignment_rounds
from recbole_llm.files import stamp
from recbole_llm.read_keys import SFT_KEYS, answers_of, reranks

FLOPS_PER_TOKEN = 2 * 135e6  # one pass of the embedded model; others correct themselves after their first run
TOPK_ANSWERS = 100  # titles that a search for the best ten costs about as much as
PLANNED_SHOWN = 24
_current: WholeRun | None = None


class WholeRun:
    """The runs of a comparison and the time they are expected to take; says both, and what was finished before.

    Args:
        runs: label, configuration and folder of each, in order.
        jobs: how many run at a time. With one, each is done inside ``running``; else ``side_by_side`` tells that they
            have begun, and ``ended`` that one has ended, upon which the next begins.
    """

    def __init__(self, runs: Sequence[tuple[str, Config, Path]], jobs: int = 1) -> None:
        self.labels = [label for label, _, _ in runs]
        self.kinds = [_kind(config) for _, config, _ in runs]
        # LLM runs of the same users and seed may share the first one's SFT stage.
        first = {_sft(config): config for _, config, _ in reversed(runs) if _trains_llm(config)}
        folders = [folder for _, _, folder in runs]
        self.runs = len(set(folders))  # two labels may be one run
        self.seconds = [
            0.0
            if folder in folders[:i] or (folder / "result.json").is_file()
            else guessed_seconds(config, config is first.get(_sft(config)))
            for i, (_, config, folder) in enumerate(runs)
        ]
        self.scale = dict.fromkeys(self.kinds, 1.0)
        self.took, self.guessed = dict.fromkeys(self.kinds, 0.0), dict.fromkeys(self.kinds, 0.0)
        self.open = {i for i, seconds in enumerate(self.seconds) if seconds}
        self.todo, self.jobs = len(self.open), jobs
        self.began: dict[int, float] = {}  # runs that are on
        self._tell_plan()

    def _tell_plan(self) -> None:
        """One line a kind of run that is still to be done, and one for all."""
        at_once = f", {self.jobs} at a time" if self.jobs > 1 else ""
        print(
            f"{self.runs} runs, {self.runs - self.todo} finished before, about {told_time(self.left())} "
            f"in all{at_once} (a guess until the first runs end).",
            flush=True,
        )
        for i in sorted(self.open)[:PLANNED_SHOWN]:
            print(f"  to do: {self.labels[i]}, about {told_time(self.seconds[i])}", flush=True)
        if len(self.open) > PLANNED_SHOWN:
            print(f"  and {len(self.open) - PLANNED_SHOWN} more", flush=True)

    def left(self) -> float:
        """Seconds to the end of the last run."""
        now = time.monotonic()
        whole = {i: self.seconds[i] * self.scale[self.kinds[i]] for i in self.open}
        expected = [max(0.0, seconds - (now - self.began.get(i, now))) for i, seconds in whole.items()]
        return max(max(expected, default=0.0), sum(expected) / self.jobs)

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Around one run in this process: says which."""
        global _current
        self.began[number], _current = time.monotonic(), self
        place = self.todo - len(self.open) + 1
        print(
            f"\n[{place}/{self.todo}] {self.labels[number]}: whole comparison about {told_time(self.left())} left",
            flush=True,
        )
        try:
            yield
        finally:
            _current = None
            self.open.discard(number)

    def side_by_side(self) -> None:
        """As many runs as there may be are on."""
        for number in sorted(self.open - set(self.began))[: self.jobs - len(self.began)]:
            self.began[number] = time.monotonic()

    def learn(self, number: int) -> None:
        """A run is done: others of its kind take as much longer, or shorter, than was guessed.

        One that failed teaches nothing. The guess of one run counts as one that took so long: the first to end may have
        found its stages finished.
        """
        kind, began = self.kinds[number], self.began.pop(number, None)
        if began is None or not self.seconds[number]:
            return
        self.took[kind] += time.monotonic() - began
        self.guessed[kind] += self.seconds[number]
        one = median(s for s, other in zip(self.seconds, self.kinds, strict=True) if s and other == kind)
        self.scale[kind] = (self.took[kind] + one) / (self.guessed[kind] + one)

    def ended(self, number: int, error: str | None) -> None:
        """One of several runs at a time has ended: says so, and the next is on."""
        self.open.discard(number)
        if error is None:
            self.learn(number)
        self.began.pop(number, None)
        self.side_by_side()
        print(
            f"[{self.todo - len(self.open)}/{self.todo}] {self.labels[number]}: {'failed' if error else 'done'}; whole "
            f"comparison about {told_time(self.left())} left",
            flush=True,
        )


class tqdm(plain_tqdm):  # noqa: N801 - a drop-in
    """tqdm whose postfix also says when the whole comparison will end, and whose ETA no change of the clock moves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._time = time.monotonic  # tqdm's own is the wall clock
        self.start_t = self.last_print_t = self._time()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """As tqdm's, with the time left of all runs."""
        whole = f"all runs: {told_time(_current.left())} left" if _current else ""
        super().set_postfix_str(", ".join(x for x in (s, whole) if x), refresh=False)  # drawn with the next update


def told_time(seconds: float) -> str:
    """Seconds in words, whole minutes from fifty seconds on."""
    return f"{max(1, round(seconds / 60))} min" if seconds > 50 else f"{seconds:.0f} s"


def _kind(config: Config) -> str:
    if "recommender_model" in config:
        return "dpo4rec"
    return "llm" if "llm" in config else "trained" if config["MODEL_TYPE"] != ModelType.TRADITIONAL else "counted"


def _trains_llm(config: Config) -> bool:
    return _kind(config) == "llm" and config["finetune"] != "none"


def _sft(config: Config) -> str:
    """What runs have in common that share an SFT stage; of other models, nothing that any LLM has."""
    return str([config[key] for key in ("dataset", "few_shot", "sft_positions", *SFT_KEYS)]) if "llm" in config else ""


def guessed_seconds(config: Config, with_sft: bool = True) -> float:
    """Seconds that a configuration may take to train and to be asked. Rough on purpose: shapes times this machine's
    speed.

    Args:
        with_sft: whether it trains the SFT stage, or finds it.
    """
    sizes = _sizes(config)
    if _kind(config) == "counted":
        return 5.0
    length = config["MAX_ITEM_LIST_LENGTH"] if config["MODEL_TYPE"] == ModelType.SEQUENTIAL else 1
    # Early stopping ends most runs within some forty epochs.
    training = sizes["rows"] * min(config["epochs"], 40) * (2e-5 * length + 3e-6)
    if _kind(config) == "trained":
        return 10 + training
    if _kind(config) == "dpo4rec":
        return 10 + _dpo4rec_seconds(config, sizes, training)
    start, share = (2, 0.01) if config["llm"] == "tiny" else (10, 1)
    return start + share * _llm_tokens(config, sizes, with_sft) * FLOPS_PER_TOKEN / _machine_flops()


def _sizes(config: Config) -> dict[str, float]:
    file, separator = atomic_file(config.final_config_dict, config["dataset"], "inter"), config["field_separator"]
    rows, n_users = _counted(file.absolute(), separator, config["USER_ID_FIELD"], stamp(file))
    share = min(1.0, (config["few_shot"] or n_users) / n_users)
    return {
        "rows": rows * share,
        "users": n_users * share,
        "tested": min(config["eval_users"] or n_users, n_users),
    }


@lru_cache  # asked for each run and search of a comparison
def _counted(file: Path, separator: str, user_field: str, _: tuple[int, int]) -> tuple[int, int]:
    """Rows and users of a file, which is read again when its stamp is another."""
    column = [*read_header(file, separator)].index(user_field)
    with open(file, encoding="utf-8", errors="replace") as lines:  # users are counted, not named
        users = [line.rstrip("\n").split(separator)[column] for line in lines if line.strip()][1:]
    return len(users), len(set(users))


def _llm_tokens(config: Config, sizes: dict[str, float], with_sft: bool) -> float:
    """Tokens of all passes; a training step costs as much as 2.3 passes (the base's weights get no gradient)."""
    _, items = read_items(config.final_config_dict, config["dataset"])
    title = 2 + sum(len(next(iter(row.values()))) for row in items.values()) / max(1, len(items)) / 3
    trains = _trains_llm(config)
    with_sft, prefers = with_sft and trains, config["loss"] != "SFT" and trains
    rounds = (config["epochs"] if with_sft else 0) + (config["preference_epochs"] if prefers else 0)
    rounds = rounds * (config["eval_step"] > 0) if trains else 1
    asked = 0.0
    for split, mode in config["eval_args"]["mode"].items():
        answers = answers_of(config, mode) or len(items)
        if reranks(config, mode):
            answers = min(answers, config["rerank_topk"])
        elif mode == "full" and config["full_ranking"] == "exact_topk":
            answers = min(answers, TOPK_ANSWERS)
        asked += sizes["tested"] * (config["MAX_ITEM_LIST_LENGTH"] + answers) * (rounds if split == "valid" else 1)
    trained = 0.0
    if with_sft:
        trained += _positions(config["sft_positions"], sizes) * config["epochs"]
    if prefers:
        trunk = sizes["users"] * config["MAX_ITEM_LIST_LENGTH"]
        pairs = trunk + _positions(config["preference_positions"], sizes) * (1 + config["rejected_num"])
        trained += pairs * (config["preference_epochs"] + 1 / 2.3)
        if "self_hard" in config["rejected"]:
            asked += trunk + _positions(config["preference_positions"], sizes) * config["rejected_pool"]
    return title * (2.3 * trained + asked)


def _dpo4rec_seconds(config: Config, sizes: dict[str, float], training: float) -> float:
    """Of all iterations; a token that is written costs about three that are read, because few are written at a time."""
    rounds = alignment_rounds(config)
    if config["knowledge"] == "none":
        return training
    prompt, text = 12 * config["reasoning_history"], 3 * config["reasoning_tokens"]
    read = sizes["tested"] + min(sizes["users"], config["text_users"] or sizes["users"])
    judged = config["pair_users"] * (prompt + config["samples"] * text)
    aligned = config["pair_users"] * 2.3 * config["align_epochs"] * (prompt + 2 * config["reasoning_tokens"])
    tokens = (rounds + 1) * read * (prompt + text) + rounds * (judged + aligned)
    return (rounds + 1) * 2 * training + tokens * FLOPS_PER_TOKEN / _machine_flops()


def _positions(last: int, sizes: dict[str, float]) -> float:
    return min(sizes["rows"], last * sizes["users"]) if last else sizes["rows"]


@cache  # asked for each run and search of a comparison
def _machine_flops() -> float:
    """Float32 operations a second of this machine on a layer-sized product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = torch.randn(512, 576, device=device), torch.randn(576, 1536, device=device)
    clock, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - clock < 0.2:
        (a @ b).sum().item()
        count += 1
    return 0.7 * count * 2 * 512 * 576 * 1536 / (time.perf_counter() - clock)  # norms and attention take the rest


def bar(**kwargs: Any) -> tqdm:
    """A progress bar of this project's width; in a log file one line every 30 seconds."""
    return tqdm(ncols=120, mininterval=0.5 if sys.stderr.isatty() else 30, **kwargs)
