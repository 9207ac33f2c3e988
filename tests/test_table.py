"""Tables in every format: whole golden files, what is best and who is told apart, and nothing that is markup."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recbole.utils import ModelType

from recbole_llm.errors import ConfigError, UserError
from recbole_llm.report import formats, frames
from recbole_llm.report.entries import Options, parse_models
from recbole_llm.report.formats import html_table, latex, latex_file, latex_text, markdown
from recbole_llm.report.grid import Setting
from recbole_llm.report.results import Line, Results, collect, direction, merit, metric_name, user_rows
from recbole_llm.report.significance import baselines, check_resamples, comparisons
from recbole_llm.report.summary import found
from recbole_llm.report.table import (
    Table,
    Value,
    accuracy_columns,
    costs_table,
    harm_table,
    p_text,
    primary_metric,
    results_table,
    significance_table,
)
from tests.made_runs import NOT_GIVEN, made_grid

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
        "device": "cpu",
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
        harm_table(results, tests, ["A"], Options(), 1),
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
    values = {"A": 0.50001, "B": 0.49999, "C": 0.4, "D": 0.00025, "E": 0.0003}
    assert f"{0.00025:.4f}" == "0.0003" and np.round(0.00025, 4) == 0.0002  # two ways to round a half
    lines = [Line(n, [record(tmp_path, n, 1, {"ndcg@10": [v, v, v]})], []) for n, v in values.items()]
    table = results_table(Results(Setting(None, None, False, None), lines), pd.DataFrame(), ["A"], Options(), 1)
    assert [cell(table, row, "NDCG@10").place for row in range(3)] == [1, 1, 2]
    last = Results(Setting(None, None, False, None), lines[3:])
    table = results_table(last, pd.DataFrame(), ["D"], Options(), 1)
    assert [cell(table, row, "NDCG@10").place for row in range(2)] == [1, 1]


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


def made(home: Path, metric: str, **models: list[list[float]]) -> Results:
    """A line a model, of each seed's values the users' values."""
    lines = [
        Line(name, [record(home, name, seed, {metric: values}) for seed, values in enumerate(seeds, 1)], [])
        for name, seeds in models.items()
    ]
    return Results(Setting("toy", None, False, None), lines)


def test_the_order_of_seeds_is_no_difference(tmp_path: Path) -> None:
    """(.1 + .2 + .3) / 3 and (.3 + .2 + .1) / 3 differ in the last digit of a double."""
    up = [[0.1] * 4, [0.2] * 4, [0.3] * 4]
    row = comparisons(made(tmp_path, "ndcg@10", A=up, B=up[::-1]), ["A"], Options(resamples=99)).iloc[0]
    assert (row["wins"], row["ties"], row["losses"]) == (0, 4, 0)
    assert row["difference"] == row["t"] == row["d"] == 0 and row["p_t"] == 1 and row["verdict"] == ""


@pytest.mark.filterwarnings("error")
def test_what_rounding_tells_apart_is_a_tie(tmp_path: Path) -> None:
    """Rows have ten digits: 1/2, 1/3, 1/6 over three seeds have the mean of three times 1/3."""
    thirds = [[0.5, 1.0], [0.3333333333, 1.0], [0.1666666667, 1.0]]
    results = made(tmp_path, "ndcg@10", A=[[0.3333333333, 0.5]] * 3, B=thirds)
    (test,) = comparisons(results, ["A"], Options(resamples=99)).to_dict("records")
    assert (test["wins"], test["ties"], test["losses"]) == (1, 1, 0)


def test_a_single_user_has_no_test(tmp_path: Path) -> None:
    results = made(tmp_path, "ndcg@10", A=[[0.25]], B=[[0.5]])
    tests = comparisons(results, ["A"], Options(resamples=99))
    assert np.isnan(tests["p_holm"][0]) and tests["verdict"][0] == ""
    texts = [value.text for value in significance_table(results, tests, Options(), 1).rows[0]]
    assert texts == ["B", "A", "+0.2500", "[+0.2500, +0.2500]", "", "1/0/0", "", "1", "", "not told apart"]
    told = found(results, tests, ["A"], Options())
    assert told == "NDCG@10: B is best (0.5000). There is no test of B against the baseline A."


@pytest.mark.parametrize(("shift", "verdict"), [(0.3, "better"), (-0.3, "worse"), (0.5, ""), (0.8, "")])
def test_nearest_to_zero_from_both_sides(tmp_path: Path, shift: float, verdict: str) -> None:
    """A's lift is -.4: B's -.1 is nearer, -.7 is not; of +.1 and +.4 a test of the difference cannot say."""
    lift = np.linspace(-0.45, -0.35, 30)
    moved = lift + shift + np.linspace(-0.01, 0.01, 30)
    results = made(tmp_path, "popularity_lift@10", A=[lift.tolist()], B=[moved.tolist()])
    row = comparisons(results, ["A"], Options(resamples=99)).iloc[0]
    assert row["p_t"] < 1e-6 and row["verdict"] == verdict


def test_a_verdict_is_about_the_users_of_the_test(tmp_path: Path) -> None:
    """B is better for each user that both have a value for; its mean over its own is worse."""
    results = made(
        tmp_path,
        "long_tail@10",
        A=[[0.10, 0.12, 0.11, 0.13, np.nan, 0.12]],
        B=[[0.20, 0.23, 0.20, 0.24, 0.00, 0.21]],
        C=[[0.20, 0.23, 0.20, 0.24, -9.0, 0.21]],
    )
    tests = comparisons(results, ["A"], Options(resamples=99))
    assert tests["verdict"].tolist() == ["better", "better"] and tests["users"].tolist() == [5, 5]


def test_two_baselines_are_both_marked(results: Results) -> None:
    """B is better than A: B's cell says so, and A's too."""
    chosen = Options(resamples=999)
    tests = comparisons(results, ["A", "B"], chosen)
    table = results_table(results, tests, ["A", "B"], chosen, 1)
    marks = [(v.better, v.worse) for v in (cell(table, row, "NDCG@10") for row in range(3))]
    assert marks == [("", "b"), ("a", ""), ("", "b")]


def test_one_sided_asks_both_baselines(results: Results) -> None:
    """Whether B is better than A is one question, whether A is better than B another."""
    for against in (["A", "B"], ["B", "A"]):
        tests = comparisons(results, against, Options(resamples=999, alternative="better"))
        ndcg = tests[tests["metric"] == "ndcg@10"].set_index(["model", "baseline"])["verdict"]
        assert ndcg.to_dict() == {("A", "B"): "", ("B", "A"): "better", ("C", "A"): "", ("C", "B"): ""}


def test_more_baselines_than_letters() -> None:
    entries = parse_models(",".join(f"BPR[epochs={n}]" for n in range(1, 28)))
    labels = tuple(entry.label for entry in entries)
    assert baselines(entries, Options(baseline=labels[:26])) == list(labels[:26])
    with pytest.raises(ConfigError, match="--baseline: names 27 models; at most 26 have a letter"):
        baselines(entries, Options(baseline=labels))
    assert baselines(entries, Options(baseline=(labels[0], "x"), names={labels[0]: "x"})) == [labels[0]]


def test_seeds_of_the_caption(tmp_path: Path) -> None:
    """A line of another seed, a seed that failed, and one run a line are said."""

    def told(**seeds: list[int]) -> str:
        runs = {n: [record(tmp_path, n, s, {"ndcg@10": [0.1, 0.2]}) for s in of] for n, of in seeds.items()}
        every = Results(Setting("toy", None, False, None), [Line(n, of, []) for n, of in runs.items()])
        return results_table(every, pd.DataFrame(), ["A"], Options(), 1).caption

    assert "Mean and ± standard deviation over seeds 1, 2." in told(A=[1, 2], B=[1, 2])
    assert "over seeds 1, 2; other seeds: B 7; C 2." in told(A=[1, 2], B=[7], C=[2])
    assert "One seed each: A 1, B 2. " in told(A=[1], B=[2]) and "One seed (1)." in told(A=[1], B=[1])


def test_captions_name_only_baselines_that_ran(results: Results) -> None:
    tests, chosen = comparisons(results, ["F_1", "A"], Options(resamples=999)), Options(resamples=999)
    told = results_table(results, tests, ["F_1", "A"], chosen, 1).caption
    assert "lowered = worse than (b) A." in told and "F_1" not in told


def test_tuning_is_said(results: Results) -> None:
    told = [results_table(results, pd.DataFrame(), ["A"], Options(tune=n), 1).caption for n in (0, 8)]
    assert "tuned" not in told[0] and "Every line tuned on validation by 8 trials at most." in told[1]


def test_columns_without_a_test_are_named(results: Results) -> None:
    """No mark would read as "not told apart"; who has a test has it for users."""
    assert "Not tested" not in tables(results)[0].caption
    assert tables(results)[2].caption.endswith("as in the table of results. Not tested: gini@10.")
    both = tables(results, table_metrics=("NDCG@10", "gini@10"))[0].caption
    assert "test on 40 users' means" in both and "Not tested: gini@10. Best in bold" in both
    lift = tables(results, table_metrics=("popularity_lift@10",))[0].caption
    assert "test on 39 users' means" in lift and "Not tested" not in lift
    none = tables(results, table_metrics=("gini@10",))[0].caption
    assert "t-test" not in none and "Not tested: gini@10." in none
    untested = results_table(results, pd.DataFrame(), ["A"], Options(table_metrics=("gini@10",)), 1).caption
    assert "Not tested" not in untested  # nothing is, and nothing says so


def test_what_lines_do_not_share_is_said(tmp_path: Path) -> None:
    cells, records = made_grid(tmp_path, ["Pop", "SFT", "DPO", "BPR"], [NOT_GIVEN], seeds=(1,))
    alike = collect(cells, records)
    told = results_table(alike[0], pd.DataFrame(), ["Pop"], Options(), 1).caption
    assert "Histories" not in told and "Validation users" not in told
    for cell in cells:
        cell.config["eval_users"] = 2000
        own = {"Pop": {"MODEL_TYPE": ModelType.TRADITIONAL}, "SFT": {"MAX_ITEM_LIST_LENGTH": 5}}.get(cell.entry.label)
        cell.config.update(own or {}, valid_users=None if cell.entry.label in ("Pop", "BPR") else 100)
    told = results_table(collect(cells, records, {"DPO": "a loss"})[0], pd.DataFrame(), ["Pop"], Options(), 1).caption
    assert "Histories of up to 20 items; SFT 5. Validation users: 2,000; SFT, a loss 100. One seed (1)." in told
    cells[-1].config["valid_metric"] = "Hit@10"
    told = results_table(collect(cells, records)[0], pd.DataFrame(), ["Pop"], Options(), 1).caption
    assert "Epochs selected by NDCG@10; BPR Hit@10. One seed (1)." in told


def test_a_pair_is_said(tmp_path: Path) -> None:
    run = record(tmp_path, "A", 1, {"ndcg@1": [0.0, 1.0]}, mode="uni1")
    results = Results(Setting("toy", None, False, None), [Line("A", [run], [])])
    told = results_table(results, pd.DataFrame(), ["A"], Options(), 1).caption
    assert "2 rows, the next item among one other drawn uniformly from those that the user never met (frozen" in told


def test_trained_elsewhere_is_said(tmp_path: Path) -> None:
    """``eval_dataset``: the title and the files name both data sets, the caption what was trained on."""
    run = record(tmp_path, "A", 1, {"ndcg@10": [0.1, 0.2]}, training_dataset="films")
    results = Results(Setting("films", None, False, None), [Line("A", [run], [])])
    table = results_table(results, pd.DataFrame(), ["A"], Options(), 1)
    assert table.title == "films → toy, all training users, uni9"
    assert "1,234 training interactions of films." in table.caption
    assert frames.results_frame([results])["dataset"].tolist() == ["films → toy"]


def test_the_metric_that_selects_is_a_column(tmp_path: Path) -> None:
    """Also where its K is not one of the two largest: it is the one that is tested."""
    rows = {f"{name}@{k}": [0.1, 0.2, 0.4] for name in ("hit", "ndcg") for k in (1, 5, 10)}
    run = record(tmp_path, "A", 1, rows, valid_metric="NDCG@1")
    results = Results(Setting(None, None, False, None), [Line("A", [run], [])])
    assert accuracy_columns(results, Options()) == ["hit@5", "hit@10", "ndcg@1", "ndcg@5", "ndcg@10"]
    assert primary_metric(results, Options()) == "ndcg@1"
    others = [record(tmp_path, name, 1, rows, valid_metric="Hit@10") for name in "BC"]
    results = Results(results.setting, [*results.lines, *(Line(run["label"], [run], []) for run in others)])
    assert primary_metric(results, Options()) == "hit@10"  # of most, whatever one line selects by


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    few, every = (Results(Setting(None, n, True, None), [Line("A", [], ["x"])]) for n in (20, None))
    run = record(tmp_path, "A", 1, {"ndcg@10": [0.1]}, few_shot=20)
    few.lines.append(Line("B", [run], []))
    text = frames.results_frame([few, every]).to_csv(index=False)
    assert ",20,uni9,A,,1,," in text and ",20,uni9,B,1,0,12345,0.1" in text


def test_one_sided_is_said(results: Results) -> None:
    one, two = (comparisons(results, ["A"], Options(resamples=999, alternative=a)) for a in ("better", "two-sided"))
    row = {f["metric"]: f for f in one[one["model"] == "B"].to_dict("records")}
    both = {f["metric"]: f for f in two[two["model"] == "B"].to_dict("records")}
    assert row["ndcg@10"]["p_t"] == pytest.approx(both["ndcg@10"]["p_t"] / 2)
    assert row["popularity_lift@10"]["p_t"] == both["popularity_lift@10"]["p_t"]  # zero is best: two-sided always
    assert row["ndcg@10"]["detectable"] < both["ndcg@10"]["detectable"]
    assert row["popularity_lift@10"]["detectable"] == both["popularity_lift@10"]["detectable"]
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
    assert p_text(float("nan")) == ""  # of a single user


def test_columns_asked_for(results: Results) -> None:
    table = tables(results, table_metrics=("NDCG@10", "gini@10"))[0]
    assert table.header == ["Model", "NDCG@10 ↑", "gini@10 ↓"]
    notes = tables(results, table_metrics=("NDCG@10", "Hallucination@5"))[0].notes
    assert notes[0] == "Hallucination@5: not every run has it." and len(notes) == 2


def test_all_failed() -> None:
    nothing = Results(Setting("toy", 5, True, "uni9"), [Line("A", [], ["x"]), Line("B", [], ["y"])])
    table = results_table(nothing, comparisons(nothing, ["A"], Options()), ["A"], Options(), 1)
    assert table.title == "toy, 5 training users, uni9" and table.caption == "No run finished."
    told = markdown(table)
    assert table.header == ["Model", "Result"] and len(re.findall(r"\|\s+failed \|", told)) == 2
    assert "A: failed: x" in told and "B: failed: y" in told
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
    assert parsed.tags <= set("section h2 div table thead tbody tr th td button ul li p wbr".split())
    assert Tags(html_table(hostile_table())).text.count('<script>alert("1")</script>') == 6


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_stays_text_in_latex(text: str) -> None:
    """No character of LaTeX's own survives, braces are paired, and all of it is ASCII or Latin letters."""
    named = "text(backslash|asciicircum|asciitilde|endash|emdash|quote(left|right|dblleft|dblright))"
    escaped = rf"\\({named}|ldots|ss|o|O|ae|AE|l|L)\{{\}}|" r"\\ensuremath\{[^}]*\}|\\[&%$#_{}]|\{-\}"
    bare = re.sub(escaped, "", latex_text(text))
    assert not set(bare) & set('\\{}&%$#_^~<>|"')
    assert all(ord(c) < 0x1E00 + 0x100 and c.isprintable() for c in bare)


