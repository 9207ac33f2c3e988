"""``--llm=tiny``: a random two-layer LLM for tests and teaching. Nothing is fetched.

Its tokens are pieces of words, learned on the film titles that RecBole's wheel carries, so that a title takes about
as many tokens as with a real LLM.
"""

from __future__ import annotations

from pathlib import Path

import torch
from recbole import __file__ as recbole_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CONTEXT = 8192
PIECES = 1024

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_llm(seed: int = 0) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random LLM of 80,000 weights and its tokenizer.

    The weights depend on ``seed`` alone, and torch's global generator is left as it was. Any text can be written
    (single bytes are tokens), and a line break is always a token of its own.

    Args:
        seed: of the weights.

    Returns:
        the model (float32, on the CPU, in evaluation mode) and the tokenizer.
    """
    tokenizer = _title_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        # Ten times the usual: attention then moves the log-probs enough that a wrong mask shows in a test.
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: it would seed every GPU as well.
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    return model.float().eval(), tokenizer


def _title_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    # A line break alone; the rest in words. Without this, "\n\n" or ")\n" could become one token.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("\n"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    films = Path(recbole_file).parent / "dataset_example" / "ml-100k" / "ml-100k.item"
    rows = [line.split("\t") for line in films.read_text(encoding="utf-8").splitlines()[1:]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        [f"{title} ({year})" for _, title, year, *_ in rows],
        trainers.BpeTrainer(vocab_size=PIECES, initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
