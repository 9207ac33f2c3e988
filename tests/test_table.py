"""Tables in every format: whole golden files, what is best and who is told apart, and nothing that is markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recbole_llm.errors import UserError
from recbole_llm.report import frames
from recbole_llm.report.entries import Options
from recbole_llm.report.formats import html_table, latex, latex_file, latex_text, markdown
from recbole_llm.report.grid import Setting
from recbole_llm.report.results import Line, Results, direction, merit, metric_name
from recbole_llm.report.significance import comparisons
from recbole_llm.report.table import Table, Value, costs_table, harm_table, p_text, results_table, significance_table

GOLDEN = Path(__file__).parent / "golden"
HOSTILE = r"""A_b & 50% $x^2$ #1 {y} ~ \input{/etc/passwd} <script>alert("1")</script> | `code` é 漢 ](http://x)"""


def record(folder: Path, label: str, seed: int, rows: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    """A finished run as the tables read it, with its per-user rows on disk."""
    home = folder / f"{label}-{seed}"
    home.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame({"user": [f"u{i}" for i in range(len(next(iter(rows.values()))))], "target": "i1", **rows})
    table.to_csv(home / "per_user.csv.gz", index=False)
    return {
        "label": label,
        "metrics": {name: float(np.nanmean(np.array(values, dtype=float))) for name, values in rows.items()}
        | more.pop("metrics", {}),
        "rows": len(table),
        "candidate_hash": "a" * 64,
        "data_hash": "d" * 64,
        "dataset": "toy",
        "mode": "uni9",
        "few_shot": None,
        "training_users": None,
        "training_interactions": 1234,
        "seed": seed,
        "valid_metric": "NDCG@10",
        "versions": {"recbole_llm": "1", "recbole": "1.2.1", "torch": "2"},
        "trainable_parameters": 12345,
        "timings": {"train_s": 1.25, "test_s": 0.5, "total_cpu_s": 90.0},
        "run_hash": f"{label}-toy-{seed}",
        "run_folder": str(home),
        **more,
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Three models, two seeds, 40 users: B is better than A for nearly all, C is like A; F fails."""
    rng = np.random.default_rng(0)
    base = rng.random(40).round(2)
    lines = []
    for name, shift in (("A", 0.0), ("B", 0.2), ("C", 0.0)):
        runs = []
        for seed in (1, 2):
            noise = rng.normal(0, 0.02, 40).round(2) if name != "A" else np.zeros(40)
            ndcg = (base + shift + noise + 0.01 * seed).round(2)
            rows = {"hit@10": (ndcg > 0.5).astype(float).tolist(), "ndcg@10": ndcg.tolist()}
            rows["popularity_lift@10"] = [None, *(0.5 - ndcg)[1:]]
            runs.append(record(tmp_path, name, seed, rows, metrics={"gini@10": 0.5 - shift}))
        lines.append(Line(name, runs, []))
    lines.append(Line("F_1", [], ["out of | memory"]))
    return Results(Setting("toy", None, False, None), lines)


def tables(results: Results, **options: Any) -> list[Table]:
    chosen = Options(resamples=999, **options)
    tests = comparisons(results, ["A"], chosen)
    found = [
        results_table(results, tests, ["A"], chosen, 1),
        significance_table(results, tests, chosen, 1),
        harm_table(results, tests, ["A"], 1),
        costs_table([results]),
    ]
    return [table for table in found if table]


# Golden files: to change them on purpose, delete one and run the test twice


@pytest.mark.parametrize("name", ["table.md", "table.tex", "table.html", "table.csv", "tests.csv", "table.json"])
def test_golden(results: Results, name: str) -> None:
    every, tests = [results], [comparisons(results, ["A"], Options(resamples=999))]
    text = {
        "table.md": lambda: "\n".join(map(markdown, tables(results))),
        "table.tex": lambda: latex_file(tables(results)),
        "table.html": lambda: "\n".join(map(html_table, tables(results))),
        "table.csv": lambda: frames.results_frame(every).to_csv(index=False, float_format="%.10g"),
        "tests.csv": lambda: frames.tests_frame(every, tests).to_csv(index=False, float_format="%.10g"),
        "table.json": lambda: json.dumps(rounded(frames.as_json(every, tests, 999)), indent=1),
    }[name]()
    file = GOLDEN / name
    if not file.is_file():
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        pytest.fail(f"{file} was not there; it is now. Read it, then run again.")
    assert text == file.read_text(encoding="utf-8")


def rounded(value: Any) -> Any:
    """Numbers to ten digits: the last ones are the processor's."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


# Marks


def cell(table: Table, row: int, column: str) -> Value:
    return table.rows[row][[h.split(" ")[0] for h in table.header].index(column)]


def test_best_second_and_told_apart(results: Results) -> None:
    table = tables(results)[0]
    ndcg = [cell(table, row, "NDCG@10") for row in range(3)]
    assert [v.place for v in ndcg][1] == 1 and sorted(v.place for v in ndcg) == [0, 1, 2]
    assert [v.better for v in ndcg] == ["", "a", ""] and all(v.worse == "" for v in ndcg)
    assert table.rows[0][0].text == "A (a)" and table.rows[3][1].text == "failed"
    assert table.notes == ["F_1: failed: out of | memory"]
    harm = tables(results)[2]
    assert [cell(harm, row, "gini@10").place for row in range(3)] == [2, 1, 2]  # smaller is better; A and C tie


def test_equal_to_the_digits_shown_is_equal(tmp_path: Path) -> None:
    values = {"A": 0.50001, "B": 0.49999, "C": 0.4}
    lines = [Line(n, [record(tmp_path, n, 1, {"ndcg@10": [v, v, v]})], []) for n, v in values.items()]
    table = results_table(Results(Setting(None, None, False, None), lines), pd.DataFrame(), ["A"], Options(), 1)
    assert [cell(table, row, "NDCG@10").place for row in range(3)] == [1, 1, 2]


def test_worse_is_marked_below(results: Results) -> None:
    chosen = Options(resamples=999)
    tests = comparisons(results, ["B"], chosen)
    table = results_table(results, tests, ["B"], chosen, 1)
    assert [cell(table, row, "NDCG@10").worse for row in range(3)] == ["a", "", "a"]
    assert "lowered = worse than (a) B" in table.caption
    verdicts = {(r["model"], r["metric"]): r["verdict"] for r in tests.to_dict("records")}
    assert verdicts["A", "ndcg@10"] == "worse" and ("B", "ndcg@10") not in verdicts


def test_two_baselines_are_one_family(results: Results) -> None:
    """Three models and two baselines: A-B once, C-A, C-B; Holm over those three."""
    tests = comparisons(results, ["A", "B"], Options(resamples=999))
    ndcg = tests[tests["metric"] == "ndcg@10"]
    assert set(zip(ndcg["model"], ndcg["baseline"], strict=True)) == {("B", "A"), ("C", "A"), ("C", "B")}
    ordered = ndcg.sort_values("p_t")["p_t"].to_numpy()
    assert ndcg["p_holm"].min() == pytest.approx(min(1, 3 * ordered[0]))


def test_one_sided_is_said(results: Results) -> None:
    one, two = (comparisons(results, ["A"], Options(resamples=999, alternative=a)) for a in ("better", "two-sided"))
    row = {f["metric"]: f for f in one[one["model"] == "B"].to_dict("records")}
    both = {f["metric"]: f for f in two[two["model"] == "B"].to_dict("records")}
    assert row["ndcg@10"]["p_t"] == pytest.approx(both["ndcg@10"]["p_t"] / 2)
    assert row["popularity_lift@10"]["p_t"] == both["popularity_lift@10"]["p_t"]  # zero is best: two-sided always
    assert "one-sided (is the model better?)" in tables(results, alternative="better")[0].caption


def test_users_without_a_value_are_left_out(results: Results) -> None:
    tests = comparisons(results, ["A"], Options(resamples=999))
    assert set(tests.groupby("metric")["users"].first().items()) >= {("ndcg@10", 40), ("popularity_lift@10", 39)}


def test_directions() -> None:
    ways = {"ndcg@10": "larger", "gini@5": "smaller", "averagepopularity@5": "smaller", "popularity_lift@1": "zero"}
    assert {m: direction(m) for m in ways} == ways and direction("hallucination_base") is None
    assert merit("popularity_lift@1", np.array([-0.5, 0.1])).tolist() == [-0.5, -0.1]
    names = {"ndcg@10": "NDCG@10", "hit@1": "Hit@1", "gauc": "GAUC", "coverage@5": "coverage@5"}
    assert {m: metric_name(m) for m in names} == names


def test_p_values_as_printed() -> None:
    assert [p_text(p) for p in (0.0004, 0.001, 0.0496, 0.5, 1.0)] == ["< .001", ".001", ".050", ".500", "1"]


def test_columns_asked_for(results: Results) -> None:
    table = tables(results, table_metrics=("NDCG@10", "gini@10"))[0]
    assert table.header == ["Model", "NDCG@10 ↑", "gini@10 ↓"]


def test_all_failed() -> None:
    nothing = Results(Setting("toy", 5, True, "uni9"), [Line("A", [], ["x"]), Line("B", [], ["y"])])
    table = results_table(nothing, comparisons(nothing, ["A"], Options()), ["A"], Options(), 1)
    assert table.title == "toy, 5 training users, uni9" and table.caption == "No run finished."
    assert markdown(table).count("failed") == 4 or "failed: x" in markdown(table)
    assert frames.results_frame([nothing])["failed"].tolist() == [1, 1]


# Nothing is markup


def hostile_table() -> Table:
    row = [Value(HOSTILE), Value("0.5", "0.1", 1, "a", "b")]
    return Table("t-1", HOSTILE, HOSTILE, ["Model", HOSTILE], [row, row], notes=[HOSTILE])


def test_hostile_markdown() -> None:
    text = markdown(hostile_table())
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1  # every row has as many cells
    assert "<script" not in text and not re.search(r"(?<!\\)\]\(", text) and "\\`code\\`" in text


class Tags(HTMLParser):
    """All tags, attributes and the text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attributes)

    def handle_data(self, data: str) -> None:
        self.text += data


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_stays_text_in_html(text: str) -> None:
    table = Table("t", text, text, [text], [[Value(text)]], notes=[text])
    parsed = Tags(html_table(table))
    assert parsed.tags <= set("section h2 div table thead tbody tr th td button ul li p".split())
    assert Tags(html_table(hostile_table())).text.count('<script>alert("1")</script>') == 6


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_stays_text_in_latex(text: str) -> None:
    """No character of LaTeX's own survives, braces are paired, and all of it is ASCII or Latin letters."""
    escaped = r"\\text(backslash|asciicircum|asciitilde)\{\}|\\ensuremath\{[^}]*\}|\\[&%$#_{}]|\{-\}"
    bare = re.sub(escaped, "", latex_text(text))
    assert not set(bare) & set('\\{}&%$#_^~<>|"')
    assert all(ord(c) < 0x1E00 + 0x100 and c.isprintable() for c in bare)


ENGINES = [name for name in ("pdflatex", "tectonic") if shutil.which(name)]


@pytest.mark.skipif(not ENGINES, reason="no LaTeX engine on this machine")
@pytest.mark.parametrize("within", [False, True], ids=["by itself", "in a paper"])
def test_latex_compiles(results: Results, tmp_path: Path, within: bool) -> None:
    wide = Table("wide", "Wide", "Wide.", ["M", *["Long header"] * 14], [[Value("x"), *[Value("0.12345")] * 14]])
    (tmp_path / "table.tex").write_text(latex_file([*tables(results), hostile_table(), wide]), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs,graphicx}"
        r"\begin{document}\input{table}See \ref{tab:t-1}.\end{document}"
    )
    words = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error"] if ENGINES[0] == "pdflatex" else ["tectonic"]
    ran = subprocess.run(
        [*words, "paper.tex" if within else "table.tex"], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (tmp_path / ("paper.pdf" if within else "table.pdf")).stat().st_size > 5000


def test_latex_by_hand() -> None:
    table = Table("t", "T", "50 % of A_1", ["Model", "Hit@1 ↑"], [[Value("A"), Value("-0.5", "0.1", 1, "a", "b")]])
    assert latex(table).splitlines()[2:] == [
        r"\caption{50 \% of A\_1}",
        r"\label{tab:t}",
        r"\small",
        r"\sbox0{%",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"Model & Hit@1 \ensuremath{\uparrow} \\",
        r"\midrule",
        r"A & \textbf{\ensuremath{-}0.5} {\scriptsize \ensuremath{\pm} 0.1}\ensuremath{^{\mathrm{a}}_{\mathrm{b}}} \\",
        r"\bottomrule",
        r"\end{tabular}}%",
        r"\ifdim\wd0>\linewidth\resizebox{\linewidth}{!}{\usebox0}\else\usebox0\fi",
        r"\end{table}",
    ]


def test_unreadable_rows_are_told(results: Results) -> None:
    (Path(results.lines[0].runs[0]["run_folder"]) / "per_user.csv.gz").unlink()
    with pytest.raises(UserError, match="per_user.csv.gz cannot be read"):
        comparisons(results, ["A"], Options())


def test_a_user_called_na(tmp_path: Path) -> None:
    run = record(tmp_path, "A", 1, {"ndcg@10": [0.1, 0.2]})
    file = Path(run["run_folder"]) / "per_user.csv.gz"
    pd.DataFrame({"user": ["NA", "007"], "target": ["null", "1"], "ndcg@10": [0.25, 0.5], "rank": [1, 2]}).to_csv(file)
    table = pd.read_csv(file, index_col=0, keep_default_na=False)
    table.to_csv(file, index=False)
    assert Line("A", [run], []).users["ndcg@10"].to_dict() == {"007": 0.5, "NA": 0.25}
