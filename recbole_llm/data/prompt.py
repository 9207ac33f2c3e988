"""History -> prompt tokens, item -> answer tokens, by a template (``template.py``).

*Stream*: a header, then one line a title; the answer is the next line. *Instruct*: a chat question that holds the
history; the answer is the title and the tokenizer's end-of-text token. *Pair*: see ``pair_prompt.py``. Titles are
tokenised apart from the template and with special tokens switched off, so that no title can end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from torch import Tensor

from recbole_llm.errors import UserError
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder

DAY = date(2024, 7, 26)  # in chat templates that tell the day; Llama 3's take it where they cannot ask for today's


@dataclass(frozen=True)
class Window:
    """Items of one user in order, and which of them are trained or scored given those before them.

    Attributes:
        user: internal id.
        items: internal ids ``[L]``.
        targets: places in ``items`` that are predicted, each >= 1.
        rejected: for each target its rejected items (all of one length k; none for SFT).
        also: for each target more items that are chosen in its place (all of one length P - 1).
        reference: for each target the reference log-probs, chosen first, then rejected, nats; filled by the trainer.
        smoothing: for each target and rejected item the probability that the pair is wrongly labelled.
    """

    user: int
    items: tuple[int, ...]
    targets: tuple[int, ...]
    rejected: tuple[tuple[int, ...], ...] = ()
    also: tuple[tuple[int, ...], ...] = ()
    reference: list[list[float]] = field(default_factory=list)
    smoothing: list[list[float]] = field(default_factory=list)

    def told(self) -> list[Any]:
        """What it asks, to be hashed: not what it is worth (``smoothing``, ``reference``)."""
        return [self.user, self.items, self.targets, self.also, self.rejected]

    def branches(self) -> list[tuple[int, ...]]:
        """For each target the items scored beside it: those also chosen, then the rejected ones."""
        nothing = ((),) * len(self.targets)
        return [a + r for a, r in zip(self.also or nothing, self.rejected or nothing, strict=True)]


def check_end(line: str, tokenizer: Any) -> None:
    """Whether a tokenizer keeps what ends a title in a line of the template.

    Raises:
        UserError: it drops it, so a title that begins another one would never be less likely.
    """
    whole, cut = plain_tokens(tokenizer, [line.replace("{title}", "a"), line.partition("{title}")[0] + "a"])
    if whole == cut:
        raise UserError(
            f"--prompt: the LLM's tokenizer drops what ends a title in {line!r}, so a title that begins another would "
            "never be less likely than it. Set --prompt=instruct, or a template whose line ends with a word or a mark."
        )


class Prompt:
    """Tokens of prompts and answers for one tokenizer and catalogue.

    Args:
        template: a parsed template file.
        texts: text of each internal item id, entry 0 empty.
        tokenizer: a transformers tokenizer.

    Attributes:
        every_position: whether a history is its own prompt at every step (stream).
        lines, answers: token ids of each item, in the history and as the answer.
    """

    def __init__(self, template: dict[str, Any], texts: Sequence[str], tokenizer: Any) -> None:
        self.every_position = template["family"] == "stream"
        line = template["line"]
        if self.every_position:
            self.prefix, self.suffix = tokenizer(template["header"])["input_ids"], []
            if self.prefix and self.prefix[-1] == tokenizer.eos_token_id:
                self.prefix = self.prefix[:-1]
            check_end(line, tokenizer)
            self.lines = self.answers = plain_tokens(tokenizer, [line.replace("{title}", t) for t in texts])
        else:
            self.prefix, self.suffix = chat_parts(template["question"], ("history",), tokenizer)
            self.lines = plain_tokens(tokenizer, [line.replace("{title}", t) for t in texts])
            self.answers = [[*ids, tokenizer.eos_token_id] for ids in plain_tokens(tokenizer, texts)]
        self.prefix = self.prefix or start_tokens(tokenizer)

    def trunk(self, history: Sequence[int]) -> list[int]:
        """Prompt tokens for a history of item ids, oldest first."""
        return self.prefix + [t for item in history for t in self.lines[item]] + self.suffix

    def longest(self, items: int) -> int:
        """Tokens of the longest prompt of that many items with its answer."""
        lines = sorted(map(len, self.lines), reverse=True)[:items]
        return len(self.prefix) + sum(lines) + len(self.suffix) + self.longest_answer

    @cached_property
    def longest_answer(self) -> int:
        """Tokens of the longest answer."""
        return max(map(len, self.answers))

    def fit(self, history: Sequence[int], most: int) -> Sequence[int]:
        """The history without as many of its oldest items as it takes to leave room for any answer.

        Args:
            most: tokens of prompt and answer together.
        """
        room = most - len(self.prefix) - len(self.suffix) - self.longest_answer
        return newest([len(self.lines[i]) for i in history], history, room)

    def candidate_tree(self, history: Sequence[int], candidates: Sequence[int]) -> TokenTree:
        """The prompt as trunk, each candidate's answer as a branch; completions in the order of the candidates."""
        tree = TreeBuilder()
        end = tree.chain(-1, self.trunk(history))[-1]
        for item in candidates:
            tree.completion(tree.chain(end, self.answers[item]))
        return tree.build()

    def window_tree(self, window: Window) -> TokenTree:
        """A window's targets with their branches: completions are target after target, chosen first, rejected last.

        With a stream prompt the target's title is the trunk itself and all others hang off it; with an instruct
        prompt a window has one target.
        """
        if not self.every_position:
            (target,), (others,) = window.targets, window.branches()
            return self.candidate_tree(window.items[:target], (window.items[target], *others))
        tree = TreeBuilder()
        end = tree.chain(-1, self.prefix)[-1]
        places = dict(zip(window.targets, window.branches(), strict=True))
        # A completion is numbered when its nodes are known, and the target's title comes after its branches.
        chosen_of, others_of = [], []
        for place, item in enumerate(window.items[: max(window.targets) + 1]):
            branches = [tree.chain(end, self.answers[r]) for r in places.get(place, ())]
            nodes = tree.chain(end, self.lines[item])
            end = nodes[-1]
            if place in places:
                chosen_of.append(nodes)
                others_of.append(branches)
        for nodes, branches in zip(chosen_of, others_of, strict=True):
            tree.completion(nodes)
            for branch in branches:
                tree.completion(branch)
        return tree.build()

    def window_size(self, window: Window) -> int:
        """Tokens of a window's tree that go through the model."""
        last = max(window.targets)
        trunk = len(self.trunk(window.items[: last + self.every_position]))
        answer = 0 if self.every_position else len(self.answers[window.items[last]])
        branches = sum(len(self.answers[i]) - 1 for items in window.branches() for i in items)
        return trunk + answer - 1 + branches  # leaves are not fed

    def chosen_lengths(self, window: Window) -> list[int]:
        """Tokens of each target's title, which SFT trains."""
        return [len(self.answers[window.items[t]]) for t in window.targets]

    def combined(self, logps: Tensor) -> Tensor:
        """Log-probs of a window's completions as the losses take them: as they are ``[T, P + k]``."""
        return logps


