"""What a GPU runs: FlexAttention, bfloat16, 4-bit weights, searches. Skipped where there is none."""

from __future__ import annotations

import gc
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_llm.catalogue import exact_scores, exact_topk
from recbole_llm.llm.attention import NAMES
from recbole_llm.llm.logps import batch_logps, completion_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.token_tree import TokenTree
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.title_scores import title_scores
from tests.conftest import accuracy
from tests.test_attention import logps_and_gradients, stream
from tests.test_catalogue import best, random_answers, random_prompt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda")


def drawn() -> list[TokenTree]:
    generator = torch.Generator().manual_seed(0)
    return [stream(20, 7, 5, generator), stream(30, 0, 6, generator), stream(3, 2, 1, generator)]


def on_gpu(**options: Any) -> torch.nn.Module:
    return load_llm(**{"llm": "tiny", "device": GPU, "seed": 0, "finetune": "full", **options}).model


@pytest.mark.parametrize("kind", ["flex", "blocks", "sdpa"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_back_ends_equal_the_cpu_in_float32(kind: str, checkpointing: bool) -> None:
    """Log-probs and gradients; rows of several lengths go through one compiled kernel."""
    expected, expected_gradients = logps_and_gradients("eager", drawn())
    model = on_gpu(dtype="float32", attention=kind, gradient_checkpointing=checkpointing).train()
    assert model.config._attn_implementation == NAMES.get(kind, kind)
    logps = batch_logps(model, drawn())
    torch.testing.assert_close(logps.detach().cpu(), expected, atol=1e-3, rtol=0)
    weights = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(logps.sin().sum(), weights, allow_unused=True)
    gradients = torch.cat([g.flatten() for g in found if g is not None]).cpu()
    assert (gradients - expected_gradients).norm() <= 1e-3 * expected_gradients.norm()
    for part in ([0], [1, 2]):
        some = [drawn()[i] for i in part]
        wanted = logps_and_gradients("eager", some)[0]
        torch.testing.assert_close(batch_logps(model, some).detach().cpu(), wanted, atol=1e-3, rtol=0)


def test_bfloat16_is_chosen_with_flex_and_as_exact_as_one_sequence_at_a_time() -> None:
    """Its error against float32 is that of plain code in bfloat16, whatever else is in the row."""
    expected = logps_and_gradients("eager", drawn())[0]
    model = on_gpu(finetune="none")
    assert (model.dtype, model.config._attn_implementation) == (torch.bfloat16, NAMES["flex"])
    with torch.no_grad():
        together = batch_logps(model, drawn()).cpu()
        alone = torch.cat(completion_logps(model, drawn(), token_budget=1)).cpu()
        model.set_attn_implementation("eager")
        plain = batch_logps(model, drawn()).cpu()
    error = (plain - expected).abs().mean()
    assert (together - expected).abs().mean() <= 1.2 * error
    assert (together - alone).abs().max() <= 1e-2 * expected.abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_exact_ranking(dtype: str) -> None:
    """The full pass equals the CPU's; the search finds what the full pass finds."""
    answers, prompts = random_answers(0), [random_prompt(i, 3 + 11 * i) for i in range(5)]
    trie = title_trie(answers)
    scores, hidden = title_scores(trie), [np.arange(1, 4)] * 5
    model = on_gpu(dtype=dtype, finetune="none")
    full = [exact_scores(model, p, trie, scores, token_budget=33).numpy() for p in prompts]
    found, stats = exact_topk(model, prompts, trie, scores, k=5, hidden=hidden, token_budget=64, most_kept=10**4)
    assert len(stats.expansions) == 5
    if dtype == "float32":
        cpu = tiny_llm()[0]
        cpu.set_attn_implementation(NAMES["blocks"])
        for prompt, mine in zip(prompts, full, strict=True):
            np.testing.assert_allclose(
                mine, exact_scores(cpu, prompt, trie, scores, token_budget=33).numpy(), atol=1e-3
            )
        for one, mine in zip(found, full, strict=True):
            assert set(one.items.tolist()) == best(mine, 5, [1, 2, 3])
    for one, mine in zip(found, full, strict=True):
        np.testing.assert_allclose(one.scores, mine[one.items], atol=1e-3 if dtype == "float32" else 0.5)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
def test_4bit_trains_its_adapters_alone(tmp_path: Path) -> None:
    """Log-probs of packed trees equal those of plain code over the same 4-bit weights; gradients reach LoRA."""
    model, tokenizer = tiny_llm()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    llm = load_llm(llm=str(tmp_path), device=GPU, quantization="4bit", gradient_checkpointing=True, seed=0)
    packed = llm.model.train()
    kinds = {type(module).__name__ for module in packed.modules()}
    assert "Linear4bit" in kinds
    logps = batch_logps(packed, drawn())
    logps.sum().backward()
    with_gradient = {name for name, p in packed.named_parameters() if p.grad is not None}
    assert with_gradient and all("lora_" in name for name in with_gradient)
    with torch.no_grad():
        packed.base_model.model.set_attn_implementation("eager")
        plain = batch_logps(packed, drawn())
    assert (logps - plain).abs().mean() < 0.3


def test_out_of_memory_halves_the_budget() -> None:
    """A pass that the GPU truly has no room for; the next, smaller one gives the numbers."""
    from recbole_llm.llm.budget import TokenBudget

    budget = TokenBudget(1024)
    total = torch.cuda.get_device_properties(GPU).total_memory

    def work(tokens: int) -> int:
        torch.empty(int(total * tokens / 300), dtype=torch.uint8, device=GPU)  # fits at 256 and below
        return tokens

    assert budget.run(work) == 256 == budget.tokens
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("changes", [{}, {"eval_args": {"mode": "full"}, "full_ranking": "exact_topk"}])
def test_a_run_on_the_gpu(tiny: dict[str, Any], changes: dict[str, Any]) -> None:
    """Two stages and the evaluation, in float32 as on a CPU to rounding, and in bfloat16."""
    settings = {**tiny, "loss": "SDPO", "rejected_num": 3, "few_shot": 20, **changes}
    result = {}
    for device, dtype in (("", "float32"), ("0", "float32"), ("0", "bfloat16")):
        run = {"gpu_id": device, "dtype": dtype, "checkpoint_dir": f"saved{device}{dtype}"}
        done = run_recbole_llm(config_dict={**settings, **run})
        result[device, dtype] = accuracy(done["test_result"])
    assert all(np.isfinite(list(r.values())).all() for r in result.values())
    cpu, gpu = (np.array(list(result[key, "float32"].values())) for key in ("", "0"))
    np.testing.assert_allclose(gpu, cpu, atol=0.06)  # of 40 users one or two whose candidates nearly tie


@pytest.mark.parametrize("model", ["EASE", "ItemKNN", "Random", "BPR", "SASRec"])
def test_classic_models_rank_on_the_gpu(toy: dict[str, Any], model: str) -> None:
    """Some of RecBole's give their scores on the CPU."""
    for number, mode in enumerate(("uni19", "full")):
        run = {"gpu_id": "0", "epochs": 1, "eval_args": {"mode": mode}, "checkpoint_dir": f"saved{number}"}
        done = run_recbole_llm(model, None, None, {**toy, **run})
        assert np.isfinite(list(accuracy(done["test_result"]).values())).all()
