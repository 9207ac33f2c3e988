"""Write an LLM of random weights to a folder, to time shapes that no package carries: time does not depend on weights.

    python benchmarks/random_llm.py llama-1b --shape=llama-1b        # then: python benchmarks/gpu.py --llm=llama-1b

``llama8`` has 8 layers of width 512 (body 26 million weights, LM head 16 million): a third of the embedded LLM's work a
token, and a head that is as large beside the body as in models of a few billion. The others are those of the models
they are named after (SmolLM2, Llama 3.2 and 3.1).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from recbole_llm.llm.tiny import tiny_llm

SHAPES: dict[str, dict[str, Any]] = {
    "llama8": {"layers": 8, "width": 512, "inner": 1408, "heads": 8, "kv_heads": 8, "vocabulary": 32000},
    "smollm2-135m": {"layers": 30, "width": 576, "inner": 1536, "heads": 9, "kv_heads": 3, "vocabulary": 49152},
    "llama-1b": {"layers": 16, "width": 2048, "inner": 8192, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
    "llama-8b": {"layers": 32, "width": 4096, "inner": 14336, "heads": 32, "kv_heads": 8, "vocabulary": 128256},
}
UNTIED = {"llama-8b"}


def write_llm(folder: Path, shape: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """A Llama with the tokenizer of ``tiny``, whose tokens are the first of its vocabulary; weights from seed 0."""
    tokenizer, size = tiny_llm()[1], SHAPES[shape]
    config = LlamaConfig(
        vocab_size=size["vocabulary"],
        hidden_size=size["width"],
        intermediate_size=size["inner"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv_heads"],
        max_position_embeddings=4096,
        tie_word_embeddings=shape not in UNTIED,
        dtype=dtype,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama8")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args(argv)
    write_llm(args.folder, args.shape, device=args.device, dtype=getattr(torch, args.dtype))


if __name__ == "__main__":
    main()
