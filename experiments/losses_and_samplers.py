"""Every preference loss and every rejected strategy, end to end: accuracy, harm and CPU-minutes side by side.

    python experiments/losses_and_samplers.py            # about an hour on two cores; give it again after a break
    python experiments/losses_and_samplers.py --small    # the random LLM and few users: the whole path in some minutes

MovieLens-100K, 100 training users, the target among 20 candidates, one seed. Learning rate and beta of the preference
stage are chosen once, with DMPO on validation, and are then the same for all losses: no loss is tuned on its own, none
on test. Results go to results/losses-and-samplers/.
"""

from __future__ import annotations

import argparse
from itertools import product
from typing import Any

from kept import keep

from recbole_llm.report.compare import compare

SHARED: dict[str, Any] = {
    "few_shot": 100,
    "eval_users": 100,
    "eval_args": {"mode": {"valid": "uni19", "test": "uni19"}},
    "MAX_ITEM_LIST_LENGTH": 10,
    "seed": 2020,
    "state": "WARNING",
}
LLM: dict[str, Any] = {
    "item_text": "{movie_title}",
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "epochs": 1,
    "eval_step": 0,
    "sft_positions": 30,
    "learning_rate": 0.001,
    "train_batch_size": 16,
    "preference_positions": 4,
}
SMALL_SHARED = {"few_shot": 20, "eval_users": 20}
SMALL_LLM = {"llm": "tiny", "lora_target_modules": "all-linear", "sft_positions": 5, "preference_positions": 2}
RATES, BETAS = (1e-4, 5e-4), (0.1, 1.0)
CLASSIC = {"train_batch_size": 256, "epochs": 50, "stopping_step": 5}

LOSSES = (
    "LLMRanker[loss=SFT]",
    "LLMRanker[loss=DPO,rejected_num=1]",
    "LLMRanker[loss=DMPO]",
    "LLMRanker[loss=DMPO,pairwise_mean=True,reference_free=True,sft_weight=1.0]",
    "LLMRanker[loss=SDPO]",
    "LLMRanker[loss=SDPO,boundary_negatives=True,dynamic_beta=True]",
    "LLMRanker[loss=DMPO,boundary_negatives=True,dynamic_beta=True]",
    "LLMRanker[loss=MultDPO,chosen_num=2]",
    "LLMRanker[loss=RosePO]",
    "LLMRanker[loss=RosePO,smoothing=0.1]",
    "LLMRanker[loss=RosePO,smoothing=0.0]",
    "LLMRanker[loss=RosePO,robust=True,smoothing_max=0.4]",
)
SAMPLERS = tuple(
    f"LLMRanker[loss=RosePO,rejected={rejected}]"
    for rejected in (
        "popularity",
        "low_rating",
        "self_hard",
        "semantic",
        "from_model",
        "self_hard+semantic+popularity",
    )
)


def chosen_on_validation(shared: dict[str, Any], llm: dict[str, Any]) -> dict[str, float]:
    """The preference stage's learning rate and beta with the best validation NDCG@10 of DMPO; the grid is kept."""
    grid = [
        f"LLMRanker[loss=DMPO,eval_step=1,preference_learning_rate={rate},beta={beta}]"
        for rate, beta in product(RATES, BETAS)
    ]
    # eval_step names the SFT stage; each run validates its single epoch, which selects nothing within a run.
    done = compare(grid, "ml-100k", shared, {"LLMRanker": {**llm, "rejected_num": 3}})
    keep(done, "chosen_on_validation", "losses-and-samplers", "Validation NDCG@10 chose; the columns are test metrics.")
    scores = [run["valid_metrics"]["ndcg@10"] for run in done["runs"]]
    rate, beta = list(product(RATES, BETAS))[scores.index(max(scores))]
    told = ", ".join(f"{entry} {score:.4f}" for entry, score in zip(grid, scores, strict=True))
    print(f"validation: {told}\nchosen: preference_learning_rate={rate}, beta={beta}")
    return {"preference_learning_rate": rate, "beta": beta}


def main() -> None:
    """Choose on validation, then run and keep both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny LLM, few users, nothing kept that means anything")
    small = parser.parse_args().small
    shared, llm = (SHARED | SMALL_SHARED, LLM | SMALL_LLM) if small else (SHARED, LLM)
    chosen = chosen_on_validation(shared, llm)
    per_model = {"LLMRanker": {**llm, **chosen, "rejected_num": 3}, "SASRec": CLASSIC, "GRU4Rec": CLASSIC}
    done = compare(["Pop", "SASRec", "GRU4Rec", *LOSSES, *SAMPLERS], "ml-100k", shared, per_model)
    told = f"Preference stages: learning rate {chosen['preference_learning_rate']}, beta {chosen['beta']}, chosen with DMPO"
    keep(done, "small" if small else "table", "losses-and-samplers", f"{told} on validation; k = 3 (DPO 1), 400 pairs.")
    print(done["markdown"])


if __name__ == "__main__":
    main()
