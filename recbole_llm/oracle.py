"""RosePO's preference oracle: how likely it is that a user prefers a rejected item to the chosen one.

A recommender that never saw the pair judges it. The training users are cut into folds; the judge of a fold was trained
on the users of the others. A judge's difference of scores becomes a probability by one temperature, fitted on
validation rows: p(a preferred to b) = s((score_a - score_b) / tau), Bradley and Terry's model. RosePO (arXiv
2410.12519) says that such an oracle exists; what it is and how it is trained could not be read, so this is our reading.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from recbole.config import Config
from scipy.optimize import minimize_scalar
from scipy.special import expit

from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.prompt import Window
from recbole_llm.data.protocol import Protocol
from recbole_llm.recommender import Recommender, train_recommender

AT_ONCE = 256  # histories that a judge scores at a time
FULL_MODE_NEGATIVES = 19  # items drawn for each validation row where the mode names none


@dataclass(frozen=True)
class Calibration:
    """How the judges' scores became probabilities.

    Attributes:
        tau: temperature, in units of the judges' scores.
        accuracy: share of validation pairs (target, candidate) that the judges order right; ties count half.
        confidence: mean probability of the order that the judges believe in; near ``accuracy`` when calibrated.
        pairs: how many.
    """

    tau: float
    accuracy: float
    confidence: float
    pairs: int


class Oracle:
    """Judges for a run's pairs.

    Args:
        judges: the judge of each fold, which has not seen its users.
        fold_of: fold of each user ``[n_users]``.
        calibration: how their scores become probabilities.
        most: the largest epsilon.
    """

    def __init__(
        self, judges: Sequence[Recommender], fold_of: np.ndarray, calibration: Calibration, most: float
    ) -> None:
        self.judges, self.fold_of, self.calibration, self.most = judges, fold_of, calibration, most

    def smoothing(self, windows: Sequence[Window]) -> list[list[list[float]]]:
        """For each window, target and rejected item: p(rejected is preferred), at most ``most``.

        It is judged by the window's items before the target: of a stretch (stream prompt) those of the stretch.
        """
        places = [
            (w.user, w.items[:t], (w.items[t], *r)) for w in windows for t, r in zip(w.targets, w.rejected, strict=True)
        ]
        scores = iter(judged(self.judges, self.fold_of, places))
        found = []
        for window in windows:
            mine = [next(scores) for _ in window.targets]
            eps = [expit((s[1:] - s[0]) / self.calibration.tau) for s in mine]
            found.append([np.clip(e, 0, self.most).tolist() for e in eps])
        return found


def judged(
    judges: Sequence[Recommender], fold_of: np.ndarray, places: Sequence[tuple[int, Sequence[int], Sequence[int]]]
) -> list[np.ndarray]:
    """Scores of each place's items by the judge of its user.

    Args:
        places: user, history, and the items to score.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(places)
    for fold, judge in enumerate(judges):
        mine = [i for i, (user, _, _) in enumerate(places) if fold_of[user] == fold]
        for first in range(0, len(mine), AT_ONCE):  # each has scores of the whole catalogue
            part = mine[first : first + AT_ONCE]
            scores = judge.scores([places[i][1] for i in part])
            for row, i in enumerate(part):
                found[i] = scores[row, list(places[i][2])]
    return found


def train_oracle(config: Config, protocol: Protocol) -> Oracle:
    """Train the judges on training data alone and calibrate them on validation rows."""
    folds = config["oracle_folds"]
    users = np.array(sorted(protocol.training_sequences()))
    fold_of = folds_of(protocol, users, folds, config["seed"])
    judges = [train_recommender(config, config["oracle_model"], users[fold_of[users] != f]) for f in range(folds)]
    calibration = calibrate(judges, fold_of, protocol.valid, config["candidate_seed"])
    logger = logging.getLogger()
    logger.info(f"Oracle: {folds} judges ({config['oracle_model']}), {asdict(calibration)}")
    if calibration.accuracy < 0.6:
        logger.warning(
            f"--oracle_model={config['oracle_model']}: the oracle orders only {calibration.accuracy:.1%} of validation "
            "pairs right (chance 50%), so every epsilon is near 1/2 and RosePO learns little. Train it on more users, "
            "or set --smoothing to a number."
        )
    return Oracle(judges, fold_of, calibration, config["smoothing_max"])


def folds_of(protocol: Protocol, users: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold for every user ``[n_users]``: training users in parts of equal size, the others wherever they fall."""
    tokens = protocol.dataset.field2id_token[protocol.dataset.uid_field]
    fold_of = np.arange(len(tokens)) % folds
    order = users[np.argsort(tokens[users])]  # by token: internal ids follow the file's order
    fold_of[np.random.default_rng(seed).permutation(order)] = np.arange(len(users)) % folds
    return fold_of


def calibrate(judges: Sequence[Recommender], fold_of: np.ndarray, rows: EvalRows, seed: int) -> Calibration:
    """The temperature that makes the right order of validation pairs most likely (maximum likelihood).

    A pair is a row's target, the next item, against one of its candidates that is not relevant.
    """
    places = []
    for row in range(len(rows)):
        others = _negatives(rows, row, seed)
        places.append((int(rows.users[row]), rows.history[row].tolist(), [int(rows.targets[row]), *others]))
    scores = judged(judges, fold_of, places)
    lead = np.concatenate([s[0] - s[1:] for s in scores])
    unit = max(float(np.std(lead)), 1e-9)

    def loss(log_tau: float) -> float:
        return float(np.logaddexp(0, -lead / (unit * np.exp(log_tau))).mean())

    tau = unit * float(np.exp(minimize_scalar(loss, bounds=(-6, 8), method="bounded").x))
    accuracy = float(((lead > 0) + 0.5 * (lead == 0)).mean())
    return Calibration(tau, accuracy, float(expit(np.abs(lead) / tau).mean()), len(lead))


def _negatives(rows: EvalRows, row: int, seed: int) -> list[int]:
    """The row's candidates but the relevant; in full mode a seeded draw of items that the user has not met."""
    relevant = rows.relevant[row]
    if rows.candidates is not None:
        return [int(i) for i in rows.candidates[row] if i not in relevant]
    met = np.concatenate([rows.history[row], relevant, rows.hidden_of(row)])
    free = np.setdiff1d(np.arange(1, len(rows.item_tokens)), met)
    rng = np.random.default_rng([seed, int(rows.users[row])])
    return [int(i) for i in rng.choice(free, min(FULL_MODE_NEGATIVES, len(free)), replace=False)]
