"""The same seed gives the same bits: runs of an LLM under another hash seed, rows in any order.

Elsewhere: killed runs (test_resume), passes of a step (test_llmranker), attention and kernels (test_attention,
test_fast_linears), SASRec (test_protocol), how much each of them moves real runs (experiments/determinism.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared, started

pytestmark = pytest.mark.usefixtures("one_thread")
# Everything that draws or ranks on the way: dropout, three sources of rejected titles, validation that selects.
RUN = {"loss": "RosePO", "smoothing": 0.1, "rejected": "self_hard+semantic+popularity", "lora_dropout": 0.1}
FEW = {"few_shot": 10, "eval_users": 10, "rejected_pool": 6}
FILES = ("adapter_model.safetensors", "per_user.csv.gz", "metrics.jsonl", "candidates-test.jsonl.gz")


def left(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_same_seed_same_bits_in_any_process(tiny: dict[str, Any], tmp_path: Path) -> None:
    """In a process whose sets are ordered otherwise, and here after other draws: the same. Another seed: not."""
    apart, here, seed = ({**tiny, **RUN, **FEW, "checkpoint_dir": str(tmp_path / n)} for n in ("apart", "here", "seed"))
    program = "import json, sys; from recbole_llm.quick_start import run_recbole_llm as r; r(**json.loads(sys.argv[1]))"
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", program, json.dumps({"config_dict": apart})]
    subprocess.run(command, env={**os.environ, **environment}, check=True, capture_output=True, timeout=120)
    (result,) = Path(apart["checkpoint_dir"]).glob("LLMRanker-*/result.json")

    torch.rand(3), np.random.rand(3)
    first = left(Path(run_recbole_llm(config_dict=here)["run_folder"]))
    assert left(result.parent) == first
    other = left(Path(run_recbole_llm(config_dict={**seed, "seed": 3})["run_folder"]))
    assert {name for name in FILES if other[name] == first[name]} == {"candidates-test.jsonl.gz"}


@pytest.mark.parametrize("budget", [64, 2048])
def test_rows_in_any_order_and_company(tiny: dict[str, Any], budget: int) -> None:
    """A user's scores do not depend on who is scored beside, in what order, and in passes of what size."""
    config, protocol = prepared({**tiny, "token_budget": budget}, "LLMRanker")
    trainer = started(config, protocol)
    trainer.model.eval()
    rows, expected = protocol.test, []
    with torch.no_grad():
        for row in range(len(rows)):
            expected.append(trainer.score_rows(rows, np.array([row]))[0][0])
        order = np.random.default_rng(0).permutation(len(rows))
        found = torch.cat([trainer.score_rows(rows, part)[0] for part in np.array_split(order, 3)])
    expected = torch.stack(expected)
    assert expected.std(1).min() > 0.01  # there is something to mix up
    torch.testing.assert_close(found, expected[torch.as_tensor(order)], atol=1e-4, rtol=0)
