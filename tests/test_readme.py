"""The README's commands, and the Python of the pages, are ones that work."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from recbole_llm.cli import COMMANDS, TAKES, parse_flags
from recbole_llm.config import LLMConfig
from recbole_llm.report.entries import parse_models, split_options
from recbole_llm.report.grid import cells
from recbole_llm.report.tune_lines import check_tuned_from
from recbole_llm.settings import read_yaml, read_yamls

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = re.findall(
    r"^(?:recbole-llm|make|torchrun) .+$", "\n".join(re.findall(r"```\n(.*?)```", README, re.DOTALL)), re.MULTILINE
)


def test_there_are_commands() -> None:
    assert len(LINES) >= 8


@pytest.mark.parametrize("line", LINES)
def test_command_is_accepted(line: str) -> None:
    """Everything up to the first long work: the command exists, its flags parse, its configuration is fine."""
    words = shlex.split(line, comments=True)
    if words[0] == "torchrun":  # its own flags first
        words = words[words.index("-m") + 1 :]
    program, command, *rest = words
    if program == "make":
        assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return
    assert command in COMMANDS
    settings = parse_flags(rest, TAKES.get(command))
    if command in ("run", "plan", "preview"):
        settings.pop("user", None)
        LLMConfig(config_dict=settings)
    if command == "compare":
        settings = read_yamls([str(ROOT / file) for file in settings.pop("config_files", [])]) | settings
        entries = parse_models(settings.pop("models"))
        options, shared = split_options(settings)
        assert len(cells(entries, options, shared)) >= len(entries)


def test_files_named_in_the_readme_exist() -> None:
    for name in re.findall(r"`([\w./]+/[\w.]+\.(?:py|yaml|md))`", README) + re.findall(r"\]\((docs/[\w.]+)\)", README):
        assert (ROOT / name).is_file(), name


def test_quick_comparison_is_accepted() -> None:
    """What `make run` runs."""
    settings = read_yaml(str(ROOT / "properties" / "compare" / "quick.yaml"))
    entries = parse_models(settings.pop("models"))
    options, shared = split_options(settings)
    assert len(cells(entries, options, shared)) == 5 * 2


def test_example_of_tuned_from_is_accepted() -> None:
    (text,) = re.findall(r"```yaml\n(  models: .*?)```", (ROOT / "docs" / "tuning.md").read_text("utf-8"), re.DOTALL)
    settings = yaml.safe_load(text)
    entries = parse_models(settings.pop("models"))
    options, shared = split_options({**settings, "tune": 2})
    check_tuned_from(entries, options)
    assert set(options.tuned_from or {}) == {entries[2].label} and len(cells(entries, options, shared, "ml-100k")) == 3


@pytest.mark.slow
def test_python_of_the_pages_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a reader would: docs/python.md from top to bottom, then the page that goes on from it."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    blocks = {file.name: re.findall(r"```python\n(.*?)```", file.read_text("utf-8"), re.DOTALL) for file in files}
    pages = ("python.md", "full_ranking.md")
    assert {name for name, found in blocks.items() if found} == set(pages)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for page in pages:
        for block in blocks[page]:
            exec(compile(block, page, "exec"), names)
    table, run, ranked = names["comparison"]["table"].set_index("model"), names["run"], names["ranked"]
    assert table.loc["LLMRanker", "ndcg@10"] == names["result"]["test_result"]["ndcg@10"]
    assert ranked.rank(run.rows.relevant[names["row"]].tolist()) == run.stored_rank(names["row"])
    every = names["every"].numpy()
    every[list(names["history"])] = -np.inf
    assert sorted(names["found"][0].items) == sorted(np.argsort(-every)[:10])
