"""The report: one page that asks no server, in which what users typed is text, and a browser finds nothing wrong."""

from __future__ import annotations

import base64
import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest

from recbole_llm.report.compare import write_comparison
from recbole_llm.report.entries import Options
from recbole_llm.report.grid import Setting
from recbole_llm.report.results import Line, Results, collect
from recbole_llm.report.summary import found
from recbole_llm.report.tune import Trial, Tuned
from tests.made_runs import NOT_GIVEN, cell_of, made_grid, made_up, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

EVIL = "<script>alert(1)</script>"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


class Page(HTMLParser):
    """Elements, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        """An attribute of every element of a kind."""
        return [str(attributes[name]) for kind, attributes in self.elements if kind == tag and name in attributes]


def written(home: Path, cells: list[Any], records: list[dict[str, Any]], **options: Any) -> tuple[str, dict[str, Any]]:
    """The report, and what the comparison returns."""
    options = {"out": str(home / "out"), "resamples": 99, **options}
    done = write_comparison(cells, records, [cells[0].entry.label], Options(**options))
    return (home / "out" / "report.html").read_text(encoding="utf-8"), done


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of three models, one of them failed, in two modes; its files are in ``out``."""
    home = tmp_path_factory.mktemp("comparison")
    settings = [Setting("toy", None, False, mode) for mode in ("uni99", "full")]
    labels = ["Pop", "SASRec[n_heads=3]", "BPR", "LLMRanker[loss=DMPO]"]
    written(home, *made_grid(home / "saved", labels, settings, users=60, failing=["SASRec[n_heads=3]"]))
    return home


@pytest.fixture(scope="module")
def text(home: Path) -> str:
    return (home / "out" / "report.html").read_text(encoding="utf-8")


# What is in it


def test_sections(text: str) -> None:
    page = Page(text)
    names = [name for name in page.all("section", "id") if not name.startswith(("results", "tests", "harm", "plot"))]
    assert names == ["summary", "costs", "protocol", "failed", "environment", "runs", "files"]
    assert len(page.all("section", "id")) == len(set(page.all("section", "id")))
    anchors = [link[1:] for link in page.all("a", "href") if link.startswith("#")]
    assert set(anchors) == set(page.all("section", "id"))  # every section can be reached, and no other is named
    for told in (
        "4 models on toy; 2 settings; seeds 1, 2; 16 runs, 4 of them failed.",
        "--n_heads=3: does not divide 8.",
    ):
        assert told in page.text
    for told in ("LS valid_and_test, order TO", "c" * 64, "d" * 64, "paired t-test", "Holm", "NDCG@10", "torch "):
        assert told in page.text


def test_a_run_of_several_settings_is_one(tmp_path: Path) -> None:
    """An entry with training users of its own is the same run in both settings, and told with its own number."""
    settings = [Setting("toy", 50, True, None), Setting("toy", None, True, None)]
    cells, records = made_grid(tmp_path / "saved", ["Pop", "BPR[few_shot=30]"], settings, seeds=(1,), users=10)
    for cell in (cells[1], cells[3]):
        cell.config["few_shot"] = 30
    cells[3].__dict__["folder"] = cells[1].folder
    records[3] = records[1]
    text, _ = written(tmp_path, cells, records, plots=False)
    page = Page(text)
    assert "2 models on toy; 2 settings; seed 1; 3 runs." in page.text
    environment, runs = (
        text.partition(f'<section id="{name}">')[2].partition("</section>")[0] for name in ("environment", "runs")
    )
    assert runs.count("BPR[<wbr>few_shot=30]") == 1 and "30 training users" in runs and runs.count("<tr>") == 4
    assert '<td class="text">3</td>' in environment
    records[1] = records[3] = {k: v for k, v in records[1].items() if k != "run_folder"} | {"error": "no"}
    del records[1]["metrics"]
    text, _ = written(tmp_path, cells, records, plots=False)
    failed = text.partition('<section id="failed">')[2].partition("</section>")[0]
    assert "3 runs, 1 of them failed." in Page(text).text and failed.count("<tr>") == 2


