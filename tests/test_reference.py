"""Reference log-probs on disk: equal to direct computation, computed once, and never stale."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recbole_llm import reference
from recbole_llm.data import rejected
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.errors import UserError
from recbole_llm.llm.adapter import adapter_state, set_adapter_state
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.stages import Stage
from tests.conftest import prepared, started

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WINDOWS_AT_ONCE", 8)


@pytest.fixture
def settings(tiny: dict[str, Any]) -> dict[str, Any]:
    return {**tiny, "loss": "DMPO", "rejected_num": 2, "epochs": 0, "preference_epochs": 1, "prompt": "stream"}


def preference(settings: dict[str, Any], **changes: Any) -> tuple[LLMTrainer, Stage]:
    """A trainer before its only stage, a new one of the same run each time."""
    trainer = started(*prepared({**settings, **changes}, "LLMRanker"))
    (stage,) = trainer.stages()
    assert len(stage.windows) > 3 * reference.WINDOWS_AT_ONCE
    return trainer, stage


def filled(trainer: LLMTrainer, stage: Stage) -> tuple[dict[str, int], int]:
    """What was read and computed, and the passes of the LLM that it took."""
    passes = []
    decoder = trainer.model.policy.get_base_model().model
    hook = decoder.register_forward_hook(lambda *_: passes.append(1))
    counts = trainer._fill_reference(stage, False)
    hook.remove()
    assert counts["read"] + counts["computed"] == sum(len(w.targets) for w in stage.windows)
    return counts, len(passes)


def values(stage: Stage) -> list[list[list[float]]]:
    return [w.reference for w in stage.windows]


def parts(stage: Stage) -> list[Path]:
    return sorted(stage.folder.parent.glob("reference-*/*.safetensors"))


@pytest.mark.parametrize("prompt", ["stream", "instruct", "pair"])
def test_kept_values_are_the_computed_ones(settings: dict[str, Any], prompt: str) -> None:
    if prompt == "pair":
        settings |= {"eval_args": {"mode": {"valid": "uni1", "test": "uni1"}}}
    trainer, stage = preference(settings, prompt=prompt)
    counts, passes = filled(trainer, stage)
    assert counts["read"] == 0 and passes > 0
    trainer.model.eval()
    with torch.no_grad():
        direct = [trainer.model.window_logps([w]) for w in stage.windows]
    for window, logps in zip(stage.windows, direct, strict=True):
        torch.testing.assert_close(torch.tensor(window.reference), logps, atol=1e-4, rtol=0)
    assert len(parts(stage)) == -(-len(stage.windows) // 8)
    other, again = preference(settings, prompt=prompt)
    counts, passes = filled(other, again)
    assert counts["computed"] == passes == 0
    assert values(again) == values(stage)  # to the last bit


def test_a_killed_run_goes_on(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the reference pass, then in training: nothing is computed twice, and the result is that of one go."""
    whole = run_recbole_llm(config_dict={**settings, "checkpoint_dir": settings["checkpoint_dir"] + "-whole"})
    computed, trained = LLMRanker.reference_logps, LLMTrainer._step
    asked: list[Window] = []

    def killed(self: LLMRanker, windows: Sequence[Window]) -> list[list[list[float]]]:
        if len(asked) == 16:
            raise KeyboardInterrupt
        asked.extend(windows)
        return computed(self, windows)

    monkeypatch.setattr(LLMRanker, "reference_logps", killed)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict=settings)

    def rest(self: LLMRanker, windows: Sequence[Window]) -> list[list[list[float]]]:
        asked.extend(windows)
        return computed(self, windows)

    def no_step(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLMRanker, "reference_logps", rest)
    monkeypatch.setattr(LLMTrainer, "_step", no_step)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict=settings)
    monkeypatch.setattr(LLMTrainer, "_step", trained)
    resumed = run_recbole_llm(config_dict=settings)
    assert resumed["test_result"] == whole["test_result"]
    records = [json.loads((Path(r["run_folder"]) / "result.json").read_text())["stages"][0] for r in (whole, resumed)]
    positions = records[0]["positions"]
    assert [(r["reference"]["read"], r["reference"]["computed"]) for r in records] == [(0, positions), (positions, 0)]
    assert records[0]["found"] == []
    (found,) = records[1]["found"]
    assert found["what"] == "reference" and found["seconds"] > 0
    filled = [w for w in asked if not w.reference]  # the others are asked by guards, before and after training
    assert len({(w.user, w.targets) for w in filled}) == len(filled)  # each window once


