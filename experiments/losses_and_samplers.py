"""Every preference loss and every rejected strategy, end to end: accuracy, harm and CPU-minutes side by side.

    python experiments/losses_and_samplers.py            # about an hour on two cores; give it again after a break
    python experiments/losses_and_samplers.py --small    # the random LLM and few users: the whole path in some minutes

MovieLens-100K, 100 training users, the target among 20 candidates, one seed. Nothing is tuned: all preference stages
have the default learning rate and the beta of S-DPO's paper. Results go to results/losses-and-samplers/.
"""

from __future__ import annotations

import argparse

from kept import CLASSIC, LLM, PROTOCOL, keep

from recbole_llm.report.compare import compare

SHARED = {**PROTOCOL, "few_shot": 100}
LLM_SETTINGS = {
    **LLM,
    "item_text": "{movie_title}",
    "preference_learning_rate": 1e-4,
    "beta": 1.0,
    "rejected_num": 3,
    "generate_users": 10,
}
SMALL_SHARED = {"few_shot": 20, "eval_users": 20}
SMALL_LLM = {"llm": "tiny", "lora_target_modules": "all-linear", "sft_positions": 5, "preference_positions": 2}

LOSSES = (
    "LLMRanker[loss=SFT]",
    "LLMRanker[loss=DPO,rejected_num=1]",
    "LLMRanker[loss=DMPO]",
    "LLMRanker[loss=SDPO]",
    "LLMRanker[loss=SDPO,boundary_negatives=True,dynamic_beta=True]",
    "LLMRanker[loss=MultDPO,chosen_num=2]",
    "LLMRanker[loss=RosePO]",
    "LLMRanker[loss=RosePO,smoothing=0.1]",
    "LLMRanker[loss=RosePO,smoothing=0.0]",
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


def main() -> None:
    """Run all of them and keep the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="tiny LLM, few users, nothing kept that means anything")
    small = parser.parse_args().small
    shared, llm = (SHARED | SMALL_SHARED, LLM_SETTINGS | SMALL_LLM) if small else (SHARED, LLM_SETTINGS)
    per_model = {"LLMRanker": llm, "SASRec": CLASSIC, "GRU4Rec": CLASSIC}
    done = compare(["Pop", "SASRec", "GRU4Rec", *LOSSES, *SAMPLERS], "ml-100k", {**shared, "per_model": per_model})
    told = f"Preference stages: learning rate {llm['preference_learning_rate']:g}, beta {llm['beta']}, k = 3 (DPO 1)."
    names = {entry: entry.removeprefix("LLMRanker[loss=").removesuffix("]") for entry in (*LOSSES, *SAMPLERS)}
    print(keep(done, "small" if small else "table", "losses-and-samplers", told, names))


if __name__ == "__main__":
    main()
