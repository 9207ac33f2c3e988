"""LLMRanker end to end on made-up data: it learns what can be learned, and its reference stays where it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.errors import UserError
from recbole_llm.llm import logps
from recbole_llm.llm.adapter import adapter_state, load_adapter
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.loss import PREFERENCE_LOSSES
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import write_dataset


def built(settings: dict[str, Any], folder: Path) -> tuple[LLMRanker, Protocol, LLMTrainer]:
    config = LLMConfig(config_dict=settings)
    protocol = prepare_data(config)
    model = LLMRanker(config, protocol.train_data._dataset)
    trainer = LLMTrainer(config, model)
    folder.mkdir(parents=True, exist_ok=True)
    trainer.start(protocol, folder)
    return model, protocol, trainer


def asked(model: LLMRanker, histories: list[list[int]], items: list[list[int]]) -> Interaction:
    """RecBole rows of (history, candidate), as evaluation makes them."""
    rows = [(h, i) for h, candidates in zip(histories, items, strict=True) for i in candidates]
    return Interaction(
        {
            "item_id_list": torch.tensor([h + [0] * (model.max_seq_length - len(h)) for h, _ in rows]),
            "item_length": torch.tensor([len(h) for h, _ in rows]),
            "item_id": torch.tensor([i for _, i in rows]),
        }
    )


def test_predict_scores_whole_titles(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Against one sequence at a time; neighbours with other histories or of other length do not mix."""
    model, _, _ = built(tiny, tmp_path / "run")
    model.eval()
    histories, items = [[3, 4], [3, 4, 5], [7]], [[10, 11, 12], [10], [11, 12]]
    with torch.no_grad():
        scores = model.predict(asked(model, histories, items))
        expected = []
        for history, candidates in zip(histories, items, strict=True):
            before = model.prompt.trunk(history)
            for item in candidates:
                answer = model.prompt.answers[item]
                logps = model.policy(input_ids=torch.tensor([before + answer])).logits[0].log_softmax(-1)
                expected.append(sum(logps[len(before) - 1 + i, t] for i, t in enumerate(answer)))
    torch.testing.assert_close(scores, torch.stack(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("budget", [64, 4096])
@pytest.mark.parametrize("norm", ["sum", "mean", "pmi"])
def test_permuting_candidates_permutes_scores(tiny: dict[str, Any], tmp_path: Path, norm: str, budget: int) -> None:
    model, _, _ = built({**tiny, "score_norm": norm, "token_budget": budget}, tmp_path / "run")
    model.eval()
    items = list(range(1, 31))
    order = np.random.default_rng(0).permutation(30)
    with torch.no_grad():
        one = model.predict(asked(model, [[3, 4, 5]], [items]))
        other = model.predict(asked(model, [[3, 4, 5]], [[items[i] for i in order]]))
    torch.testing.assert_close(one[torch.as_tensor(order)], other, atol=1e-4, rtol=0)


def test_score_norms(tiny: dict[str, Any], tmp_path: Path) -> None:
    model, _, _ = built(tiny, tmp_path / "run")
    model.eval()
    items, scores = [5, 6, 7], {}
    with torch.no_grad():
        for norm in ("sum", "mean", "pmi"):
            model.config["score_norm"] = norm
            scores[norm] = model.predict(asked(model, [[1, 2]], [items]))
        lengths = torch.tensor([len(model.prompt.answers[i]) for i in items])
        torch.testing.assert_close(scores["mean"], scores["sum"] / lengths)
        model.config["score_norm"] = "sum"
        prior = model.predict(asked(model, [[]], [items]))
    torch.testing.assert_close(scores["pmi"], scores["sum"] - prior, atol=1e-4, rtol=0)


def test_it_learns_structure_and_not_noise(toy: dict[str, Any], tmp_path: Path) -> None:
    """A fixed cycle of items is ranked near the top, pure noise at chance (.1 of 10 candidates)."""
    hits = {}
    for name, structure in (("cycle", 1.0), ("noise", 0.0)):
        write_dataset(tmp_path / name, users=150, structure=structure)
        settings = {
            **toy,
            "data_path": str(tmp_path / name),
            "llm": "tiny",
            "finetune": "full",
            "epochs": 12,
            "learning_rate": 5e-3,
            "train_batch_size": 64,
            "stopping_step": 20,
        }
        hits[name] = run_recbole_llm("LLMRanker", config_dict=settings)["test_result"]["hit@1"]
    assert hits["cycle"] > 0.8
    assert hits["noise"] < 0.22  # chance .1, three standard errors of 150 users above it


@pytest.mark.parametrize("loss", sorted(PREFERENCE_LOSSES))
def test_reference_is_the_sft_adapter_and_stays(tiny: dict[str, Any], tmp_path: Path, loss: str) -> None:
    """The first preference step starts at ln 2 (ln(1 + k) for S-DPO): policy and reference are one."""
    number = 1 if loss == "DPO" else 3
    settings = {
        **tiny,
        "loss": loss,
        "rejected_num": number,
        "beta": 0.5,
        "preference_learning_rate": 1e-2,
        "preference_epochs": 10,
        "stopping_step": 20,
        "lr_scheduler": "constant",
    }
    result = run_recbole_llm(config_dict=settings)
    folder = Path(result["run_folder"])
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    first = next(step for step in steps if step["stage"] == loss)
    expected = np.log(1 + number) if loss in ("SDPO", "MultDPO") else np.log(2)
    assert first["loss"] == pytest.approx(expected, abs=1e-4)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-3)
    last = [step for step in steps if step["stage"] == loss][-1]
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0

    # The stored reference log-probs are those of the SFT adapter, loaded anew.
    model, protocol, trainer = built(settings, tmp_path / "again")
    record = json.loads((folder / "result.json").read_text())
    assert [stage["loss"] for stage in record["stages"]] == ["SFT", loss]
    sft, stage = trainer.stages()
    load_adapter(model.llm, sft.folder)
    before = adapter_state(model.llm)
    trainer.stage = stage
    trainer._fill_reference(stage, False)
    model.eval()
    with torch.no_grad():
        for window in stage.windows[:5]:
            torch.testing.assert_close(model.window_logps([window]), torch.tensor(window.reference), atol=1e-4, rtol=0)
    load_adapter(model.llm, folder)
    assert any(not torch.equal(before[name], now) for name, now in adapter_state(model.llm).items())


def test_each_stage_records_its_own_losses(tiny: dict[str, Any]) -> None:
    """Three SFT epochs leave nothing in the record of a preference stage of one."""
    settings = {**tiny, "loss": "DMPO", "rejected_num": 2, "epochs": 3, "stopping_step": 20}
    folder = Path(run_recbole_llm(config_dict=settings)["run_folder"])
    sft, dmpo = json.loads((folder / "result.json").read_text())["stages"]
    assert sorted(sft["train_loss"]) == ["0", "1", "2"] and sorted(dmpo["train_loss"]) == ["0"]
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(sft["steps"] + dmpo["steps"]))


