"""A run in several processes leaves what a run in one leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from recbole_llm.quick_start import run_recbole_llm
from tests.processes import run_together

pytestmark = pytest.mark.usefixtures("one_thread")


def left(result: dict[str, Any]) -> dict[str, Any]:
    """What a run leaves that no clock measured."""
    folder = Path(result["run_folder"])
    return {
        "steps": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "adapter": load_file(folder / "adapter_model.safetensors"),
        "rows": (folder / "per_user.csv.gz").read_bytes(),
        "record": json.loads((folder / "result.json").read_text()),
    }


def alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Steps, adapter, metrics and rows of two runs agree; log-probs of whole titles relative to their size."""
    assert len(found["steps"]) == len(expected["steps"]) > 0
    for step, other in zip(found["steps"], expected["steps"], strict=True):
        assert step.pop("stage") == other.pop("stage")
        assert step == pytest.approx(other, rel=tolerance, abs=tolerance)
    assert found["adapter"].keys() == expected["adapter"].keys()
    for name, tensor in found["adapter"].items():
        np.testing.assert_allclose(tensor, expected["adapter"][name], atol=tolerance)
    assert found["rows"] == expected["rows"]
    for key in ("metrics", "valid_metrics", "train_tokens", "candidate_hash", "rows"):
        assert found["record"][key] == expected["record"][key]


def test_two_processes_leave_what_one_leaves(tiny: dict[str, Any], tmp_path: Path) -> None:
    """SFT, then DMPO; only one process's folder, logs and TensorBoard files are there."""
    settings = {**tiny, "loss": "DMPO", "epochs": 1}
    one = run_recbole_llm(config_dict={**settings, "checkpoint_dir": str(tmp_path / "one")})
    logs = len(list(tmp_path.glob("log/*/*"))), len(list(tmp_path.glob("log_tensorboard/*")))
    first, second = run_together(2, settings)
    assert first["test_result"] == second["test_result"] and first["best_valid_score"] == second["best_valid_score"]
    found = left(first)
    alike(found, left(one))
    assert found["record"]["processes"] == 2 and found["record"]["test_tokens"] > 0
    assert (len(list(tmp_path.glob("log/*/*"))), len(list(tmp_path.glob("log_tensorboard/*")))) == (2 * logs[0], 2 * logs[1])


@pytest.mark.faults
def test_fsdp(tiny: dict[str, Any], tmp_path: Path) -> None:
    settings = {**tiny, "loss": "DMPO", "epochs": 1}
    one = run_recbole_llm(config_dict={**settings, "checkpoint_dir": str(tmp_path / "one")})
    first, second = run_together(2, {**settings, "fsdp": True})
    alike(left(first), left(one))
