"""DMPO's own protocol on MovieLens-100K: two candidates, paired accuracy, k rejected titles, equal updates.

    python experiments/dmpo_pairs.py --k 1      # about 15 minutes on two cores
    python experiments/dmpo_pairs.py --full     # k = 1 to 5, histories of 35, 700 test users, run.sh's epochs: hours

The protocol is properties/compare/dmpo.yaml. To fit a laptop, without --full histories hold 5 titles, 100 users are
tested, and there are fewer epochs at a higher learning rate. Controls without a model (listed first, shorter title,
more popular) answer the same pairs. Results go to results/dmpo-pairs/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from kept import RESULTS, keep

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.files import write_json
from recbole_llm.harm import title_texts
from recbole_llm.pair_metrics import pair_metrics
from recbole_llm.report.compare import compare
from recbole_llm.settings import read_yaml

PROTOCOL = Path(__file__).resolve().parents[1] / "properties" / "compare" / "dmpo.yaml"
SMALL: dict[str, Any] = {"eval_users": 100, "valid_users": 100, "MAX_ITEM_LIST_LENGTH": 5, "state": "WARNING"}
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
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="numbers of rejected titles")
    given = parser.parse_args()
    full = given.full
    settings = read_yaml(str(PROTOCOL))
    models, per_model = settings.pop("models"), settings.pop("per_model")
    models = [m for m in models if "DMPO" not in m or any(f"rejected_num={k}]" in m for k in given.k)]
    settings |= {"eval_users": 700} if full else SMALL
    per_model["LLMRanker"] |= {} if full else SMALL_LLM
    done = compare(models, "ml-100k", {**settings, "per_model": per_model})
    name = "full" if full else "small"
    short = {m: m.removeprefix("LLMRanker[loss=").removesuffix("]").replace("rejected_num", "k") for m in models}
    print(keep(done, name, "dmpo-pairs", names=short))
    ruled = controls(prepare_data(LLMConfig("Pop", "ml-100k", None, settings)))
    write_json(RESULTS / "dmpo-pairs" / f"{name}-controls.json", ruled)
    for rule, values in ruled.items():
        print(f"{rule}: {values}")


if __name__ == "__main__":
    main()
