"""What a run will compute, counted from configuration and data: positions, passes, tokens, LM-head rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from recbole.config import Config

from recbole_llm.data.pair_prompt import PairPrompt
from recbole_llm.data.prompt import Prompt, Window
from recbole_llm.llm.token_tree import batches_by_budget
from recbole_llm.llm_steps import optimizer_steps
from recbole_llm.reference import WINDOWS_AT_ONCE
from recbole_llm.stages import Stage


@dataclass
class Work:
    """Passes of one kind over the same data: a training stage, its reference, an evaluation.

    Attributes:
        name: as shown.
        rounds: how often all of it is done: epochs, or validations.
        positions: supervised positions, or rows that are ranked, of one round.
        windows: token trees of one round.
        steps: optimizer steps of all rounds; 0 where nothing is trained.
        passes: forward passes of one round.
        tokens: that go through the LLM in one round.
        one_by_one: the same with one sequence (prompt and completion) for each completion.
        head_rows: rows of the LM head in one round.
        largest: tokens and LM-head rows of the largest pass.
        trained: whether gradients are computed.
        kept: tokens whose keys and values are held beside the largest pass.
        sample: windows to time the passes with; empty where what is run cannot be timed by windows.
        cached: whether an earlier run left its result.
        seconds: of all rounds; None = not measured.
    """

    name: str
    rounds: int
    positions: int
    windows: int
    steps: int
    passes: int
    tokens: int
    one_by_one: int
    head_rows: int
    largest: tuple[int, int]
    trained: bool
    kept: int = 0
    sample: list[Window] = field(default_factory=list)
    cached: bool = False
    seconds: float | None = None


def head_rows(prompt: Prompt | PairPrompt, window: Window) -> int:
    """Tokens of a window's tree whose next-token distribution is needed."""
    if isinstance(prompt, PairPrompt):
        target = window.items[window.targets[0]]
        return sum(1 + 2 * (len(prompt.answer(target, r)) - 1) for r in window.rejected[0])
    chosen = sum(len(prompt.answers[window.items[t]]) for t in window.targets)
    return chosen + sum(len(prompt.answers[i]) - 1 for items in window.branches() for i in items)


def tokens_one_by_one(prompt: Prompt | PairPrompt, window: Window) -> int:
    """Tokens of a window's completions, each in a sequence of its own behind its prompt."""
    trunks = [len(prompt.trunk(window.items[:t])) for t in window.targets]
    if isinstance(prompt, PairPrompt):
        target = window.items[window.targets[0]]
        asked = [len(prompt.listing(target, r)) + len(prompt.answer(target, r)) for r in window.rejected[0]]
        return sum(2 * (trunks[0] + tokens) for tokens in asked)
    total = 0
    for trunk, target, others in zip(trunks, window.targets, window.branches(), strict=True):
        total += sum(trunk + len(prompt.answers[i]) for i in (window.items[target], *others))
    return total


def stage_work(config: Config, prompt: Prompt | PairPrompt, stage: Stage) -> list[Work]:
    """A training stage, with its reference where it has one."""
    grouped = [
        [*optimizer_steps(stage.windows, config["train_batch_size"], config["seed"], epoch)]
        for epoch in range(stage.epochs)
    ]
    steps = sum(map(len, grouped))
    epochs = [[part for step in epoch for part in passes_of(config, prompt, step)] for epoch in grouped]
    trained = sum_work(stage.loss, prompt, epochs[0], stage.windows, rounds=stage.epochs, steps=steps)
    trained.largest = max(_sizes(prompt, part) for epoch in epochs for part in epoch)
    if stage.loss == "SFT":
        return [trained]
    return [pass_work(config, prompt, f"{stage.loss}: reference", [stage.windows]), trained]


def pass_work(config: Config, prompt: Prompt | PairPrompt, name: str, calls: Iterable[list[Window]]) -> Work:
    """Log-probs of windows without gradients, asked for in some calls."""
    calls = list(calls)
    parts = [some[first : first + WINDOWS_AT_ONCE] for some in calls for first in range(0, len(some), WINDOWS_AT_ONCE)]
    passes = [found for part in parts for found in passes_of(config, prompt, part)]
    return sum_work(name, prompt, passes, [w for some in calls for w in some])


def sum_work(
    name: str,
    prompt: Prompt | PairPrompt,
    passes: list[list[Window]],
    alone: list[Window],
    *,
    rounds: int = 1,
    steps: int = 0,
) -> Work:
    """Sums over passes.

    Args:
        passes: windows of each; there may be none yet.
        alone: the windows before those of equal histories are joined.
    """
    sizes = [_sizes(prompt, part) for part in passes]
    return Work(
        name,
        rounds,
        positions=sum(len(w.targets) for w in alone),
        windows=sum(map(len, passes)),
        steps=steps,
        passes=len(passes),
        tokens=sum(tokens for tokens, _ in sizes),
        one_by_one=sum(tokens_one_by_one(prompt, w) for w in alone),
        head_rows=sum(rows for _, rows in sizes),
        largest=max(sizes, default=(0, 0)),
        trained=steps > 0,
        sample=max(passes, key=lambda part: _sizes(prompt, part), default=[]),
    )


def _sizes(prompt: Prompt | PairPrompt, windows: Sequence[Window]) -> tuple[int, int]:
    """Tokens and LM-head rows of one pass."""
    return sum(map(prompt.window_size, windows)), sum(head_rows(prompt, w) for w in windows)


def passes_of(config: Config, prompt: Prompt | PairPrompt, windows: Sequence[Window]) -> list[list[Window]]:
    """Windows as forward passes take them."""
    sizes = [prompt.window_size(w) for w in windows]
    return [[windows[i] for i in group] for group in batches_by_budget(sizes, config["token_budget"])]
