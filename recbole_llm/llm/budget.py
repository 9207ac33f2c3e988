"""How many tokens one forward pass may hold, halved when memory does not suffice."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from recbole_llm.errors import UserError

Result = TypeVar("Result")

LEAST = 64  # tokens; below, a pass is no larger than a prompt
# What torch says on a CPU, where it raises no error of its own kind.
SAID = ("not enough memory", "can't allocate memory", "out of memory")


class TokenBudget:
    """A number of tokens that shrinks for good where it was too large.

    Results do not depend on it: passes are sums of parts.

    Args:
        tokens: to begin with.
        shrinks: False where other processes take part in each pass, which cannot be repeated by one of them.
    """

    def __init__(self, tokens: int, shrinks: bool = True) -> None:
        self.tokens, self.shrinks = tokens, shrinks

    def run(self, work: Callable[[int], Result]) -> Result:
        """``work(tokens)``, again with half as many whenever memory runs out; ``work`` must be safe to repeat.

        Raises:
            UserError: memory does not suffice for the smallest pass.
        """
        while True:
            try:
                return work(self.tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if not self.shrinks:
                    # Nobody shall try again: the others are in the middle of this pass, and end when this process does.
                    raise SystemExit(
                        f"recbole-llm: --token_budget={self.tokens}: memory does not suffice ({error}), and with "
                        "--fsdp=True it is not halved by itself. Give a lower one."
                    ) from error
                if self.tokens <= LEAST:
                    raise UserError(
                        "--token_budget: memory does not suffice for the smallest pass, one user's prompt and titles "
                        f"({error}). Use a smaller --llm, a lower --MAX_ITEM_LIST_LENGTH or --rejected_num, "
                        "--gradient_checkpointing=True in training, or --quantization=4bit on a GPU."
                    ) from error
            _let_go()  # not in the handler: there the error still holds the tensors of the pass that failed
            self.tokens = max(LEAST, self.tokens // 2)
            logging.getLogger(__name__).warning(
                f"--token_budget: out of memory; going on with {self.tokens} tokens a pass. The results are the same."
            )


def in_halves(rows: Any, work: Callable[[Any], Result]) -> Iterator[tuple[Any, Result]]:
    """``work`` on all rows; where memory does not suffice, on each half of them, and so on. Yields rows and result.

    Raises:
        UserError: memory does not suffice for one row.
    """
    result: list[Result] = []
    try:
        result.append(work(rows))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(rows) == 1:
            raise UserError(
                f"Memory does not suffice for one user at a time ({error}). Use a smaller model, fewer candidates or "
                "--samples, or a machine with more memory."
            ) from error
    if result:
        yield rows, result[0]
        return
    _let_go()
    half = (len(rows) + 1) // 2
    logging.getLogger(__name__).warning(f"Out of memory with {len(rows)} users at a time; going on with {half}.")
    yield from in_halves(rows[:half], work)
    yield from in_halves(rows[half:], work)


def _let_go() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, of a GPU's or of the machine's."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(s in str(error).lower() for s in SAID)