def test_losses_share_one_sft_stage(tiny: dict[str, Any]) -> None:
    settings = {**tiny, "loss": "DMPO", "rejected_num": 2}
    run_recbole_llm(config_dict=tiny)
    stages = Path(tiny["checkpoint_dir"]) / "stages"
    (stage,) = stages.iterdir()
    written = (stage / "stage.json").stat().st_mtime_ns
    done = run_recbole_llm(config_dict=settings)
    assert len(list(stages.glob("SFT-*"))) == 1 and (stage / "stage.json").stat().st_mtime_ns == written
    sft, dmpo = json.loads((Path(done["run_folder"]) / "result.json").read_text())["stages"]
    assert sft["reused"] and "reused" not in dmpo  # the record says whose time it was
    assert sft["cpu_seconds"] == json.loads((stage / "stage.json").read_text())["cpu_seconds"] > 0
    run_recbole_llm(config_dict={**settings, "learning_rate": 1e-5})
    assert len(list(stages.glob("SFT-*"))) == 2


def test_a_preference_stage_is_shared_by_all_ways_to_ask(tiny: dict[str, Any]) -> None:
    """Trained once for two modes of the test, with the adapter and curve of a run of its own; another beta trains."""
    settings = {**tiny, "loss": "DMPO", "rejected_num": 2, "rejected": "uniform+self_hard"}
    modes = [{"mode": {"valid": "uni9", "test": test}} for test in ("uni9", "full")]
    first, again = [
        run_recbole_llm(config_dict={**settings, "eval_args": mode, "full_ranking": "exact"}) for mode in modes
    ]
    alone = {**settings, "eval_args": modes[1], "full_ranking": "exact", "checkpoint_dir": tiny["checkpoint_dir"] + "2"}
    alone = run_recbole_llm(config_dict=alone)
    assert again["test_result"] == alone["test_result"] != first["test_result"]
    files = [Path(run["run_folder"]) / "metrics.jsonl" for run in (first, again, alone)]
    assert len({file.read_text() for file in files}) == 1
    record = json.loads((Path(again["run_folder"]) / "result.json").read_text())
    assert [stage["loss"] for stage in record["stages"] if stage["reused"]] == ["SFT", "DMPO"]
    changed = run_recbole_llm(config_dict={**settings, "eval_args": modes[0], "full_ranking": "exact", "beta": 0.7})
    record = json.loads((Path(changed["run_folder"]) / "result.json").read_text())
    assert [stage["loss"] for stage in record["stages"] if "reused" not in stage] == ["DMPO"]


