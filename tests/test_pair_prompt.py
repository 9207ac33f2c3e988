"""Two-candidate prompts: both titles are the answer, nothing tells which one is chosen, packing changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from recbole_llm.config import PROPERTIES, LLMConfig
from recbole_llm.data.pair_prompt import PairPrompt, make_prompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.data.protocol import prepare_data
from recbole_llm.data.template import load_template
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.token_tree import TokenTree
from recbole_llm.loss import dpo_loss
from recbole_llm.model.llmranker import LLMRanker

MODEL, TOKENIZER = tiny_llm()
TITLES = ["", "red cat", "dog", "a much longer title about elephants", "x", "<|im_end|>", "{second}", ">, <Title:dog"]
TEMPLATE = load_template("pair", PROPERTIES)
PROMPT = PairPrompt(TEMPLATE, TITLES, TOKENIZER)
ITEM = st.integers(1, len(TITLES) - 1)
UNI1 = {"valid": "uni1", "test": "uni1"}

pytestmark = pytest.mark.usefixtures("one_thread")


def paths(tree: TokenTree) -> list[tuple[list[int], list[int]]]:
    """For each completion the tokens before it, and its own."""
    found = []
    for completion in range(tree.n_completions):
        nodes = tree.scored[tree.completion == completion].tolist()
        node, before = tree.parent[nodes[0]].item(), []
        while node >= 0:
            before.append(tree.token[node].item())
            node = tree.parent[node].item()
        found.append((before[::-1], [tree.token[n].item() for n in nodes]))
    return found


def read(tree: TokenTree) -> list[tuple[str, str]]:
    return [(TOKENIZER.decode(before), TOKENIZER.decode(own)) for before, own in paths(tree)]


# What the LLM reads


def test_what_is_asked_and_answered() -> None:
    """Candidates are listed as they come; completion i prefers candidate i."""
    (asked, first), (again, second) = read(PROMPT.candidate_tree([2, 4], (1, 3)))
    assert asked == again
    assert asked.startswith("<|im_start|>user\nYou know the taste of one person")
    assert "in order:\n<Title:dog> <Title:x> \nRank two more" in asked
    assert "<Title:red cat> and <Title:a much longer title about elephants>. Answer with both" in asked
    assert asked.endswith("the likelier one first.<|im_end|>\n<|im_start|>assistant\n")
    assert first == "<Title:red cat>, <Title:a much longer title about elephants><|im_end|>"
    assert second == "<Title:a much longer title about elephants>, <Title:red cat><|im_end|>"


@settings(max_examples=60, deadline=None)
@given(ITEM, ITEM)
def test_titles_have_the_same_tokens_wherever_they_stand(first: int, second: int) -> None:
    """No title merges with what surrounds it, or brings a control token of its own."""

    def plain(text: str) -> list[int]:
        return TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    one, two, end = plain(TITLES[first]), plain(TITLES[second]), [TOKENIZER.eos_token_id]
    assert PROMPT.lines[first] == plain("<Title:") + one + plain("> ")
    assert PROMPT.answer(first, second) == plain("<Title:") + one + plain(">, <Title:") + two + plain(">") + end
    listing = PROMPT.listing(first, second)
    assert listing[: len(one)] == one
    rest = listing[len(one) :]
    between = plain("> and <Title:")
    assert rest[: len(between) + len(two)] == between + two
    own = [*PROMPT.lines[first], *listing[: len(one) + len(between) + len(two)], *PROMPT.answer(first, second)[:-1]]
    assert not set(TOKENIZER.all_special_ids) & set(own)
    # Which title comes first changes the order of an answer's tokens, not their number.
    assert sorted(PROMPT.answer(first, second)) == sorted(PROMPT.answer(second, first))


@settings(max_examples=100, deadline=None)
@given(st.lists(ITEM, max_size=10), st.lists(ITEM, min_size=2, max_size=2, unique=True), st.integers(0, 120))
def test_histories_are_cut_and_candidates_never(history: list[int], pair: list[int], spare: int) -> None:
    most = PROMPT.longest(0) + spare
    kept = list(PROMPT.fit(history, most))
    assert kept == history[len(history) - len(kept) :]
    for before, own in paths(PROMPT.candidate_tree(kept, pair)):
        assert before == PROMPT.trunk(kept) + PROMPT.listing(*pair)
        assert len(before) + len(own) <= most
        if len(set(kept)) == len(kept):
            assert len(before) + len(own) <= PROMPT.longest(len(kept))
    if len(kept) < len(history):  # one more would not leave room for every pair
        longest = PROMPT.longest(0) - len(PROMPT.trunk([]))
        assert len(PROMPT.trunk(history[len(history) - len(kept) - 1 :])) + longest > most


def test_longest_is_reached() -> None:
    by_length = sorted(range(1, len(TITLES)), key=lambda i: len(PROMPT.answers[i]))
    a, b = by_length[-2:]
    whole = PROMPT.trunk([b]) + PROMPT.listing(a, b) + PROMPT.answer(b, a)
    assert len(whole) == PROMPT.longest(1)


@pytest.mark.parametrize("candidates", [(), (1,), (1, 2, 3)])
def test_two_candidates_and_no_other_number(candidates: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=f"ranks two candidates, not {len(candidates)}"):
        PROMPT.candidate_tree([1], candidates)


@pytest.mark.parametrize(
    "window",
    [
        Window(1, (1, 2), (1,)),
        Window(1, (1, 2), (1,), ((),)),
        Window(1, (1, 2, 3), (1, 2), ((4,), (4,))),
        Window(1, (1, 2), (1,), ((4,),), ((3,),)),
    ],
)
def test_windows_that_are_no_pairs(window: Window) -> None:
    with pytest.raises(ValueError, match="one target a window, one chosen item and at least one rejected"):
        PROMPT.window_tree(window)


def test_family_chooses_the_prompt() -> None:
    assert type(make_prompt(TEMPLATE, TITLES, TOKENIZER)) is PairPrompt
    for family in ("stream", "instruct"):
        prompt = make_prompt(load_template(family, PROPERTIES), TITLES, TOKENIZER)
        assert type(prompt) is Prompt
        logps = torch.randn(3, 4)
        assert prompt.combined(logps) is logps


# The order of the listing


def listed(user: int, history: tuple[int, ...], target: int, rejected: tuple[int, ...]) -> list[bool]:
    """For each listing whether the chosen title comes first, read off the tree."""
    window = Window(user, (*history, target), (len(history),), (rejected,))
    found = []
    for place, (before, _) in enumerate(paths(PROMPT.window_tree(window))[: len(rejected)]):
        asked = before[len(PROMPT.trunk(history)) :]
        orders = {
            True: PROMPT.listing(target, rejected[place]),
            False: PROMPT.listing(rejected[place], target),
        }
        (first,) = [first for first, tokens in orders.items() if asked == tokens]
        found.append(first)
    return found


def test_order_of_the_listing_tells_nothing() -> None:
    """Both orders are equally likely, over users, places and rejected items, whichever item is chosen."""
    cases = []
    for user in range(1, 81):
        for place in (1, 2, 5):
            history = (4,) * place
            for target, rejected in ((1, (2, 3)), (3, (1, 2))):
                for number, first in enumerate(listed(user, history, target, rejected)):
                    cases.append((place, target, number, first))
    for column, values in ((0, (1, 2, 5)), (1, (1, 3)), (2, (0, 1))):
        for value in values:
            firsts = [case[3] for case in cases if case[column] == value]
            assert chisquare(np.bincount(firsts, minlength=2)).pvalue > 1e-4
    # Listings of one window are ordered apart from each other.
    both = [case[3] == other[3] for case, other in zip(cases[::2], cases[1::2], strict=True)]
    assert chisquare(np.bincount(both, minlength=2)).pvalue > 1e-4


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 3), st.lists(ITEM, min_size=2, max_size=2, unique=True))
def test_swapping_chosen_and_rejected_moves_no_candidate(user: int, place: int, pair: list[int]) -> None:
    """The same two items at the same place are listed in the same order whichever is chosen."""
    (one,), (other,) = (listed(user, (4,) * place, a, (b,)) for a, b in (pair, pair[::-1]))
    assert one != other


# Windows


def one_by_one(before: list[int], own: list[int], policy: Any) -> torch.Tensor:
    plain = policy(torch.tensor([before + own])).logits[0].log_softmax(-1)
    return sum(plain[len(before) - 1 + i, token] for i, token in enumerate(own))


def test_window_logps_equal_one_sequence_at_a_time(tiny: dict[str, Any]) -> None:
    """Chosen first in each listing, then rejected first; written out as text with the question as it is."""
    config = LLMConfig(config_dict=tiny | {"finetune": "full", "prompt": "pair", "eval_args": {"mode": UNI1}})
    ranker = LLMRanker(config, prepare_data(config).train_data._dataset)
    prompt = ranker.prompt
    windows = [Window(7, (3, 9, 4, 17), (3,), ((5, 6, 30),)), Window(8, (12, 2), (1,), ((40, 41, 42),))]
    logps = ranker.window_logps(windows)
    assert logps.shape == (2, 4)
    for row, window in zip(logps, windows, strict=True):
        place = window.targets[0]
        target, rejected = window.items[place], window.rejected[0]
        firsts = []
        for number, item in enumerate(rejected):
            pairs = [(target, item), (item, target)]
            tree_before = paths(prompt.window_tree(window))[number][0]
            before = [prompt.trunk(window.items[:place]) + prompt.listing(*pair) for pair in pairs]
            assert tree_before in before
            c, r = (one_by_one(tree_before, prompt.answer(*pair), ranker.policy) for pair in pairs)
            torch.testing.assert_close(row[0] - row[1 + number], c - r, atol=1e-4, rtol=0)
            firsts.append(c)
        torch.testing.assert_close(row[0], sum(firsts) / 3, atol=1e-4, rtol=0)
    with torch.no_grad():
        (mine,) = ranker._scores([[3, 9, 4]], [[17, 5]])
        before = prompt.trunk([3, 9, 4]) + prompt.listing(17, 5)
        plain = [one_by_one(before, prompt.answer(*pair), ranker.policy) for pair in ((17, 5), (5, 17))]
    torch.testing.assert_close(mine.cpu(), torch.stack(plain), atol=1e-4, rtol=0)


@pytest.mark.parametrize("rejected", [(2,), (2, 3, 4)])
def test_sizes_and_lengths(rejected: tuple[int, ...]) -> None:
    window = Window(1, (4, 2, 1), (2,), (rejected,))
    tree = PROMPT.window_tree(window)
    assert tree.n_completions == 2 * len(rejected)
    assert PROMPT.window_size(window) == len(tree.without_leaves())
    lengths = [len(own) for _, own in paths(tree)[: len(rejected)]]
    assert PROMPT.chosen_lengths(window) == [round(np.mean(lengths))]


def test_completions_prefer_the_chosen_first() -> None:
    tree = PROMPT.window_tree(Window(1, (4, 1), (1,), ((2, 3),)))
    told = [own.removesuffix("<|im_end|>") for _, own in read(tree)]
    cat, dog, elephants = (f"<Title:{TITLES[i]}>" for i in (1, 2, 3))
    assert told == [f"{cat}, {dog}", f"{cat}, {elephants}", f"{dog}, {cat}", f"{elephants}, {cat}"]


def test_combined_by_hand() -> None:
    """Two listings: c = (-2, -6), r = (-3, -4); so differences 1 and -2 around a chosen -4."""
    combined = PROMPT.combined(torch.tensor([[-2.0, -6.0, -3.0, -4.0]]))
    assert combined.tolist() == [[-4.0, -5.0, -2.0]]
    alone = torch.tensor([[-2.0, -3.0]])
    assert torch.equal(PROMPT.combined(alone), alone)


def test_combined_makes_losses_of_pairs() -> None:
    """DPO's margin of each pair, policy less reference, is that of its own listing."""
    policy, reference = torch.randn(5, 6, dtype=torch.double) * 9, torch.randn(5, 6, dtype=torch.double) * 9
    mine, theirs = PROMPT.combined(policy), PROMPT.combined(reference)
    for pair in range(3):
        loss = dpo_loss(
            policy_chosen_logps=mine[:, 0],
            policy_rejected_logps=mine[:, 1 + pair : 2 + pair],
            ref_chosen_logps=theirs[:, 0],
            ref_rejected_logps=theirs[:, 1 + pair : 2 + pair],
            beta=0.1,
        ).loss
        margin = 0.1 * ((policy[:, pair] - reference[:, pair]) - (policy[:, 3 + pair] - reference[:, 3 + pair]))
        torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(margin))


def test_base_model_gets_a_plain_question() -> None:
    base = copy.deepcopy(TOKENIZER)
    base.chat_template = None
    prompt = PairPrompt(TEMPLATE, TITLES, base)
    asked = base.decode(prompt.trunk([1]) + prompt.listing(2, 4))
    assert asked.startswith("<|im_start|>Question: You know") and asked.endswith("first.\nAnswer:\n")
