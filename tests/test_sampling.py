"""Free text: equal to token-by-token writing, prompts computed once, draws as they should be."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_llm.generation import greedy_text
from recbole_llm.llm.logps import base_model
from recbole_llm.llm.pretrained import load_llm
from recbole_llm.llm.sampling import Sampling, sample_texts
from recbole_llm.llm.types import LLM

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm() -> LLM:
    return load_llm(llm="tiny", device=torch.device("cpu"), seed=0)


@pytest.fixture
def prompts(llm: LLM) -> list[list[int]]:
    texts = ["the red cat and the green dog", "a", "blue owl, black fox", "one two three four five six"]
    return [llm.tokenizer(text)["input_ids"] for text in texts]


def test_greedy_is_the_likeliest_token_each_time(llm: LLM, prompts: list[list[int]]) -> None:
    """Prompts of different lengths in one batch write what each writes alone, one token after the other."""
    found = sample_texts(llm, prompts, Sampling(1, 15), 0)
    alone = SimpleNamespace(llm=llm, policy=llm.model)
    for prompt, (written,) in zip(prompts, found, strict=True):
        assert written.text == greedy_text(alone, prompt, 15, "", 2048)
        assert written.tokens == 15 or written.ended


def test_seed_alone_decides(llm: LLM, prompts: list[list[int]]) -> None:
    sampling = Sampling(3, 10, 1.0, 0.95)
    before = torch.random.get_rng_state()
    first, again, other = (sample_texts(llm, prompts, sampling, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again != other
    assert len({text.text for mine in first for text in mine}) > len(prompts)  # the N texts differ


def test_back_end_is_put_back(llm: LLM, prompts: list[list[int]]) -> None:
    before = llm.model.config._attn_implementation
    sample_texts(llm, prompts, Sampling(1, 2), 0)
    assert llm.model.config._attn_implementation == before != "sdpa"


def test_first_tokens_follow_the_nucleus(llm: LLM) -> None:
    """Drawn at temperature 2 from the top 60 %: frequencies of first tokens match the probabilities worked by hand."""
    prompt = llm.tokenizer("red cat")["input_ids"]
    with torch.no_grad():
        logits = llm.model(input_ids=torch.tensor([prompt])).logits[0, -1].double() / 2
    probs, order = logits.softmax(-1).sort(descending=True)
    inside = probs.cumsum(0) - probs < 0.6
    expected = dict(zip(order[inside].tolist(), (probs[inside] / probs[inside].sum()).tolist(), strict=True))
    number = 4000
    written = sample_texts(llm, [prompt], Sampling(number, 1, 2.0, 0.6), 5)[0]
    counts: dict[str, int] = {}
    for text in written:
        counts[text.text] = counts.get(text.text, 0) + 1
    by_text: dict[str, float] = {}
    for token, p in expected.items():
        text = llm.tokenizer.decode([token], skip_special_tokens=True)
        by_text[text] = by_text.get(text, 0.0) + p
    assert set(counts) <= set(by_text)
    seen = np.array([counts.get(text, 0) for text in by_text])
    wanted = number * np.array(list(by_text.values()))
    assert (np.abs(seen - wanted) < 5 * np.sqrt(wanted) + 5).all()


class Fed(TorchDispatchMode):
    """Counts the tokens that are embedded."""

    tokens = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204 - torch's own signature
        if func.overloadpacket.__name__ == "embedding":
            self.tokens += args[1].numel()
        return func(*args, **(kwargs or {}))


def test_prompt_is_computed_once(llm: LLM) -> None:
    """N texts of a prompt of P tokens: P - 1 tokens once, then the last one and what is written, for each text."""
    prompt = llm.tokenizer("the red cat and the green dog and the blue owl")["input_ids"]
    with Fed() as fed:
        found = sample_texts(llm, [prompt], Sampling(6, 4, 1.0, 1.0), 0)[0]
    assert not any(text.ended for text in found)
    assert fed.tokens == len(prompt) - 1 + 6 * 4  # the last token that is written is not fed


def test_end_of_text_ends_a_text(llm: LLM, prompts: list[list[int]]) -> None:
    """A model that ends at once writes nothing; the end is no part of the text."""
    head = llm.model.get_output_embeddings()
    bias = torch.zeros(head.weight.shape[0])
    bias[llm.tokenizer.eos_token_id] = 1e4
    hook = head.register_forward_hook(lambda module, args, output: output + bias)
    try:
        found = sample_texts(llm, prompts, Sampling(2, 5, 1.0, 0.9), 0)
    finally:
        hook.remove()
    assert all(text.ended and text.text == "" and text.tokens == 0 for mine in found for text in mine)


def test_the_end_of_a_turn_ends_a_text(llm: LLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat model ends its turn by another token than its tokenizer's end of text; its own settings name both."""
    plain = sample_texts(llm, prompts[:1], Sampling(1, 12), 0)[0][0]
    fourth = llm.model.generate(torch.tensor([prompts[0]]), max_new_tokens=4, do_sample=False)[0, -1].item()
    monkeypatch.setattr(llm.model.generation_config, "eos_token_id", [llm.tokenizer.eos_token_id, fourth])
    ((text,),) = sample_texts(llm, prompts[:1], Sampling(1, 12), 0)
    assert text.ended and text.tokens <= 3 and plain.text.startswith(text.text) and plain.tokens > 3
    assert text.end == fourth != llm.tokenizer.eos_token_id and plain.end is None


OWN = {"min_p": 0.5, "typical_p": 0.2, "no_repeat_ngram_size": 1, "min_new_tokens": 12}
OWN |= {"suppress_tokens": list(range(300, 900)), "temperature": 0.1, "top_k": 2, "repetition_penalty": 3.0}


@pytest.mark.parametrize("finetune", ["none", "lora"])
def test_a_models_own_generation_settings_move_no_text(prompts: list[list[int]], finetune: str) -> None:
    """They are left aside while it writes, and put back."""
    llm = load_llm(llm="tiny", device=torch.device("cpu"), finetune=finetune, fast_linears=False, seed=0)
    choices = Sampling(1, 12), Sampling(3, 12, 1.0, 0.95)
    plain = [sample_texts(llm, prompts, choice, 1) for choice in choices]
    own = base_model(llm.model).generation_config
    for key, value in OWN.items():
        setattr(own, key, value)
    assert [sample_texts(llm, prompts, choice, 1) for choice in choices] == plain
    assert base_model(llm.model).generation_config is own and own.min_p == 0.5


def test_many_greedy_texts_make_no_sense() -> None:
    with pytest.raises(ValueError, match="number = 2"):
        Sampling(2, 5)
