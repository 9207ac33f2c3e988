"""Every model that `recbole-llm ls` names ranks under the protocol, or says what it lacks."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.utils import ModelType

import recbole_llm.model
from recbole_llm import config
from recbole_llm.checks import wrong_model
from recbole_llm.config import LLMConfig
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.model import OWN_MODELS, UNFIT, model_names
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared

pytestmark = pytest.mark.usefixtures("one_thread")

# Of items they read a column, by default one that the made-up data lack.
COLUMNS = {"inter": ["user_id", "item_id", "timestamp", "rating"], "item": ["item_id", "release_year"]}
READ_COLUMNS = ("FDSA", "GRU4RecF", "SASRecF")
OF_GRAPHS = ("CFKG", "CKE", "KGAT", "KGCN", "KGIN", "KGNNLS", "KTUP", "MCCLK", "MKR", "RippleNet")
LACKS = {
    **dict.fromkeys(OF_GRAPHS, r"\.kg"),
    "GRU4RecKG": r"\.ent",
}


def needs_a_package(model: str) -> bool:
    """Whether a model imports a package that is not here."""
    modules = {"NCL": "faiss", "KGAT": "dgl", "KGIN": "torch_scatter", "MCCLK": "torch_scatter"}
    return model in modules and find_spec(modules[model]) is None


@pytest.mark.parametrize("model", [name for name in model_names() if name not in OWN_MODELS])
def test_one_epoch(toy: dict[str, Any], model: str) -> None:
    settings = {**toy, "encoder": "none", "train_batch_size": 256}
    if model in READ_COLUMNS:
        with pytest.raises(ConfigError, match="--selected_features: toy.item has no column class; it has item_id, "):
            run_recbole_llm(model, config_dict=settings)
        settings |= {"selected_features": ["release_year"]}
        with pytest.raises(ConfigError, match="'release_year' of toy.item is not read; add it to --load_col"):
            run_recbole_llm(model, config_dict={**settings, "load_col": {"inter": "*"}})
        assert LLMConfig(model, config_dict=settings)["load_col"] == COLUMNS
        on_films = LLMConfig(model, "ml-100k", config_dict={"selected_features": ["movie_title"]})
        assert on_films["load_col"]["item"] == ["item_id", "release_year", "class", "movie_title"]
    if needs_a_package(model):
        with pytest.raises(ConfigError, match=rf"--model={model}: it needs the package (\w+); `pip install"):
            run_recbole_llm(model, config_dict=settings)
        return
    if model in LACKS:
        with pytest.raises(UserError, match=LACKS[model]):
            run_recbole_llm(model, config_dict=settings)
        return
    assert np.isfinite(run_recbole_llm(model, config_dict=settings)["test_result"]["ndcg@10"])


@pytest.mark.parametrize("model", OF_GRAPHS)
def test_one_epoch_with_a_knowledge_graph(graph: dict[str, Any], model: str) -> None:
    """Asked as every other model, of items without an entity too."""
    if needs_a_package(model):
        pytest.skip("its package is not there")
    result = run_recbole_llm(model, config_dict={**graph, "encoder": "none"})
    assert np.isfinite(result["test_result"]["ndcg@10"])
    assert result["candidate_hash"] == prepared(graph, "BPR")[1].candidate_hash


def test_a_failure_in_training_is_told(toy: dict[str, Any]) -> None:
    """RecBole's own errors come as they like; the run folder has the traceback."""
    given = {**toy, "train_neg_sample_args": None}
    with pytest.raises(UserError, match="--model=BPR --dataset=toy: training failed: KeyError.*traceback.txt says"):
        run_recbole_llm("BPR", config_dict=given)


def test_items_that_share_an_entity(graph: dict[str, Any]) -> None:
    """The first of them that was met has it, an item's last entity counts, and the others are as without one."""
    file = Path(graph["data_path"], "toy", "toy.link")
    header, first, second, *others, nobody = file.read_text(encoding="utf-8").splitlines()
    (one, entity), two = first.split("\t"), second.split("\t")[0]
    links = [f"unmet\t{entity}", f"{one}\tm.other", first, f"{two}\t{entity}", *others, nobody]
    file.write_text("\n".join([header, *links]) + "\n", encoding="utf-8")
    _, protocol = prepared(graph, "CKE")
    items, entities = (protocol.dataset.field2token_id[field] for field in ("item_id", "head_id"))
    assert items[one] == entities[entity] and items[two] == entities[f"[item] {two}"]
    assert sorted(items.values()) == list(range(protocol.dataset.item_num))
    result = run_recbole_llm("CKE", config_dict={**graph, "encoder": "none"})
    assert result["candidate_hash"] == prepared(graph, "BPR")[1].candidate_hash


