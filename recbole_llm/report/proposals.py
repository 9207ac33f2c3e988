"""Which values are tried next: Optuna's TPE over a search space, never the same ones twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from recbole_llm.files import content_hash
from recbole_llm.report.search_space import Parameter

STARTUP = 10  # proposals that are drawn at random, before scores decide; Optuna's own default
MOST_DRAWS = 10_000
PATIENCE = 10  # proposals that were tried before, until one is drawn at random from the others


class Proposals:
    """Values to try, one after another: first those as given, then what the sampler makes of the scores so far.

    The same seed and the same scores give the same proposals, whoever computed the scores: a search that was cut off
    goes on where it was by being told what was found before. Values as given that lie outside the space are tried and
    tell the sampler nothing; neither do failed trials.

    Args:
        first: the values as given.
        bigger: whether a bigger score is better.
    """

    def __init__(self, space: Sequence[Parameter], first: Mapping[str, Any], seed: int, bigger: bool) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it tells of each study
        self.space = list(space)
        self.first, self.seed = dict(first), seed
        self.tried: set[str] = set()
        direction = "maximize" if bigger else "minimize"
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        self.study = optuna.create_study(direction=direction, sampler=sampler)
        self.distributions = {p.key: _distribution(p) for p in self.space}
        self.trial: optuna.Trial | None = None

    def most(self) -> float:
        """How many different proposals there are; infinity for a space of real numbers."""
        return math.prod(p.size for p in self.space) + (self._draws_of(self.first) is None)

    def next(self) -> dict[str, Any] | None:
        """Values that were not tried before; None when all were, or none is found any more."""
        if not self.tried:
            draws = self._draws_of(self.first)
            self.trial = None if draws is None else self._ask(draws)
            self.tried.add(content_hash(self.first if draws is None else self._values_of(draws)))  # 0 and 0.0 are one
            return self.first
        if len(self.tried) >= self.most():
            return None
        for _ in range(PATIENCE):
            self.trial = self.study.ask(self.distributions)
            values = self._values_of(self.trial.params)
            if content_hash(values) not in self.tried:
                return self._take(values)
            self.study.tell(self.trial, state=optuna.trial.TrialState.FAIL)
        draws = self._untried()
        if draws is None:
            return None
        self.trial = self._ask(draws)
        return self._take(self._values_of(draws))

    def tell(self, score: float | None) -> None:
        """The score of the last proposal; None where it failed."""
        if self.trial is None:
            return
        failed = optuna.trial.TrialState.FAIL if score is None else None
        self.study.tell(self.trial, score, state=failed)

    def before_scores(self, most: int) -> list[dict[str, Any]]:
        """Of at most so many proposals the first, which are the same whatever the scores: they can be tried at once.

        It uses them up: for a search that is told scores make these proposals anew.
        """
        found: list[dict[str, Any]] = []
        while len(found) < min(most, STARTUP) and (values := self.next()) is not None:
            found.append(values)
            self.tell(0.0)
        return found

    def _take(self, values: dict[str, Any]) -> dict[str, Any]:
        self.tried.add(content_hash(values))
        return values

    def _ask(self, draws: Mapping[str, Any]) -> optuna.Trial:
        self.study.enqueue_trial(dict(draws))
        return self.study.ask(self.distributions)

    def _values_of(self, draws: Mapping[str, Any]) -> dict[str, Any]:
        return {p.key: p.value(draws[p.key]) for p in self.space}

    def _draws_of(self, values: Mapping[str, Any]) -> dict[str, float] | None:
        found = {p.key: p.drawn(values[p.key]) for p in self.space}
        draws = {key: value for key, value in found.items() if value is not None}
        return draws if len(draws) == len(found) else None

    def _untried(self) -> dict[str, float] | None:
        """Draws at random whose values were not tried; None after many that were, as between close real numbers."""
        rng = np.random.default_rng([self.seed, len(self.tried)])
        for _ in range(MOST_DRAWS):
            draws = {p.key: _at_random(p, rng) for p in self.space}
            if content_hash(self._values_of(draws)) not in self.tried:
                return draws
        return None


def _at_random(parameter: Parameter, rng: np.random.Generator) -> float:
    if not math.isinf(parameter.size):
        return parameter.nth(int(rng.integers(int(parameter.size))))
    low, high = parameter.bounds[:2]
    return low * (high / low) ** rng.random() if parameter.kind == "log" else rng.uniform(low, high)


def _distribution(parameter: Parameter) -> BaseDistribution:
    """A choice is drawn by its place: Optuna takes no lists as values."""
    if parameter.kind == "choice":
        return CategoricalDistribution(range(len(parameter.bounds)))
    low, high = parameter.bounds[:2]
    if parameter.kind == "int":
        return IntDistribution(low, high, step=parameter.step)
    return FloatDistribution(low, high, log=parameter.kind == "log", step=parameter.step)
