"""Every model that `recbole-llm ls` names ranks under the protocol, or says what it lacks."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

from recbole_llm.errors import ConfigError, UserError
from recbole_llm.model import OWN_MODELS, UNFIT, model_names
from recbole_llm.quick_start import run_recbole_llm

pytestmark = pytest.mark.usefixtures("one_thread")

# Of items they read a column, by default one that the made-up data lack.
COLUMNS = {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "release_year"]}
READ_COLUMNS = ("FDSA", "GRU4RecF", "SASRecF")
LACKS = {
    "S3Rec": "class",
    "NCL": "faiss",
    **dict.fromkeys(("CFKG", "CKE", "KGAT", "KGCN", "KGIN", "KGNNLS", "KTUP", "MCCLK", "MKR", "RippleNet"), r"\.kg"),
    **dict.fromkeys(("GRU4RecKG", "KSR"), r"\.ent"),
}


@pytest.mark.parametrize("model", [name for name in model_names() if name not in OWN_MODELS])
def test_one_epoch(toy: dict[str, Any], model: str) -> None:
    settings = {**toy, "encoder": "none", "train_batch_size": 256}
    if model in READ_COLUMNS:
        settings |= {"load_col": COLUMNS, "selected_features": ["release_year"]}
    if model == "NCL" and find_spec("faiss"):
        pytest.skip("its package is there")
    if model in LACKS:
        with pytest.raises(UserError, match=LACKS[model]):
            run_recbole_llm(model, config_dict=settings)
        return
    assert np.isfinite(run_recbole_llm(model, config_dict=settings)["test_result"]["ndcg@10"])


def test_a_failure_in_training_is_told(toy: dict[str, Any]) -> None:
    """RecBole's own errors come as they like; the run folder has the traceback."""
    given = {**toy, "train_neg_sample_args": None}
    with pytest.raises(UserError, match="--model=BPR --dataset=toy: training failed: KeyError.*traceback.txt says"):
        run_recbole_llm("BPR", config_dict=given)


@pytest.mark.parametrize("model", UNFIT)
def test_what_cannot_rank_is_told_and_not_named(toy: dict[str, Any], model: str) -> None:
    assert model not in model_names()
    with pytest.raises(ConfigError, match=f"--model={model}: it "):
        run_recbole_llm(model, config_dict=toy)
