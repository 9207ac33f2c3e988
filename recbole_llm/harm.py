"""What a ranking does besides hitting: popularity bias, look-alikes of the history, coverage of the catalogue.

Item id 0 stands for "nothing there" and counts nowhere. docs/harm.md has formulas, directions and caveats.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from recbole.config import Config
from recbole.data.dataset import Dataset
from recbole.evaluator.metrics import GiniIndex, ItemCoverage

from recbole_llm.data.atomic import read_items
from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.item_text import clean, text_columns, text_template
from recbole_llm.errors import UserError
from recbole_llm.llm.encoder import text_embeddings

# Name -> which value is best: the larger, the smaller, the one nearest to zero; None = it says nothing about a model.
HARM = {
    "popularity_lift": "zero",
    "long_tail": "larger",
    "hallucination": "smaller",
    "hallucination_base": None,
    "coverage": "larger",
    "gini": "smaller",
}
CATALOGUE = {"coverage": "itemcoverage", "gini": "giniindex"}  # RecBole's names, which take ours' place where asked for
HEAD_SHARE = 0.2  # of the catalogue
SIMILARITIES_AT_ONCE = 2**24  # float32: 64 MiB

logger = logging.getLogger()


def harm_metrics(
    config: Config,
    rows: EvalRows,
    top: np.ndarray,
    popularity: np.ndarray,
    embeddings: np.ndarray | None,
    catalogue: np.ndarray | None = None,
) -> tuple[dict[str, float], pd.DataFrame]:
    """Harm of a ranking at every K of ``topk`` that leaves some of the candidates out.

    Args:
        config: needs ``topk``, ``metrics``, ``metric_decimal_place`` and ``look_alikes``.
        top: item ids of the best ``[R, K]``.
        popularity: training interactions of each item ``[n_items]``.
        embeddings: unit rows of the titles ``[n_items, d]``, zeros where there is none; None = no hallucination.
        catalogue: ids of the items that can be answers; None = all.

    Returns:
        Name -> mean over the rows where it is defined, and a table of the values of each row ``[R]``.
    """
    topk = [k for k in config["topk"] if rows.candidates is None or k < rows.candidates.shape[1]]
    catalogue = np.arange(1, len(popularity)) if catalogue is None else catalogue
    if embeddings is not None and len(catalogue) < len(embeddings) - 1:
        embeddings = np.where(np.isin(np.arange(len(embeddings)), catalogue)[:, None], embeddings, 0)
    alike = None if embeddings is None else look_alikes(rows.history, embeddings, config["look_alikes"])
    by_row: dict[str, np.ndarray] = {}
    for k in topk:
        by_row[f"popularity_lift@{k}"] = popularity_lift(top[:, :k], rows.history, popularity)
        by_row[f"long_tail@{k}"] = long_tail_share(top[:, :k], popularity, catalogue)
        if alike is not None:
            by_row[f"hallucination@{k}"] = hallucination(top[:, :k], rows.relevant, alike)
    if topk and alike is not None and rows.candidates is not None:
        by_row["hallucination_base"] = hallucination(rows.candidates, rows.relevant, alike)
    result = _means(by_row)
    for k in topk:
        result.update(catalogue_metrics(config, top[:, :k], len(catalogue) + 1, f"@{k}"))
    return {name: round(v, config["metric_decimal_place"]) for name, v in result.items()}, pd.DataFrame(by_row)


def _means(by_row: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over the rows where a value is defined; a metric that is defined nowhere is left out."""
    for name in ("popularity_lift", "hallucination"):
        undefined = next((np.isnan(v).sum() for key, v in by_row.items() if key.startswith(name)), 0)
        if undefined:
            rows = len(next(iter(by_row.values())))
            logger.info(f"Harm: {name} is undefined for {undefined} of {rows} rows, which its mean leaves out.")
    return {name: float(np.nanmean(v)) for name, v in by_row.items() if not np.isnan(v).all()}


# Popularity


def popularity_lift(top: np.ndarray, history: Sequence[np.ndarray], popularity: np.ndarray) -> np.ndarray:
    """How much more popular the top-K is than what the user chose, relative to the latter ``[R]``.

    0 is as popular, 1 twice as popular. NaN where the history is empty or nobody trained on its items. It is the
    change of group average popularity (Abdollahpouri et al. 2019, arXiv:1907.13286) with every user a group.

    Args:
        top: item ids ``[R, K]``.
        history: item ids of each row.
        popularity: training interactions of each item ``[n_items]``.
    """
    chosen = np.array([popularity[h].mean() if len(h) else np.nan for h in history])
    chosen[chosen == 0] = np.nan
    return (_mean_of(popularity[top], top > 0) - chosen) / chosen


def long_tail(popularity: np.ndarray, catalogue: np.ndarray | None = None) -> np.ndarray:
    """Which items are long tail: those outside the 20 % most popular of the catalogue ``[n_items]``, bool.

    Where items tie at that border all of them are long tail, so that no numbering of the items decides.
    """
    counts = np.sort(popularity[1:] if catalogue is None else popularity[catalogue])[::-1]
    tail = popularity <= counts[int(HEAD_SHARE * len(counts))]
    tail[0] = False
    return tail


