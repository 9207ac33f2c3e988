"""History -> prompt tokens, item -> answer tokens; templates from ``properties/prompt/*.yaml``.

*Stream*: a header, then one line a title; the answer is the next line. *Instruct*: a chat question that holds the
history; the answer is the title and the end of the turn. Titles are tokenised apart from the template and with
special tokens switched off, so that no title can end a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jinja2 import TemplateError

from recbole_llm.errors import UserError
from recbole_llm.llm.token_tree import TokenTree, TreeBuilder

HISTORY_MARK = "\u2983history\u2984"  # rare enough to stand in no template
REQUIRED = {"stream": {"header": str, "line": str}, "instruct": {"question": str, "line": str}}


@dataclass(frozen=True)
class Window:
    """Items of one user in order, and which of them are trained or scored given those before them.

    Attributes:
        user: internal id.
        items: internal ids ``[L]``.
        targets: places in ``items`` that are predicted, each >= 1.
        rejected: for each target its rejected items (all of one length k; none for SFT).
        reference: for each target the reference log-probs, chosen first, then rejected, nats; filled by the trainer.
    """

    user: int
    items: tuple[int, ...]
    targets: tuple[int, ...]
    rejected: tuple[tuple[int, ...], ...] = ()
    reference: list[list[float]] = field(default_factory=list)


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
            self.lines = self.answers = plain_tokens(tokenizer, [line.replace("{title}", t) for t in texts])
        else:
            self.prefix, self.suffix, end = _chat_parts(template["question"], tokenizer)
            self.lines = plain_tokens(tokenizer, [line.replace("{title}", t) for t in texts])
            self.answers = [ids + end for ids in plain_tokens(tokenizer, texts)]
        if not self.prefix:  # a completion's first token needs something before it
            self.prefix = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]

    def trunk(self, history: Sequence[int]) -> list[int]:
        """Prompt tokens for a history of item ids, oldest first."""
        return self.prefix + [t for item in history for t in self.lines[item]] + self.suffix

    def longest(self, items: int) -> int:
        """Tokens of the longest prompt of that many items with its answer."""
        lines = sorted(map(len, self.lines), reverse=True)[:items]
        return len(self.prefix) + sum(lines) + len(self.suffix) + max(map(len, self.answers))

    def fit(self, history: Sequence[int], most: int) -> Sequence[int]:
        """The history without as many of its oldest items as it takes to leave room for any answer.

        Args:
            most: tokens of prompt and answer together.
        """
        room = most - len(self.prefix) - len(self.suffix) - max(map(len, self.answers))
        kept = len(history)
        while kept and sum(len(self.lines[i]) for i in history[len(history) - kept :]) > room:
            kept -= 1
        return history[len(history) - kept :]

    def candidate_tree(self, history: Sequence[int], candidates: Sequence[int]) -> TokenTree:
        """The prompt as trunk, each candidate's answer as a branch; completions in the order of the candidates."""
        tree = TreeBuilder()
        end = tree.chain(-1, self.trunk(history))[-1]
        for item in candidates:
            tree.completion(tree.chain(end, self.answers[item]))
        return tree.build()

    def window_tree(self, window: Window) -> TokenTree:
        """A window's targets with their rejected items: completions are target after target, chosen first.

        With a stream prompt the chosen title is the trunk itself and the rejected ones hang off it; with an
        instruct prompt a window has one target.
        """
        if not self.every_position:
            (target,), rejected = window.targets, window.rejected[0] if window.rejected else ()
            return self.candidate_tree(window.items[:target], (window.items[target], *rejected))
        tree = TreeBuilder()
        end = tree.chain(-1, self.prefix)[-1]
        places = dict(zip(window.targets, window.rejected or ((),) * len(window.targets), strict=True))
        # A completion is numbered when its nodes are known, and the chosen title comes after its rejected branches.
        chosen_of, rejected_of = [], []
        for place, item in enumerate(window.items[: max(window.targets) + 1]):
            branches = [tree.chain(end, self.answers[r]) for r in places.get(place, ())]
            nodes = tree.chain(end, self.lines[item])
            end = nodes[-1]
            if place in places:
                chosen_of.append(nodes)
                rejected_of.append(branches)
        for nodes, branches in zip(chosen_of, rejected_of, strict=True):
            tree.completion(nodes)
            for branch in branches:
                tree.completion(branch)
        return tree.build()


def load_template(name: str, folder: Path) -> dict[str, Any]:
    """A template by name (``stream``, ``instruct``) or by path of a YAML file.

    Raises:
        UserError: no such template, or one with missing, unknown or ill-typed entries.
    """
    file = folder / "prompt" / f"{name}.yaml"
    file = file if file.is_file() else Path(name)
    if not file.is_file():
        known = ", ".join(sorted(f.stem for f in (folder / "prompt").glob("*.yaml")))
        raise UserError(
            f"--prompt={name}: no such template; use {known}, or the path of a YAML file "
            "like those in properties/prompt."
        )
    try:
        template = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise UserError(f"--prompt={name}: {file} is not plain YAML: {' '.join(str(error).split())}.") from None
    family = template.get("family") if isinstance(template, dict) else None
    if not isinstance(family, str) or family not in REQUIRED:
        raise UserError(f"--prompt={name}: {file} needs `family: stream` or `family: instruct`.")
    wrong = [k for k, kind in REQUIRED[family].items() if not isinstance(template.get(k), kind)]
    wrong += [str(k) for k in template if k not in REQUIRED[family] and k != "family"]
    holes = {"line": "{title}", "question": "{history}"}
    wrong += [k for k, hole in holes.items() if k in REQUIRED[family] and str(template.get(k)).count(hole) != 1]
    if wrong:
        raise UserError(
            f"--prompt={name}: {file}: wrong or missing {', '.join(dict.fromkeys(wrong))}; a {family} template has "
            f"{', '.join(REQUIRED[family])}, `line` holds {{title}} once and `question` holds {{history}} once."
        )
    if family == "stream" and template["line"].endswith("{title}"):
        raise UserError(
            f"--prompt={name}: {file}: `line` must go on after {{title}}, for example with \\n: the answer is "
            "a line, and a title without an end is as likely as all that begin with it."
        )
    return template


def plain_tokens(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as plain text: no special token is added, and none is recognised inside a text."""
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


def _chat_parts(question: str, tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """Tokens before and after the history, and the end of the answer."""
    question = question.replace("{history}", HISTORY_MARK)
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(
                f"--prompt: the LLM's chat template refuses a question ({error}); use --prompt=stream."
            ) from error
    else:  # a base model: plain question and answer
        text = f"{tokenizer.bos_token or ''}Question: {question}\nAnswer:\n"
    if text.count(HISTORY_MARK) != 1:
        raise UserError(
            "--prompt: the LLM's chat template does not show a question once, as it is; use --prompt=stream."
        )
    before, after = text.split(HISTORY_MARK)
    prefix, suffix = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (before, after))
    return prefix, suffix, [tokenizer.eos_token_id]