def test_validation_has_the_metrics_that_are_asked(tiny: dict[str, Any]) -> None:
    """Also of a stage that a run trained which measured others."""
    run_recbole_llm(config_dict=tiny)
    other = {**tiny, "metrics": ["NDCG", "Recall"], "topk": [3, 10]}
    shared = run_recbole_llm(config_dict=other)
    alone = run_recbole_llm(config_dict={**other, "checkpoint_dir": tiny["checkpoint_dir"] + "2"})
    assert shared["best_valid_result"] == alone["best_valid_result"]
    assert set(alone["best_valid_result"]) == {f"{m}@{k}" for m in ("ndcg", "recall") for k in (3, 10)}
    assert shared["best_valid_score"] == alone["best_valid_score"]


def test_sft_is_shared_by_all_that_does_not_change_it(tiny: dict[str, Any]) -> None:
    """How the test ranks the catalogue is no matter of training; how passes are cut is, under dropout alone."""
    stages = Path(tiny["checkpoint_dir"]) / "stages"
    full = {**tiny, "eval_args": {"mode": {"valid": "uni9", "test": "full"}}}
    for ranking in ("exact", "exact_topk"):
        run_recbole_llm(config_dict={**full, "full_ranking": ranking, "token_budget": 512})
    assert len(list(stages.iterdir())) == 1
    for budget in (128, 512):
        run_recbole_llm(config_dict={**full, "full_ranking": "exact", "token_budget": budget, "lora_dropout": 0.1})
    assert len(list(stages.iterdir())) == 3


@pytest.mark.parametrize("loss", ["SFT", "SDPO"])
def test_steps_do_not_depend_on_how_they_are_packed(tiny: dict[str, Any], tmp_path: Path, loss: str) -> None:
    """All windows of a step in one row, and each in a pass of its own: the same losses on the way, and weights."""
    after, losses = {}, {}
    for budget in (64, 8192):
        settings = {
            **tiny,
            "loss": loss,
            "token_budget": budget,
            "epochs": 2,
            "learning_rate": 1e-2,
            "preference_learning_rate": 1e-2,
            "checkpoint_dir": str(tmp_path / str(budget)),
            "learner": "sgd",
        }
        folder = Path(run_recbole_llm(config_dict=settings)["run_folder"])
        model, _, _ = built(settings, tmp_path / "load" / str(budget))
        load_adapter(model.llm, folder)
        after[budget] = adapter_state(model.llm)
        losses[budget] = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses[64]) > 4 and len(set(losses[64])) > 4
    assert losses[64] == pytest.approx(losses[8192], rel=1e-5)
    for name, weight in after[64].items():
        torch.testing.assert_close(weight, after[8192][name], atol=1e-5, rtol=1e-4)


def test_users_of_equal_history_share_its_pass(tiny: dict[str, Any], tmp_path: Path) -> None:
    """Three users, two histories; each item is fed once a history, and everyone gets their own items' scores."""
    model, _, _ = built(tiny, tmp_path / "run")
    model.eval()
    histories, items = [[3, 4, 5], [6, 7], [3, 4, 5]], [[10, 11, 12], [10, 13, 14], [12, 20, 10]]
    alone = [model.predict(asked(model, [h], [i])) for h, i in zip(histories, items, strict=True)]
    fed = []
    embeddings = model.policy.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda module, ids, out: fed.append(ids[0].numel()))
    with torch.no_grad():
        together = model._scores(histories, items)
    hook.remove()
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    trunks = sum(len(model.prompt.trunk(h)) for h in ([3, 4, 5], [6, 7]))
    assert sum(fed) == trunks + sum(len(model.prompt.answers[i]) - 1 for i in (10, 11, 12, 20, 10, 13, 14))


