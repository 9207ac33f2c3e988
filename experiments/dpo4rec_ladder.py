"""DPO4Rec step by step on MovieLens-100K: what texts, whose texts, and aligning their author each add.

    python experiments/dpo4rec_ladder.py            # about an hour on two cores; give it again after a break
    python experiments/dpo4rec_ladder.py --small    # the random LLM and few users: the whole path in some minutes

The rungs are those of properties/compare/dpo4rec.yaml with one seed (2020). Results go to results/dpo4rec-ladder/.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from kept import RESULTS, keep
from tabulate import tabulate

from recbole_llm.report.compare import compare
from recbole_llm.settings import read_yaml

LADDER = Path(__file__).resolve().parents[1] / "properties" / "compare" / "dpo4rec.yaml"
SMALL: dict[str, Any] = {"few_shot": 40, "eval_users": 20}
SMALL_MODEL = {
    "llm": "tiny",
    "text_encoder": "llm",
    "text_users": 20,
    "pair_users": 10,
    "reasoning_tokens": 16,
    "epochs": 5,
}
SECONDS = ("texts_s", "train_s", "samples_s", "align_s")
NAMES: dict[str, str] = read_yaml(str(LADDER))["names"]


def judged_table(runs: list[dict[str, Any]]) -> str:
    """What the texts about pair users were worth to the recommender, round by round, and what each stage cost."""
    rows = []
    for run in runs:
        for one in run.get("iterations", []):
            judged, align = one.get("judged", {}), one.get("align", {})
            rows.append(
                [
                    NAMES.get(run["label"], run["label"]),
                    one["iteration"],
                    one["best_valid_score"],
                    judged.get("ndcg_worst"),
                    judged.get("ndcg_mean"),
                    judged.get("ndcg_best"),
                    judged.get("pairs"),
                    (align.get("displacement") or {}).get("chosen_shift"),
                    *(round(one[key]) if key in one else None for key in SECONDS),
                ]
            )
    headers = ("run", "iteration", "validation", "NDCG@5 worst", "mean", "best text", "pairs", "chosen shift, nats",
               "texts s", "recommender s", "samples s", "align s")  # fmt: skip
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".4f", missingval="–")


def main() -> None:
    """Run the rungs and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny LLM, few users, nothing kept that means anything")
    small = parser.parse_args().small
    settings = read_yaml(str(LADDER))
    models, dataset, per_model = (settings.pop(key) for key in ("models", "dataset", "per_model"))
    for key in ("seeds", "names"):
        settings.pop(key)
    settings |= {"state": "WARNING", "seed": 2020, "baseline": list(NAMES)[:-1]}
    if small:
        settings |= SMALL
        per_model["DPO4Rec"] |= SMALL_MODEL
    done = compare(models, dataset, {**settings, "per_model": per_model})
    told = (
        "MovieLens-100K, 150 training users, 100 test users, the target among 100, one seed. Rungs share stages: "
        "seconds of texts that another rung wrote are near 0.\n\n" + judged_table(done["runs"])
    )
    print(keep(done, "small" if small else "table", "dpo4rec-ladder", told, NAMES))
    if not small:  # every rung against those below it, by users
        tests = done["tests"].replace({"model": NAMES, "baseline": NAMES})
        tests.to_csv(RESULTS / "dpo4rec-ladder" / "tests.csv", index=False, float_format="%.10g")


if __name__ == "__main__":
    main()
