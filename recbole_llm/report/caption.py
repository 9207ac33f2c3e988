"""What a table's caption says, written from the facts of its runs."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from recbole_llm.report.entries import Options
from recbole_llm.report.results import Results, direction, metric_name, training_data
from recbole_llm.report.significance import alternative_of

DRAWN = {
    "uni": "drawn uniformly from those that the user never met",
    "pop": "drawn by popularity from those that the user never met",
    "low": "that the user rated low",
}
# Keys whose values of two lines may differ, as a caption begins to tell them.
UNLIKE = {
    "MAX_ITEM_LIST_LENGTH": "Histories of up to {} items",
    "valid_users": "Validation users: {}",
    "valid_metric": "Epochs selected by {}",
}
TESTS = {"t": "paired t-test", "randomization": "paired sign-flip randomisation test"}


def caption(
    results: Results,
    columns: Sequence[str],
    tests: pd.DataFrame,
    against: Sequence[str],
    options: Options,
    letters: dict[str, str],
) -> str:
    """Data, protocol, seeds, test and marks of a table of results, in sentences.

    Args:
        columns: metrics that the table shows.
        letters: of the baselines that something is told from.
    """
    if not results.records:
        return "No run finished."
    parts = [f"{results.title}.", *protocol_sentences(results), *_unlike(results), *_reordering(results)]
    parts.append(_seeds(results))
    if options.tune:
        parts.append(f"Every line tuned on validation by {options.tune} trials at most.")
    shown = tests if tests.empty else tests[tests["metric"].isin(columns)]
    if not shown.empty:
        users = _each(sorted(set(shown["users"])))
        sides = {alternative_of(metric, options) for metric in shown["metric"]}
        side = "two-sided" if sides == {"two-sided"} else "one-sided (is the model better?)"
        family = shown.groupby("metric").size().max()
        corrected = f"Holm's correction over the {family} comparisons" if family > 1 else "one comparison"
        parts.append(
            f"{TESTS[options.test].capitalize()} on {users} users' means over seeds, {side}, {corrected} of each "
            f"metric, significant below {options.alpha:g}: {_marks(against, letters)}"
        )
        parts += _two_sided(columns, options)
    parts += [f"{told} are the same runs, and count twice." for told in _same(results)]
    parts += [*untested(columns, tests), "Best in bold, second underlined."]
    return " ".join(parts)


def _same(results: Results) -> list[str]:
    """Lines of the very same runs, apart by what nothing reads."""
    by_runs: dict[tuple[str, ...], list[str]] = {}
    for line in results.finished:
        by_runs.setdefault(tuple(run.get("run_hash", line.label) for run in line.runs), []).append(line.label)
    return [" and ".join(labels) for labels in by_runs.values() if len(labels) > 1]


def untested(columns: Sequence[str], tests: pd.DataFrame) -> list[str]:
    """A sentence that names the shown metrics without a test, whose values bear no marks; none where nothing is tested
    at all."""
    without = [] if tests.empty else [metric_name(c) for c in columns if c not in set(tests["metric"])]
    return [f"Not tested: {', '.join(without)}."] if without else []


def _unlike(results: Results) -> list[str]:
    """What lines read, or select epochs by, where they differ in it; the most frequent value first."""
    told = []
    for key, sentence in UNLIKE.items():
        values = {line.label: line.reads[key] for line in results.finished if key in line.reads}
        found = [value for value, _ in Counter(values.values()).most_common()]
        named = [f"{', '.join(label for label, v in values.items() if v == value)} {value}" for value in found[1:]]
        told += [f"{sentence.format(found[0])}; {'; '.join(named)}."] if named else []
    return told


def _reordering(results: Results) -> list[str]:
    """Which lines order what another model found, and so share its leanings."""
    found = {line.label: line.reads["reorders"] for line in results.finished if "reorders" in line.reads}
    named = {top: ", ".join(label for label, v in found.items() if v == top) for top in dict.fromkeys(found.values())}
    return [f"Reordering {top}, and what that misses cannot be found: {labels}." for top, labels in named.items()]


def _marks(against: Sequence[str], letters: dict[str, str]) -> str:
    if not letters:
        return f"no difference from {' or '.join(against)} is."
    told = ", ".join(f"({letter}) {label}" for label, letter in letters.items())
    return f"raised letter = better than, lowered = worse than {told}."


def protocol_sentences(results: Results) -> list[str]:
    """What was trained on and what was asked."""
    run, records = results.records[0], results.records
    events = _each(f"{r['training_interactions']:,}" for r in records)
    elsewhere = "" if all(training_data(r) == r["dataset"] for r in records) else " of "
    elsewhere += _each(map(training_data, records)) if elsewhere else ""
    return [
        f"{events} training interactions{elsewhere}.",
        f"Test: {run['rows']:,} rows, {_asked(run)}; candidates {run['candidate_hash'][:12]}.",
    ]


def _asked(run: dict[str, Any]) -> str:
    ahead = run.get("next_items", 1)  # older records lack it
    target = "the next item" if ahead == 1 else f"the next {ahead} items"
    found = re.fullmatch(r"(uni|pop|low)(\d+)", run["mode"])
    if found:
        others = "one other" if found[2] == "1" else f"{found[2]} others"
        return f"{target} among {others} {DRAWN[found[1]]} (frozen, the same for every model)"
    masked = run.get("mask_history", True)
    return f"{target} among all items" + (" that the user has not met" if masked else "")


def _seeds(results: Results) -> str:
    """Which, and of which lines others."""
    mine = {line.label: [str(run["seed"]) for run in line.runs] for line in results.finished}
    seeds = list(dict.fromkeys(seed for of_line in mine.values() for seed in of_line))
    if len(seeds) == 1:
        return f"One seed ({seeds[0]})."
    if one_run_each(results):
        return f"One seed each: {', '.join(f'{label} {of_line[0]}' for label, of_line in mine.items())}."
    most = max(mine.values(), key=len)
    others = [f"{label} {', '.join(of_line)}" for label, of_line in mine.items() if of_line != most]
    told = f"; other seeds: {'; '.join(others)}" if others else ""
    return f"Mean and ± standard deviation over seeds {', '.join(most)}{told}."


def one_run_each(results: Results) -> bool:
    """Whether no line has runs to be told apart by their seeds."""
    return all(len(line.runs) == 1 for line in results.finished)


def tests_caption(results: Results, metric: str, options: Options) -> str:
    """How the columns of a table of tests are to be read."""
    side = "two-sided" if alternative_of(metric, options) == "two-sided" else "one-sided: is the model better?"
    more = " One seed: how runs vary is not in it." if one_run_each(results) else ""
    return (
        f"{metric_name(metric)}: difference of means over users, its 95 % bootstrap interval ({options.resamples:,} "
        "draws of users), Cohen's d of the paired differences, users won / tied / lost, p-values of the paired t-test "
        f"and of the sign-flip randomisation test ({side}); Holm's correction is of the {TESTS[options.test]}. All "
        f"metrics are in tests.csv.{more}"
    )


def harm_caption(columns: Sequence[str], tests: pd.DataFrame, options: Options) -> str:
    """Where the formulas are, and which of the shown metrics are tested."""
    told = (
        "Popularity bias, long tail, look-alikes of the history, coverage and concentration of the top K; formulas and "
        "caveats: docs/harm.md. Arrows: which values are good. Seeds, tests and marks as in the table of results."
    )
    return " ".join([told, *_two_sided(columns, options), *untested(columns, tests)])


def _two_sided(columns: Sequence[str], options: Options) -> list[str]:
    """A sentence where what no one-sided test suits is shown beside what it was asked for."""
    both = options.alternative != "two-sided" and any(direction(c) == "zero" for c in columns)
    return ["What is best near zero is tested two-sided."] if both else []


def _each(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(map(str, values)))
