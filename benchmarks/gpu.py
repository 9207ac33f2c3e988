"""What the GPU benchmarks share: users of random tokens, the best number of users a pass, useful MFU, a table.

Every side takes as many users a pass as is best for it (passes of ``--tokens`` are tried). Token ids are drawn at
random, titles have ``--title`` tokens: time does not depend on either. Gate: what a side finds may differ from float32
by 1.2 times what plain bfloat16 code differs by. Useful MFU: operations of the least there is to compute
(operations.py) over seconds and over the rate of a large bfloat16 product on this GPU. All sides run in autocast, as
TRL does; the plain ones with peft as it comes.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from common import Side, arguments, load, speedups, timed, title_tree
from plain import sequence_logps, stir_adapter

from recbole_llm.llm.logps import completion_logps
from recbole_llm.llm.types import LLM
from results import Results, markdown

Asked = tuple[list[int], list[list[int]]]  # a prompt, and its titles, the chosen one first
Cell = Callable[[argparse.Namespace, Mapping[str, LLM], int, int, float], dict[str, Any]]
SLACK = 1.2  # how much more than plain bfloat16 code a side may differ from float32
GATED = 2  # users of the gate


def users(number: int, prompt: int, titles: int, tokens: int, vocabulary: int) -> list[Asked]:
    """Prompts and titles of random tokens."""
    draw = random.Random(0)

    def text(length: int) -> list[int]:
        return [draw.randrange(vocabulary) for _ in range(length)]

    return [(text(prompt), [text(tokens) for _ in range(titles)]) for _ in range(number)]


def in_passes(asked: Sequence[Asked], at_once: int, work: Callable[[Sequence[Asked]], Any]) -> list[Any]:
    """What ``work`` makes of so many users at a time; the GPU is done with it on return."""
    found = [work(asked[first : first + at_once]) for first in range(0, len(asked), at_once)]
    synchronize()
    return found


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def plain_logps(model: torch.nn.Module, asked: Sequence[Asked], head: str) -> torch.Tensor:
    """One padded sequence a title ``[users, titles]``."""
    pairs = [(prompt, title) for prompt, titles in asked for title in titles]
    return sequence_logps(model, pairs, head).view(len(asked), -1)


def tree_logps(model: torch.nn.Module, asked: Sequence[Asked]) -> torch.Tensor:
    """Ours: a tree a user, all in one row ``[users, titles]``."""
    trees = [title_tree(*one) for one in asked]
    return torch.stack(completion_logps(model, trees, token_budget=sum(tree.fed for tree in trees)))


def best_at_once(
    make: Callable[[Mapping[str, int]], dict[str, Side]], a_user: Mapping[str, int], args: argparse.Namespace
) -> dict[str, int]:
    """For each side how many users a pass take the least time; sides that fit the memory in no pass are left out.

    Args:
        make: sides that take so many users a pass.
        a_user: tokens of one user, by side.
    """
    best: dict[str, tuple[float, int]] = {}
    for name, tokens in a_user.items():
        for size in sorted({min(max(1, budget // tokens), args.users) for budget in args.tokens}):
            try:
                side = make({name: size})[name]
                side.run()
                seconds = timed({name: side}, 1)[name]["wall_s"]
            except torch.OutOfMemoryError:
                break
            finally:
                side = None
                gc.collect()
                torch.cuda.empty_cache()
            best[name] = min(best.get(name, (seconds, size)), (seconds, size))
    print({name: (size, f"{seconds:.2f} s") for name, (seconds, size) in best.items()}, flush=True)
    return {name: size for name, (_, size) in best.items()}


def peak_bytes(side: Side) -> int:
    """GPU memory that a run of a side takes at most beyond what was allocated before, weights and gradients aside."""
    if not torch.cuda.is_available():
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side.run()
    return torch.cuda.max_memory_allocated() - before


def add_mfu(records: Mapping[str, dict[str, Any]], operations: float, peak: float) -> None:
    """Give each timed side its useful MFU."""
    for found in records.values():
        if "wall_s" in found:
            found["useful_mfu"] = operations / found["wall_s"] / peak


def record(records: dict[str, dict[str, Any]], ours: str, number: int, limit: float, allowed: float) -> dict[str, Any]:
    """What is written of a cell."""
    for found in records.values():
        if "wall_s" in found:
            found["users_a_second"] = number / found["wall_s"]
    return {
        "users": number,
        "allowed_difference": allowed,
        "operations_plain_over_ours": limit,
        "times_faster": speedups(records, ours),
        "sides": records,
    }


def product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a large product of random matrices."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    side = Side(lambda: (a @ b, synchronize()))
    side.run()
    return 2 * size**3 / timed({"product": side}, 20)["product"]["wall_s"]


def measure(benchmark: str, args: argparse.Namespace, cell: Cell, cells: Mapping[str, tuple[int, int]]) -> Results:
    """Load the LLM three times (float32, transformers' attention, ours), measure the cells, and print them."""
    results = Results(benchmark, args)
    options = {"device": args.device, "dtype": args.dtype}
    llms = {
        "exact": load(args.llm, **options | {"dtype": "float32"}, attention="sdpa"),
        "plain": load(args.llm, **options, attention="sdpa"),
        "ours": load(args.llm, **options),
    }
    for llm in llms.values():
        stir_adapter(llm.model)
    for module in llms["plain"].model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = True  # peft's default
    model = llms["ours"].model
    args.vocabulary = model.config.vocab_size
    peak = product_rate(args.device, getattr(torch, args.dtype), args.product)
    print(f"{args.dtype} product: {peak / 1e12:.1f} TFLOP/s; attention {model.config._attn_implementation}")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for name in results.todo(cells):
        found = cell(args, llms, *cells[name], peak)
        results.keep(name, {**found, "gpu": gpu, "product_flops": peak, "dtype": args.dtype})
    print(table(results))
    return results


def read_arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """The options that both GPU benchmarks have."""
    parser.add_argument("--prompt", type=int, nargs="+", default=[300], help="prompt tokens")
    parser.add_argument("--title", type=int, default=8, help="tokens of a title, its end included")
    parser.add_argument("--users", type=int, default=128, help="users whose seconds are given")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 32768], help="of a pass, to try")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--product", type=int, default=8192, help="size of the product that the peak is measured by")
    return arguments(parser, argv)


def table(results: Results) -> str:
    """Markdown: a row for each cell and side."""
    rows = []
    for cell, found in results.cells.items():
        for name, side in found["sides"].items():
            row = {"cell": cell, "side": name, "users a pass": side.get("users_a_pass")}
            row |= {"users/s": side.get("users_a_second"), "useful MFU": side.get("useful_mfu")}
            row |= {"ours is faster by": found["times_faster"].get(name, {}).get("wall")}
            peak = side.get("peak_bytes")
            row |= {"GiB": peak and peak / 2**30, "difference": side["difference"], "": side.get("failed", "")}
            rows.append(row)
    return markdown(rows)
