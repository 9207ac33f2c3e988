"""Frozen linear layers through oneDNN: the same numbers as torch's default, and a choice that stays."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.llm import fast_linears
from recbole_llm.llm.fast_linears import OneDNNLinear, onednn_linear, speed_up_linears, use_kernels
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder
from tests.conftest import prepared, started

DEFAULT = {"layers": "default", "head": "default"}
ONEDNN = {"layers": "onednn", "head": "onednn"}

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(not fast_linears._has_onednn(), reason="this torch has no oneDNN"),
]


def llama(**options: Any) -> LlamaForCausalLM:
    """A small random model, frozen, whose layers are large enough to be looked at."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return LlamaForCausalLM(config).eval().requires_grad_(False)


def with_lora(model: LlamaForCausalLM, kernels: dict[str, str]) -> PeftModel:
    """The model over these kernels under an adapter that does something, the same each time."""
    use_kernels(model, kernels)
    options = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(1)
        model = get_peft_model(model, options)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.02)
    return model


def tree() -> TokenTree:
    generator = torch.Generator().manual_seed(2)
    builder = TreeBuilder()
    end = builder.chain(-1, torch.randint(512, (40,), generator=generator).tolist())[-1]
    for length in (1, 3, 6, 4):
        builder.completion(builder.chain(end, torch.randint(512, (length,), generator=generator).tolist()))
    return builder.build()


def logps_and_gradient(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor]:
    model.zero_grad()
    logps = batch_logps(model, [tree()])
    (logps * torch.tensor([1.0, -0.5, -0.3, -0.2])).sum().backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    assert len(gradient) == 2 * 2 * 7  # A and B of seven layers in two blocks
    return logps.detach(), torch.cat(gradient)


@pytest.mark.parametrize("tied", [False, True])
def test_scores_and_lora_gradients_are_the_default_ones(tied: bool) -> None:
    plain, fast = (with_lora(llama(tie_word_embeddings=tied), kernels) for kernels in (DEFAULT, ONEDNN))
    assert sum(isinstance(m, OneDNNLinear) for m in fast.modules()) == 2 * 7 + 1
    (expected, gradient), (logps, found) = logps_and_gradient(plain), logps_and_gradient(fast)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    assert expected.abs().max() > 1  # the tolerance says something
    assert (found - gradient).norm() <= 1e-5 * gradient.norm()
    with torch.no_grad():
        torch.testing.assert_close(batch_logps(fast, [tree()]), expected, atol=1e-4, rtol=0)


def test_the_kernel_is_really_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frozen product, forward and backward, goes through oneDNN; the first inputs need no gradient."""
    calls = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(tuple(weight.shape))
        return onednn_linear(x, weight, bias)

    model = with_lora(llama(), ONEDNN)
    monkeypatch.setattr(fast_linears, "onednn_linear", counted)
    monkeypatch.setattr("recbole_llm.llm.logps.onednn_linear", counted)
    logps_and_gradient(model)
    assert len(calls) == (2 * 7 + 1) + (2 * 7 - 3 + 1)
    assert calls.count((512, 256)) == calls.count((256, 512)) == 1  # the head


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_is_the_linear_layer_it_replaces(bias: bool) -> None:
    plain = nn.Linear(20, 30, bias=bias).requires_grad_(False)
    fast = fast_linears._onednn(plain)
    assert fast.weight is plain.weight and fast.bias is plain.bias
    x = torch.randn(2, 3, 20)
    for shaped in (x, x[0, 0], x.transpose(0, 1), x[:, :0]):  # whatever the shape and the strides
        torch.testing.assert_close(fast(shaped), plain(shaped))
    x.requires_grad_()
    (expected,) = torch.autograd.grad(plain(x).sum(), x)  # a gradient without strides of its own
    (found,) = torch.autograd.grad(fast(x).sum(), x)
    torch.testing.assert_close(found, expected)


def test_a_trained_layer_and_other_types_go_the_usual_way() -> None:
    fast = fast_linears._onednn(nn.Linear(20, 30, bias=False))
    x = torch.randn(3, 20)
    (gradient,) = torch.autograd.grad(fast(x).sum(), fast.weight)  # it is not frozen
    torch.testing.assert_close(gradient, x.sum(0).expand(30, -1))
    half = fast.requires_grad_(False).bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16


def test_adapters_have_the_same_names_and_values_on_either_kernel() -> None:
    plain, fast = with_lora(llama(), DEFAULT), with_lora(llama(), ONEDNN)
    assert list(plain.state_dict()) == list(fast.state_dict())
    with torch.no_grad():
        for weight in fast.parameters():
            if weight.requires_grad:
                weight.mul_(1.5)
    set_peft_model_state_dict(plain, get_peft_model_state_dict(fast))
    torch.testing.assert_close(batch_logps(plain, [tree()]), batch_logps(fast, [tree()]), atol=1e-4, rtol=0)


@torch.no_grad()
def test_merging_and_switching_off_the_adapter() -> None:
    model = with_lora(llama(), ONEDNN)
    base, adapted = batch_logps(llama(), [tree()]), batch_logps(model, [tree()])
    assert (adapted - base).abs().max() > 0.01
    with model.disable_adapter():
        torch.testing.assert_close(batch_logps(model, [tree()]), base, atol=1e-4, rtol=0)
    model.merge_adapter()
    torch.testing.assert_close(batch_logps(model, [tree()]), adapted, atol=1e-4, rtol=0)
    model.unmerge_adapter()
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(batch_logps(merged, [tree()]), adapted, atol=1e-4, rtol=0)


# ---- the choice


def chosen(monkeypatch: pytest.MonkeyPatch, layers: float, head: float, folder: Path) -> tuple[dict[str, str], int]:
    """What is chosen when oneDNN is so many times faster, and how often it was timed."""
    timed = []

    def gain(linears: list[nn.Linear], most_outputs: int) -> float:
        timed.append(linears)
        return {14: layers, 1: head}[len(linears)]

    monkeypatch.setattr(fast_linears, "_gain", gain)
    model = llama()
    kernels = speed_up_linears(model, folder)
    decoder = [m for m in model.model.modules() if isinstance(m, nn.Linear)]
    assert {isinstance(m, OneDNNLinear) for m in decoder} == {kernels["layers"] == "onednn"}
    assert isinstance(model.lm_head, OneDNNLinear) == (kernels["head"] == "onednn")
    return kernels, len(timed)


@pytest.mark.parametrize(("layers", "head"), [(1.09, 1.11), (1.11, 1.09), (0.5, 0.9), (1.7, 2.0)])
def test_what_is_clearly_faster_is_chosen_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, layers: float, head: float
) -> None:
    expected = {"layers": "onednn" if layers > 1.1 else "default", "head": "onednn" if head > 1.1 else "default"}
    assert chosen(monkeypatch, layers, head, tmp_path) == (expected, 2)
    assert chosen(monkeypatch, 1 / layers, 1 / head, tmp_path) == (expected, 0)  # kept, whatever a new timing says
    torch.set_num_threads(2)
    assert chosen(monkeypatch, 0.5, 0.5, tmp_path) == (DEFAULT, 2)  # another number of threads is another case


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"kernels": {"layers": "onednn"}}', '{"kernels": null}', "\udcff"])
def test_a_damaged_file_is_made_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, damage: str) -> None:
    chosen(monkeypatch, 2.0, 2.0, tmp_path)
    (file,) = (tmp_path / "kernels").glob("*.json")
    file.write_bytes(damage.encode(errors="surrogateescape"))
    assert chosen(monkeypatch, 0.5, 2.0, tmp_path) == ({"layers": "default", "head": "onednn"}, 2)
    assert json.loads(file.read_text())["gain"] == {"layers": 0.5, "head": 2.0}
    file.write_text(file.read_text().replace("onednn", "cuda"))  # a kernel there is not
    assert chosen(monkeypatch, 2.0, 0.5, tmp_path) == ({"layers": "onednn", "head": "default"}, 2)


def test_where_nothing_can_be_kept_nothing_is_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Two runs would else decide each for itself."""
    (tmp_path / "file").write_text("")
    assert chosen(monkeypatch, 2.0, 2.0, tmp_path / "file") == (DEFAULT, 0)
    assert "RECBOLE_LLM_CACHE" in caplog.text


