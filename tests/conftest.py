"""A small made-up data set in RecBole's atomic files, and runs that keep to a temporary folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401, I001 - before torch: it sets how torch's threads wait
from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.harm import HARM
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.quick_start import trainer_for

ANIMALS = ("cat", "dog", "fox", "owl", "bee", "ant", "elk", "cow", "pig", "hen", "rat", "bat", "cod", "eel", "jay")
COLOURS = ("red", "blue", "green", "black")
N_ITEMS = len(ANIMALS) * len(COLOURS)


def write_dataset(
    folder: Path,
    *,
    users: int = 40,
    events: int = 12,
    structure: float = 1.0,
    seed: int = 0,
    name: str = "toy",
    items: bool = True,
) -> Path:
    """Write ``<folder>/<name>/<name>.inter`` and ``.item``: 60 items such as `red cat`, ratings 1 to 5, distinct times.

    With probability ``structure`` a user's next item is the one after the last in a fixed cycle, else any other:
    1 is wholly predictable, 0 pure noise. No user meets an item twice.
    """
    rng = np.random.default_rng(seed)
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    cycle = rng.permutation(N_ITEMS)
    place = np.argsort(cycle)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    for user in range(users):
        item, seen = int(rng.integers(N_ITEMS)), []
        for step in range(events):
            seen.append(item)
            lines.append(f"u{user}\ti{item}\t{rng.integers(1, 6)}\t{880000000 + user * 1000 + step}")
            following = int(cycle[(place[item] + 1) % N_ITEMS])
            free = [i for i in range(N_ITEMS) if i not in seen]
            item = following if rng.random() < structure and following in free else int(rng.choice(free))
    (home / f"{name}.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if items:
        titles = [f"{colour} {animal}" for animal in ANIMALS for colour in COLOURS]
        rows = [f"i{i}\t{title}\t{1950 + i}" for i, title in enumerate(titles)]
        (home / f"{name}.item").write_text(
            "\n".join(["item_id:token\ttitle:token_seq\trelease_year:token", *rows]) + "\n", encoding="utf-8"
        )
    return folder


@pytest.fixture
def case(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """``case("kills")`` counts a kill, a fault or an input that this test has survived; all are told at the end."""
    return lambda kind, number=1: record_property(f"case {kind}", number)


@pytest.fixture(autouse=True)
def inputs_counted(request: pytest.FixtureRequest, case: Callable[..., None]) -> None:
    """The inputs that hypothesis makes for a test."""
    fuzzed = getattr(request.function, "_hypothesis_internal_use_settings", None)
    if fuzzed is not None:
        case("inputs fuzzed", fuzzed.max_examples)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One table of the cases of all tests that passed, whatever process ran them."""
    counts: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        for name, number in report.user_properties:
            if name.startswith("case ") and report.when == "call":
                counts[name.removeprefix("case ")] += int(number)
    if counts:
        terminalreporter.section("cases")
        for kind, number in sorted(counts.items()):
            terminalreporter.write_line(f"{kind:<18}{number:>8,}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads gain nothing on tensors this small, and lose much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a run on the made-up data in a temporary working folder; RecBole writes logs where it runs."""
    monkeypatch.chdir(tmp_path)
    return toy_settings(write_dataset(tmp_path / "data"), tmp_path / "saved")


def toy_settings(data_path: Path, saved: Path) -> dict[str, Any]:
    """Settings of a small, quiet run."""
    return {
        "dataset": "toy",
        "data_path": str(data_path),
        "checkpoint_dir": str(saved),
        "show_progress": False,
        "gpu_id": "",
        "eval_args": {"mode": {"valid": "uni9", "test": "uni9"}},
        "epochs": 1,
        "encoder": "tfidf",
        "state": "ERROR",
    }


@pytest.fixture
def graph(toy: dict[str, Any]) -> dict[str, Any]:
    """The settings of ``toy``, whose items but every third are linked to a knowledge graph."""
    home = Path(toy["data_path"], "toy")
    lines = (home / "toy.inter").read_text(encoding="utf-8").splitlines()[1:]
    items = sorted({line.split("\t")[1] for line in lines})
    linked = [item for number, item in enumerate(items) if number % 3]
    links = ["item_id:token\tentity_id:token", *(f"{item}\tm.{item}" for item in [*linked, "nobody met it"])]
    told = [f"m.{item}\tkind\tgenre{number % 4}" for number, item in enumerate(linked)]
    (home / "toy.link").write_text("\n".join(links) + "\n", encoding="utf-8")
    header = "head_id:token\trelation_id:token\ttail_id:token"
    (home / "toy.kg").write_text("\n".join([header, *told]) + "\n", encoding="utf-8")
    return toy


@pytest.fixture
def tiny(toy: dict[str, Any]) -> dict[str, Any]:
    """The same for LLMRanker with the random LLM."""
    return {**toy, "model": "LLMRanker", "llm": "tiny", "train_batch_size": 32}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The tiny LLM as a transformers folder."""
    model, tokenizer = tiny_llm()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


Event = tuple[str, str, float, float]  # user, item, rating, timestamp


def write_events(folder: Path, events: Iterable[Event], *, name: str = "toy") -> Path:
    """Write ``<folder>/<name>/<name>.inter`` from these interactions, in this order and full precision."""
    home = folder / name
    home.mkdir(parents=True, exist_ok=True)
    lines = [f"{user}\t{item}\t{rating!r}\t{time!r}" for user, item, rating, time in events]
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    (home / f"{name}.inter").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return folder


def random_events(lengths: Iterable[int], *, items: int = 60, seed: int = 0) -> list[Event]:
    """Users ``u0``, ``u1``, ... with so many distinct random items each, interleaved by small whole times."""
    rng = np.random.default_rng(seed)
    lengths = list(lengths)
    events: list[Event] = []
    for user, length in enumerate(lengths):
        chosen = rng.choice(items, length, replace=False)
        events += [
            (f"u{user}", f"i{item}", float(rng.integers(1, 6)), float(step * len(lengths) + user))
            for step, item in enumerate(chosen)
        ]
    return events


def prepared(settings: dict[str, Any], model: str, **changes: Any) -> tuple[LLMConfig, Protocol]:
    """A model's configuration and data, without a run."""
    config = LLMConfig(model, config_dict={**settings, **changes})
    return config, prepare_data(config)


def accuracy(result: dict[str, float]) -> dict[str, float]:
    """A test result without the harm metrics, which have tests of their own."""
    return {name: value for name, value in result.items() if name.split("@")[0] not in HARM}


def started(config: LLMConfig, protocol: Protocol, model_class: type | None = None) -> Any:
    """A trainer that can evaluate; of another model class than the configuration's where one is given."""
    model = (model_class or config.model_class)(config, protocol.train_data._dataset)
    trainer = trainer_for(config, model)
    folder = Path(config["checkpoint_dir"]) / "made-by-hand"
    folder.mkdir(parents=True, exist_ok=True)
    trainer.start(protocol, folder)
    return trainer
