"""Films to games and back: an adapter trained on one data set ranks the other, beside models trained on that other one.

    python experiments/cross_domain.py --data_path=<folder that holds amazon-games/>   # 20 minutes on two cores

MovieLens-100K comes with RecBole; amazon-games is a folder with amazon-games.inter and .item (RecBole atomic files).
Its items with fewer than 50 interactions are left out. Few-shot: 100 training users of whichever data set is trained
on. The zero-shot LLM and popularity say what transfer has to beat; SASRec and the LLM trained in the domain what it may
cost. Results go to results/cross-domain/.
"""

from __future__ import annotations

import argparse

from kept import CLASSIC, LLM, PROTOCOL, keep

from recbole_llm.report.compare import compare

GAMES, DENSE = "amazon-games", "[50,inf)"
FILMS_TEXT = "item_text={movie_title}"
OF_GAMES = f"item_inter_num_interval={DENSE}"


def main() -> None:
    """Both directions, a table each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_path", required=True, help="folder that holds amazon-games/")
    given = parser.parse_args()
    shared = {**PROTOCOL, "few_shot": 100, "data_path": given.data_path}
    per_model = {"LLMRanker": {**LLM, "item_text_max_tokens": 24}, "SASRec": CLASSIC}
    to_games = f"dataset=ml-100k,{FILMS_TEXT},eval_dataset={GAMES},eval_config={{'item_inter_num_interval': '{DENSE}'}}"
    to_films = f"{OF_GAMES},eval_dataset=ml-100k,eval_config={{'item_text': '{{movie_title}}'}}"
    for name, dataset, own, foreign in (
        ("films-to-games", GAMES, OF_GAMES, to_games),
        ("games-to-films", "ml-100k", FILMS_TEXT, f"dataset={GAMES},{to_films}"),
    ):
        classic = f"[{OF_GAMES}]" if dataset == GAMES else ""
        names = {
            f"Pop{classic}": "Pop",
            f"SASRec{classic}": "SASRec, in the domain",
            f"LLMRanker[finetune=none,{own}]": "LLMRanker, zero-shot",
            f"LLMRanker[loss=SFT,{own}]": "LLMRanker SFT, in the domain",
            f"LLMRanker[loss=SFT,{foreign}]": "LLMRanker SFT, from the other domain",
            f"LLMRanker[loss=DMPO,{foreign}]": "LLMRanker SFT + DMPO, from the other domain",
        }
        done = compare(list(names), dataset, {**shared, "per_model": per_model})
        print(keep(done, name, "cross-domain", names=names))


if __name__ == "__main__":
    main()
