"""A run folder's README.md: its numbers, its loading code, its command, and names that would break Markdown."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.torch import load_file

from recbole_llm import trainer as trainers
from recbole_llm.cli import parse_flags
from recbole_llm.config import LLMConfig
from recbole_llm.keys import LOSSES
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report.command import _quoted, as_typed, command_of
from recbole_llm.report.hub import hub_id, loading_code
from recbole_llm.report.markdown import fenced, inline, one_line
from recbole_llm.run_folder import run_folder_of
from recbole_llm.settings import TEXT_FLAGS
from tests.conftest import prepared, write_dataset
from tests.test_dpo4rec import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

OWN = {"SFT": {}, "DPO": {"rejected_num": 1}, "RosePO": {"smoothing": 0.1}, "MultDPO": {"chosen_num": 2}}
FEW = {"few_shot": 8, "eval_users": 4, "preference_learning_rate": 0.01, "learning_rate": 0.01}


def card_of(run: dict[str, Any]) -> str:
    return (Path(run["run_folder"]) / "README.md").read_text(encoding="utf-8")


def record_of(run: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(run["run_folder"]) / "result.json").read_text(encoding="utf-8"))


def block(card: str, language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)\n```$", card, re.DOTALL | re.MULTILINE)
    return found


def row(card: str, metric: str) -> list[str]:
    (line,) = [line for line in card.splitlines() if line.startswith(f"| {metric} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


# ---- what it cost


def test_cost_is_in_all_where_the_run_did_all(tiny: dict[str, Any]) -> None:
    """Also where it was given again; a stage that another run did is named as such."""
    first, again = (card_of(run_recbole_llm(config_dict={**tiny, **FEW})) for _ in range(2))
    other = card_of(run_recbole_llm(config_dict={**tiny, **FEW, "loss": "DMPO", "rejected_num": 2}))
    for card in (first, again):
        assert re.search(r"SFT \d+ s, test [\d.]+ s, [\d.]+ CPU min in all,", card)
    assert re.search(r"SFT \d+ s \(in another run\), DMPO \d+ s, .* CPU min beside what was found done,", other)


# ---- the adapter, loaded as the card says


def loaded(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the card's own Python makes in the run's folder."""
    monkeypatch.chdir(run["run_folder"])
    names: dict[str, Any] = {}
    exec(block(card_of(run), "python"), names)
    return names["model"]


def title_logp(model: torch.nn.Module, before: list[int], answer: list[int]) -> float:
    """Log-prob of an answer by one plain pass of transformers over one sequence."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*before, *answer]])).logits[0].float()
    logps = logits.log_softmax(-1)[len(before) - 1 : -1]
    return float(logps[range(len(answer)), answer].sum())


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, torch.Tensor, torch.Tensor]]:
    """Rows of the test, and their items and scores, as the run that follows gives them."""
    seen: list[tuple[Any, Any, torch.Tensor, torch.Tensor]] = []
    score = trainers.ProtocolEvaluation.score_rows

    def kept(self: Any, data: Any, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        scores, items = score(self, data, rows)
        if data.split == "test":
            seen.append((self.model.prompt, [data.history[r] for r in rows], items, scores))
        return scores, items

    monkeypatch.setattr(trainers.ProtocolEvaluation, "score_rows", kept)
    return seen


@pytest.mark.parametrize("loss", LOSSES)
def test_adapter_of_every_loss_gives_the_scores_of_the_run(
    tiny: dict[str, Any], scored: list[Any], monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    run = run_recbole_llm(config_dict={**tiny, **FEW, "loss": loss, **OWN.get(loss, {})})
    folder = Path(run["run_folder"])
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {file.name for file in folder.iterdir()}
    model = loaded(run, monkeypatch)
    assert isinstance(model, PeftModel)
    base, compared = tiny_llm()[0], 0
    for prompt, histories, items, scores in scored:
        for history, mine, found in zip(histories, items, scores, strict=True):
            before = prompt.trunk([int(i) for i in history])
            expected = [title_logp(model, before, prompt.answers[i]) for i in mine.tolist()]
            torch.testing.assert_close(found.cpu(), torch.tensor(expected), atol=1e-4, rtol=0)
            untrained = [title_logp(base, before, prompt.answers[i]) for i in mine.tolist()]
            assert (found.cpu() - torch.tensor(untrained)).abs().max() > 0.05
            compared += 1
    assert compared == 4


def test_all_weights_load_as_told(tiny: dict[str, Any], scored: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_recbole_llm(config_dict={**tiny, **FEW, "finetune": "full"})
    card = ModelCard.load(Path(run["run_folder"]) / "README.md")
    assert card.data.library_name == "transformers" and "All weights of tiny, trained by SFT." in card.text
    model = loaded(run, monkeypatch)
    prompt, (history, *_), items, scores = scored[0]
    before = prompt.trunk([int(i) for i in history])
    expected = [title_logp(model, before, prompt.answers[i]) for i in items[0].tolist()]
    torch.testing.assert_close(scores[0].cpu(), torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("llm", ["mod/x", "~/mod/x"])
def test_a_base_that_lies_here_loads_as_told(
    tiny: dict[str, Any], scored: list[Any], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: str
) -> None:
    """Typed as in the folder where the run was started, or from home; the lines are for the run's own folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mod").mkdir()
    folder.rename(tmp_path / "mod/x")
    run = run_recbole_llm(config_dict={**tiny, **FEW, "llm": llm})
    assert "## Load\n\nIn this folder:\n\n```python\n" in card_of(run)
    model = loaded(run, monkeypatch)
    prompt, (history, *_), items, scores = scored[0]
    before = prompt.trunk([int(i) for i in history])
    expected = [title_logp(model, before, prompt.answers[i]) for i in items[0].tolist()]
    torch.testing.assert_close(scores[0].cpu(), torch.tensor(expected), atol=1e-4, rtol=0)