def long_tail_share(top: np.ndarray, popularity: np.ndarray, catalogue: np.ndarray | None = None) -> np.ndarray:
    """Share of the top-K that is long tail ``[R]``."""
    return _mean_of(long_tail(popularity, catalogue)[top], top > 0)


def _mean_of(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Mean of each row over what is there ``[R]``; NaN where nothing is."""
    count = there.sum(1)
    return np.where(there, values, 0).sum(1) / np.where(count, count, np.nan)


# Look-alikes


def look_alikes(history: Sequence[np.ndarray], embeddings: np.ndarray, count: int) -> np.ndarray:
    """The items whose titles are nearest, by cosine, to the mean of the history's titles ``[R, count]``; 0 = none.

    Items of the history are no look-alikes of it, nor are items with a cosine of 0 or less.

    Args:
        embeddings: ``[n_items, d]``, unit rows, or zeros where there is no title.
        count: how many at most.
    """
    count = min(count, len(embeddings))
    chunk = max(1, SIMILARITIES_AT_ONCE // len(embeddings))
    found = [np.zeros((0, count), dtype=np.int64)]
    for first in range(0, len(history), chunk):
        told = history[first : first + chunk]
        # The length of the mean changes no order within a row, so it is not divided by.
        profiles = np.stack([embeddings[h].mean(0) if len(h) else np.zeros_like(embeddings[0]) for h in told])
        cosine = profiles @ embeddings.T
        for row, items in enumerate(told):
            cosine[row, items] = 0
        nearest = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        found.append(np.where(np.take_along_axis(cosine, nearest, 1) > 0, nearest, 0))
    return np.concatenate(found)


def hallucination(top: np.ndarray, targets: np.ndarray, alike: np.ndarray) -> np.ndarray:
    """Share of the top-K that looks like the history and is no target ``[R]``; NaN without look-alikes.

    With the candidates as ``top`` it is what a random order of them would have.

    Args:
        top: item ids ``[R, K]``.
        targets: ``[R]``, or several a row ``[R, P]``.
        alike: item ids that look like each row's history, 0 = none ``[R, count]``.
    """
    looks = np.array([np.isin(t, a) for t, a in zip(top, alike, strict=True)], dtype=bool).reshape(top.shape)
    no_target = (top[:, :, None] != targets.reshape(len(top), 1, -1)).all(2)
    share = _mean_of(looks & no_target, top > 0)
    return np.where((alike > 0).any(1), share, np.nan)


# Catalogue


def catalogue_metrics(config: Config, top: np.ndarray, n_items: int, suffix: str) -> dict[str, float]:
    """Coverage of the catalogue and Gini index of the recommendations, by RecBole's formulas.

    Other than in RecBole, the catalogue is without the padding item. A metric that ``metrics`` asks for is left out.
    """
    items = top[top > 0][:, None]
    asked = {metric.lower() for metric in config["metrics"]}
    found = {}
    if CATALOGUE["coverage"] not in asked:
        found[f"coverage{suffix}"] = float(ItemCoverage(config).get_coverage(items, n_items - 1))
    if CATALOGUE["gini"] not in asked:
        found[f"gini{suffix}"] = float(GiniIndex(config).get_gini(items, n_items - 1))
    return found


# Titles


def title_texts(dataset: Dataset) -> list[str]:
    """The title of every internal item id, without year; empty for the padding item and where there is none.

    Raises:
        UserError: no ``.item`` file, or no title column in it.
    """
    name = dataset.config["dataset"]
    columns, rows = read_items(dataset.config.final_config_dict, name)
    try:
        (title, *_) = text_columns(text_template("auto", columns, name))
    except UserError:
        if "item_text" not in dataset.config or dataset.config["item_text"] == "auto":
            raise
        (title, *_) = text_columns(text_template(dataset.config["item_text"], columns, name))
    tokens = [str(t) for t in dataset.field2id_token[dataset.iid_field][1:]]
    return ["", *(clean(rows[t][title]) if t in rows else "" for t in tokens)]


def title_vectors(config: Config, dataset: Dataset) -> np.ndarray:
    """Unit vectors of the titles ``[n_items, d]`` by ``encoder``, zeros where there is none.

    Raises:
        UserError: no encoder, no titles, or an encoder that cannot be had.
    """
    if config["encoder"] == "none":
        raise UserError("--encoder=none: what compares titles needs an encoder; use minilm, or tfidf (no download).")
    return text_embeddings(title_texts(dataset), config["encoder"])


@lru_cache(maxsize=1)
def title_embeddings(dataset: Dataset) -> np.ndarray | None:
    """``title_vectors`` for the harm metrics, kept for the last data set; None without titles or with ``encoder=none``.

    The encoder of the defaults may lack, without a network for example: then None, with a warning.

    Raises:
        UserError: the encoder that the user named cannot be had.
    """
    if dataset.config["encoder"] == "none":
        logger.info("Harm: hallucination is left out (--encoder=none).")
        return None
    try:
        texts = title_texts(dataset)
    except UserError as error:
        logger.info(f"Harm: hallucination is left out, because there are no titles: {error}")
        return None
    try:
        return text_embeddings(texts, dataset.config["encoder"])
    except UserError as error:
        if "encoder" in dataset.config.external_config_dict:
            raise
        logger.warning(f"Harm: hallucination is left out: {error}")
        return None
