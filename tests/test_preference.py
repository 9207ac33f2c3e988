"""The preference stage as a configuration sets it: switches, logged values, displacement, several chosen items."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.data.pair_prompt import make_prompt
from recbole_llm.data.prompt import Window
from recbole_llm.data.template import load_template
from recbole_llm.data.windows import training_windows
from recbole_llm.errors import ConfigError
from recbole_llm.llm.logps import completion_logps
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.preference import Displacement, preference_loss
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.run_folder import run_hash

pytestmark = pytest.mark.usefixtures("one_thread")

POLICY = torch.tensor([[-4.0, -9.0, -3.5], [-6.0, -5.0, -20.0]])
REFERENCE = torch.tensor([[-5.0, -8.0, -4.0], [-6.5, -6.0, -15.0]])


def config(**changes: Any) -> dict[str, Any]:
    defaults = {
        "beta": 0.5,
        "pairwise_mean": False,
        "reference_free": False,
        "smoothing": 0.1,
        "robust": False,
        "boundary_negatives": False,
        "dynamic_beta": False,
        "dynamic_margin": 6.0,
        "chosen_num": 1,
    }
    return {**defaults, **changes}


def test_the_released_dmpo_is_pairwise_and_without_reference() -> None:
    """By hand, as the released code computes it: k rows of -log s(beta (log pi(y_w) - log pi(y_i)))."""
    result, _ = preference_loss(config(pairwise_mean=True, reference_free=True), "DMPO", POLICY, REFERENCE, None)
    rows = -F.logsigmoid(0.5 * (POLICY[:, :1] - POLICY[:, 1:]))
    torch.testing.assert_close(result.loss, rows.mean(1))


def test_what_is_logged_by_hand() -> None:
    _, logged = preference_loss(config(), "DMPO", POLICY, REFERENCE, None)
    # Log-ratios of the first pair: chosen +1; rejected -1 and +.5.
    assert logged["logps/chosen_shift"][0] == pytest.approx(1.0)
    assert logged["logps/rejected_shift"][0] == pytest.approx(-0.25)
    assert logged["rewards/margins"][0] == pytest.approx(0.5 * (1 + 0.25))
    assert logged["rewards/accuracies"].tolist() == [1.0, 0.5]  # second: +.5 against +1 and -5
    assert logged["logps/chosen"].tolist() == [-4.0, -6.0]


def test_boundary_alone_is_logged_and_learned_from() -> None:
    """Of the first pair only the item at -3.5 is as likely as the chosen one, of the second that at -5."""
    settings = config(boundary_negatives=True)
    result, logged = preference_loss(settings, "SDPO", POLICY, REFERENCE, None)
    kept = [2, 1]
    margin = torch.stack([(POLICY - REFERENCE)[i, 0] - (POLICY - REFERENCE)[i, kept[i]] for i in range(2)])
    torch.testing.assert_close(result.loss, -F.logsigmoid(0.5 * margin))
    assert logged["boundary_share"].tolist() == [0.5, 0.5]
    torch.testing.assert_close(logged["rewards/margins"], 0.5 * margin)
    plain, _ = preference_loss(config(dynamic_beta=True), "DMPO", POLICY, REFERENCE, None)
    assert not torch.equal(plain.loss, preference_loss(config(), "DMPO", POLICY, REFERENCE, None)[0].loss)


def test_a_diverged_policy_gives_a_diverged_loss_and_no_other_error() -> None:
    settings = config(boundary_negatives=True, dynamic_beta=True)
    result, _ = preference_loss(settings, "SDPO", POLICY * float("nan"), REFERENCE, None)
    assert torch.isnan(result.loss).all()


def test_smoothing_of_the_pairs_comes_before_that_of_the_configuration() -> None:
    eps = torch.tensor([[0.0, 0.5], [0.2, 0.3]])
    own, _ = preference_loss(config(smoothing="oracle"), "RosePO", POLICY, REFERENCE, eps)
    h = 0.5 * ((POLICY - REFERENCE)[:, :1] - (POLICY - REFERENCE)[:, 1:])
    torch.testing.assert_close(own.loss, (-(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)).mean(1))


def test_displacement_warns_once_after_a_collapse() -> None:
    watch = Displacement()
    assert not any(watch.add(-4.9) for _ in range(30))
    assert [watch.add(-9.0) for _ in range(Displacement.STEPS)].count(True) == 1
    assert not any(watch.add(-9.0) for _ in range(30))
    assert watch.facts() == {
        "chosen_shift": pytest.approx(-9),
        "lowest_chosen_shift": pytest.approx(-9),
        "collapsed": True,
    }
    assert not Displacement().add(-100.0)  # one bad step is no collapse


def test_a_collapse_is_told_and_recorded(
    tiny: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a limit that every policy is under, the warning comes once, and the record says how far it went."""
    monkeypatch.setattr(Displacement, "LEAST", 1000.0)
    result = run_recbole_llm(config_dict={**tiny, "loss": "DMPO", "epochs": 0, "state": "WARNING"})
    folder = Path(result["run_folder"])
    record = json.loads((folder / "result.json").read_text())["stages"][0]["displacement"]
    assert sum("less likely" in message for message in caplog.messages) == 1
    shifts = [json.loads(line)["logps/chosen_shift"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert record["collapsed"] and record["chosen_shift"] == pytest.approx(sum(shifts[-10:]) / 10)


def test_sft_weight_adds_the_mean_token_loss_of_the_chosen(tiny: dict[str, Any]) -> None:
    """The first step's loss is ln 2 and the SFT term, whose mean is logged."""
    settings = {**tiny, "loss": "DMPO", "rejected_num": 2, "epochs": 0}
    first = {}
    for weight in (0.0, 0.5):
        folder = Path(run_recbole_llm(config_dict={**settings, "sft_weight": weight})["run_folder"])
        first[weight] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert "sft" not in first[0.0] and first[0.5]["sft"] > 1
    assert first[0.5]["loss"] == pytest.approx(first[0.0]["loss"] + 0.5 * first[0.5]["sft"], abs=1e-4)


TEXTS = ["", *(f"{c} {a}" for c in ("red", "blue", "dark green") for a in ("cat", "dog", "elephant"))]


def test_several_chosen_are_the_target_and_those_that_follow() -> None:
    prompt = make_prompt(load_template("stream", PROPERTIES), TEXTS, tiny_llm()[1])
    (window,) = training_windows({1: [1, 2, 3, 4, 5]}, prompt, history=10, last=0, most_tokens=500, chosen=3)
    assert [window.items[t] for t in window.targets] == [2, 3]
    assert window.also == ((3, 4), (4, 5))
    instruct = make_prompt(load_template("instruct", PROPERTIES), TEXTS, tiny_llm()[1])
    told = training_windows({1: [1, 2, 3, 4, 5]}, instruct, history=10, last=1, most_tokens=500, chosen=3)
    assert [(w.items, w.also) for w in told] == [((1, 2, 3), ((4, 5),))]


@pytest.mark.parametrize("family", ["stream", "instruct"])
def test_several_chosen_are_different_titles(family: str) -> None:
    """What is met again counts once; a position with fewer others behind it is left out, and what follows it too."""
    prompt = make_prompt(load_template(family, PROPERTIES), TEXTS, tiny_llm()[1])
    sequence = {1: [1, 2, 2, 3, 2, 4, 2, 2]}
    told = training_windows(sequence, prompt, history=10, last=0, most_tokens=500, chosen=3)
    pairs = [(window.items[t], also) for window in told for t, also in zip(window.targets, window.also, strict=True)]
    assert pairs == [(2, (3, 4)), (2, (3, 4)), (3, (2, 4))]
    alone = training_windows(sequence, prompt, history=10, last=0, most_tokens=500)
    assert [w.items[t] for w in alone for t in w.targets] == [2, 2, 3, 2, 4, 2, 2]


@pytest.mark.parametrize("family", ["stream", "instruct"])
def test_several_chosen_equal_one_sequence_at_a_time(family: str) -> None:
    """Log-probs of target, also chosen and rejected titles equal those of plain sequences."""
    model, tokenizer = tiny_llm()
    prompt = make_prompt(load_template(family, PROPERTIES), TEXTS, tokenizer)
    window = Window(1, (1, 2, 3, 4), (2, 3), rejected=((7, 8), (9, 1)), also=((4,), (5,)))
    windows = [window] if family == "stream" else [
        Window(1, window.items[: t + 1], (t,), (window.rejected[i],), (window.also[i],))
        for i, t in enumerate(window.targets)
    ]  # fmt: skip
    found = torch.cat(completion_logps(model, [prompt.window_tree(w) for w in windows], token_budget=4096))
    expected = []
    for target, items in zip(window.targets, ((3, 4, 7, 8), (4, 5, 9, 1)), strict=True):
        for item in items:
            before, answer = prompt.trunk(window.items[:target]), prompt.answers[item]
            logps = model(input_ids=torch.tensor([before + answer])).logits[0].log_softmax(-1)
            expected.append(sum(logps[len(before) - 1 + i, t] for i, t in enumerate(answer)))
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"loss": "SDPO", "pairwise_mean": True}, "--pairwise_mean=True: SDPO does not read it; it belongs to DMPO"),
        ({"loss": "DMPO", "robust": True, "smoothing": 0.1}, "--robust=True: DMPO does not read it"),
        ({"loss": "MultDPO", "dynamic_beta": True}, "--dynamic_beta=True: MultDPO does not read it"),
        ({"loss": "DMPO", "chosen_num": 2}, "--chosen_num=2: DMPO takes one chosen item"),
        ({"loss": "RosePO", "smoothing": 0.7}, "--smoothing=0.7: must be oracle, or a number"),
        ({"loss": "DMPO", "rejected": "uniform+uniform"}, "--rejected='uniform\\+uniform': must be one of"),
        ({"loss": "DMPO", "rejected": "hard"}, "--rejected='hard': must be one of uniform"),
        ({"loss": "DMPO", "rejected": "semantic", "encoder": "none"}, "--rejected=semantic compares titles"),
        ({"loss": "DMPO", "rejected": "self_hard", "rejected_pool": 2}, "--rejected_pool=2"),
        ({"prompt": "pair"}, "a pair prompt ranks two candidates"),
        ({"eval_args": {"mode": "low1"}}, "set --liked_only=True"),
        ({"disjoint_users": True}, "--few_shot=100"),
        ({"disjoint_users": True, "few_shot": 5}, "--eval_users=100"),
        ({"prompt": "pair", "eval_args": {"mode": {"test": "uni1"}}}, "a pair prompt ranks two candidates"),
        ({"prompt": "pair", "eval_args": {"mode": {"valid": "uni1"}}}, "a pair prompt ranks two candidates"),
        ({"eval_config": {"encoder": "none"}}, None),
    ],
)
def test_settings_that_do_not_go_together_are_told_before_any_work(
    tiny: dict[str, Any], changes: dict[str, Any], told: str | None
) -> None:
    if told is None:
        with pytest.raises(ConfigError, match="it needs --eval_dataset"):
            run_recbole_llm(config_dict={**tiny, **changes})
        return
    with pytest.raises(ConfigError, match=told):
        LLMConfig(config_dict={**tiny, **changes})


