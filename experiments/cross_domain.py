"""Films to games and back: an adapter trained on one data set ranks the other, beside models trained on that other one.

    python experiments/cross_domain.py --data_path=<folder that holds amazon-games/>   # 20 minutes on two cores

MovieLens-100K comes with RecBole; amazon-games is a folder with amazon-games.inter and .item (RecBole atomic files).
Its items with fewer than 50 interactions are left out. Few-shot: 100 training users of whichever data set is trained
on. The zero-shot LLM and popularity say what transfer has to beat; SASRec and the LLM trained in the domain what it may
cost. Results go to results/cross-domain/.
"""

from __future__ import annotations

import argparse
from typing import Any

from kept import keep

from recbole_llm.report.compare import compare

GAMES, DENSE = "amazon-games", "[50,inf)"
SHARED: dict[str, Any] = {
    "few_shot": 100,
    "eval_users": 100,
    "eval_args": {"mode": {"valid": "uni19", "test": "uni19"}},
    "MAX_ITEM_LIST_LENGTH": 10,
    "seed": 2020,
    "state": "WARNING",
}
LLM: dict[str, Any] = {
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "item_text_max_tokens": 24,
    "epochs": 1,
    "eval_step": 0,
    "sft_positions": 30,
    "learning_rate": 0.001,
    "train_batch_size": 16,
    "preference_positions": 4,
}
CLASSIC = {"train_batch_size": 256, "epochs": 50, "stopping_step": 5}
FILMS_TEXT = "item_text={movie_title}"
OF_GAMES = f"item_inter_num_interval={DENSE}"


def main() -> None:
    """Both directions, a table each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="folder that holds amazon-games/")
    given = parser.parse_args()
    shared = {**SHARED, "data_path": given.data_path}
    per_model = {"LLMRanker": LLM, "SASRec": CLASSIC}
    to_games = f"dataset=ml-100k,{FILMS_TEXT},eval_dataset={GAMES},eval_config={{'item_inter_num_interval': '{DENSE}'}}"
    to_films = f"{OF_GAMES},eval_dataset=ml-100k,eval_config={{'item_text': '{{movie_title}}'}}"
    for name, dataset, own, foreign in (
        ("films-to-games", GAMES, OF_GAMES, to_games),
        ("games-to-films", "ml-100k", FILMS_TEXT, f"dataset={GAMES},{to_films}"),
    ):
        classic = f"[{OF_GAMES}]" if dataset == GAMES else ""
        entries = [
            f"Pop{classic}",
            f"SASRec{classic}",
            f"LLMRanker[finetune=none,{own}]",
            f"LLMRanker[loss=SFT,{own}]",
            f"LLMRanker[loss=SFT,{foreign}]",
            f"LLMRanker[loss=DMPO,{foreign}]",
        ]
        done = compare(entries, dataset, shared, per_model)
        keep(done, name, "cross-domain")
        print(done["markdown"])


if __name__ == "__main__":
    main()
