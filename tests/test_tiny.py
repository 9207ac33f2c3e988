"""The random LLM over bytes."""

from __future__ import annotations

import string

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recbole_llm.llm.tiny import CONTEXT, tiny_llm

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
    assert config.vocab_size == len(tokenizer) == 256 + 3
    assert config.max_position_embeddings == tokenizer.model_max_length == CONTEXT == 8192


@given(TEXT, TEXT)
def test_tokens_of_a_sum_are_the_sum_of_the_tokens(tokenizer: object, a: str, b: str) -> None:
    assert tokenizer(a + b).input_ids == tokenizer(a).input_ids + tokenizer(b).input_ids


@given(TEXT)
def test_a_token_is_a_byte(tokenizer: object, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text


def test_every_byte_has_a_token_and_line_breaks_stay_alone(tokenizer: object) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(259))
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
    ids = tokenizer(["first film\n", "other film\n"], return_tensors="pt").input_ids
    last = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert (last[0] - last[1]).abs().max() > 0.1
