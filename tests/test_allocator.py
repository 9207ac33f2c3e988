"""Memory that torch frees while a recommender is trained: kept for the next batch, returned at the end."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from recbole_llm import trainer
from recbole_llm.allocator import BY_USER, freed_memory_kept
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import write_dataset

GLIBC = hasattr(ctypes.CDLL(None), "mallopt") and hasattr(ctypes.CDLL(None), "malloc_trim")
STEPS = 5
COUNTED = f"""
import resource, psutil, torch
from recbole_llm.allocator import freed_memory_kept

def step():  # blocks above 32 MiB, which glibc never keeps by itself
    sum(float(torch.ones(2**24)[-1]) for _ in range(2))

def faults():  # of the step with the fewest: on a full machine the kernel takes pages back in between
    counts = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
    for _ in range({STEPS}):
        step()
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    return min(after - before for before, after in zip(counts, counts[1:]))

resident = psutil.Process().memory_info
step()
start = resident().rss
plain = faults()
with freed_memory_kept() as kept:
    inside, held = faults(), resident().rss - start
print(kept, plain, inside, held // 2**20, (resident().rss - start) // 2**20)
"""


@pytest.mark.skipif(not GLIBC, reason="glibc's allocator")
def test_freed_blocks_are_kept_and_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2 x 64 MiB asks the kernel for 32,768 pages of 4 KiB, or for 64 huge ones."""
    for name in BY_USER:
        monkeypatch.delenv(name, raising=False)
    done = subprocess.run([sys.executable, "-c", COUNTED], capture_output=True, text=True, check=True)
    kept, *counts = done.stdout.split()
    plain, inside, held, after = map(int, counts)
    assert kept == "True"
    assert inside * 20 < plain
    assert held > 50 and after < 20  # MiB


def test_nothing_is_done_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    with freed_memory_kept() as kept:
        assert not kept


@pytest.mark.parametrize("name", BY_USER)
def test_what_the_user_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1048576")
    with freed_memory_kept() as kept:
        assert not kept


@pytest.mark.parametrize(
    ("model", "own", "times"), [("SASRec", {"train_batch_size": 64}, 1), ("LLMRanker", {"llm": "tiny"}, 0)]
)
@pytest.mark.usefixtures("one_thread")
def test_recommenders_are_trained_so_and_llms_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, own: dict[str, Any], times: int
) -> None:
    entered = []

    @contextmanager
    def counted() -> Iterator[bool]:
        entered.append(model)
        yield True

    def run(name: str) -> Any:
        settings = {
            "data_path": str(write_dataset(tmp_path / name)),
            "checkpoint_dir": str(tmp_path / name / "saved"),
            "epochs": 2,
            "encoder": "none",
            "eval_args": {"mode": "uni20"},  # in full ranking an LLM trains a recommender too
        }
        return run_recbole_llm(model, "toy", config_dict=settings | own)["test_result"]

    as_it_comes = run("kept")
    monkeypatch.setattr(trainer, "freed_memory_kept", counted)
    assert run("counted") == as_it_comes  # the numbers are the same
    assert entered == [model] * times
