"""Hyper-parameters by the same number of trials for every model, chosen on validation alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pandas as pd

from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError
from recbole_llm.key_checks import integer
from recbole_llm.report.search_space import Parameter, search_space
from recbole_llm.report.trials import Trial, run_trial

if TYPE_CHECKING:
    from recbole_llm.report.proposals import Proposals


@dataclass(frozen=True)
class Tuned:
    """What tuning a model found.

    Attributes:
        settings: searched key -> chosen value, to be laid over the settings that were tuned; none where all trials
            failed.
        score: of the chosen trial.
        trials: all of them, in order; fewer than were asked for where the space holds no more.
        space: searched key -> its range, as in YAML.
        metric: the validation metric, as the user wrote it.
        bigger: whether a bigger score is better.
        source: the line whose chosen values were given; None where what is not searched is the user's.
    """

    settings: dict[str, Any]
    score: float | None
    trials: list[Trial]
    space: dict[str, Any]
    metric: str
    bigger: bool
    source: str | None = None

    @property
    def seconds(self) -> float:
        """What all trials took."""
        return sum(trial.seconds for trial in self.trials)


def check_search(
    model: str, dataset: str | None, settings: dict[str, Any], search: str | None = None
) -> tuple[LLMConfig, list[Parameter]]:
    """The configuration as given and what is searched around it, before any work.

    Args:
        model, dataset, settings: as for a run. Keys that ``settings`` holds are not searched.
        search: file or folder of spaces (``--search``); None = those that come with the package.

    Raises:
        ConfigError: what is wrong with the settings or the space.
    """
    config = LLMConfig(model, settings.get("dataset", dataset), None, settings)
    return config, search_space(config, search)


def proposals_of(config: LLMConfig, space: Sequence[Parameter]) -> Proposals:
    """What a search around this configuration tries, from its beginning."""
    from recbole_llm.report.proposals import Proposals  # Optuna takes half a second

    return Proposals(space, {p.key: config[p.key] for p in space}, config["seed"], config["valid_metric_bigger"])


def tune(
    model: str,
    dataset: str | None,
    settings: dict[str, Any],
    trials: int,
    search: str | None = None,
    label: str | None = None,
    source: str | None = None,
) -> Tuned:
    """Try up to so many configurations and choose the best on validation; test rows are never scored.

    Trial 1 is the configuration as given, so one trial means no tuning, and tuning is never worse on validation. The
    others come from Optuna's TPE, seeded with the run's ``seed``. Every trial is kept in
    ``<checkpoint_dir>/trials/<Model>-<dataset>-<hash>.json`` by the hash that names runs: what was tried before with
    the same everything is read, so a search that was cut off goes on where it was. A trial that fails counts.

    Args:
        model, dataset, settings, search: as for ``check_search``.
        trials: at most; less where the space has fewer configurations.
        label: what the model is called where progress is told.
        source: whose chosen values ``settings`` holds, to be told.

    Raises:
        ConfigError: what is wrong with settings, space or number of trials, before the first trial.
        UserError: a disk that is full or cannot be read; finished trials are kept.
    """
    if wrong := integer(1)(trials):
        raise ConfigError([f"--tune={trials!r}: {wrong}."])
    config, space = check_search(model, dataset, settings, search)
    bigger, proposals = config["valid_metric_bigger"], proposals_of(config, space)
    number_of = int(min(trials, proposals.most()))
    told = _Progress(label or model, number_of, config["valid_metric"], source)
    told.begin(space, trials)
    done: list[Trial] = []
    while len(done) < number_of:
        values = proposals.next()
        if values is None:
            print(f"[tune {told.label}] there is no more to try, so {len(done)} trials", flush=True)
            break
        done.append(run_trial(len(done), model, config["dataset"], settings, values))
        proposals.tell(done[-1].score)
        told.trial(done, _best(done, bigger))
    best = _best(done, bigger)
    return Tuned(
        best.values if best else {},
        best.score if best else None,
        done,
        {p.key: p.form() for p in space},
        config["valid_metric"],
        bigger,
        source,
    )


def _best(trials: Sequence[Trial], bigger: bool) -> Trial | None:
    """The best so far, the earliest of equals."""
    scored = [(-t.score if bigger else t.score, t.number, t) for t in trials if t.score is not None]
    return min(scored, default=(0, 0, None))[2]


class _Progress:
    """A line a trial."""

    def __init__(self, label: str, trials: int, metric: str, source: str | None) -> None:
        self.label, self.trials, self.metric = label, trials, metric
        self.given = _given(source)

    def begin(self, space: Sequence[Parameter], asked: int) -> None:
        """What is searched, and where there is less to try than was asked for."""
        over = ", ".join(p.key for p in space) or "nothing: no key of its space is left open"
        fewer = f"; there is no more to try, so {self.trials} of {asked} trials" if self.trials < asked else ""
        print(f"[tune {self.label}] over {over}{fewer}", flush=True)

    def trial(self, done: Sequence[Trial], best: Trial | None) -> None:
        """The last trial, the best so far, and the time left if the others take as long."""
        last, left = done[-1], self.trials - len(done)
        told = [f"[tune {self.label} {len(done)}/{self.trials}]", _pairs(last.values)]
        told += [f"({self.given})"] if last.number == 0 else []
        told += [f"valid {self.metric} {last.score:.4f}" if last.error is None else f"failed: {last.error}"]
        seconds = left * sum(trial.seconds for trial in done) / len(done)
        time_left = f"{seconds / 60:.0f} min" if seconds > 50 else f"{seconds:.0f} s"
        ends = [f", best {best.score:.4f}" if best else "", f", about {time_left} left" if left else ""]
        print(" ".join(filter(None, told)) + "".join(ends), flush=True)


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def tuned_frame(found: Sequence[tuple[str, str, Tuned]]) -> pd.DataFrame:
    """One line a model and data set, for an appendix.

    Args:
        found: label, data set, and what tuning found.

    Returns:
        Columns ``model``, ``data set``, ``trials``, ``failed`` (of them), ``valid metric``, ``best``, ``as given`` (the
        score of trial 1), ``min`` (minutes of all trials: the same number of trials is not the same compute) and
        ``chosen``.
    """
    lines = [
        {
            "model": label,
            "data set": dataset,
            "trials": len(tuned.trials),
            "failed": sum(trial.error is not None for trial in tuned.trials),
            "valid metric": tuned.metric,
            "best": tuned.score,
            "as given": tuned.trials[0].score,
            "min": tuned.seconds / 60,
            "chosen": _chosen(tuned),
        }
        for label, dataset, tuned in found
    ]
    return pd.DataFrame(lines)


def trials_frame(found: Sequence[tuple[str, str, Tuned]]) -> pd.DataFrame:
    """One line a trial, in the order in which they were tried: what the choice stood on.

    Args:
        found: label, data set, and what tuning found.

    Returns:
        Columns ``model``, ``data set``, ``trial`` (1 is the configuration as given), ``values`` of the searched keys,
        ``valid metric``, ``score`` (none where it failed) and ``error``.
    """
    lines = [
        {
            "model": label,
            "data set": dataset,
            "trial": trial.number + 1,
            "values": _pairs(trial.values),
            "valid metric": tuned.metric,
            "score": trial.score,
            "error": trial.error or "",
        }
        for label, dataset, tuned in found
        for trial in tuned.trials
    ]
    return pd.DataFrame(lines)


def _chosen(tuned: Tuned) -> str:
    if not tuned.space:
        return "nothing to search" + (f", {_given(tuned.source)}" if tuned.source else "")
    return f"{_given(tuned.source)}: no trial succeeded" if tuned.score is None else _pairs(tuned.settings)


def _given(source: str | None) -> str:
    """What the first trial is."""
    return f"as chosen for {source}" if source else "as given"
