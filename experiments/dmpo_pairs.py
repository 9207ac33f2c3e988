"""DMPO's own protocol on MovieLens-100K: two candidates, paired accuracy, k = 1 to 5 at the same number of updates.

    python experiments/dmpo_pairs.py            # about 40 minutes on two cores
    python experiments/dmpo_pairs.py --full     # histories of 35, 700 test users, the epochs of its run.sh: hours

The protocol is properties/compare/dmpo.yaml; to fit a laptop, histories hold 10 titles, 200 users are tested, and
learning rates are ten times those of its run.sh for fewer epochs. Controls without a model (listed first, shorter
title, more popular) answer the same pairs. Results go to results/dmpo-pairs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, keep

from recbole_llm.config import LLMConfig, read_yaml
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.harm import title_texts
from recbole_llm.pair_metrics import pair_metrics
from recbole_llm.report.compare import compare
from recbole_llm.run_folder import write_json

PROTOCOL = Path(__file__).resolve().parents[1] / "properties" / "compare" / "dmpo.yaml"
SMALL: dict[str, Any] = {"eval_users": 200, "valid_users": 100, "MAX_ITEM_LIST_LENGTH": 10, "state": "WARNING"}
SMALL_LLM: dict[str, Any] = {
    "item_text": "{movie_title}",
    "epochs": 2,
    "preference_epochs": 1,
    "learning_rate": 0.001,
    "preference_learning_rate": 0.001,
    "eval_step": 0,
}


def controls(protocol: Protocol) -> dict[str, dict[str, float]]:
    """Paired accuracy and AUCs of rules that need no model, on the same test pairs."""
    rows, titles = protocol.test, title_texts(protocol.dataset)
    pairs = rows.candidates
    target = (pairs == rows.targets[:, None]).argmax(1)
    lengths = np.array([len(t) for t in titles])
    scores = {
        "listed first": np.tile([1.0, 0.0], (len(rows), 1)),
        "shorter title": -lengths[pairs].astype(float),
        "more popular in training (all users)": protocol.popularity[pairs].astype(float),
    }
    each = np.arange(len(rows))
    return {name: pair_metrics(s[each, target], s[each, 1 - target], 4) for name, s in scores.items()}


def main() -> None:
    """The comparison, then the controls."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="the protocol as it is, but for the number of test users")
    full = parser.parse_args().full
    settings = read_yaml(str(PROTOCOL))
    models, per_model = settings.pop("models"), settings.pop("per_model")
    settings |= {"eval_users": 700} if full else SMALL
    per_model["LLMRanker"] |= {} if full else SMALL_LLM
    done = compare(models, "ml-100k", settings, per_model)
    name = "full" if full else "small"
    keep(done, name, "dmpo-pairs")
    ruled = controls(prepare_data(LLMConfig("Pop", "ml-100k", None, settings)))
    write_json(RESULTS / "dmpo-pairs" / f"{name}-controls.json", ruled)
    print(done["markdown"])
    for rule, values in ruled.items():
        print(f"{rule}: {values}")


if __name__ == "__main__":
    main()
