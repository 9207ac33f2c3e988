"""Free answers: the greedy loop against argmax without a cache, and what counts as valid, by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.utils import ModelOutput

from recbole_llm import generation
from recbole_llm.data.protocol import Protocol
from recbole_llm.generation import answer_text, generated_answers, greedy_text
from recbole_llm.llm.sampling import cache_key
from recbole_llm.model.llmranker import LLMRanker
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import prepared

pytestmark = pytest.mark.usefixtures("one_thread")


def built(settings: dict[str, Any], **changes: Any) -> tuple[LLMRanker, Protocol]:
    config, protocol = prepared({k: v for k, v in settings.items() if k != "model"}, "LLMRanker", **changes)
    return LLMRanker(config, protocol.train_data._dataset).eval(), protocol


def says(monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> list[tuple[Any, ...]]:
    """Let the LLM write these texts, one a row; returns what it was asked."""
    asked: list[tuple[Any, ...]] = []

    def written(model: LLMRanker, trunk: list[int], most: int, stop: str, token_budget: int) -> str:
        asked.append((model.llm.tokenizer.decode(trunk), most, stop))
        return answers[len(asked) - 1]

    monkeypatch.setattr(generation, "greedy_text", written)
    return asked


@pytest.mark.parametrize("prompt", ["stream", "instruct"])
def test_greedy_is_the_argmax_of_every_step(tiny: dict[str, Any], prompt: str) -> None:
    """Each step a pass over everything before, without a cache; LoRA moved, so that it counts."""
    model, _ = built(tiny, prompt=prompt)
    torch.manual_seed(0)
    for name, weight in model.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    tokenizer = model.llm.tokenizer
    texts = []
    for history, pass_tokens in (([1, 2, 3], 2048), ([7], 5), ([20, 4, 9, 11, 30], 7)):  # a prompt in pieces too
        ids = model.prompt.trunk(history)
        for _ in range(12):
            with torch.no_grad():
                token = int(model.policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        written = ids[len(model.prompt.trunk(history)) :]
        grown = [tokenizer.decode(written[:n]) for n in range(1, len(written) + 1)]
        assert greedy_text(model, model.prompt.trunk(history), 12, "", pass_tokens) == grown[-1]
        stop = grown[1][len(grown[0]) :]  # the second token, which may be the first again
        assert greedy_text(model, model.prompt.trunk(history), 12, stop, pass_tokens) == next(
            t for t in grown if stop in t
        )
        texts.append(grown[-1])
    assert len(set(texts)) == 3 and all(texts)
    assert not model.policy.config.use_cache


def test_the_end_of_text_ends_an_answer(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that writes `red cat`, the end of text, and more: the cache holds all that was fed before."""
    model, _ = built(tiny, prompt="instruct")
    tokenizer = model.llm.tokenizer
    written = tokenizer("red cat")["input_ids"] + [tokenizer.eos_token_id, *tokenizer(" dog")["input_ids"]]
    fed: list[list[int]] = []

    key = cache_key(model.policy)

    def policy(input_ids: torch.Tensor, use_cache: bool, **cache: Any) -> Any:
        assert use_cache and cache == {key: len(fed) or None}
        fed.append(input_ids[0].tolist())
        logits = torch.nn.functional.one_hot(torch.tensor([[written[len(fed) - 1]]]), len(tokenizer)).float()
        return ModelOutput(logits=logits, **{key: len(fed)})

    monkeypatch.setattr(model.policy, "forward", policy)
    assert greedy_text(model, [5, 6], 50, "", 2048) == "red cat"
    assert fed == [[5, 6], *([token] for token in written[: len(fed) - 1])]
    assert len(fed) == len(tokenizer("red cat")["input_ids"]) + 1


@pytest.mark.parametrize(
    ("text", "around", "answer"),
    [
        ("red cat (1950)\nblue", ("", "\n"), "red cat (1950)"),
        ("red cat (1950)", ("", "\n"), "red cat (1950)"),  # cut before its end
        (" red  cat (1950) \n", ("", "\n"), "red cat (1950)"),
        ("\nred cat (1950)\n", ("", "\n"), ""),
        ("- red cat (1950);\nblue", ("- ", ";\n"), "red cat (1950)"),
        ("red cat (1950);\n- blue", ("- ", ";\n"), "red cat (1950)"),
        ("red cat\n(1950)", ("", ""), "red cat (1950)"),
    ],
)
def test_answer_of_a_text(text: str, around: tuple[str, str], answer: str) -> None:
    assert answer_text(text, *around) == answer