def test_dpo4rec(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_recbole_llm("DPO4Rec", config_dict={**toy, **SMALL, "align_learning_rate": 0.01, "iterations": 1})
    card, folder = card_of(run), Path(run["run_folder"])
    assert "SASRec that reads an LLM's texts about users (knowledge: reasoning)." in card
    assert "## Prompt: reasoning" in card and "\n- DPO4Rec\n- DPO\n" in card.split("---")[1]
    kept = load_file(folder / "adapter_model.safetensors")
    live = dict(loaded(run, monkeypatch).named_parameters())
    assert kept and all(torch.equal(live[name.replace(".weight", ".default.weight")], kept[name]) for name in kept)


def test_dpo4rec_without_an_llm_names_none(toy: dict[str, Any]) -> None:
    card = card_of(run_recbole_llm("DPO4Rec", config_dict={**toy, **SMALL, "knowledge": "none"}))
    assert card.startswith("# DPO4Rec on toy\n") and "## Load" not in card and "tiny, weights" not in card


# ---- what it says


def test_numbers_are_those_of_the_record(tiny: dict[str, Any]) -> None:
    settings = {**tiny, **FEW, "loss": "DMPO", "rejected_num": 2, "beta": 0.25}
    run = run_recbole_llm(config_dict=settings)
    record, folder = record_of(run), Path(run["run_folder"])
    told = ModelCard.load(folder / "README.md")
    assert told.data.base_model is None and told.data.library_name == "peft"
    assert {"recbole-llm", "LLMRanker", "DMPO"} <= set(told.data.tags)
    results = {one.metric_type: one.metric_value for one in told.data.eval_results}
    assert results == {name: record["metrics"][name] for name in ("hit@10", "ndcg@10", "mrr@10")}
    assert told.data.metrics == list(results) and told.data.model_name == folder.name
    both = (record["metrics"], record["valid_metrics"])
    assert row(told.text, "ndcg") == [f"{found[f'ndcg@{k}']:.4f}" for found in both for k in (1, 5, 10)]
    lift = [f"{record['metrics'][f'popularity_lift@{k}']:.4f}" for k in (1, 5)]
    assert row(told.text, "popularity_lift") == [*lift, "", "", "", ""]
    machine = json.loads((folder / "env.json").read_text(encoding="utf-8"))
    for text in (
        "# LLMRanker (DMPO) on toy",
        "LoRA adapter over tiny, trained by SFT, then DMPO.",
        f"files {record['data_hash'][:12]} (SHA-256); trained on 8 users (few-shot), 80 interactions",
        f"test 4 rows, uni9, candidates {record['candidate_hash'][:12]}; validation uni9",
        f"tiny, weights {record['llm_revision']}, float32; LoRA r 16, alpha 32, dropout 0.0, all-linear; beta 0.25, "
        f"2 rejected titles a pair (uniform); {record['trainable_parameters']:,} trained parameters",
        f"{record['train_tokens']:,} tokens in training, {record['test_tokens']:,} tokens in the test, peak memory "
        f"{record['peak_memory_bytes'] / 2**30:.1f} GiB",
        f"- **Seeds**: {record['seed']} (training), {record['candidate_seed']} (candidates)",
        f"recbole_llm {record['versions']['recbole_llm']} (code {record['versions']['recbole_llm_code']}, commit "
        f"{machine['git_commit'] or 'unknown'})",
        "Each row ranks 10 candidates (uni9), not the whole catalogue",
        "tiny is a random LLM of two layers",
        'line: "{title}\\n"',
    ):
        assert text in told.text
    assert told.content.count("\n") < 110


def test_recbole_model(toy: dict[str, Any]) -> None:
    run = run_recbole_llm("Pop", config_dict={**toy, "eval_args": {"mode": "full"}})
    card, record = card_of(run), record_of(run)
    assert card.startswith("# Pop on toy\n") and "RecBole's Pop, trained and evaluated by RecBole-LLM." in card
    assert "trained on all users, 400 interactions" in card and "test 40 rows, full, candidates" in card
    assert row(card, "hit")[:3] == [f"{record['metrics'][f'hit@{k}']:.4f}" for k in (1, 5, 10)]
    assert "candidates (" not in card.split("## Limits")[1] and "## Load" not in card and "## Prompt" not in card


def test_zero_shot(tiny: dict[str, Any]) -> None:
    card = card_of(run_recbole_llm(config_dict={**tiny, **FEW, "finetune": "none"}))
    assert "# LLMRanker (zero-shot) on toy" in card and "Nothing is trained: tiny, as it is." in card
    assert "## Load" not in card and "library_name" not in card


def test_pairs_have_metrics_without_k(tiny: dict[str, Any]) -> None:
    settings = {**tiny, **FEW, "loss": "DPO", "rejected_num": 1, "prompt": "pair", "topk": [1]}
    run = run_recbole_llm(config_dict={**settings, "eval_args": {"mode": "uni1"}, "valid_metric": "NDCG@1"})
    card, record = card_of(run), record_of(run)
    accuracy = record["metrics"]["paired_accuracy"]
    assert f"Test: paired_accuracy {accuracy:.4f}, " in card and "## Prompt: pair" in card
    assert "Each row ranks 2 candidates (uni1)" in card


# ---- the command


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (
            "LLMRanker",
            {"loss": "DMPO", "beta": 0.5, "few_shot": 8, "item_text": "{title}, it's $1"},
        ),
        ("SASRec", {"hidden_size": 32, "item_inter_num_interval": "[0,inf)", "eval_users": None}),
        ("LLMRanker", {"finetune": "none", "rejected": "uniform+popularity", "lora_target_modules": ["q_proj"]}),
        ("Pop", {"log_wandb": False, "state": "ERROR", "topk": [1, 5], "valid_metric": "NDCG@5"}),
    ],
)
def test_command_names_the_same_run(toy: dict[str, Any], model: str, changes: dict[str, Any]) -> None:
    llm = {"llm": "tiny"} if model == "LLMRanker" else {}
    config = LLMConfig(model, config_dict={**toy, **llm, **changes})
    program, command, *words = shlex.split(command_of(config))
    assert (program, command) == ("recbole-llm", "run")
    again = LLMConfig(config_dict={**parse_flags(words), "checkpoint_dir": toy["checkpoint_dir"]})
    assert run_folder_of(again) == run_folder_of(config)
    assert "state" not in command_of(config)