def test_letters_that_latex_has_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    """Greek by Unicode's own names; what is no letter there is told, once."""
    for letter in "αβγδεζηθικλμνξπρστυφχψωΓΔΘΛΞΠΣΥΦΨΩ":
        _, size, _, name = unicodedata.name(letter).replace("LAMDA", "LAMBDA").split()
        told = name.capitalize() if size == "CAPITAL" else name.lower()
        assert latex_text(letter) == rf"\ensuremath{{\{told}}}"
    capitals = "\N{GREEK CAPITAL LETTER ALPHA}\N{GREEK CAPITAL LETTER CHI}\N{GREEK SMALL LETTER OMICRON}"
    assert latex_text(capitals + "\N{MICRO SIGN}") == r"AXo\ensuremath{\mu}"
    assert latex_text("Łukasz’s “ø–æ” ≤ 2×β…") == (
        r"\L{}ukasz\textquoteright{}s \textquotedblleft{}\o{}\textendash{}\ae{}\textquotedblright{} "
        r"\ensuremath{\leq} 2\ensuremath{\times}\ensuremath{\beta}\ldots{}"
    )
    assert not caplog.records
    formats._unknown.cache_clear()
    assert latex_text("a漢b漢") == latex_text("a漢b漢") == "a?b?"
    (told,) = [r.getMessage() for r in caplog.records if "6F22" in r.getMessage()]
    assert told.startswith("table.tex: '漢' (U+6F22) is in no font of LaTeX, and a question mark there")


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
        r"\caption{T. 50 \% of A\_1}",
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


