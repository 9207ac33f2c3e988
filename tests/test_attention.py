"""Attention back ends: the same log-probs and gradients as transformers' own kernels under a dense mask."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from recbole_llm.catalogue import exact_scores
from recbole_llm.errors import UserError
from recbole_llm.llm import attention
from recbole_llm.llm.attention import FLEX_BLOCK, NAMES, Blocks, Flex, additive_mask
from recbole_llm.llm.attention_check import choose_attention
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.title_trie import title_trie
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder, batch_trees
from recbole_llm.title_scores import title_scores
from tests.test_token_tree import one_at_a_time, trees

OTHER_SCALE = getattr(transformers, "HyperCLOVAXConfig", None)  # older versions have none


def stream(positions: int, rejected: int, title: int, generator: torch.Generator) -> TokenTree:
    """A window as training makes it: titles in a chain, rejected ones hanging off each position."""
    builder = TreeBuilder()

    def draw(number: int) -> list[int]:
        return torch.randint(3, 200, (number,), generator=generator).tolist()

    end = builder.chain(-1, draw(5))[-1]
    for _ in range(positions):
        for _ in range(rejected):
            builder.completion(builder.chain(end, draw(title)))
        nodes = builder.chain(end, draw(title))
        builder.completion(nodes)
        end = nodes[-1]
    return builder.build()


@pytest.fixture
def windows() -> list[TokenTree]:
    generator = torch.Generator().manual_seed(0)
    return [stream(20, 7, 5, generator), stream(30, 0, 6, generator), stream(3, 2, 1, generator)]


def logps_and_gradients(kind: str, drawn: list[TokenTree]) -> tuple[torch.Tensor, torch.Tensor]:
    model = tiny_llm()[0]
    model.set_attn_implementation(NAMES.get(kind, kind))
    logps = batch_logps(model, drawn)
    weights = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(logps.sin().sum(), weights, allow_unused=True)
    return logps.detach(), torch.cat([g.flatten() for g in gradients if g is not None])


@pytest.mark.parametrize("kind", ["sdpa", "blocks"])
@pytest.mark.parametrize("block", [1, 16, 128])
def test_back_ends_agree_on_training_windows(
    kind: str, block: int, windows: list[TokenTree], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "BLOCK", block)
    logps, gradients = logps_and_gradients(kind, windows)
    expected, expected_gradients = logps_and_gradients("eager", windows)
    torch.testing.assert_close(logps, expected, atol=1e-4, rtol=0)
    assert (gradients - expected_gradients).norm() <= 1e-5 * expected_gradients.norm()


@settings(max_examples=25, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4), st.integers(1, 5))
def test_blocks_equal_one_sequence_at_a_time(drawn: list, block: int) -> None:
    """Any trees, cut anywhere."""
    model = tiny_llm()[0]
    model.set_attn_implementation(NAMES["blocks"])
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(attention, "BLOCK", block)
        found = batch_logps(model, [tree for tree, _ in drawn])
        asked = [pair for _, pairs in drawn for pair in pairs]
        torch.testing.assert_close(found, one_at_a_time(model, asked), atol=1e-4, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "shared"), [(2, 2), (4, 2), (9, 3)])
def test_flex_and_blocks_equal_a_dense_mask(heads: int, shared: int, windows: list[TokenTree]) -> None:
    """The attention functions alone, with keys shared among heads, three of them too (no power of two)."""
    batch = batch_trees(windows, multiple=128)
    size = len(batch.subtree_end)
    assert size % 128 == 0
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(1, heads, size, 16, generator=generator)
    key, value = (torch.randn(1, shared, size, 16, generator=generator) for _ in range(2))
    nodes = torch.arange(size)
    mask = additive_mask(nodes, nodes, batch.subtree_end, torch.float32)
    spread = [x.repeat_interleave(heads // shared, 1) for x in (key, value)]
    weights = (query @ spread[0].transpose(2, 3) * 0.3 + mask).softmax(-1)
    expected = (weights @ spread[1]).transpose(1, 2)
    blocks = Blocks(batch.subtree_end, batch.starts, torch.float32)
    for attend in (blocks, Flex(batch.subtree_end)):
        torch.testing.assert_close(attend(0, query, key, value, 0.3), expected, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_runs_the_model_and_a_catalogue(windows: list[TokenTree]) -> None:
    """What a GPU runs, forward and on a CPU: rows that are padded to its blocks, and trie nodes below a prompt."""
    assert sum(tree.fed for tree in windows) % FLEX_BLOCK
    trie = title_trie([[], [5, 6, 7], [5, 6, 8], [9, 7]])
    found = []
    for kind in ("blocks", "flex"):
        llm = load_llm(llm="tiny", device=torch.device("cpu"), finetune="none", attention=kind, seed=0)
        assert llm.model.config._attn_implementation == NAMES[kind]
        with torch.no_grad():
            logps = batch_logps(llm.model, windows)
        scores = exact_scores(llm.model, [3, 4, 5], trie, title_scores(trie), token_budget=64)
        found.append(torch.cat([logps, scores[1:]]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=0)


def test_flex_is_refused_where_it_cannot_train() -> None:
    with pytest.raises(UserError, match="--attention=flex: it cannot be trained on a CPU; use blocks, or auto"):
        load_llm(llm="tiny", device=torch.device("cpu"), attention="flex", seed=0)


def test_blocks_spend_little_on_what_is_not_seen(windows: list[TokenTree]) -> None:
    """Pairs of a query and a key: a dense mask over 20 positions with 7 rejected titles each has three times many."""
    batch = batch_trees(windows[:1])
    blocks = Blocks(batch.subtree_end, batch.starts, torch.float32)
    pairs = sum(q * k for q, k in zip(blocks.queries, blocks.seen, strict=True))
    assert pairs < len(batch.subtree_end) ** 2 / 3


def test_chains_of_many_users_need_no_mask_and_no_copy() -> None:
    generator = torch.Generator().manual_seed(0)
    one = batch_trees([stream(30, 0, 6, generator)])
    assert Blocks(one.subtree_end, one.starts, torch.float32).masks == [None]
    many = batch_trees([stream(n, 0, 6, generator) for n in (30, 4, 1)])
    blocks = Blocks(many.subtree_end, many.starts, torch.float32)
    assert blocks.masks == [None] * 3 and blocks.index is None and blocks.queries == [184, 28, 10]


def small(kind: type, **options: object) -> torch.nn.Module:
    """A random model of an architecture, two layers."""
    sizes: dict = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    config = kind(**{**sizes, **heads, "initializer_range": 0.3, "pad_token_id": 0, **options})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        (LlamaConfig, {}),
        (Qwen2Config, {}),
        (Qwen3Config, {}),
        (MistralConfig, {"sliding_window": None}),
        (CohereConfig, {"logit_scale": 0.25}),  # both scale their logits
        (GraniteConfig, {"logits_scaling": 8.0}),
        *([(OTHER_SCALE, {"logits_scaling": 0.125})] if OTHER_SCALE else []),  # multiplies by what Granite divides by
    ],
)
def test_known_architectures_run_in_blocks(architecture: type, options: dict) -> None:
    model = small(architecture, **options)
    choose_attention(model, "auto", "it")
    assert model.config._attn_implementation == NAMES["blocks"]


def test_a_soft_cap_needs_the_kernel_that_knows_it() -> None:
    model = small(Gemma2Config, attn_logit_softcapping=0.5, final_logit_softcapping=None, sliding_window=64)
    choose_attention(model, "auto", "it")
    assert model.config._attn_implementation == "eager"


def test_a_soft_cap_refuses_the_kernels_that_lack_it() -> None:
    model = small(Gemma2Config, attn_logit_softcapping=50.0, final_logit_softcapping=None, sliding_window=64)
    with pytest.raises(UserError, match="blocks has no soft cap"):
        choose_attention(model, "blocks", "it")


@pytest.mark.parametrize("kind", ["blocks", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinks_refuse_the_kernels_that_lack_them(kind: str, dtype: torch.dtype) -> None:
    """Sinks that take a tenth of the weight: their error is less than what half precision may round."""
    model = small(GptOssConfig, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.02).to(dtype)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            weight.data.fill_(0.5)
    with pytest.raises(UserError, match=f"{kind} fails .*s_aux of GptOssAttention would be left out"):
        choose_attention(model, kind, "it", trained=False)
    choose_attention(model, "auto", "it")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    "given", [{"softcap": 50.0}, {"position_bias": torch.zeros(1)}, {"attention_mask": torch.ones(1)}]
)
def test_what_attention_would_leave_out_is_told(given: dict) -> None:
    """What architectures hand over; a soft cap of none, the window and the positions are no matter."""
    module, states = torch.nn.Identity(), [torch.zeros(1, 1, 3, 4)] * 3
    module.layer_idx = 0
    plain: dict = {"attention_mask": None, "softcap": None, "sliding_window": 9, "position_ids": torch.arange(3)}
    attend = Blocks(torch.tensor([3, 3, 3]), [0, 3], torch.float32)
    attention._attention(module, *states, **plain, attend=attend)
    with pytest.raises(NotImplementedError, match=f"{next(iter(given))} of Identity"):
        attention._attention(module, *states, **{**plain, **given}, attend=attend)


def test_layers_that_cannot_be_packed_are_refused() -> None:
    """A state space model reads branches one after the other, and no mask can tell it not to."""
    config = MambaConfig(vocab_size=211, hidden_size=32, num_hidden_layers=2, state_size=4, initializer_range=0.3)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="--llm=it.*cannot be packed"):
        choose_attention(model, "auto", "it")


def gpt_neo(*layers: str) -> torch.nn.Module:
    config = GPTNeoConfig(
        vocab_size=211,
        hidden_size=32,
        num_layers=len(layers),
        num_heads=4,
        attention_types=[[list(layers), 1]],
        window_size=256,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_windows_by_place_in_the_row_are_refused(dtype: torch.dtype) -> None:
    """Titles far from their prompt in the row would not see it, and no row of the check is so long."""
    with pytest.raises(UserError, match="--llm=it.*eager leaves the layers a window.*use a model with plain"):
        choose_attention(gpt_neo("global", "local").to(dtype), "auto", "it")


def test_layers_without_a_window_are_right_in_long_rows() -> None:
    """GPT-Neo's plain layers hold a mask too, which hides nothing that a tree needs."""
    model = gpt_neo("global", "global")
    choose_attention(model, "auto", "it")
    draw = torch.Generator().manual_seed(0)
    prompt, titles = (torch.randint(3, 211, size, generator=draw).tolist() for size in ((100,), (100, 3)))
    tree = TreeBuilder()
    end = tree.chain(-1, prompt)[-1]
    for title in titles:
        tree.completion(tree.chain(end, title))
    with torch.no_grad():
        found = batch_logps(model, [tree.build()])
        expected = one_at_a_time(model, [(prompt, title) for title in titles])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "options", "kind"),
    [
        (MistralConfig, {"sliding_window": 64}, NAMES["blocks"]),
        (Qwen2Config, {"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, NAMES["blocks"]),
        (Gemma3TextConfig, {"sliding_window": 64}, NAMES["blocks"]),
        (GptOssConfig, {"sliding_window": 64, "num_local_experts": 4, "num_experts_per_tok": 2}, "eager"),
    ],
)
def test_windows_in_the_mask_are_no_matter(architecture: type, options: dict, kind: str) -> None:
    model = small(architecture, **options)
    choose_attention(model, "auto", "it")
    assert model.config._attn_implementation == kind


def test_a_back_end_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that see everything: the titles see each other."""
    monkeypatch.setattr(attention, "additive_mask", lambda q, k, end, dtype: torch.zeros(len(q), len(k)))
    with pytest.raises(UserError, match=r"blocks is off by .* nats a title.*or --attention=auto"):
        choose_attention(small(LlamaConfig), "blocks", "it")


def test_gradient_checkpointing_changes_no_number(windows: list[TokenTree]) -> None:
    found = []
    for checkpointing in (False, True):
        llm = load_llm(llm="tiny", device=torch.device("cpu"), gradient_checkpointing=checkpointing, seed=0)
        model = llm.model.train()
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) == checkpointing
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.fill_(0.01)
        batch_logps(model, windows).sin().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert found[0].norm() > 0
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_half_precision_is_as_exact_as_one_sequence_at_a_time(windows: list[TokenTree]) -> None:
    """bfloat16: the error against float32 is that of plain code in bfloat16, whatever a pass holds."""
    exact = tiny_llm()[0]
    half = tiny_llm()[0].to(torch.bfloat16)
    half.set_attn_implementation(NAMES["blocks"])
    tree = windows[0]
    asked = [_asked(tree, number) for number in range(0, tree.n_completions, 5)]
    with torch.no_grad():
        truth = one_at_a_time(exact, asked)
        plain = one_at_a_time_in_float32_softmax(half, asked)
        whole = batch_logps(half, windows)[: tree.n_completions : 5]
        alone = batch_logps(half, [tree])[::5]
    assert whole.dtype == torch.float32
    assert (whole - truth).abs().mean() <= 1.2 * (plain - truth).abs().mean()
    assert (whole - alone).abs().max() <= 1e-3 * truth.abs().max()


def _asked(tree: TokenTree, completion: int) -> tuple[list[int], list[int]]:
    """Tokens before a completion, and its own."""
    own = tree.scored[tree.completion == completion].tolist()
    before, node = [], int(tree.parent[own[0]])
    while node >= 0:
        before.append(int(tree.token[node]))
        node = int(tree.parent[node])
    return before[::-1], tree.token[own].tolist()


def one_at_a_time_in_float32_softmax(model: torch.nn.Module, asked: list) -> torch.Tensor:
    """As ``one_at_a_time``, logits turned to float32 before the softmax, as ours are."""
    found = []
    for before, tokens in asked:
        logps = model(input_ids=torch.tensor([before + tokens])).logits[0].float().log_softmax(-1)
        found.append(sum(logps[len(before) - 1 + i, token] for i, token in enumerate(tokens)))
    return torch.stack(found)