def test_command_is_quoted_as_people_write() -> None:
    assert _quoted("--eval_args={'mode': 'full'}") == '''"--eval_args={'mode': 'full'}"'''
    for word in ("a", "it's", "'$HOME'", '''it's "so"''', "'`ls`'", "'!x'", "a'\n'b", "'\\'"):
        assert shlex.split(_quoted(word)) == [word]


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
NESTED = st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5)


@given(NESTED)
def test_values_are_read_back(value: Any) -> None:
    assert parse_flags([f"--recommender_config={as_typed('recommender_config', value)}"]) == {
        "recommender_config": value
    }


@given(st.sampled_from(sorted(TEXT_FLAGS - {"config_files", "config"})), st.text())
def test_texts_stay_as_typed(key: str, value: str) -> None:
    assert parse_flags([f"--{key}={as_typed(key, value)}"]) == {key: value}


# ---- names and titles that would be markup

MARKUP = st.text(st.sampled_from("\\`*_{}[]()<>#+-.!|~&;\n\r\t ab1$\x00\u2028") | st.characters(codec="utf-8"))


GITHUB = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def read_back(markdown: str) -> list[str]:
    """The text of each paragraph, heading or cell, as GitHub reads it; there may be nothing else in it."""
    inlines = [token for token in GITHUB.parse(markdown) if token.type == "inline"]
    kinds = {child.type for token in inlines for child in token.children}
    assert kinds <= {"text", "text_special"}, kinds
    return ["".join(child.content for child in token.children) for token in inlines]


@given(MARKUP.map(one_line).filter(bool))
def test_text_is_never_markup(text: str) -> None:
    assert read_back(f"x {inline(text)} y") == [f"x {text} y"]
    assert read_back(f"# {inline('x ' + text)}") == [f"x {text}"]
    assert read_back(f"| a | b |\n|---|---|\n| {inline(text)} | c |") == ["a", "b", text, "c"]


def test_text_is_one_line() -> None:
    assert one_line(" a\n\tb\x00c\u2028d ") == inline("a\nb\x00c\u2028d") == "a b c d"
    assert inline("ndcg_at_10, amazon-games: uni99") == "ndcg_at_10, amazon-games: uni99"  # readable as it is