def newest(sizes: Sequence[int], history: Sequence[int], room: int) -> Sequence[int]:
    """The history without as many of its oldest items as it takes for the others' sizes to fit."""
    first, used = 0, sum(sizes)
    while first < len(history) and used > room:
        used -= sizes[first]
        first += 1
    return history[first:]


def plain_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as plain text: no special token is added, and none is recognised inside a text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def start_tokens(tokenizer: Any) -> list[int]:
    """What a prompt without words begins with: a completion's first token needs something before it."""
    return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]


def _of_no_day(chat_template: str) -> str:
    """A chat template that tells ``DAY`` where it would tell today: a prompt must be the same tomorrow.

    Raises:
        ValueError: it asks in another way than for a form in quotes.
    """
    asks = r"""strftime_now\(\s*(["'])(.*?)\1\s*\)"""
    told = re.sub(asks, lambda asked: repr(DAY.strftime(asked.group(2))), chat_template)
    if "strftime_now(" in told:
        raise ValueError("it tells today's date, so the prompt would be another one tomorrow")
    return told


def chat_parts(question: str, holes: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Tokens of a question put to a chat model, before, between and after its holes.

    Args:
        holes: names of the ``{holes}``, each once in the question, in this order.

    Raises:
        UserError: the chat template refuses the question or changes it.
    """
    marks = [f"\u2983{name}\u2984" for name in holes]  # rare enough to stand in no template
    for name, mark in zip(holes, marks, strict=True):
        question = question.replace(f"{{{name}}}", mark)
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}],
                chat_template=_of_no_day(tokenizer.get_chat_template()),
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, ValueError) as error:  # the latter: no default among several, or today's date
            raise UserError(
                f"--prompt: the LLM's chat template refuses a question ({error}); use --prompt=stream."
            ) from error
    else:  # a base model: plain question and answer
        text = f"{tokenizer.bos_token or ''}Question: {question}\nAnswer:\n"
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            raise UserError(
                "--prompt: the LLM's chat template does not show a question once, as it is; use --prompt=stream."
            )
        part, text = text.split(mark)
        parts.append(part)
    return [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (*parts, text)]