def test_a_name_is_no_argument_of_latex() -> None:
    rows = [[Value(name), Value("1")] for name in ("[ours]", "*new*", "A [b]")]
    lines = latex(Table("t", "T", "", ["Model", "Hit"], rows)).splitlines()
    assert lines[lines.index(r"\midrule") + 1 :][:3] == [r"{}[ours] & 1 \\", r"{}*new* & 1 \\", r"A [b] & 1 \\"]


def test_damaged_rows_are_told(results: Results) -> None:
    """Whatever byte of the compressed part is another one."""
    file = Path(results.lines[0].runs[0]["run_folder"]) / "per_user.csv.gz"
    whole = file.read_bytes()
    told = 0
    for place in range(10, len(whole)):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            user_rows(results.lines[0].runs[0])
        except UserError as error:
            told += "per_user.csv.gz cannot be read" in str(error)
    assert told > 0.9 * (len(whole) - 10)


def test_lines_of_other_few_shot_say_so(tmp_path: Path) -> None:
    rows = {"ndcg@10": [0.5, 0.0]}
    lines = [Line(f"A{n}", [record(tmp_path, f"A{n}", 1, rows, few_shot=n)], []) for n in (20, 5)]
    results = Results(Setting("toy", None, False, None), lines)
    assert frames.results_frame([results])["few_shot"].tolist() == [20, 5]
    tests = comparisons(results, ["A20"], Options())
    assert frames.tests_frame([results], [tests])["few_shot"].tolist() == [5] * len(tests)