@given(MARKUP)
def test_code_stays_code(text: str) -> None:
    first, *rest = MarkdownIt("commonmark").parse(fenced(text, "sh") + "\n\nbehind")
    assert first.type == "fence" and [t.content for t in rest if t.type == "inline"] == ["behind"]


def test_hostile_data_set(toy: dict[str, Any], tmp_path: Path) -> None:
    """A folder of that name, with titles and a prompt of that kind: one heading, one table, the blocks closed."""
    name = "a|b `c` [d](e) <i>_f_ --- &lt;"
    write_dataset(tmp_path / "data", name=name)
    item = tmp_path / "data" / name / f"{name}.item"
    item.write_text(item.read_text(encoding="utf-8").replace("red cat", "``` # x | <b>"), encoding="utf-8")
    (tmp_path / "p```|.yaml").write_text(
        "family: stream\nheader: '```\n\n  ---\n\n  # x\n\n  ~~~'\nline: '{title} ````\n\n  '\n", encoding="utf-8"
    )
    settings = {**toy, "dataset": name, "llm": "tiny", "train_batch_size": 32, "prompt": "p```|.yaml", **FEW}
    run = run_recbole_llm("LLMRanker", config_dict=settings)
    told = ModelCard.load(Path(run["run_folder"]) / "README.md")
    assert told.data.eval_results[0].dataset_type == name
    tokens = GITHUB.parse(told.text)
    heads = [tokens[i + 1] for i, t in enumerate(tokens) if t.type == "heading_open"]
    assert ["".join(c.content for c in head.children) for head in heads] == [
        f"LLMRanker (SFT) on {name}",
        "Limits",
        "Prompt: p```|.yaml",
        "Load",
        "Run again",
    ]
    assert [t.type for t in tokens if t.level == 0 and t.type in ("table_open", "fence", "html_block", "hr")] == [
        "table_open", "fence", "fence", "fence",
    ]  # fmt: skip
    assert {c.type for t in tokens if t.type == "inline" for c in t.children} <= {
        "text", "text_special", "strong_open", "strong_close", "code_inline", "softbreak",
    }  # fmt: skip


# ---- base models


@pytest.mark.parametrize(
    ("llm", "found"),
    [
        ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("tiny", None),
        ("gpt2", "gpt2"),
        ("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-0.5B"),
        ("/home/alice/model", None),
        ("./model", None),
        ("a/b/c", None),
        ("model.gguf", None),
        ("here", None),
    ],
)
def test_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: str, found: str | None) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hub_id(llm) == found


@pytest.mark.parametrize(
    ("llm", "told"),
    [
        ("embedded", "where = embedded_folder()"),
        ("qwen2.5-coder-0.5b", "where = embedded_folder('qwen2.5-coder-0.5b')"),
        ("Qwen/Qwen2.5-0.5B", "where = 'Qwen/Qwen2.5-0.5B'"),
        ("/m/x.gguf", "where = gguf_folder(Path('/m/x.gguf'))"),
        ("~/x.gguf", "where = gguf_folder(Path('~/x.gguf').expanduser())"),
        ("m/x.gguf", "where = gguf_folder(Path('../../m/x.gguf'))"),
        ("./here", "where = Path('../../here')"),
        ("it's\n\"", "where = 'it\\'s\\n\"'"),
    ],
)
def test_code_for_other_bases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llm: str, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    run = Path("saved/run")
    run.mkdir(parents=True)
    (run / "adapter_model.safetensors").touch()
    code = loading_code(llm, "bfloat16", run)
    compile(code, "card", "exec")
    assert told in code.splitlines() and 'from_pretrained(where, dtype="bfloat16")' in code


@pytest.mark.parametrize(("eval_users", "sample"), [(None, False), (12, True), (1000, False)])
def test_a_sample_of_users_is_told_where_it_is_one(toy: dict[str, Any], eval_users: int | None, sample: bool) -> None:
    """Of 40 users, each with 2 test rows."""
    split = {"split": {"RS": [0.7, 0.1, 0.2]}, **toy["eval_args"]}
    run = run_recbole_llm("Pop", config_dict={**toy, "eval_args": split, "eval_users": eval_users})
    asked, rows = (12, 24) if sample else (40, 80)
    assert (record_of(run)["test_users"], record_of(run)["rows"]) == (asked, rows)
    assert card_of(run).count("A sample of users was asked") == card_of(run).count(f"was asked: {rows} rows.") == sample


def test_config_is_not_changed_by_the_card(toy: dict[str, Any]) -> None:
    config, _ = prepared(toy, "Pop")
    before = json.dumps(config.external_config_dict, default=str)
    command_of(config)
    assert json.dumps(config.external_config_dict, default=str) == before