def test_few_users_are_an_epoch(toy: dict[str, Any]) -> None:
    """Of models that learn from users; RecBole's loader goes over all of them."""
    for few_shot, expected in ((5, 5), (None, prepared(toy, "BPR")[1].dataset.user_num)):
        _, protocol = prepared({**toy, "few_shot": few_shot}, "MultiVAE")
        seen = torch.cat([batch["user_id"] for batch in protocol.train_data])
        assert len(seen) == len(set(seen.tolist())) == expected
        if few_shot:
            assert set(seen.tolist()) == set(map(int, protocol.train_users))


def test_weights_to_begin_with_that_are_not_there(toy: dict[str, Any], tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.pth")
    with pytest.raises(ConfigError, match=r"--pretrain_path=.*gone\.pth: there is no such file"):
        run_recbole_llm("NAIS", config_dict={**toy, "pretrain_path": missing})
    neumf = {**toy, "model": "NeuMF", "mf_pretrain_path": missing}
    assert LLMConfig(config_dict=neumf)["mf_pretrain_path"] == missing  # read with use_pretrain alone
    with pytest.raises(ConfigError, match="--mf_pretrain_path=.*there is no such file"):
        LLMConfig(config_dict={**neumf, "use_pretrain": True})
    assert wrong_model("Mine", ModelType.GENERAL, {"log_path": missing}) == []
    (tmp_path / "gone.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match="building the model failed: "):
        run_recbole_llm("NAIS", config_dict={**toy, "pretrain_path": missing})


@pytest.mark.parametrize("model", UNFIT)
def test_what_cannot_rank_is_told_and_not_named(toy: dict[str, Any], model: str) -> None:
    assert model not in model_names()
    with pytest.raises(ConfigError, match=f"--model={model}: it "):
        run_recbole_llm(model, config_dict=toy)


MY_MODEL = """
import torch
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.model.loss import BPRLoss
from recbole.utils import InputType


class MyModel(GeneralRecommender):
    input_type = InputType.PAIRWISE

    def __init__(self, config, dataset):
        super().__init__(config, dataset)
        self.user, self.item = (torch.nn.Embedding(n, config["my_size"]) for n in (self.n_users, self.n_items))

    def score(self, interaction, item):
        return (self.user(interaction[self.USER_ID]) * self.item(interaction[item])).sum(-1)

    def calculate_loss(self, interaction):
        return BPRLoss()(self.score(interaction, self.ITEM_ID), self.score(interaction, self.NEG_ITEM_ID))

    def predict(self, interaction):
        return self.score(interaction, self.ITEM_ID)
"""


def test_a_model_of_ones_own_is_two_files(toy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CONTRIBUTING.md says, the folders being others."""
    shutil.copytree(config.PROPERTIES, tmp_path / "properties")
    monkeypatch.setattr(config, "PROPERTIES", tmp_path / "properties")
    monkeypatch.setattr(recbole_llm.model, "__path__", [*recbole_llm.model.__path__, str(tmp_path)])
    (tmp_path / "mymodel.py").write_text(MY_MODEL, encoding="utf-8")
    (tmp_path / "properties" / "model" / "MyModel.yaml").write_text("my_size: 8   # (int)\n", encoding="utf-8")
    settings = {**toy, "encoder": "none"}
    result = run_recbole_llm("MyModel", config_dict={**settings, "my_size": 4})
    assert np.isfinite(result["test_result"]["ndcg@10"]) and "MyModel-toy-" in result["run_folder"]
    full = run_recbole_llm("MyModel", config_dict={**settings, "eval_args": {"mode": "full"}})
    assert np.isfinite(full["test_result"]["ndcg@10"])
    with pytest.raises(ConfigError, match="--my_siz: no such key; did you mean `my_size`"):
        LLMConfig("MyModel", config_dict={**settings, "my_siz": 4})
