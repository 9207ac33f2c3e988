"""Who trains, who validates and who is tested: drawn by user token, so that no model moves it."""

from __future__ import annotations

import logging

import numpy as np
from recbole.config import Config

from recbole_llm.data.events import Events
from recbole_llm.errors import UserError

SPLITS = ("train", "valid", "test")

logger = logging.getLogger()


def draw_users(config: Config, events: Events, ends: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray | None]:
    """Internal ids of the users of each split, sorted; None = all (training only).

    Only users with ``min_disliked`` disliked items, and with N where the mode is lowN, take part. Of them
    ``eval_users`` are tested, ``valid_users`` validate and ``few_shot`` train. A larger number of the same seed
    adds users to those of a smaller one. With ``disjoint_users`` the test users are drawn first, then those of
    validation, then those of training, so that ``few_shot`` moves no user who is asked.

    Args:
        ends: as in SplitTable ``[n_users, 3]``.
        tokens: token of each user ``[n_users]``.

    Raises:
        UserError: fewer users than a key asks for, or ``disjoint_users`` without ``eval_users``.
    """
    pools = _pools(config, events, ends)
    met = tokens[(np.diff(events.start) > 0) | (np.arange(len(tokens)) == 0)]  # a `.user` file may hold others
    disjoint, few_shot, asked = config["disjoint_users"], config["few_shot"], config["eval_users"]
    validating = config["valid_users"] or asked
    if disjoint and asked is None:
        raise UserError("--disjoint_users=True: say how many users are tested, for example --eval_users=1000.")
    test = _shuffled(pools["test"], tokens, met, [config["candidate_seed"]])
    valid = _shuffled(pools["valid"], tokens, met, [config["candidate_seed"]])
    # Another stream than that of the users who are asked: both seeds are the same by default.
    train = _shuffled(pools["train"], tokens, met, [config["few_shot_seed"], 1])
    if disjoint:
        test = _first(test, asked, "eval_users", "have test rows")
        valid = valid[~np.isin(valid, test)]
        key = "valid_users" if config["valid_users"] else "eval_users"
        valid = _first(valid, validating, key, "who are not tested have validation rows")
        train = train[~np.isin(train, np.append(test, valid))]
    if few_shot is not None:
        told = " and are neither validated nor tested" if disjoint else ""
        train = _first(train, few_shot, "few_shot", f"have training interactions{told}")
    for key, wanted, there in (("valid_users", validating, valid), ("eval_users", asked, test)):
        if wanted is not None and wanted > len(there):
            logger.info(f"Protocol: --{key}={wanted}: there are {len(there)} users with such rows; all are asked.")
    everyone = few_shot is None and not config["min_disliked"]
    return {
        "train": None if everyone else np.sort(train),
        "valid": np.sort(valid[:validating]),
        "test": np.sort(test[:asked]),
    }


def _pools(config: Config, events: Events, ends: np.ndarray) -> dict[str, np.ndarray]:
    """Users with rows of each split and enough disliked items."""
    rows = np.diff(ends, axis=1, prepend=0)
    least = np.array([2, 1, 1])  # a single event trains no sequence
    modes = {"train": "full", **config["eval_args"]["mode"]}
    lows = {split: int(mode[3:]) if mode.startswith("low") else 0 for split, mode in modes.items()}
    needed = {split: max(config["min_disliked"], low) for split, low in lows.items()}
    counts = events.disliked_counts() if any(needed.values()) else np.zeros(len(ends), dtype=int)
    pools = {}
    for column, split in enumerate(SPLITS):
        users = np.flatnonzero(rows[:, column] >= least[column])
        enough = counts[users] >= needed[split]
        pools[split] = users[enough]
        if len(users) and not enough.any():
            mode = f"--eval_args mode {modes[split]}"
            asked = mode if lows[split] > config["min_disliked"] else f"--min_disliked={config['min_disliked']}"
            raise UserError(
                f"{asked}: of {len(users)} users with "
                f"{split} interactions none has {needed[split]} items rated <= {events.threshold:g}, the most is "
                f"{counts[users].max()}. Ask for fewer, or set another --rating_threshold."
            )
        if split != "train" and not enough.all():
            left_out = rows[users[~enough], column].sum() // config["next_items"]
            logger.info(
                f"Protocol: {left_out} {split} rows are left out, of {(~enough).sum()} users with fewer than "
                f"{needed[split]} items rated <= {events.threshold:g}; {enough.sum()} users stay."
            )
    return pools


def _shuffled(users: np.ndarray, tokens: np.ndarray, met: np.ndarray, seed: list[int]) -> np.ndarray:
    """The users in a random order; each has a place of its own, drawn by its token among those of all users ``met``."""
    place = np.random.default_rng(seed).random(len(met))
    by_token = users[np.argsort(tokens[users])]
    return by_token[np.argsort(place[np.searchsorted(np.sort(met), tokens[by_token])])]


def _first(users: np.ndarray, number: int, key: str, what: str) -> np.ndarray:
    if len(users) < number:
        raise UserError(f"--{key}={number}: only {len(users)} users {what}. Ask for fewer.")
    return users[:number]
