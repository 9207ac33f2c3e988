"""Write an LLM of random weights to a folder, to time shapes that no package carries: time does not depend on weights.

    python benchmarks/random_llm.py llama8        # then: python benchmarks/train_preference.py --llm=llama8

The default is a Llama of 8 layers, width 512, vocabulary 32,000 (body 26 million weights, LM head 16 million): a third
of the embedded LLM's work a token, and a head that is as large beside the body as in models of a few billion.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.llm.tiny import tiny_llm


def write_llm(folder: Path, *, layers: int, width: int, inner: int, heads: int, vocabulary: int) -> None:
    """A Llama with the tokenizer of ``tiny``, whose tokens are the first of its vocabulary."""
    tokenizer = tiny_llm()[1]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1408)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    args = vars(parser.parse_args(argv))
    write_llm(args.pop("folder"), **args)


if __name__ == "__main__":
    main()
