"""Every loss learns what can be learned: a dial from pure noise to pure structure in made-up sequences.

A short SFT stage comes first and is shared; what the preference stage adds is the loss's own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_llm.loss import PREFERENCE_LOSSES
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import toy_settings, write_dataset

pytestmark = pytest.mark.usefixtures("one_thread")
USERS = 150
OWN = {
    "DPO": {"rejected_num": 1},
    "MultDPO": {"chosen_num": 2, "preference_epochs": 12},
    "RosePO": {"smoothing": 0.05},
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    """A folder for each setting of the dial; runs in it share one SFT stage."""
    folders = {dial: tmp_path_factory.mktemp(f"dial{int(10 * dial)}") for dial in (0.0, 1.0)}
    for dial, folder in folders.items():
        write_dataset(folder / "data", users=USERS, structure=dial)
    return folders


def hit(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> float:
    """Hit@1 among 10 candidates."""
    monkeypatch.chdir(folder)
    settings = {
        **toy_settings(folder / "data", folder / "saved"),
        "model": "LLMRanker",
        "llm": "tiny",
        "finetune": "full",
        "epochs": 1,
        "learning_rate": 5e-3,
        "lr_scheduler": "constant",
        "train_batch_size": 32,
        "preference_learning_rate": 4e-3,
        "beta": 0.2,
        "rejected_num": 3,
        "eval_step": 0,
        "encoder": "none",
    }
    return run_recbole_llm(config_dict={**settings, **changes})["test_result"]["hit@1"]


@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_structure_is_learned(worlds: dict[float, Path], monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """A fixed cycle: one epoch of SFT is far from perfect, the preference stage gets near it.

    For MultDPO of two chosen titles the one after the next is as good, and it stands among the candidates of every
    fifth user.
    """
    before = hit(worlds[1.0], monkeypatch, loss="SFT")
    after = hit(worlds[1.0], monkeypatch, **{"loss": loss, "preference_epochs": 10, **OWN.get(loss, {})})
    assert before < 0.5 and after > (0.65 if loss == "MultDPO" else 0.8)


@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_noise_is_not(worlds: dict[float, Path], monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    """Random sequences: chance is .1, and three standard errors of 150 users are .073."""
    assert hit(worlds[0.0], monkeypatch, **{"loss": loss, **OWN.get(loss, {}), "preference_epochs": 2}) < 0.1 + 0.08