def test_ratios_by_hand(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 8 answers: 2 hits, 1 of the history, 1 of another item, and 4 that are no item. Valid: 4 of 8."""
    model, protocol = built(tiny)
    rows, texts = protocol.test, model.texts
    rows.visible, rows.users = rows.visible[:8], rows.users[:8]
    other = next(i for i in range(1, 61) if i not in rows.history[3] and i != rows.targets[3])
    answers = [
        texts[rows.targets[0]] + "\n",
        "  " + texts[rows.targets[1]] + " \nand more",
        texts[rows.history[2][0]] + "\n",
        texts[other],
        texts[rows.targets[4]].upper() + "\n",
        texts[rows.targets[5]][:-1] + "\n",
        "\n",
        texts[rows.targets[7]] + "!\n",
    ]
    asked = says(monkeypatch, answers)
    result, samples = generated_answers(model, rows, 8, 0)
    assert result == {
        "generation/valid_ratio": 4 / 8,
        "generation/hit_over_all_rows": 2 / 8,
        "generation/hit_over_valid_rows": 2 / 4,
        "generation/in_history": 1 / 8,
    }
    assert [s["valid"] for s in samples] == [True] * 4 + [False] * 4
    assert [s["hit"] for s in samples] == [True] * 2 + [False] * 6
    assert [s["in_history"] for s in samples] == [False] * 2 + [True] + [False] * 5
    assert [s["user"] for s in samples] == [str(rows.user_tokens[u]) for u in rows.users]
    assert samples[2]["target"] == texts[rows.targets[2]] and samples[2]["answer"] == texts[rows.history[2][0]]
    for (prompt, most, stop), sample, history in zip(asked, samples, rows.history, strict=False):
        assert prompt.splitlines()[1:] == [texts[i] for i in history] and prompt.endswith(sample["prompt_tail"])
        assert most == max(map(len, model.prompt.answers)) + 2 and stop == "\n"


def test_nothing_valid_has_no_hits_over_valid(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, protocol = built(tiny)
    says(monkeypatch, ["no such thing\n"] * 3)
    result, samples = generated_answers(model, protocol.test, 3, 0)
    assert result["generation/valid_ratio"] == 0 and result["generation/hit_over_valid_rows"] is None
    assert len(samples) == 3


def test_the_sample_is_seeded(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, protocol = built(tiny)
    drawn = []
    for count, seed in ((10, 1), (10, 1), (10, 2), (99, 1)):
        says(monkeypatch, ["x"] * 99)
        drawn.append([s["user"] for s in generated_answers(model, protocol.test, count, seed)[1]])
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 10
    assert sorted(drawn[3]) == sorted(f"u{n}" for n in range(40))


def test_a_template_of_ones_own(tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines that begin and end with more than the title: `* title;` and a line break."""
    template = tmp_path / "own.yaml"
    template.write_text('family: stream\nheader: "Seen:\\n"\nline: "* {title};\\n"\n', encoding="utf-8")
    model, protocol = built(tiny, prompt=str(template))
    title = model.texts[protocol.test.targets[0]]
    asked = says(monkeypatch, [f"* {title};\n* and more;"] * 40)
    _, samples = generated_answers(model, protocol.test, 40, 0)
    assert samples[0]["hit"] and all(s["valid"] for s in samples)
    assert {stop for _, _, stop in asked} == {";\n"}


@pytest.mark.parametrize("prompt", ["stream", "instruct"])
def test_a_random_llm_writes_no_title(tiny: dict[str, Any], prompt: str) -> None:
    """The whole path: what it writes is kept, and is no item."""
    model, protocol = built(tiny, prompt=prompt)
    model.train()
    result, samples = generated_answers(model, protocol.test, 4, 0)
    assert result["generation/valid_ratio"] == 0 and not model.training
    assert len({s["prompt_tail"] for s in samples}) == 4 and any(s["answer"] for s in samples)


def test_a_run_counts_and_keeps_them(tiny: dict[str, Any]) -> None:
    done = run_recbole_llm(config_dict={**tiny, "generate_users": 3, "epochs": 0})
    folder = Path(done["run_folder"])
    samples = [json.loads(line) for line in (folder / "generated.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = json.loads((folder / "result.json").read_text())["metrics"]
    assert len(samples) == 3 and metrics["generation/valid_ratio"] == sum(s["valid"] for s in samples) / 3
    assert metrics["generation/hit_over_valid_rows"] is None or metrics["generation/valid_ratio"] > 0