def test_lines_tell_their_own_training(tmp_path: Path) -> None:
    """Data and users of a line that failed are its settings', not those of the first run."""
    rows = {"ndcg@10": [0.5, 0.0]}
    films = record(tmp_path, "A", 1, rows, few_shot=7, training_dataset="films")
    failed = Line("C", [], ["x"], {"dataset": "toy", "few_shot": None})
    lines = [Line("A", [films], []), Line("B", [record(tmp_path, "B", 1, rows)], []), failed]
    results = Results(Setting("toy", None, False, None), lines)
    frame = frames.results_frame([results])
    assert frame["dataset"].tolist() == ["films → toy", "toy", "toy"]
    assert frame["few_shot"].isna().tolist() == [False, True, True] and frame["few_shot"][0] == 7
    told = frames.as_json([results], [pd.DataFrame()], 99)[0]["models"]
    assert [(m["dataset"], m["few_shot"]) for m in told] == [("films → toy", 7), ("toy", None), ("toy", None)]
    tests = frames.tests_frame([results], [comparisons(results, ["B"], Options(resamples=99))])
    assert set(tests["dataset"]) == {"films → toy"}
    assert '"films → toy",7,' in frames.spreadsheet_csv(tests)  # as in table.csv


def test_one_sided_asks_once_of_what_is_best_near_zero(tmp_path: Path) -> None:
    """Two baselines are compared both ways where the question has a side, which nearness to zero has not."""
    rows = {"ndcg@10": [0.5, 0.0, 0.2], "popularity_lift@10": [0.1, -0.2, 0.3]}
    lines = [Line(n, [record(tmp_path, n, 1, rows)], []) for n in "AB"]
    results = Results(Setting("toy", None, False, None), lines)
    tests = comparisons(results, ["A", "B"], Options(resamples=99, alternative="better"))
    assert tests["metric"].value_counts().to_dict() == {"ndcg@10": 2, "popularity_lift@10": 1}
    options = Options(resamples=99, alternative="better", table_metrics=("popularity_lift@10",))
    told = found(results, tests, ["A", "B"], options)
    assert "one-sided" not in results_table(results, tests, ["A", "B"], options, 1).caption
    both = Options(resamples=99, alternative="better", table_metrics=("NDCG@10", "popularity_lift@10"))
    caption = results_table(results, tests, ["A", "B"], both, 1).caption
    assert "one-sided (is the model better?)" in caption and "What is best near zero is tested two-sided." in caption
    assert "one-sided" not in told and ("A is a baseline itself" in told or "not told apart" in told)
    table = significance_table(results, tests, options, 1)
    assert table.rows[0][-1].text == "not told apart" and "(two-sided)" in table.caption