def test_minutes_of_tuning(tmp_path: Path) -> None:
    """Beside the costs of the runs, with a link to it: 3 trials of 80 seconds."""
    cells, records = made_grid(tmp_path / "saved", ["Pop", "BPR"], [NOT_GIVEN], users=10)
    trials = [Trial(number, {"learning_rate": 0.1}, 0.2, 80.0, None) for number in range(3)]
    tuned = Tuned({"learning_rate": 0.1}, 0.2, trials, {"learning_rate": "[0.1, 1]"}, "NDCG@10", True)
    options = Options(out=str(tmp_path / "out"), resamples=99, plots=False)
    write_comparison(cells, records, ["Pop"], options, [("BPR", "toy", tuned)])
    page = Page((tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    assert {"costs", "tuning-costs", "tuned"} <= set(page.all("section", "id"))
    assert {link[1:] for link in page.all("a", "href") if link.startswith("#")} == set(page.all("section", "id"))
    assert re.search(r"Minutes of all trials.*BPR\s*toy\s*3\s*4(\.0*)?(?!\d)", page.text, re.DOTALL)


def test_links_lead_to_what_is_there(home: Path, text: str) -> None:
    """Every run folder, and every file beside the page; all of them relative."""
    links = [link for link in Page(text).all("a", "href") if not link.startswith("#")]
    assert all(not urlsplit(link).scheme and not urlsplit(link).netloc and not link.startswith("/") for link in links)
    found = [(home / "out" / unquote(link)).resolve() for link in links]
    folders = {folder.resolve() for folder in (home / "saved").iterdir()}
    assert len(folders) == 12 and folders <= set(found)
    missing = {path.name for path in found if not path.exists()}
    assert missing == {"run-2", "run-3", "run-10", "run-11"}  # made up as failed, without a folder
    beside = {path.resolve() for path in (home / "out").rglob("*") if path.is_file()}
    assert beside - set(found) == {(home / "out" / "report.html").resolve()}


def test_pictures_are_inside(home: Path, text: str) -> None:
    page = Page(text)
    pictures = page.all("img", "src")
    links = list(dict.fromkeys(link for link in page.all("a", "href") if link.endswith(".png")))
    files = [(home / "out" / link).read_bytes() for link in links]
    assert [base64.b64decode(src.removeprefix("data:image/png;base64,")) for src in pictures] == files
    assert len(pictures) == len(page.all("img", "alt")) == 6 and all(page.all("img", "alt"))


def test_nothing_is_loaded(text: str) -> None:
    page = Page(text)
    assert not {"link", "iframe", "object", "embed", "base", "form"} & {kind for kind, _ in page.elements}
    loaded = [
        value for kind, _ in page.elements for name in ("src", "srcset", "data") for value in page.all(kind, name)
    ]
    assert loaded and all(value.startswith("data:image/png;base64,") for value in loaded)
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert style and "url(" not in style and "@import" not in style
    assert "default-src 'none'" in page.all("meta", "content")[0]


def test_what_others_wrote_is_text(tmp_path: Path) -> None:
    """Labels, names, data sets, errors, versions and folders."""
    label, name = f"Pop[x={EVIL}]", f'"><img src=x onerror="alert(1)">{EVIL}'
    frame, facts = made_up(0, "Pop", NOT_GIVEN, 1, 40)
    facts |= {"dataset": EVIL, "candidate_hash": EVIL, "versions": {"recbole": EVIL}, "valid_metric": f"ndcg@10{EVIL}"}
    folders = [tmp_path / "saved" / name for name in ("a b#c?%22", "<i>run", "javascript:alert(1)", "failed&amp;")]
    records = [write_run(folder, frame, **facts) | {"label": label} for folder in folders[:3]]
    records.append({"label": "BPR", "run_hash": "x", "error": f"wrong: {EVIL}"})
    cells = [cell_of(one, folder) for one, folder in zip([label, "SASRec", "GRU4Rec", "BPR"], folders, strict=True)]
    (folders[0] / "env.json").write_text(json.dumps({"versions": {EVIL: EVIL}, "processor": EVIL}))
    text, _ = written(tmp_path, cells, records, names={"SASRec": name})
    page = Page(text)
    assert [kind for kind, _ in page.elements].count("script") == 1
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert not {"i", "x"} & {kind for kind, _ in page.elements}
    assert all(src.startswith("data:") for src in page.all("img", "src"))
    for told in (label, name, EVIL, f"wrong: {EVIL}", f"Comparison: {EVIL}"):
        assert told in page.text
    links = [unquote(link) for link in page.all("a", "href") if not link.startswith("#") and not urlsplit(link).scheme]
    assert {(tmp_path / "out" / link).resolve() for link in links} >= {folder.resolve() for folder in folders}


def test_what_experiments_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """experiments/kept.py writes the tables of a comparison under other names."""
    spec = importlib.util.spec_from_file_location("kept", Path(__file__).parents[1] / "experiments" / "kept.py")
    kept = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(kept)
    monkeypatch.setattr(kept, "RESULTS", tmp_path)
    cells, records = made_grid(tmp_path, ["A", "B"], [NOT_GIVEN], failing=["B"])
    done = {"runs": records, "results": collect(cells, records)}
    told = kept.keep(done, "table", "mine", names={"A": "first"})
    assert "| first" in told and "Harm" in told and (tmp_path / "mine" / "table.json").is_file()


def test_without_plots(tmp_path: Path) -> None:
    text, done = written(tmp_path, *made_grid(tmp_path / "saved", ["Pop", "BPR"], [NOT_GIVEN], users=30), plots=False)
    assert "<img" not in text and "Plots:" not in text and not (tmp_path / "out" / "plots").exists()
    assert done["files"][-1] == tmp_path / "out" / "report.html" and all(file.is_file() for file in done["files"])


def test_nothing_finished(tmp_path: Path) -> None:
    cells, records = made_grid(tmp_path / "saved", ["Pop", "BPR"], [NOT_GIVEN], users=30, failing=["Pop", "BPR"])
    page = Page(written(tmp_path, cells, records)[0])
    assert "2 models; 1 setting; no seed; 4 runs, 4 of them failed." in page.text and "No run finished." in page.text
    assert "protocol" not in page.all("section", "id") and not page.all("img", "src")


# Sentences


def line(tmp_path: Path, label: str, *values: float) -> Line:
    users = pd.DataFrame({"ndcg@10": values}, index=[f"u{n}" for n in range(len(values))])
    return Line(label, [write_run(tmp_path / label, users)], [])


def row_of(model: str, baseline: str, verdict: str, p: float = 0.04, difference: float = 0.1) -> dict[str, Any]:
    """A row of the tests."""
    span = {"difference": difference, "ci_low": difference - 0.05, "ci_high": difference + 0.05}
    names = {"metric": "ndcg@10", "model": model, "baseline": baseline, "verdict": verdict}
    return names | span | {"p_holm": p, "users": 1200, "detectable": 0.0123}


@pytest.mark.parametrize(
    ("rows", "against", "told"),
    [
        (
            [row_of("B", "A", "better", 0.0001)],
            ["A"],
            "It is significantly better than the baseline A (0.2500): difference +0.1000, 95 % interval [+0.0500, "
            "+0.1500], p < .001 after Holm's correction, 1,200 users.",
        ),
        (
            [row_of("B", "A", "", 0.21)],
            ["A"],
            "It is not told apart from the baseline A (0.2500): difference +0.1000, 95 % interval [+0.0500, +0.1500], "
            "p = .210 after Holm's correction, 1,200 users. A true difference of 0.0123 would be seen in 4 of 5 "
            "such studies at best.",
        ),
        (
            [row_of("A", "B", "worse", 0.01, -0.2), row_of("C", "B", "")],
            ["B"],
            "B is the baseline, and significantly better than 1 of 2 others; not told apart from it: C.",
        ),
        (
            [row_of("A", "B", "worse"), row_of("C", "B", "worse")],
            ["B"],
            "B is the baseline, and significantly better than all 2 others.",
        ),
        ([], ["A"], "There is no test of B against the baseline A."),
        ([], ["B"], "B is the baseline; there is no other to test."),
    ],
)
def test_summary(tmp_path: Path, rows: list[dict[str, Any]], against: list[str], told: str) -> None:
    lines = [line(tmp_path, "A", 0, 0.5), line(tmp_path, "B", 0.5, 0.5), line(tmp_path, "C", 0, 0.25)]
    results = Results(NOT_GIVEN, lines)
    assert found(results, pd.DataFrame(rows), against, Options()) == f"NDCG@10: B is best (0.5000). {told}"


def test_summary_of_two_best_and_two_baselines(tmp_path: Path) -> None:
    """A test between baselines stands once, and is read from both sides."""
    lines = [line(tmp_path, "A", 0, 0.5), line(tmp_path, "B", 0.5, 0.5), line(tmp_path, "C", 1, 0)]
    rows = [row_of("A", "B", "worse", difference=-0.25), row_of("C", "A", ""), row_of("C", "B", "")]
    told = found(Results(NOT_GIVEN, lines), pd.DataFrame(rows), ["B", "A"], Options())
    assert told.startswith(
        "NDCG@10: B and C are best (0.5000). B is the baseline, and significantly better than 1 of 2"
    )
    assert "B is significantly better than the baseline A (0.2500): difference +0.2500, 95 % interval [+0.2000," in told
    assert "C is not told apart from the baseline A (0.2500): difference +0.1000" in told


def test_summary_of_one_sided_tests(tmp_path: Path) -> None:
    """What was not asked is not told as an answer."""
    results = Results(NOT_GIVEN, [line(tmp_path, "A", 0, 0.5), line(tmp_path, "B", 0.5, 0.5)])
    options = Options(alternative="better")
    told = found(results, pd.DataFrame([row_of("A", "B", "", 0.9, -0.25)]), ["B"], options)
    assert told.endswith("B is the baseline; the tests are one-sided, and do not ask whether it is better than others.")
    told = found(results, pd.DataFrame([row_of("B", "A", "", 0.2)]), ["A"], options)
    assert "It is not significantly better than the baseline A" in told
    rows = pd.DataFrame([row_of("B", "A", "better"), row_of("A", "B", "", 0.9, -0.25)])
    told = found(results, rows, ["A", "B"], options)
    assert "It is significantly better than the baseline A" in told and told.endswith("B is a baseline itself.")
    told = found(results, rows[:1], ["A", "B"], Options())  # two-sided they are compared once
    assert told.endswith("B is a baseline itself.")


def test_summary_of_a_metric_without_a_best(tmp_path: Path) -> None:
    users = pd.DataFrame({"hallucination_base": [0.1, 0.2]}, index=["u1", "u2"])
    results = Results(NOT_GIVEN, [Line("A", [write_run(tmp_path / "A", users)], [])])
    told = found(results, pd.DataFrame(), ["A"], Options(table_metrics=("hallucination_base",)))
    assert told == "hallucination_base says nothing about which model is best."
    assert found(results, pd.DataFrame(), ["A"], Options()) == "The finished runs share no metric of the table."


# In a browser


def browse(file: Path, profile: Path, *words: str) -> tuple[str, str]:
    """What headless Chromium prints and logs of a page; no name resolves."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--disable-background-networking"]
    command += ["--disable-component-update", "--no-first-run", "--virtual-time-budget=2000", *words, file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr


def with_body(text: str, more: str, file: Path) -> Path:
    """The page with more at its end."""
    file.write_text(text.replace("</body>", more + "</body>"), encoding="utf-8")
    return file


def requests(log: Path) -> set[str]:
    """Addresses that a page asked for, by Chromium's log of the network; the browser's own have no origin."""
    events = [event.get("params", {}) for event in json.loads(log.read_text(encoding="utf-8"))["events"]]
    return {told["url"] for told in events if told.get("initiator", "not an origin") != "not an origin"}


@in_a_browser
def test_no_error_and_no_request(text: str, tmp_path: Path) -> None:
    """A picture from elsewhere would be refused, and the console says so; without the policy it would be asked for."""
    page = with_body(text, "", tmp_path / "page.html")
    dom, console = browse(page, tmp_path / "one", "--dump-dom", f"--log-net-log={tmp_path / 'one.json'}")
    assert 'id="summary"' in dom and "CONSOLE" not in console
    elsewhere = '<img src="http://pictures.example/x.png">'
    refused = with_body(text, elsewhere, tmp_path / "refused.html")
    assert "Content Security Policy" in browse(refused, tmp_path / "two", "--dump-dom")[1]
    asked = with_body(text.replace("Content-Security-Policy", "x"), elsewhere, tmp_path / "asked.html")
    browse(asked, tmp_path / "three", "--dump-dom", f"--log-net-log={tmp_path / 'three.json'}")
    assert requests(tmp_path / "three.json") == {"http://pictures.example/x.png"}
    assert requests(tmp_path / "one.json") == set()


@in_a_browser
def test_a_click_on_a_head_sorts(text: str, tmp_path: Path) -> None:
    """Once downwards, twice upwards; a failed model has no number and stays last."""

    def order(clicks: int) -> list[str]:
        click = 'document.querySelector("#results-1 thead th:last-child button").click();' * clicks
        page = with_body(text, f"<script>{click}</script>", tmp_path / f"{clicks}.html")
        dom, _ = browse(page, tmp_path / "profile", "--dump-dom")
        rows = dom.partition('id="results-1"')[2].partition("<tbody>")[2].partition("</tbody>")[0].split("</tr>")
        return [Page(row.partition("</td>")[0]).text.partition("[")[0].partition(" ")[0] for row in rows[:-1]]

    assert order(0) == ["Pop", "SASRec", "BPR", "LLMRanker"]
    assert order(1) == ["LLMRanker", "BPR", "Pop", "SASRec"]
    assert order(2) == ["Pop", "BPR", "LLMRanker", "SASRec"]


@in_a_browser
def test_pictures_show(text: str, tmp_path: Path) -> None:
    """Every inlined plot is one that the browser can draw."""
    told = "document.title=[...document.images].map(i=>i.complete&&i.naturalWidth>300).join()"
    page = with_body(text, f"<script>onload=()=>{{{told}}}</script>", tmp_path / "page.html")
    dom, _ = browse(page, tmp_path / "profile", "--dump-dom")
    assert f"<title>{','.join(['true'] * 6)}</title>" in dom
