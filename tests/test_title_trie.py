"""The title trie against sets of prefixes, over random titles that share much."""

from __future__ import annotations

import numpy as np
import pytest

from recbole_llm.llm.title_trie import TitleTrie, title_trie


def random_answers(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [[], *(rng.integers(0, 3, rng.integers(1, 6)).tolist() for _ in range(rng.integers(1, 40)))]


def words(trie: TitleTrie) -> list[tuple[int, ...]]:
    """The tokens on the way to each node."""
    found: list[tuple[int, ...]] = [()]
    for node in range(1, len(trie)):
        found.append((*found[trie.parent[node]], int(trie.token[node])))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_nodes_are_the_prefixes_in_preorder(seed: int) -> None:
    answers = random_answers(seed)
    trie = title_trie(answers)
    path = words(trie)
    assert path == sorted({tuple(a[:d]) for a in answers[1:] for d in range(len(a) + 1)})
    assert trie.depth.tolist() == list(map(len, path)) and trie.n_items == len(answers)
    for node, word in enumerate(path):
        below = [x for x, other in enumerate(path) if other[: len(word)] == word]
        assert below == list(range(node, trie.subtree_end[node]))
    assert [path[node] for node in trie.last_node[1:]] == [tuple(a) for a in answers[1:]] and trie.last_node[0] == 0


@pytest.mark.parametrize("seed", range(20))
def test_children_items_and_levels(seed: int) -> None:
    trie = title_trie(random_answers(seed))
    some = np.random.default_rng(seed).permutation(len(trie))[: len(trie) // 2 + 1]
    place, child = trie.edges(some)
    nodes = range(len(trie))
    assert list(zip(place, child, strict=True)) == [
        (i, x) for i, node in enumerate(some) for x in nodes if trie.parent[x] == node
    ]
    place, item = trie.items_at(some)
    assert list(zip(place, item, strict=True)) == [
        (i, x) for i, node in enumerate(some) for x in range(1, trie.n_items) if trie.last_node[x] == node
    ]
    assert trie.is_inner.tolist() == [node in trie.parent for node in nodes]
    assert [level.tolist() for level in trie.levels] == [
        np.flatnonzero(trie.depth == d).tolist() for d in range(1, trie.depth.max() + 1)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_least_below_a_node(seed: int) -> None:
    answers = random_answers(seed)
    trie = title_trie(answers)
    values = np.random.default_rng(seed).standard_normal(len(answers))
    expected = [
        min(values[i] for i, a in enumerate(answers) if i and tuple(a[: len(word)]) == word) for word in words(trie)
    ]
    np.testing.assert_array_equal(trie.least_below(values), expected)


@pytest.mark.parametrize("seed", range(20))
def test_inner_nodes_keep_their_order_and_paths(seed: int) -> None:
    trie = title_trie(random_answers(seed))
    path, inner = words(trie), trie.inner
    kept = [node for node in range(1, len(trie)) if node in trie.parent]
    assert inner.node.tolist() == kept and inner.depth.tolist() == [len(path[x]) for x in kept]
    for i, node in enumerate(kept):
        parent = trie.parent[node]
        assert inner.parent[i] == (kept.index(parent) if parent else -1)
        below = [j for j, other in enumerate(kept) if path[other][: len(path[node])] == path[node]]
        assert below == list(range(i, inner.subtree_end[i]))
        above = [j for j, other in enumerate(kept) if path[other] == path[node][: len(path[other])] and j != i]
        assert [x for x in inner.ancestors(np.array([i]))[0] if x >= 0] == above
    if kept:
        # All of them together: shorter paths are filled up.
        depth = inner.depth - 1
        assert ((inner.ancestors(np.arange(len(kept))) >= 0).sum(1) == depth).all()


@pytest.mark.parametrize("seed", range(5))
def test_what_a_chunk_sees_before_it_lies_on_the_path_to_its_first_node(seed: int) -> None:
    """The lemma by which memory does not grow with the catalogue."""
    inner = title_trie(random_answers(seed)).inner
    for first in range(len(inner)):
        path = set(inner.ancestors(np.array([first]))[0].tolist())
        for node in range(first, len(inner)):
            assert {x for x in inner.ancestors(np.array([node]))[0].tolist() if 0 <= x < first} <= path


def test_one_title_and_only_the_padding_item() -> None:
    trie = title_trie([[], [5, 6, 7]])
    assert trie.token.tolist() == [0, 5, 6, 7] and trie.inner.node.tolist() == [1, 2]
    assert len(title_trie([[], [5]]).inner) == 0 and len(title_trie([[]])) == 1


def test_a_hundred_thousand_titles() -> None:
    """Every title is found again by walking up from where it ends; building takes no more than one pass over them."""
    rng = np.random.default_rng(0)
    answers = [[], *(rng.zipf(1.5, length).tolist() for length in rng.integers(3, 12, 100_000))]
    trie = title_trie(answers)
    node = trie.last_node.copy()
    for step in range(1, 12):
        reached = [i for i in range(0, len(answers), 97) if len(answers[i]) >= step]
        assert [trie.token[node[i]] for i in reached] == [answers[i][-step] for i in reached]
        node = np.where(node > 0, trie.parent[node], 0)
    assert (node == 0).all() and len(trie) == 1 + len({tuple(a[:d]) for a in answers for d in range(1, len(a) + 1)})