@pytest.mark.parametrize("length", [1, 2, 3, 4, 6])
def test_users_with_fewer_items_than_are_chosen_train_nothing(length: int) -> None:
    for family in ("stream", "instruct"):
        prompt = make_prompt(load_template(family, PROPERTIES), TEXTS, tiny_llm()[1])
        cut = {"history": 10, "last": 0, "most_tokens": 500, "chosen": 4}
        windows = training_windows({1: list(range(1, length + 1))}, prompt, **cut)
        assert all(len(a) == 3 for w in windows for a in w.also)
        assert sum(len(w.targets) for w in windows) == max(0, length - 4)


def test_a_stage_does_not_depend_on_whether_sft_was_trained_just_now(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Dropout and self_hard: the adapter after a reused SFT stage is that after a fresh one, byte for byte."""
    settings = {**tiny, "loss": "DMPO", "lora_dropout": 0.3, "rejected": "self_hard", "rejected_num": 2, "few_shot": 20}
    fresh = Path(run_recbole_llm(config_dict=settings)["run_folder"])
    before = (fresh / "adapter_model.safetensors").read_bytes()
    (fresh / "adapter_model.safetensors").unlink()
    again = Path(run_recbole_llm(config_dict=settings)["run_folder"])
    assert again == fresh and (again / "adapter_model.safetensors").read_bytes() == before


def test_the_text_of_a_prompt_names_the_run(tiny: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    hashes = []
    for header in ("Seen:\n", "Read:\n"):
        file.write_text(f'family: stream\nheader: "{header[:-1]}\\n"\nline: "{{title}}\\n"\n')
        hashes.append(run_hash(LLMConfig(config_dict={**tiny, "prompt": str(file)})))
    assert hashes[0] != hashes[1]