@pytest.mark.parametrize("what", ["adapter", "item", "rejected", "lora_alpha", "prompt"])
def test_nothing_stale_is_read(settings: dict[str, Any], tmp_path: Path, what: str) -> None:
    template = {"family": "stream", "header": "Films:\n", "line": "{title}\n"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(template))
    settings |= {"prompt": str(tmp_path / "mine.yaml")}
    trainer, stage = preference(settings)
    filled(trainer, stage)
    before = parts(stage)
    changes = {"lora_alpha": 64} if what == "lora_alpha" else {}
    if what == "prompt":
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**template, "header": "Books:\n"}))
    if what == "item":
        file = tmp_path / "data" / "toy" / "toy.item"
        file.write_text(file.read_text().replace("red cat", "old cat"))
    trainer, stage = preference(settings, **changes)
    if what == "adapter":
        moved = {name: weight + 0.01 for name, weight in adapter_state(trainer.model.llm).items()}
        set_adapter_state(trainer.model.llm, moved)
    if what == "rejected":
        last = stage.windows[-1]
        stage.windows[-1] = replace(last, rejected=tuple((r[1], r[0]) for r in last.rejected))
    counts, _ = filled(trainer, stage)
    new = set(parts(stage)) - set(before)
    assert counts["read"] == 0 and len(new) == len(before)
    trainer.model.eval()
    with torch.no_grad():
        logps = trainer.model.window_logps([stage.windows[-1]])
    torch.testing.assert_close(torch.tensor(stage.windows[-1].reference), logps, atol=1e-4, rtol=0)


def test_losses_over_one_policy_share_them(settings: dict[str, Any]) -> None:
    """Of the same pairs; another number of rejected items is other pairs."""
    settings |= {"epochs": 1}
    counts, found = {}, {}
    for loss, more in (("DMPO", {}), ("SDPO", {"beta": 0.5}), ("DPO", {"rejected_num": 1})):
        result = run_recbole_llm(config_dict={**settings, "loss": loss, **more})
        record = json.loads((Path(result["run_folder"]) / "result.json").read_text())
        stage = record["stages"][1]
        counts[loss] = {name for name, n in stage["reference"].items() if n}
        found[loss] = [part["what"] for part in stage["found"] if part["seconds"] > 0]
    assert counts == {"DMPO": {"computed"}, "SDPO": {"read"}, "DPO": {"computed"}}
    assert found == {"DMPO": [], "SDPO": ["reference"], "DPO": []}


