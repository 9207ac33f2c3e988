"""Token trees: structure, and log-probs, losses and gradients equal to one sequence at a time."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from recbole_llm.llm.attention import additive_mask
from recbole_llm.llm.logps import batch_logps, completion_logps, token_logps
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder, batch_trees, batches_by_budget

TOKEN = st.integers(3, 200)
CHAIN = st.lists(TOKEN, min_size=1, max_size=4)


@st.composite
def trees(draw: st.DrawFn) -> tuple[TokenTree, list[tuple[list[int], list[int]]]]:
    """A random tree and, for each completion, the tokens before it and its own."""
    builder = TreeBuilder()
    path = builder.chain(-1, draw(st.lists(TOKEN, min_size=1, max_size=6)))
    asked = []
    for tokens, back in draw(st.lists(st.tuples(CHAIN, st.integers(0, 5)), min_size=1, max_size=8)):
        path = path[: max(1, len(path) - back)]
        before = [builder._token[n] for n in path]
        nodes = builder.chain(path[-1], tokens)
        if draw(st.booleans()) or not asked:
            builder.completion(nodes)
            asked.append((before, tokens))
        path = path + nodes
    return builder.build(), asked


def one_at_a_time(model: torch.nn.Module, asked: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The obvious code: a full forward for each (prompt, completion), log-softmax of all logits."""
    found = []
    for before, tokens in asked:
        logps = model(input_ids=torch.tensor([before + tokens])).logits[0].log_softmax(-1)
        found.append(sum(logps[len(before) - 1 + i, token] for i, token in enumerate(tokens)))
    return torch.stack(found)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return tiny_llm()[0]


def sees(tree: TokenTree) -> torch.Tensor:
    """Which node (row) may attend to which (column) ``[S, S]``."""
    nodes = torch.arange(len(tree))
    return additive_mask(nodes, nodes, tree.subtree_end, torch.float32) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(trees(), min_size=1, max_size=4), st.integers(4, 60))
def test_logps_equal_one_sequence_at_a_time(model: torch.nn.Module, drawn: list, budget: int) -> None:
    """Any trees, any batch size."""
    with torch.no_grad():
        packed = completion_logps(model, [tree for tree, _ in drawn], token_budget=budget)
        for logps, (_, asked) in zip(packed, drawn, strict=True):
            torch.testing.assert_close(logps, one_at_a_time(model, asked), atol=1e-4, rtol=0)


@pytest.mark.parametrize("frozen_head", [True, False])
@settings(max_examples=10, deadline=None)
@given(drawn=st.lists(trees(), min_size=1, max_size=3))
def test_gradients_equal_one_sequence_at_a_time(frozen_head: bool, drawn: list) -> None:
    """For a frozen head (LoRA) and a trained one (full fine-tuning)."""
    model = tiny_llm()[0]
    model.get_output_embeddings().weight.requires_grad_(not frozen_head)
    weights = [p for p in model.parameters() if p.requires_grad]
    asked = [pair for _, pairs in drawn for pair in pairs]
    mix = torch.randn(len(asked), generator=torch.Generator().manual_seed(0))
    packed = torch.autograd.grad((batch_logps(model, [tree for tree, _ in drawn]) * mix).sum(), weights)
    plain = torch.autograd.grad((one_at_a_time(model, asked) * mix).sum(), weights)
    for ours, theirs in zip(packed, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_hand_made_tree() -> None:
    r"""0-1-2 with branches 3-4 and 5 at node 1, that is 1 -> {2: "c", 3-4: "xy", 5: "z"}."""
    builder = TreeBuilder()
    a, b = builder.chain(-1, [10, 11])
    first, second, third = builder.chain(b, [12]), builder.chain(b, [20, 21]), builder.chain(b, [30])
    for nodes in (first, second, third):
        builder.completion(nodes)
    tree = builder.build()
    assert (a, b, first, second, third) == (0, 1, [2], [3, 4], [5])
    assert tree.parent.tolist() == [-1, 0, 1, 1, 3, 1]
    assert tree.depth.tolist() == [0, 1, 2, 2, 3, 2]
    assert tree.subtree_end.tolist() == [6, 6, 3, 5, 5, 6]
    assert sees(tree).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]
    fed = tree.without_leaves()
    assert (
        fed.token.tolist() == [10, 11, 20]
        and fed.parent.tolist() == [-1, 0, 1]
        and fed.subtree_end.tolist() == [3, 3, 3]
    )
    batch = batch_trees([tree])
    # Three titles share the row of the last prompt token; only "y" needs another.
    assert batch.input_ids.tolist() == [[10, 11, 20]] and batch.head_rows.tolist() == [1, 2]


@settings(max_examples=50, deadline=None)
@given(trees())
def test_mask_is_ancestors_and_self(drawn: tuple) -> None:
    tree, _ = drawn
    mask = sees(tree)
    for node in range(len(tree)):
        ancestors, at = {node}, node
        while tree.parent[at] >= 0:
            at = int(tree.parent[at])
            ancestors.add(at)
        assert set(torch.nonzero(mask[node])[:, 0].tolist()) == ancestors
        assert int(tree.depth[node]) == len(ancestors) - 1


def test_only_preorder_can_be_built() -> None:
    builder = TreeBuilder()
    root = builder.chain(-1, [1])[0]
    builder.chain(root, [2])
    left = builder.chain(root, [3])[0]
    with pytest.raises(ValueError, match="preorder"):
        builder.chain(left - 1, [4])
    with pytest.raises(ValueError, match="preorder"):
        builder.chain(-1, [5])
    builder.completion([0])
    with pytest.raises(ValueError, match="root"):
        builder.build()


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 100))
def test_batches_keep_to_the_budget(sizes: list[int], budget: int) -> None:
    groups = batches_by_budget(sizes, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or sum(sizes[i] for i in group) <= budget
    # No two groups could be one.
    totals = sorted(sum(sizes[i] for i in group) for group in groups)
    assert len(totals) < 2 or totals[0] + totals[1] > budget


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sure_tokens_in_half_precision(dtype: torch.dtype) -> None:
    """As log-softmax of the rounded logits has them, none above 0; the gradient is that of the product."""
    torch.manual_seed(0)
    head = nn.Linear(64, 500, bias=False).to(dtype).requires_grad_(False)
    target = torch.arange(200)
    hidden = (8 * head.weight[target] / head.weight[target].norm(dim=1, keepdim=True) ** 2 * 2.5).requires_grad_()
    ours = token_logps(hidden, target, target, head, SimpleNamespace())
    plain = head(hidden).float().log_softmax(-1)[target, target]
    assert ours.max() <= 0 and plain.detach().exp().median() > 0.99
    torch.testing.assert_close(ours, plain, atol=1e-4, rtol=0)
    (mine,), (wanted,) = (torch.autograd.grad(logps.sum(), hidden, retain_graph=True) for logps in (ours, plain))
    torch.testing.assert_close(mine, wanted, atol=2e-2, rtol=2e-2)
