"""Every model against the baselines, metric by metric, over the users both were asked about."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from recbole_llm.errors import ConfigError
from recbole_llm.report import stats
from recbole_llm.report.entries import Entry, Options
from recbole_llm.report.results import Line, Results, direction, merit

LEVEL = 0.95  # of intervals
DIGITS = 12  # behind the point, of differences
TIE = 1e-8  # less is none: a run's rows have ten digits, and their means over seeds lose the last
MOST_BASELINES = 26  # each has a letter


def baselines(entries: Sequence[Entry], options: Options) -> list[str]:
    """Labels to test against: those given, else the first SASRec, else the first model.

    Raises:
        ConfigError: a label that is none of the entries', or more of them than there are letters.
    """
    labels = [entry.label for entry in entries]
    if options.baseline is None:
        return [next((e.label for e in entries if e.model == "SASRec"), labels[0])]
    by_name = {name: label for label, name in (options.names or {}).items()} | {label: label for label in labels}
    unknown = [b for b in options.baseline if by_name.get(b) not in labels]
    if unknown:
        raise ConfigError([f"--baseline={b}: not one of the models; there are {', '.join(labels)}." for b in unknown])
    found = list(dict.fromkeys(by_name[b] for b in options.baseline))  # a label and its name are one
    if len(found) > MOST_BASELINES:
        raise ConfigError([f"--baseline: names {len(found)} models; at most {MOST_BASELINES} have a letter."])
    return found


def check_resamples(entries: Sequence[Entry], against: Sequence[str], options: Options) -> None:
    """Raises ConfigError where a randomisation test has too few draws to show anything after Holm's correction."""
    if options.test != "randomization":
        return
    both = len(against) * (len(against) - 1)  # pairs of two baselines, which two-sided are asked once
    asked = len(against) * (len(entries) - 1) - (both // 2 if options.alternative == "two-sided" else 0)
    least = math.floor(round(asked / options.alpha, 9))
    if options.resamples < least:
        raise ConfigError(
            [
                f"--resamples={options.resamples}: with {asked} comparisons a metric no p-value could fall below "
                f"--alpha={options.alpha:g} after Holm's correction; give {least} or more, or --test=t."
            ]
        )


def comparisons(results: Results, against: Sequence[str], options: Options) -> pd.DataFrame:
    """Tests, intervals and effect sizes of one table.

    Differences are the model's mean over seeds minus the baseline's, for each user. Holm's correction is over all
    comparisons of a metric in this table. A metric whose best value is zero is always tested two-sided, and has no
    verdict where one mean lies above zero and the other below: that they differ does not say which is nearer.

    Args:
        against: labels of the baselines, as the lines show them.

    Returns:
        One row a metric, model and baseline: ``metric, model, baseline, users, seeds, baseline_seeds, difference,
        ci_low, ci_high`` (95 %), ``t, p_t, p_randomization, p_holm`` (of the test that ``test`` names), ``d, wins,
        ties, losses, detectable`` (see ``stats``) and ``verdict``: better, worse or empty.
    """
    pairs = {way: _pairs(results.finished, against, way) for way in ("two-sided", options.alternative)}
    known = results.finished[0].users if results.finished else ()
    metrics = [m for m in results.metrics() if m in known and direction(m)]
    rows = [(metric, *pair) for metric in metrics for pair in pairs[alternative_of(metric, options)]]
    if not rows:
        return pd.DataFrame()
    # The same numbers over seeds in another order have another last digit; that is no difference.
    differences = _stacked(ours.users[m].to_numpy() - base.users[m].to_numpy() for m, ours, base in rows)
    found = pd.DataFrame(
        {
            "metric": [m for m, _, _ in rows],
            "model": [ours.label for _, ours, _ in rows],
            "baseline": [base.label for _, _, base in rows],
            "users": (~np.isnan(differences)).sum(1),
            "seeds": [len(ours.runs) for _, ours, _ in rows],
            "baseline_seeds": [len(base.runs) for _, _, base in rows],
        }
    )
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # a single user, or none with a value
        found = found.join(_tested(differences, found["metric"], options))
    gains = _stacked(merit(m, ours.users[m].to_numpy()) - merit(m, base.users[m].to_numpy()) for m, ours, base in rows)
    found[["wins", "ties", "losses"]] = stats.win_tie_loss(gains)
    chosen = found["p_t" if options.test == "t" else "p_randomization"]
    found["p_holm"] = chosen.groupby(found["metric"]).transform(lambda p: stats.holm(p.to_numpy()))
    found["verdict"] = _verdicts(rows, found["p_holm"].to_numpy() < options.alpha)
    return found


def _stacked(differences: Iterable[np.ndarray]) -> np.ndarray:
    found = np.round(np.stack(list(differences)), DIGITS)
    return np.where(np.abs(found) < TIE, 0.0, found)


def alternative_of(metric: str, options: Options) -> str:
    """``two-sided`` of what is best near zero, else as asked."""
    return "two-sided" if direction(metric) == "zero" else options.alternative


def _pairs(lines: Sequence[Line], against: Sequence[str], alternative: str) -> list[tuple[Line, Line]]:
    """Model and baseline; where both are baselines once, but one-sided both ways, which are two questions."""
    by_label = {line.label: line for line in lines}
    pairs, met = [], set()
    for name in (n for n in against if n in by_label):
        for line in lines:
            asked = frozenset((line.label, name)) in met and alternative == "two-sided"
            if line.label != name and not asked:
                met.add(frozenset((line.label, name)))
                pairs.append((line, by_label[name]))
    return pairs


def _tested(differences: np.ndarray, metrics: pd.Series, options: Options) -> pd.DataFrame:
    ways = [direction(m) for m in metrics]
    sign = np.array([-1.0 if way == "smaller" else 1.0 for way in ways])
    p = {"p_t": np.ones(len(ways)), "p_randomization": np.ones(len(ways))}
    t, detectable = np.zeros(len(ways)), np.zeros(len(ways))
    zero = np.array([way == "zero" for way in ways])
    for chosen, alternative in ((zero, "two-sided"), (~zero, options.alternative)):
        if chosen.any():
            t[chosen], p["p_t"][chosen] = stats.paired_t(differences[chosen], sign[chosen], alternative)
            p["p_randomization"][chosen] = stats.sign_flip(
                differences[chosen], sign[chosen], alternative, options.resamples
            )
            detectable[chosen] = stats.detectable(differences[chosen], options.alpha, alternative=alternative)
    low, high = stats.bootstrap_interval(differences, LEVEL, options.resamples)
    return pd.DataFrame(
        {
            "difference": np.nanmean(differences, axis=1),
            "ci_low": low,
            "ci_high": high,
            "t": t,
            **p,
            "d": stats.effect_size(differences),
            "detectable": detectable,
        }
    )


def _verdicts(rows: Sequence[tuple[str, Line, Line]], significant: np.ndarray) -> list[str]:
    """What a significant difference means, by the direction of the metric."""
    found = []
    for (metric, ours, base), sure in zip(rows, significant, strict=True):
        both = pd.concat([ours.users[metric], base.users[metric]], axis=1).dropna()  # the users of the test
        means = both.mean().to_numpy()
        ours_merit, base_merit = merit(metric, means)
        around = direction(metric) == "zero" and means.min() < 0 < means.max()
        found.append("" if around or not sure else "better" if ours_merit > base_merit else "worse")
    return found
