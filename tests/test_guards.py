"""What would go wrong in silence is refused or told: adapters that never moved, wrong files, titles that were cut."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm import files, guards
from recbole_llm.data.pair_prompt import PairPrompt, make_prompt
from recbole_llm.data.prompt import Prompt, Window, plain_tokens
from recbole_llm.data.template import load_template
from recbole_llm.data.windows import training_windows
from recbole_llm.errors import UserError
from recbole_llm.explain.finished_run import FinishedRun
from recbole_llm.llm import adapter
from recbole_llm.llm.identity import PROBES, check_identity, identity, local_weights
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.token_tree import TokenTree
from recbole_llm.llm_trainer import LLMTrainer
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.runs import stood_still
from recbole_llm.resume import read_save
from recbole_llm.run_folder import run_folder_of
from recbole_llm.settings import PROPERTIES
from tests.conftest import prepared
from tests.test_resume import Killed, kill_at

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.injects]
SMALL = {"few_shot": 8, "eval_users": 8, "save_every": 0}
CPU = torch.device("cpu")
MANY_STEPS = {"train_batch_size": 8, "few_shot": 12, "state": "WARNING"}
TOKENIZER = tiny_llm()[1]


@pytest.fixture(autouse=True)
def counted(case: Callable[..., None]) -> None:
    """Each test makes one thing go wrong, at least."""
    case("faults injected")


def refused(match: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=match)


# ---- adapters


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"learning_rate": 1e-30}, "--learning_rate=1e-30: .* steps of SFT trained nothing .scores are as"),
        ({"learning_rate": 1e-3, "frozen": True}, "steps of SFT trained nothing .LoRA adds nothing"),
        ({"loss": "DMPO", "preference_learning_rate": 1e-30}, "--preference_learning_rate=1e-30: .* steps of DMPO"),
    ],
)
def test_an_adapter_that_never_moved_is_not_evaluated(
    tiny: dict[str, Any], changes: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a step that float32 cannot hold, or by gradients that reach A alone (B at zero has none to give A)."""
    if changes.pop("frozen", False):
        real = LLMTrainer._build_optimizer

        def frozen(self: LLMTrainer, **how: Any) -> Any:
            for name, weight in self.model.named_parameters():
                weight.requires_grad &= "lora_B" not in name
            optimizer = real(self, **how)
            for group in optimizer.param_groups:
                group["weight_decay"] = 0.1  # moves A
            return optimizer

        monkeypatch.setattr(LLMTrainer, "_build_optimizer", frozen)
    with refused(told):
        run_recbole_llm(config_dict={**tiny, **SMALL, **changes})
    assert not list(Path(tiny["checkpoint_dir"]).glob("*/result.json"))
    done = [file.parent.name for file in Path(tiny["checkpoint_dir"]).glob("**/stage.json")]
    assert len(done) == ("loss" in changes)  # a stage that trained nothing is not kept for others to reuse