def test_candidates_over_the_budget_share_the_prompt(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The prompt is fed once, and the titles below it in passes that keep to the budget."""
    model, _, _ = built({**tiny, "token_budget": 64}, tmp_path / "run")
    model.eval()
    history, items = [3, 4, 5], list(range(1, 31))
    fed = []
    hook = model.policy.get_input_embeddings().register_forward_hook(
        lambda module, ids, out: fed.append(ids[0].numel())
    )
    with torch.no_grad():
        (cut,) = model._scores([history], [items])
        passes, model.budget.tokens = list(fed), 8192
        (whole,) = model._scores([history], [items])
    hook.remove()
    torch.testing.assert_close(cut, whole, atol=1e-4, rtol=0)
    answers = [model.prompt.answers[i] for i in items]
    prefixes = {tuple(answer[:n]) for answer in answers for n in range(1, len(answer))}
    assert sum(passes) == len(model.prompt.trunk(history)) + len(prefixes)
    assert len(passes) > 2 and max(passes[1:]) <= 64


def test_memory_that_runs_out_halves_the_passes_and_changes_nothing(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A machine that holds 1,000 tokens of activations: training and scoring go on in smaller passes."""
    whole = run_recbole_llm(config_dict={**tiny, "loss": "SDPO", "checkpoint_dir": str(tmp_path / "whole")})
    real = logps.batch_trees

    def small_machine(trees: Any, multiple: int = 1) -> Any:
        batch = real(trees, multiple)
        if batch.input_ids.numel() > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return batch

    monkeypatch.setattr(logps, "batch_trees", small_machine)
    with caplog.at_level("WARNING"):
        cut = run_recbole_llm(config_dict={**tiny, "loss": "SDPO", "checkpoint_dir": str(tmp_path / "cut")})
    assert "--token_budget: out of memory; going on with 1024 tokens" in caplog.text
    assert cut["test_result"] == whole["test_result"]
    losses = [(Path(r["run_folder"]) / "metrics.jsonl").read_text().splitlines() for r in (whole, cut)]
    for one, other in zip(*losses, strict=True):
        assert json.loads(one)["loss"] == pytest.approx(json.loads(other)["loss"], rel=1e-4)


def test_too_little_memory_for_any_pass_is_told(
    tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(trees: Any, multiple: int = 1) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:113] DefaultCPUAllocator: not enough memory")

    model, _, _ = built(tiny, tmp_path / "run")
    monkeypatch.setattr(logps, "batch_trees", full)
    with pytest.raises(UserError, match="--token_budget: memory does not suffice for the smallest pass"):
        model.predict(asked(model, [[3, 4]], [[5, 6]]))
    monkeypatch.setattr(logps, "batch_trees", lambda trees, multiple: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.predict(asked(model, [[3, 4]], [[5, 6]]))


def test_same_seed_same_numbers(tiny: dict[str, Any]) -> None:
    one = run_recbole_llm(config_dict=tiny)["test_result"]
    other = run_recbole_llm(config_dict={**tiny, "checkpoint_dir": tiny["checkpoint_dir"] + "2"})["test_result"]
    assert one == other


def test_every_trainable_weight_moves_and_nothing_else(tiny: dict[str, Any], tmp_path: Path) -> None:
    model, protocol, trainer = built(tiny, tmp_path / "run")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer.fit(protocol.train_data, protocol.valid)
    for name, weight in model.named_parameters():
        assert torch.equal(before[name], weight) != weight.requires_grad, name


def test_without_validation_the_last_epoch_counts(tiny: dict[str, Any]) -> None:
    """eval_step 0: nothing is selected, and the adapter is that of the last step."""
    result = run_recbole_llm(config_dict={**tiny, "eval_step": 0, "epochs": 2})
    record = json.loads((Path(result["run_folder"]) / "result.json").read_text())
    assert result["best_valid_result"] is None and record["stages"][0]["best_valid_score"] is None
    assert len(record["stages"][0]["train_loss"]) == 2 and record["metrics"] == result["test_result"]


def test_epochs_that_validation_never_sees_are_told(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    run_recbole_llm(config_dict={**tiny, "eval_step": 2, "epochs": 3})
    assert "--eval_step=2: of 3 epochs the last 1 are never validated" in caplog.text
    caplog.clear()
    run_recbole_llm(config_dict={**tiny, "eval_step": 4, "epochs": 2})
    assert "never validated" not in caplog.text


def test_zero_shot_trains_nothing(tiny: dict[str, Any]) -> None:
    result = run_recbole_llm(config_dict={**tiny, "finetune": "none"})
    record = json.loads((Path(result["run_folder"]) / "result.json").read_text())
    assert record["stages"] == [] and record["trainable_parameters"] == 0 and result["best_valid_result"] is not None
    assert not (Path(result["run_folder"]) / "adapter_model.safetensors").exists()


def test_full_ranking_reorders_the_top_of_another_model(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The LLM's order on top, all others behind in the base's; hidden items take no place."""
    model, protocol, _ = built({**tiny, "rerank_topk": 4}, tmp_path / "run")
    model.eval()

    class Base(torch.nn.Module):
        def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
            return torch.arange(model.n_items, 0, -1).float().repeat(len(interaction), 1).view(-1)

    model.rerank_with(Base())
    history = asked(model, [[3, 4, 5]], [[1]])
    with torch.no_grad():
        scores = model.full_sort_predict(history, [np.array([2])]).view(-1)
        llm = model.predict(asked(model, [[3, 4, 5]], [[1, 3, 4, 5]]))
    order = scores.argsort(descending=True).tolist()
    assert order[:4] == [[1, 3, 4, 5][i] for i in llm.argsort(descending=True).tolist()]
    assert [i for i in order[4:] if scores[i] > -torch.inf] == list(range(6, model.n_items))
    assert scores[0] == scores[2] == -torch.inf


def test_full_mode_runs_and_trains_its_base(tiny: dict[str, Any]) -> None:
    result = run_recbole_llm(config_dict={**tiny, "eval_args": {"mode": "full"}, "rerank_model": "Pop"})
    assert 0 <= result["test_result"]["hit@10"] <= 1
    with pytest.raises(UserError, match="rerank_model"):
        run_recbole_llm(config_dict={**tiny, "eval_args": {"mode": "full"}, "rerank_model": "LLMRanker"})


def test_a_diverged_loss_is_told(tiny: dict[str, Any], tmp_path: Path) -> None:
    model, protocol, trainer = built(tiny, tmp_path / "run")
    real = model.window_loss
    model.window_loss = lambda windows, loss: replace(
        real(windows, loss), total=real(windows, loss).total * float("nan")
    )
    with pytest.raises(UserError, match=r"learning_rate.*step 0.*users u"):
        trainer.fit(protocol.train_data, protocol.valid)


def test_context_too_small_is_told(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import recbole_llm.model.llmranker as module

    real = module.load_llm
    monkeypatch.setattr(module, "load_llm", lambda **kw: replace(real(**kw), context=12))
    with pytest.raises(UserError, match="context is 12 tokens"):
        built(tiny, tmp_path / "run")


def test_prior_of_an_evaluation_is_of_the_weights_that_are_evaluated(tiny: dict[str, Any], tmp_path: Path) -> None:
    """The best epoch's weights are loaded after the last epoch was validated, and then evaluated without training."""
    model, _, _ = built({**tiny, "score_norm": "pmi"}, tmp_path / "run")
    model.eval()
    rows = asked(model, [[1, 2]], [[5, 6, 7]])
    with torch.no_grad():
        model.predict(rows)
        for weight in model.parameters():
            weight.mul_(1.1)
        model.eval()
        scores = model.predict(rows)
        model.config["score_norm"] = "sum"
        expected = model.predict(rows) - model.predict(asked(model, [[]], [[5, 6, 7]]))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_every_schedule_warms_up(tiny: dict[str, Any], schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the steps: rates rise from 0 to the rate given, which `constant` then keeps."""
    rates: list[float] = []

    def seen(self: torch.optim.AdamW, *args: Any, **more: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **more)

    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", seen)
    settings = {**tiny, "learning_rate": 0.01, "warmup_ratio": 0.5, "lr_scheduler": schedule, "learner": "adamw"}
    result = run_recbole_llm(config_dict={**settings, "train_batch_size": 16})
    half = len(rates) // 2
    assert len(rates) > 8 and np.allclose(rates[:half], 0.01 * np.arange(half) / half)
    assert (np.allclose(rates[half:], 0.01)) == (schedule == "constant")
    lines = (Path(result["run_folder"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["learning_rate"] for line in lines] == rates  # of the step, not of the next one


def test_what_may_not_be_meant_is_warned_of(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Full ranking that is another model's top, keys that change nothing, a share of look-alikes that says nothing."""
    settings = {**tiny, "finetune": "none", "eval_users": 5, "eval_args": {"mode": "full"}}
    run_recbole_llm(config_dict={**settings, "rejected": "semantic", "rerank_topk": 7})
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("the LLM reorders Pop's top 7 and finds nothing else; --full_ranking=exact_topk" in t for t in told)
    (idle,) = [t for t in told if t.startswith("Given, but read by nothing under the other settings: ")]
    assert "rejected" in idle and "rerank_topk" not in idle
    assert any(t.startswith("--look_alikes=50: that many of 60 items look like any history") for t in told)
    caplog.clear()
    run_recbole_llm(config_dict={**settings, "full_ranking": "exact", "look_alikes": 6})
    assert not [
        r for r in caplog.records if "--full_ranking=rerank" in r.getMessage() or "look_alikes=" in r.getMessage()
    ]
