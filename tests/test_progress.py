"""The time a comparison will still take: what is guessed, and what the runs that end teach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recbole_llm import progress
from recbole_llm.config import LLMConfig
from recbole_llm.progress import WholeRun, guessed_seconds
from recbole_llm.run_folder import run_folder_of


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One whose speed no other process changes: guesses are compared."""
    monkeypatch.setattr(progress, "_machine_flops", lambda: 1e9)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only place."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def made(settings: dict[str, Any], **other: Any) -> LLMConfig:
    settings = {"model": "Pop", **settings, **other}
    return LLMConfig(model=settings["model"], dataset=settings["dataset"], config_dict=settings)


def run(label: str, config: LLMConfig) -> tuple[str, LLMConfig, Path]:
    return label, config, run_folder_of(config)


def whole_of(settings: dict[str, Any], jobs: int, *guesses: float, monkeypatch: pytest.MonkeyPatch) -> WholeRun:
    """Runs whose guesses are known."""
    by_seed = dict(enumerate(guesses, 1))
    monkeypatch.setattr(progress, "guessed_seconds", lambda config, with_sft: by_seed[config["seed"]])
    return WholeRun([run(f"run {seed}", made(settings, seed=seed)) for seed in by_seed], jobs)


def test_what_costs_more_is_guessed_longer(toy: dict[str, Any], tiny: dict[str, Any]) -> None:
    def seconds(**other: Any) -> float:
        return guessed_seconds(made(tiny, **other))

    assert guessed_seconds(made(toy)) == 5.0
    assert seconds(epochs=3) > seconds(epochs=1)
    assert seconds(loss="DMPO", rejected_num=3) > seconds(loss="DPO", rejected_num=1) > seconds()
    assert seconds(few_shot=5) < seconds()
    assert seconds(finetune="none") < seconds()
    assert guessed_seconds(made(tiny), with_sft=False) < seconds()


def test_a_file_is_read_once_until_it_changes(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans ask for every run of a comparison."""
    read: list[Path] = []
    real = progress.read_header
    monkeypatch.setattr(progress, "read_header", lambda *args: (read.append(args[0]), real(*args))[1])
    config = made(toy, model="BPR")
    before = [guessed_seconds(made(toy, model="BPR", seed=seed)) for seed in (1, 2, 3)]
    assert len(read) == 1 and len(set(before)) == 1
    file = Path(config["data_path"]) / "toy.inter"
    rows = file.read_text(encoding="utf-8")
    file.write_text(rows + rows.partition("\n")[2], encoding="utf-8")
    assert guessed_seconds(config) > before[0] and len(read) == 2


def test_a_shared_stage_and_a_finished_run_are_not_guessed_again(
    tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    sft, dmpo, none = made(tiny), made(tiny, loss="DMPO"), made(tiny, finetune="none")
    first, second = WholeRun([run("zero-shot", none), run("SFT", sft)]).seconds
    assert first == guessed_seconds(none) and second == guessed_seconds(sft)  # which no zero-shot run shares
    capsys.readouterr()
    alone = WholeRun([run("DMPO", dmpo)])
    both = WholeRun([run("SFT", sft), run("DMPO", dmpo), run("the same SFT", sft)])
    assert both.seconds[0] == guessed_seconds(sft) and both.seconds[2] == 0.0
    assert both.seconds[1] < alone.seconds[0]
    assert "2 runs, 0 finished before" in capsys.readouterr().out
    folder = Path(run_folder_of(sft))
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    rest = WholeRun([run("SFT", sft), run("DMPO", dmpo)])
    assert rest.seconds[0] == 0.0 and rest.left() == rest.seconds[1]
    assert "2 runs, 1 finished before" in capsys.readouterr().out


def test_another_sft_is_not_shared(tiny: dict[str, Any]) -> None:
    whole = WholeRun([run("one", made(tiny)), run("other", made(tiny, learning_rate=0.02))])
    assert whole.seconds[0] == whole.seconds[1] == guessed_seconds(made(tiny))


def test_users_are_counted_in_their_own_column(tiny: dict[str, Any], tmp_path: Path) -> None:
    before = guessed_seconds(made(tiny, few_shot=5))
    file = tmp_path / "data" / "toy" / "toy.inter"
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    file.write_text("".join("\t".join([row[1], row[0], *row[2:]]) + "\n" for row in rows))
    assert guessed_seconds(made(tiny, few_shot=5)) == before


def test_one_at_a_time_each_kind_learns_from_its_last_run(
    toy: dict[str, Any], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_of(toy, 1, 10.0, 10.0, 10.0, monkeypatch=monkeypatch)
    with whole.running(0):
        clock[0] += 4
        assert whole.left() == 26.0  # what the run that is on has taken is no longer to come
        clock[0] += 16
        whole.learn(0)
    assert whole.left() == 30.0  # (20 + 10) / (10 + 10), twice 10 seconds
    with whole.running(1):
        clock[0] += 1  # failed: teaches nothing
    assert whole.left() == 15.0


def test_a_short_first_run_does_not_say_how_long_the_long_ones_take(
    toy: dict[str, Any], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_of(toy, 2, 5.0, 1000.0, 1000.0, monkeypatch=monkeypatch)
    whole.side_by_side()
    clock[0] += 20  # four times the guess, of which a new process is most
    whole.ended(0, None)
    assert 1000.0 < whole.left() < 1100.0  # by its pace alone it would be 8000
    clock[0] += 30
    before = whole.left()
    whole.ended(1, "it failed")
    assert whole.left() == before > 900  # one still runs, and what failed teaches nothing


def test_all_that_has_ended_decides_in_the_end(
    toy: dict[str, Any], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = whole_of(toy, 2, *[100.0] * 20, monkeypatch=monkeypatch)
    whole.side_by_side()
    for number in range(0, 18, 2):
        clock[0] += 300
        whole.ended(number, None)
        whole.ended(number + 1, None)
    assert whole.left() == pytest.approx(300, rel=0.1)
