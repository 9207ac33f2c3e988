"""Accuracy against the number of training users, 16 / 64 / 100 / 256, the same users for every model.

    python experiments/few_shot_curve.py     # about 20 minutes on two cores

The users of a smaller sample are among those of a larger one, and test users and candidates stay the same. Results go
to results/few-shot-curve/.
"""

from __future__ import annotations

from typing import Any

import pandas as pd
from kept import RESULTS, keep

from recbole_llm.report.compare import compare
from recbole_llm.run_folder import write_text

USERS = (16, 64, 100, 256)
MODELS = ("Pop", "SASRec", "GRU4Rec", "LLMRanker")
SHARED: dict[str, Any] = {
    "eval_users": 100,
    "eval_args": {"mode": {"valid": "uni19", "test": "uni19"}},
    "MAX_ITEM_LIST_LENGTH": 10,
    "seed": 2020,
    "state": "WARNING",
}
CLASSIC = {"train_batch_size": 256, "epochs": 50, "stopping_step": 5}
PER_MODEL: dict[str, Any] = {
    "SASRec": CLASSIC,
    "GRU4Rec": CLASSIC,
    "LLMRanker": {
        "item_text": "{movie_title}",
        "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "epochs": 1,
        "eval_step": 0,
        "sft_positions": 30,
        "learning_rate": 0.001,
        "train_batch_size": 16,
    },
}


def main() -> None:
    """Run the grid; keep the comparison and the curve."""
    entries = ["LLMRanker[finetune=none]", *(f"{m}[few_shot={n}]" for m in MODELS for n in USERS)]
    done = compare(entries, "ml-100k", SHARED, PER_MODEL)
    keep(done, "table", "few-shot-curve")
    scores = {run["label"]: run.get("metrics", {}).get("ndcg@10") for run in done["runs"]}
    curve = pd.DataFrame(
        {"model": MODELS} | {f"{n} users": [scores[f"{m}[few_shot={n}]"] for m in MODELS] for n in USERS}
    )
    curve.loc[len(curve)] = ["LLMRanker, zero-shot", *[scores["LLMRanker[finetune=none]"]] * len(USERS)]
    told = "NDCG@10 on 100 test users, the target among 20 candidates, one seed.\n\n"
    write_text(RESULTS / "few-shot-curve" / "curve.md", told + curve.to_markdown(index=False, floatfmt=".4f") + "\n")
    print(curve.to_markdown(index=False, floatfmt=".4f"))


if __name__ == "__main__":
    main()
