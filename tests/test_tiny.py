"""The random LLM."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.llm.tiny import CONTEXT, PIECES, tiny_llm

# No surrogates, which UTF-8 cannot write, and no "|": a special token could be split between two texts.
TEXT = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="|"))


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return tiny_llm()[1]


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first, _ = tiny_llm()
    torch.manual_seed(2)
    second, other = tiny_llm()[0], tiny_llm(seed=1)[0]
    for name, weight in first.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name])
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    tiny_llm()
    assert torch.equal(before, torch.get_rng_state())


def test_shape_of_the_model(tokenizer: object) -> None:
    config = tiny_llm()[0].config
    assert (config.num_hidden_layers, config.hidden_size, config.num_attention_heads) == (2, 32, 2)
    assert config.vocab_size == len(tokenizer) == PIECES + 3
    assert config.max_position_embeddings == tokenizer.model_max_length == CONTEXT == 8192


@given(TEXT, TEXT)
def test_tokens_of_two_lines_are_the_tokens_of_each(tokenizer: object, a: str, b: str) -> None:
    assert tokenizer(a + "\n" + b).input_ids == tokenizer(a + "\n").input_ids + tokenizer(b).input_ids


@given(TEXT)
def test_any_text_can_be_written(tokenizer: object, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizer_is_the_same_each_time(tokenizer: object) -> None:
    assert tiny_llm()[1].get_vocab() == tokenizer.get_vocab()


def test_line_breaks_stay_alone(tokenizer: object) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(PIECES + 3))
    assert len({tokenizer(char).input_ids[0] for char in string.printable}) == len(string.printable)
    assert tokenizer("a\n\nb").input_ids.count(tokenizer("\n").input_ids[0]) == 2


def test_special_tokens_and_template(tokenizer: object) -> None:
    specials = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token
    assert specials == ("<|im_start|>", "<|im_end|>", "<|pad|>")
    chat = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text).input_ids
    assert ids.count(tokenizer.bos_token_id) == 2 and ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(ids) == text


@torch.no_grad()
def test_log_probs_depend_on_what_is_attended_to(tokenizer: object) -> None:
    model = tiny_llm()[0]
    first, other = (
        model(**tokenizer(text, return_tensors="pt")).logits[0, -1].log_softmax(-1)
        for text in ("Toy Story\n", "GoldenEye\n")
    )
    assert (first - other).abs().max() > 0.1