def test_a_gain_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a clock that counts products: one layer of each shape is timed once a round, at each number of rows."""
    now, seen = [0.0], []

    def forward(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        now[0] += 1.0 if isinstance(self, OneDNNLinear) else 2.5
        seen.append((type(self), tuple(self.weight.shape), len(x)))
        return nn.functional.linear(x, self.weight)

    monkeypatch.setattr(fast_linears.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(nn.Linear, "forward", forward)
    monkeypatch.setattr(OneDNNLinear, "forward", forward)
    layers = [nn.Linear(*shape, bias=False) for shape in ((8, 4), (8, 4), (4, 30))]
    assert fast_linears._gain(layers, 16) == pytest.approx(2.5)
    cases = {(shape, rows) for shape in ((4, 8), (16, 4)) for rows in fast_linears.ROWS}  # the third one is cut
    assert {s for s in seen if s[0] is OneDNNLinear} == {(OneDNNLinear, *case) for case in cases}
    rounds = 1 + fast_linears.LEAST_ROUNDS  # the first warms up
    assert len(seen) == rounds * 2 * len(cases)
    assert fast_linears._gain([], 16) == 1


def test_only_frozen_float32_layers_of_some_size_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fast_linears, "_gain", lambda linears, most_outputs: 2.0)
    for model in (llama().requires_grad_(True), llama().bfloat16()):
        assert speed_up_linears(model, tmp_path) == DEFAULT
        assert not any(isinstance(m, OneDNNLinear) for m in model.modules())
    assert not list(tmp_path.iterdir())  # nor was there anything to decide
    model = llama()
    model.lm_head.requires_grad_(True)
    assert speed_up_linears(model, tmp_path) == {"layers": "onednn", "head": "onednn"}
    assert not isinstance(model.lm_head, OneDNNLinear)


# ---- in an LLM


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """oneDNN is far ahead, even for the tiny LLM."""
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(fast_linears, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(fast_linears, "_gain", lambda linears, most_outputs: 2.0)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("options", "kernels"),
    [
        ({}, ONEDNN),
        ({"finetune": "none"}, ONEDNN),
        ({"fast_linears": False}, DEFAULT),
        ({"finetune": "full"}, DEFAULT),
        ({"dtype": "bfloat16"}, DEFAULT),
    ],
)
def test_where_an_llm_uses_it(options: dict[str, Any], kernels: dict[str, str]) -> None:
    llm = load_llm(llm="tiny", device=torch.device("cpu"), seed=0, **options)
    assert llm.kernels == kernels
    assert any(isinstance(m, OneDNNLinear) for m in llm.model.modules()) == (kernels == ONEDNN)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(("flag", "kernels"), [(True, ONEDNN), (False, DEFAULT)])
def test_a_result_names_the_kernels(tiny: dict[str, Any], flag: bool, kernels: dict[str, str]) -> None:
    trainer = started(*prepared(tiny, "LLMRanker", fast_linears=flag))
    assert trainer.facts["kernels"] == kernels
