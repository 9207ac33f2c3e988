"""Pop ranks by training interactions, whatever the batch size and the seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.pop import Pop as RecBolePop

from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared, started

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("batch", [7, 2048])
def test_counts_are_training_interactions(toy: dict[str, Any], seed: int, batch: int) -> None:
    config, protocol = prepared(toy, "Pop", seed=seed, train_batch_size=batch)
    trainer = started(config, protocol)
    trainer.fit(protocol.train_data, None, saved=False)
    counts = np.array([protocol.item_counter.get(i, 0) for i in range(protocol.dataset.item_num)])
    assert trainer.model.item_cnt.squeeze(1).tolist() == counts.tolist() and counts.max() > 5


def test_recbole_counts_once_a_batch(toy: dict[str, Any]) -> None:
    """Why the class is here; when this fails RecBole has mended it, and the class can go."""
    config, protocol = prepared(toy, "Pop")
    theirs = RecBolePop(config, protocol.train_data._dataset)
    theirs.calculate_loss(Interaction({config["ITEM_ID_FIELD"]: torch.tensor([3, 3, 3, 4])}))
    assert theirs.item_cnt[3:5, 0].tolist() == [1, 1]


def test_the_seed_changes_nothing(toy: dict[str, Any]) -> None:
    first, second = (run_recbole_llm("Pop", config_dict={**toy, "seed": seed})["test_result"] for seed in (1, 2))
    assert first == second and 0 < first["ndcg@10"] < 1


@pytest.mark.parametrize("model", ["Pop", "ItemKNN", "EASE", "Random"])
def test_what_trains_nothing_has_no_trained_parameters(toy: dict[str, Any], model: str) -> None:
    """RecBole's models of this kind hold one that is never used."""
    folder = Path(run_recbole_llm(model, None, None, toy)["run_folder"])
    assert json.loads((folder / "result.json").read_text())["trainable_parameters"] == 0