def test_pools_of_self_hard_are_asked_for_once(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed among them, the run goes on there with the pairs of one go; another loss over the policy reads all."""
    monkeypatch.setattr(rejected, "WINDOWS_AT_ONCE", 8)
    settings |= {"rejected": "self_hard", "rejected_pool": 7}
    apart = settings | {"checkpoint_dir": settings["checkpoint_dir"] + "-whole"}
    whole = run_recbole_llm(config_dict=apart)
    real, asked, most = LLMRanker.reference_logps, [], [2]

    def watched(self: LLMRanker, windows: Sequence[Window]) -> list[list[list[float]]]:
        if all(len(r) == 7 for w in windows for r in w.rejected):
            if len(asked) == most[0]:
                raise KeyboardInterrupt
            asked.append([w.told() for w in windows])
        return real(self, windows)

    monkeypatch.setattr(LLMRanker, "reference_logps", watched)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict=settings)
    most[0] = 10**6
    resumed = run_recbole_llm(config_dict=settings)
    assert resumed["test_result"] == whole["test_result"]
    first = [told for part in asked for told in part]
    assert len(first) == len({str(told) for told in first}) == 40  # each user's window once
    other = run_recbole_llm(config_dict=settings | {"loss": "SDPO"})
    assert len(asked) == 5
    found = [json.loads((Path(r["run_folder"]) / "result.json").read_text())["stages"][0]["found"]
             for r in (whole, resumed, other)]  # fmt: skip
    assert [[part["what"] for part in stage] for stage in found] == [[], ["pools"], ["pools", "reference"]]
    assert 0 < found[1][0]["seconds"] < found[2][0]["seconds"]


@pytest.mark.parametrize("shared", [False, True])
def test_a_stage_cut_off_in_training_counts_its_references_once(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """Among its own seconds, or, where another loss had computed them, with what they took there."""
    settings |= {"save_every": 1e-9}
    if shared:
        run_recbole_llm(config_dict=settings)
    steps, real = [], LLMTrainer._step

    def third_dies(self: LLMTrainer, *args: Any) -> Any:
        steps.append(args)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(LLMTrainer, "_step", third_dies)
    with pytest.raises(KeyboardInterrupt):
        run_recbole_llm(config_dict=settings | {"loss": "SDPO"})
    result = run_recbole_llm(config_dict=settings | {"loss": "SDPO"})
    (stage,) = json.loads((Path(result["run_folder"]) / "result.json").read_text())["stages"]
    assert [part["what"] for part in stage["found"]] == ["reference"] * shared
    assert stage["reference"]["computed"] == 0 and stage["steps"] == len(steps) - 1


@pytest.mark.parametrize("damage", ["empty", "cut", "changed", "other"])
def test_a_damaged_part_is_computed_again(settings: dict[str, Any], damage: str) -> None:
    trainer, stage = preference(settings)
    filled(trainer, stage)
    file = parts(stage)[1]
    sound = file.read_bytes()
    changed = bytearray(sound)
    changed[-2] ^= 1  # a bit of the last number
    file.write_bytes({"empty": b"", "cut": sound[:-1], "changed": bytes(changed), "other": b"{}" * 100}[damage])
    other, again = preference(settings)
    counts, _ = filled(other, again)
    assert 0 < counts["computed"] <= max(len(w.targets) for w in stage.windows) * 8
    assert values(again) == values(stage)
    whole = preference(settings)
    assert filled(*whole)[0]["computed"] == 0 and values(whole[1]) == values(stage)


def test_a_folder_that_cannot_be_written(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    trainer, stage = preference(settings)
    monkeypatch.setattr(reference, "write_tensors", no_room)
    with pytest.raises(UserError, match="--checkpoint_dir: reference log-probs could not be kept.*Free some space"):
        filled(trainer, stage)


def test_the_base_model_is_the_policy_with_its_adapter_off() -> None:
    """So a reference that is the base model needs no second model: peft switches the adapter off."""
    base = load_llm(llm="tiny", device=torch.device("cpu"), finetune="none", seed=0)
    llm = load_llm(llm="tiny", device=torch.device("cpu"), seed=0)
    set_adapter_state(llm, {name: weight + 0.05 for name, weight in adapter_state(llm).items()})
    template = {"family": "stream", "header": "Films:\n", "line": "{title}\n"}
    prompt = Prompt(template, ["", *(f"film {i}" for i in range(1, 9))], llm.tokenizer)
    windows = [Window(0, (1, 2, 3, 4), (2, 3), ((5, 6), (7, 8)))]
    trees = [prompt.window_tree(w) for w in windows]
    with torch.no_grad():
        expected = batch_logps(base.model, trees)
        with llm.model.disable_adapter():
            torch.testing.assert_close(batch_logps(llm.model, trees), expected)
        assert (batch_logps(llm.model, trees) - expected).abs().min() > 1e-3
