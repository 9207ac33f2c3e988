"""Accuracy against the number of training users, 16 / 64 / 100 / 256, the same users for every model.

    python experiments/few_shot_curve.py     # about 15 minutes on two cores

The users of a smaller sample are among those of a larger one, and test users and candidates stay the same. Results go
to results/few-shot-curve/.
"""

from __future__ import annotations

import pandas as pd
from kept import CLASSIC, LLM, PROTOCOL, RESULTS, keep

from recbole_llm.files import write_text
from recbole_llm.report.compare import compare

USERS = (16, 64, 100, 256)
MODELS = ("Pop", "SASRec", "GRU4Rec", "LLMRanker")
PER_MODEL = {
    "SASRec": CLASSIC,
    "GRU4Rec": CLASSIC,
    "LLMRanker": {**LLM, "item_text": "{movie_title}", "sft_positions": 10},
}


def main() -> None:
    """Run the grid; keep the comparison and the curve."""
    entries = ["LLMRanker[finetune=none]", *(f"{m}[few_shot={n}]" for m in MODELS for n in USERS)]
    done = compare(entries, "ml-100k", {**PROTOCOL, "per_model": PER_MODEL})
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