def test_what_is_saved_is_read_back(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of an adapter that is sound and another one: what an earlier run left, say."""
    real = files.save_file

    def other(state: dict[str, torch.Tensor], file: Path, metadata: dict[str, str]) -> None:
        state = {name: tensor * 0.5 for name, tensor in state.items()}
        real(state, file, metadata={"sha256": adapter.digest(state)})

    done = guards.check_saved

    def late(model: Any, windows: Any, folder: Path) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(files, "save_file", other)
            adapter.save_adapter(model.llm, folder)
        before = adapter.digest(adapter.adapter_state(model.llm))
        try:
            done(model, windows, folder)
        finally:
            assert adapter.digest(adapter.adapter_state(model.llm)) == before

    monkeypatch.setattr("recbole_llm.llm_trainer.check_saved", late)
    with refused("the adapter that was saved is not the one that was trained .other tensors, scores .* differ"):
        run_recbole_llm(config_dict={**tiny, **SMALL})
    assert not list(Path(tiny["checkpoint_dir"]).glob("*/result.json"))


def test_loading_that_does_nothing_is_seen(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "load_adapter", lambda llm, folder: None)
    with refused("the adapter that was saved is not the one that was trained"):
        run_recbole_llm(config_dict={**tiny, **SMALL})


# ---- a loss that stands still


@pytest.mark.parametrize(
    ("loss", "start"),
    [
        ("SDPO", math.log(4)),
        *(pytest.param(loss, math.log(2), marks=pytest.mark.faults) for loss in ("DPO", "DMPO", "RosePO")),
    ],
)
def test_a_loss_that_stays_where_it_starts_is_told(
    tiny: dict[str, Any], loss: str, start: float, caplog: pytest.LogCaptureFixture
) -> None:
    """A rate that moves weights, and no loss; the log of every step is the closed form to the last digits."""
    changes = {"loss": loss, "preference_learning_rate": 1e-9, "rejected_num": 1 if loss == "DPO" else 3}
    changes |= MANY_STEPS | ({"smoothing": 0.1} if loss == "RosePO" else {})
    folder = Path(run_recbole_llm(config_dict={**tiny, **SMALL, **changes})["run_folder"])
    stage = json.loads((folder / "result.json").read_text())["stages"][-1]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    mine = [line for line in lines if line["stage"] == loss]
    assert len(mine) >= guards.LEAST_STEPS and all(line["loss"] == pytest.approx(start, abs=1e-4) for line in mine)
    assert stood_still(stage) and stage["standstill"]["loss_from_start"] < 1e-4
    assert f"Stage {loss}: at its end the loss is still what it is before any training" in caplog.text
    assert f"The {loss} loss ended where it starts" in (folder / "README.md").read_text()


def test_a_loss_that_moves_is_not(tiny: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    changes = {"loss": "DMPO", "preference_learning_rate": 1e-3, **MANY_STEPS}
    folder = Path(run_recbole_llm(config_dict={**tiny, **SMALL, **changes})["run_folder"])
    assert not stood_still(json.loads((folder / "result.json").read_text())["stages"][-1])
    assert "before any training" not in caplog.text


def test_the_last_tenth_counts(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"

    def told(values: list[float]) -> dict[str, Any]:
        lines = [{"stage": "SFT", "loss": 3.0}, *({"stage": "DPO", "loss/from_start": v} for v in values)]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return guards.standstill(file, "DPO")

    assert told([-0.5] * 18 + [1e-4, -3e-4]) == {"loss_from_start": pytest.approx(2e-4), "stood_still": True}
    assert not told([0.0] * 18 + [0.0, -0.01])["stood_still"]
    assert not told([0.0] * 9)["stood_still"]  # hardly begun


# ---- base weights, tokenizer, chat template, titles


def test_another_tokenizer_or_chat_template_is_refused(tmp_path: Path) -> None:
    llm = load_llm(llm="tiny", device=CPU, seed=0)
    adapter.save_adapter(llm, tmp_path)
    adapter.load_adapter(llm, tmp_path)
    kept = llm.tokenizer.chat_template
    llm.tokenizer.chat_template = kept.replace("user", "human") + " "
    with refused(f"the adapter in {tmp_path} was trained over tiny .a chat template .*other chat template"):
        adapter.load_adapter(llm, tmp_path)
    llm.tokenizer.chat_template = kept
    llm.tokenizer.add_tokens(["千"])  # a token that only the probes in another script show
    with refused("tiny .a tokenizer .*other tokenizer"):
        adapter.load_adapter(llm, tmp_path)


def test_what_older_versions_did_not_keep_is_not_asked_for() -> None:
    llm = load_llm(llm="tiny", device=CPU, seed=0)
    known = identity(llm)
    check_identity({"llm": "tiny", "revision": known["revision"]}, llm, "this", "Stop.")
    with refused("this was trained over tiny .weights 00.*; --llm=tiny has other weights .*Stop."):
        check_identity({"llm": "tiny", "revision": "00"}, llm, "this", "Stop.")


def test_weights_at_a_path_name_the_run(tiny: dict[str, Any], folder: Path) -> None:
    """Other weights, tokenizer or template at the same path: another run, so that no finished one is taken for it."""
    where = {**tiny, "llm": str(folder)}
    before = run_folder_of(prepared(where, "LLMRanker")[0])
    assert run_folder_of(prepared(where, "LLMRanker")[0]) == before and local_weights("tiny") is None
    for name in ("model.safetensors", "tokenizer_config.json"):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        after = run_folder_of(prepared(where, "LLMRanker")[0])
        (folder / name).write_bytes(data)
        assert after != before


def another_configuration(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["rms_norm_eps"] = 0.01
    file.write_text(json.dumps(config))


def other_tokens_of_titles(folder: Path) -> None:
    """Swaps two tokens that titles have, and none of the probes."""
    read = (["red cat", "blue owl", "green elk"], list(PROBES))
    titles, probes = ({i for text in plain_tokens(TOKENIZER, texts) for i in text} for texts in read)
    a, b = TOKENIZER.convert_ids_to_tokens(sorted(titles - probes)[:2])
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize("changed", [another_configuration, other_tokens_of_titles])
def test_what_an_llm_computes_names_its_stages(
    tiny: dict[str, Any], folder: Path, tmp_path: Path, changed: Callable[[Path], None]
) -> None:
    """The weights at a path are the same, and what was trained over them is another: nothing of it is read."""
    where = {**tiny, **SMALL, "llm": str(folder), "loss": "DMPO", "rejected": "self_hard"}
    run_recbole_llm(config_dict=where)
    changed(folder)
    after = run_recbole_llm(config_dict=where)
    fresh = run_recbole_llm(config_dict={**where, "checkpoint_dir": str(tmp_path / "fresh")})
    stages = json.loads((Path(after["run_folder"]) / "result.json").read_text())["stages"]
    assert [stage.get("reused", False) for stage in stages] == [False, False]
    assert after["test_result"] == fresh["test_result"]


@pytest.mark.faults
def test_a_stage_does_not_go_on_over_another_base(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights behind one name changed between the kill and the next try."""
    long = {**tiny, **SMALL, "save_every": 1e-9, "loss": "DMPO", "preference_epochs": 2, "train_batch_size": 8}
    run_recbole_llm(config_dict={**long, "loss": "SFT"})  # SFT is there; the kill meets DMPO
    alive = kill_at(monkeypatch, 3)
    with pytest.raises(Killed):
        run_recbole_llm(config_dict=long)
    alive()
    (save,) = {file.parent for file in Path(tiny["checkpoint_dir"]).glob("**/progress-*")}
    then = read_save(next(save.glob("progress-*")))[1]["base"]["revision"]
    real = identity
    monkeypatch.setattr("recbole_llm.llm.adapter.check_identity", lambda *_: None)
    monkeypatch.setattr("recbole_llm.llm.identity.identity", lambda llm: {**real(llm), "revision": "another"})
    with refused(f"the stage that is to go on in {save} was trained over tiny .weights {then}.*another.*resume=False"):
        run_recbole_llm(config_dict=long)


def test_a_finished_run_needs_its_base_and_its_titles(tiny: dict[str, Any], folder: Path) -> None:
    run = Path(run_recbole_llm(config_dict={**tiny, **SMALL, "llm": str(folder)})["run_folder"])
    item = Path(tiny["data_path"]) / "toy" / "toy.item"
    titles = item.read_text()
    item.write_text(titles.replace("red cat", "red cats"))
    with refused(f"{run}: its titles are other tokens today .* than when it was trained"):
        _ = FinishedRun(run).model
    item.write_text(titles)
    assert FinishedRun(run).model is not None
    folder.rename(folder.with_name("moved"))
    with refused(f"{run}: it ran over {folder} with weights [0-9a-f]*, which must be there again: --llm={folder}"):
        _ = FinishedRun(run).model


# ---- targets are whole, whatever the context


def paths(tree: TokenTree) -> list[tuple[list[int], list[int]]]:
    """Of each completion the tokens that lead to it, and its own."""
    token, parent, found = tree.token.tolist(), tree.parent.tolist(), []
    for number in range(tree.n_completions):
        nodes = tree.scored[tree.completion == number].tolist()
        node, before = parent[nodes[0]], []
        while node >= 0:
            before.append(token[node])
            node = parent[node]
        found.append((before[::-1], [token[n] for n in nodes]))
    return found


def check_tree(prompt: Prompt | PairPrompt, window: Window, context: int) -> None:
    """Every answer of a window whole, after the whole newest history that fits, within the context."""
    found = paths(prompt.window_tree(window))
    assert all(len(before) + len(answer) <= context for before, answer in found)
    if isinstance(prompt, PairPrompt):
        target, trunk = window.items[-1], prompt.trunk(window.items[:-1])
        listings = [prompt.order(window, place) for place in range(len(window.rejected[0]))]
        wanted = [(trunk + prompt.listing(*pair), prompt.answer(target, r)) for pair, r in
                  zip(listings, window.rejected[0], strict=True)]  # fmt: skip
        wanted += [(trunk + prompt.listing(*pair), prompt.answer(r, target)) for pair, r in
                   zip(listings, window.rejected[0], strict=True)]  # fmt: skip
    else:
        wanted = [
            (prompt.trunk(window.items[:place]), prompt.answers[item])
            for place, others in zip(window.targets, window.branches(), strict=True)
            for item in (window.items[place], *others)
        ]
    assert found == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_targets_are_whole_whatever_the_context(data: st.DataObject) -> None:
    """Windows of random catalogues and contexts, from the least that is allowed: every answer stands whole in the tree,
    and none ends behind the context."""
    sizes = data.draw(st.lists(st.integers(1, 30), min_size=6, max_size=12))
    texts = [
        "",
        *(f"{number} {data.draw(st.sampled_from(['toy', '千', '1995']))} " * n for number, n in enumerate(sizes)),
    ]
    longest = max(range(1, len(texts)), key=lambda i: len(texts[i]))
    family = data.draw(st.sampled_from(["stream", "instruct", "pair"]))
    prompt = make_prompt(load_template(family, PROPERTIES), texts, TOKENIZER)
    context = prompt.longest(1) + data.draw(st.integers(0, 60))
    items = data.draw(st.lists(st.integers(1, len(texts) - 1), min_size=2, max_size=8))
    chosen = data.draw(st.integers(1, 2)) if family != "pair" else 1
    history = data.draw(st.integers(1, 8))
    windows = training_windows(
        {1: np.array(items)}, prompt, history=history, last=0, most_tokens=context, chosen=chosen
    )
    for window in windows:
        targets = {window.items[t] for t in window.targets}  # no rejected item is one of them
        others = st.sampled_from([i for i in range(1, len(texts)) if i not in {longest, *targets}])
        also = () if isinstance(prompt, PairPrompt) else window.also
        hardest = () if longest in targets else (longest,)
        window = replace(window, rejected=tuple((*hardest, data.draw(others)) for _ in window.targets), also=also)
        assert all(t >= 1 for t in window.targets)
        check_tree(prompt, window, context)