def test_one_user_has_no_test(tmp_path: Path) -> None:
    lines = [Line(n, [record(tmp_path, n, 1, {"ndcg@10": [v]})], []) for n, v in (("A", 0.1), ("B", 0.2))]
    results, options = Results(Setting("toy", None, False, None), lines), Options(resamples=99, test="randomization")
    told = found(results, comparisons(results, ["A"], options), ["A"], options)
    assert "There is no test of B against the baseline A." in told and "nan" not in told


def test_too_few_draws_are_refused() -> None:
    """1 / (99 + 1) times six comparisons is .06."""
    entries = parse_models("Pop,BPR,SASRec,GRU4Rec,EASE,ItemKNN,Random")
    given = {"resamples": 99, "test": "randomization"}
    with pytest.raises(ConfigError, match=r"--resamples=99: with 6 comparisons .* give 120 or more"):
        check_resamples(entries, ["Pop"], Options(**given))
    check_resamples(entries, ["Pop"], Options(**given | {"resamples": 120}))
    check_resamples(entries, ["Pop"], Options(resamples=99))


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


def test_json_says_which_run_another_machine_did(tmp_path: Path) -> None:
    """Versions stand once for all, and at the runs that had others."""
    rows = {"ndcg@10": [0.5, 0.0], "hit@10": [1.0, 0.0]}
    other = {"recbole_llm": "1", "recbole": "1.2.1", "torch": "2+cu130"}
    runs = [record(tmp_path, "A", 1, rows), record(tmp_path, "A", 2, rows, device="cuda", versions=other)]
    results = Results(Setting("toy", None, False, None), [Line("A", runs, [])])
    told = frames.as_json([results], [comparisons(results, ["A"], Options(resamples=9))], 9)[0]
    first, second = told["models"][0]["runs"]
    assert told["versions"]["torch"] == "2" and "versions" not in first and first["device"] == "cpu"
    assert second["versions"] == other and second["device"] == "cuda"


def test_what_trials_trained_is_said_to_be_missing(tmp_path: Path) -> None:
    """No row of the table of costs counts it."""
    stages = [{"loss": "SFT", "run": "run-1", "reused": True}, {"loss": "DPO", "run": "trials/LLMRanker-toy-1"}]
    for stage, missing in zip(stages, (False, True), strict=True):
        run = record(tmp_path, "A", 1, {"ndcg@10": [0.1, 0.2]}, stages=[stage])
        told = costs_table([Results(Setting("toy", None, False, None), [Line("A", [run], [])])]).caption
        assert ("Stages that a trial of the search trained" in told) == missing
