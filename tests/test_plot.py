"""Plots: the numbers behind them by hand, files that are the same each time, nothing clipped, nothing without data."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from recbole_llm.quick_start import run_recbole_llm
from recbole_llm.report import plot_data
from recbole_llm.report.entries import Options
from recbole_llm.report.grid import Setting
from recbole_llm.report.plot import draw, save_plots
from recbole_llm.report.plot_style import MARKERS, Plot, paper_style, short_number, styles, wrapped
from recbole_llm.report.results import Line, Results, collect, user_rows, user_traits
from tests.conftest import random_events, write_events
from tests.made_runs import NOT_GIVEN, made_grid, write_run

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = Options(resamples=99)
LONG = "LLMRanker[loss=RosePO,smoothing=0.1,beta=0.5]"
LABELS = ("Pop", "BPR", "SASRec", "LLMRanker[loss=DMPO]", LONG, "LLMRanker[loss=SDPO,rejected_num=15]")


def of_users(**columns: Sequence[float]) -> pd.DataFrame:
    """Users u0, u1, ... with these values."""
    frame = pd.DataFrame({name.replace("_at_", "@"): values for name, values in columns.items()})
    return frame.set_axis([f"u{n}" for n in range(len(frame))])


def one_setting(home: Path, setting: Setting = NOT_GIVEN, **users: Any) -> Results:
    """Results of models, each given by the frames of its seeds, or by (frame, facts)."""
    lines = []
    for label, seeds in users.items():
        runs = []
        for seed, given in enumerate(seeds):
            frame, facts = given if isinstance(given, tuple) else (given, {})
            folder = home / f"{label}-{seed}-{setting.few_shot}-{setting.mode}"
            runs.append(write_run(folder, frame, **({"seed": seed} | facts)) | {"label": label})
        lines.append(Line(label, runs, []))
    return Results(setting, lines)


def made(home: Path, labels: Sequence[str] = LABELS, settings: Sequence[Setting] = (NOT_GIVEN,), **options: Any) -> Any:
    return collect(*made_grid(home, labels, settings, **options))


def plots_of(every: Sequence[Results]) -> dict[str, Plot]:
    with paper_style():
        return {plot.name: plot for plot in draw(every, QUICK)}


# Numbers


def test_means_and_seeds(tmp_path: Path) -> None:
    """Two seeds of two users; the interval of a model without spread is its mean."""
    first, second = of_users(ndcg_at_10=[0.0, 1.0]), of_users(ndcg_at_10=[0.5, 0.5])
    results = one_setting(tmp_path, A=[first, second], B=[second])
    found = plot_data.metric_means(results, "ndcg@10", 99)
    assert found["model"].tolist() == ["A", "B"] and found["mean"].tolist() == [0.5, 0.5]
    assert found["seeds"].tolist() == [[0.5, 0.5], [0.5]]
    assert found["ci_low"].tolist() == [0.25, 0.5] and found["ci_high"].tolist() == [0.75, 0.5]


def test_no_plot_of_what_users_do_not_have(tmp_path: Path) -> None:
    results = one_setting(tmp_path, A=[of_users(ndcg_at_10=[0.0, 1.0])])
    assert plot_data.has_users(results, "ndcg@10") and not plot_data.has_users(results, "auc_global")
    assert not plot_data.has_users(Results(NOT_GIVEN, [Line("A", [], ["failed"])]), "ndcg@10")


def test_pareto() -> None:
    """(2, 3) beats (3, 3), (3, 1) and (2, 2); equal points stand both; who has no cost stands nowhere."""
    cost = np.array([1, 2, 3, 3, 2, 4, 4, np.nan])
    value = np.array([1, 3, 3, 1, 2, 5, 5, 9])
    assert plot_data.pareto(cost, value).tolist() == [True, True, False, False, False, True, True, False]


@pytest.mark.parametrize(("metric", "front"), [("ndcg@10", ["c", "a"]), ("averagepopularity@10", ["c", "b"])])
def test_front_goes_by_the_direction_of_the_metric(metric: str, front: list[str]) -> None:
    frame = pd.DataFrame({"model": ["a", "b", "c"], "mean": [0.9, 0.1, 0.5], "seconds": [30.0, 20.0, 10.0]})
    assert plot_data.front(frame, "seconds", metric)["model"].tolist() == front


def test_costs_count_a_shared_stage_for_each(tmp_path: Path) -> None:
    users = of_users(ndcg_at_10=[0.0, 1.0])
    sft = {"loss": "SFT", "seconds": 50.0, "cpu_seconds": 70.0}
    whole = {"timings": {"total_s": 90.0, "total_cpu_s": 100.0}, "stages": [sft]}
    part = {"timings": {"total_s": 40.0, "total_cpu_s": 30.0}, "stages": [sft | {"reused": True}, {"loss": "DPO"}]}
    results = one_setting(tmp_path, A=[(users, whole)], B=[(users, part), (users, whole)], C=[(users, {"timings": {}})])
    found = plot_data.costs(results, "ndcg@10", 99, cpu=True).set_index("model")
    assert found["seconds"][["A", "B"]].tolist() == [100, 100] and np.isnan(found["seconds"]["C"])
    assert found["parameters"].tolist() == [1000, 1000, 1000]
    assert plot_data.run_seconds(part, cpu=False) == 90 and plot_data.on_cpu([results])
    read = {"loss": "SDPO", "found": [{"what": "reference", "seconds": 7.0, "cpu_seconds": 6.0}]}
    added = plot_data.run_seconds(part | {"stages": [*part["stages"], read]}, cpu=False)
    assert added == 90 + 7  # what another loss computed
    assert not plot_data.on_cpu([one_setting(tmp_path, D=[(users, {"device": "cuda"})])])


def test_kinds_of_users(tmp_path: Path) -> None:
    """Ten users by their histories: two in each fifth."""
    history = [5, 1, 9, 3, 7, 2, 10, 4, 8, 6]
    ours = of_users(ndcg_at_10=[h / 10 for h in history], history=history)
    results = one_setting(tmp_path, A=[ours], B=[ours.assign(**{"ndcg@10": 0.5})])
    found = plot_data.by_trait(results, "ndcg@10", "history", 99)
    mine = found[found["model"] == "A"]
    assert mine["label"].tolist() == ["1–2", "3–4", "5–6", "7–8", "9–10"] and mine["users"].tolist() == [2] * 5
    assert mine["mean"].tolist() == pytest.approx([0.15, 0.35, 0.55, 0.75, 0.95])
    assert mine["ci_low"].tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    assert set(found.loc[found["model"] == "B", ["mean", "ci_low", "ci_high"]].to_numpy().ravel()) == {0.5}


def test_users_alike_share_a_bin(tmp_path: Path) -> None:
    """Six of ten targets were never trained with: they cannot be told apart, so there are three bins."""
    users = of_users(ndcg_at_10=[1.0] * 6 + [0.0] * 4, target_popularity=[0] * 6 + [1, 2, 3.5, 40])
    results = one_setting(tmp_path, A=[users])
    found = plot_data.by_trait(results, "ndcg@10", "target_popularity", 99)
    assert list(zip(found["label"], found["users"], found["mean"], strict=True)) == [
        ("0", 6, 1.0),
        ("1–2", 2, 0.0),
        ("3.5–40", 2, 0.0),
    ]
    assert plot_data.by_trait(results, "ndcg@10", "history", 99) is None  # a run of an older version
    alike = one_setting(tmp_path, B=[users.assign(history=7)])
    assert plot_data.by_trait(alike, "ndcg@10", "history", 99) is None


def test_lift_at_the_largest_k(tmp_path: Path) -> None:
    users = of_users(ndcg_at_10=[0.0, 1.0], popularity_lift_at_9=[1, 1], popularity_lift_at_10=[0.5, np.nan])
    results = one_setting(tmp_path, A=[users], B=[users.assign(**{"popularity_lift@10": [-1.0, 0.0]})])
    assert plot_data.lift_metric(results) == "popularity_lift@10"
    found = plot_data.lifts(results, "ndcg@10", "popularity_lift@10", 99)
    assert found["model"].tolist() == ["A", "B"] and found["ndcg@10"].tolist() == [0.5, 0.5]
    assert found["popularity_lift@10"].tolist() == [0.5, -0.5]
    assert found["popularity_lift@10 low"].tolist() == [0.5, -1.0]
    assert plot_data.lift_metric(one_setting(tmp_path, C=[of_users(ndcg_at_10=[0.0])])) is None


def test_few_shot_curves(tmp_path: Path) -> None:
    """A curve a mode, all users last and without a number; one size is no curve."""

    def told(few_shot: int | None, mode: str, value: float, given: bool = True) -> tuple[Results, str]:
        facts = {"few_shot": few_shot, "training_users": few_shot, "mode": mode}
        users = of_users(ndcg_at_10=[value, value])
        return one_setting(tmp_path, Setting("toy", few_shot, given, mode), A=[(users, facts)]), "ndcg@10"

    every = [told(50, "uni99", 0.1), told(100, "uni99", 0.2), told(None, "uni99", 0.4), told(50, "full", 0.3)]
    (curve,) = plot_data.few_shot_curves(every, 99)
    assert (curve.dataset, curve.mode, curve.metric) == ("toy", "uni99", "ndcg@10")
    assert curve.points["mean"].tolist() == pytest.approx([0.1, 0.2, 0.4])
    assert curve.points["users"].fillna(-1).tolist() == [50, 100, -1]
    assert plot_data.few_shot_curves([told(7, "low", 0.1, given=False), told(8, "low", 0.2, given=False)], 99) == []


def test_training_curves(tmp_path: Path) -> None:
    """Means over seeds; steps count from 0 in each stage, also where the SFT stage was another run's."""

    def steps(stage: str, key: str, values: Sequence[float], first: int = 0) -> list[dict[str, Any]]:
        return [{"stage": stage, "step": first + n, key: value} for n, value in enumerate(values)]

    users, shift = of_users(ndcg_at_10=[0.0]), "logps/chosen_shift"
    one = {"steps": [*steps("SFT", "loss", [4, 2]), *steps("DPO", shift, [0, -2], first=2)]}
    two = {"steps": steps("DPO", shift, [0, -4])}
    results = one_setting(tmp_path, A=[(users, one), (users, two)], Pop=[users])
    found = plot_data.training(results)
    sft, preference = found[found["stage"] == "SFT"], found[found["stage"] == "preference"]
    assert set(found["model"]) == {"A"} and sft["step"].tolist() == preference["step"].tolist() == [0, 1]
    assert sft["loss"].tolist() == [4, 2] and preference[shift].tolist() == [0, -3]
    assert plot_data.displaced(found) == {"A": -3.0}
    assert plot_data.training(one_setting(tmp_path, B=[users])).empty


@pytest.mark.parametrize(("end", "fallen"), [(-0.05, {}), (0.5, {}), (-0.5, {"A": -0.5})])
def test_what_counts_as_a_fall(end: float, fallen: dict[str, float]) -> None:
    """The last tenth of 20 steps alone: what happened before does not count."""
    steps = pd.DataFrame({"model": "A", "stage": "preference", "logps/chosen_shift": [-9.0] * 18 + [end] * 2})
    assert plot_data.displaced(steps) == pytest.approx(fallen)
    assert plot_data.displaced(steps.assign(stage="SFT")) == {}


def test_what_rows_are_like(toy: dict[str, Any], tmp_path: Path) -> None:
    """History and popularity of the target against the file itself; few-shot moves neither."""
    events = random_events([4 + n % 9 for n in range(45)])
    write_events(tmp_path / "data", events)
    run = run_recbole_llm("Pop", config_dict={**toy, "few_shot": 10})
    by_user: dict[str, list[tuple[float, str]]] = {}
    for user, item, _, time in events:
        by_user.setdefault(user, []).append((time, item))
    items = {user: [item for _, item in sorted(mine)] for user, mine in by_user.items()}
    counts = pd.Series([item for mine in items.values() for item in mine[:-2]]).value_counts()
    traits = user_traits(run)
    assert len(traits) == 45
    for user, mine in items.items():
        assert traits.loc[user].tolist() == [len(mine) - 1, counts.get(mine[-1], 0)]
    assert not {"history", "target_popularity"} & set(user_rows(run))


# Looks


def test_one_look_a_model() -> None:
    looks = styles([*LABELS, *LABELS])
    assert list(looks) == list(LABELS)
    assert len({look.marker for look in looks.values()}) == len({look.hatch for look in looks.values()}) == 6
    many = styles(map(str, range(7 * len(MARKERS)))).values()
    assert len({(look.colour, look.marker) for look in many}) == len(many)


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("SASRec", 10, ["SASRec"]),
        (LONG, 26, ["LLMRanker[loss=RosePO,", "smoothing=0.1,beta=0.5]"]),
        ("a b", 1, ["a", "b"]),
        ("x" * 7, 3, ["xxx", "xxx", "x"]),
        ("two  lines\nare one", 40, ["two lines are one"]),
    ],
)
def test_labels_are_broken_where_they_may_be(text: str, width: int, lines: list[str]) -> None:
    assert wrapped(text, width).split("\n") == lines


def test_short_numbers() -> None:
    assert [short_number(n) for n in (0, 1, 999, 1000, 1500, 2e6, 3e9)] == ["0", "1", "999", "1k", "1.5k", "2M", "3G"]


# Drawn


TWO_MODES = tuple(Setting("toy", few_shot, True, mode) for few_shot in (50, None) for mode in ("uni99", "full"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Plot]:
    """Every plot of six models with long labels in four settings, as saved."""
    home = tmp_path_factory.mktemp("runs")
    every = made(home, settings=TWO_MODES, users=120, failing=["BPR"])
    return {plot.name: plot for plot in save_plots(every, QUICK, home / "plots")}


def test_every_plot_is_there(drawn: dict[str, Plot]) -> None:
    names = ["metric", "few_shot", "cost", "history_length", "item_popularity", "popularity_lift"]
    assert list(drawn) == [*names, "training-1", "training-3"]  # one training for two modes
    assert all(plot.title and plot.caption and plot.alt for plot in drawn.values())
    assert "SASRec 0." in drawn["metric"].alt


def test_nothing_is_clipped_or_covered(drawn: dict[str, Plot]) -> None:
    """All that is drawn lies inside the figure, panels and legend lie apart, and data within their axes."""
    for name, plot in drawn.items():
        figure, pixel = plot.figure, 1.5
        width, height = figure.get_size_inches() * figure.dpi
        for axes in figure.axes:
            low, high = sorted(axes.get_ylim())
            for line in axes.lines:
                if line.get_transform().contains_branch(axes.transData):
                    assert low <= line.get_ydata().min() and line.get_ydata().max() <= high, name
            for segments in axes.collections:
                ends = np.array(segments.get_segments())[:, :, 1]
                assert low <= ends.min() and ends.max() <= high, name
        boxes = [axes.get_tightbbox() for axes in figure.axes] + [box.get_window_extent() for box in figure.legends]
        for box in boxes:
            assert box.x0 > -pixel and box.y0 > -pixel and box.x1 < width + pixel and box.y1 < height + pixel, name
        for i, one in enumerate(boxes):
            for other in boxes[i + 1 :]:
                apart = max(other.x0 - one.x1, one.x0 - other.x1, other.y0 - one.y1, one.y0 - other.y1)
                assert apart > -pixel, f"{name}: {one} {other}"


def test_bars_show_the_means(tmp_path: Path) -> None:
    """Lengths, whiskers, a dot a seed, and a word where nothing finished."""
    every = made(tmp_path, ["Pop", "SASRec", "BPR"], users=50, failing=["BPR"])
    (axes,) = plots_of(every)["metric"].figure.axes
    means = [float(line.users["ndcg@10"].mean()) for line in every[0].finished]
    assert [patch.get_width() for patch in axes.patches] == pytest.approx(means)
    seeds = [line.get_xdata().tolist() for line in axes.lines]
    assert seeds == [pytest.approx([u["ndcg@10"].mean() for u in line.users_by_seed]) for line in every[0].finished]
    texts = [text.get_text() for text in axes.texts]
    assert texts == [*(f"{mean:.3f}" for mean in means), "failed"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Pop", "SASRec", "BPR"]


def test_a_fall_of_the_chosen_is_told(tmp_path: Path) -> None:
    """Only the last of the made-up models falls."""
    plot = plots_of(made(tmp_path, users=30))["training-1"]
    texts = [text.get_text() for axes in plot.figure.axes for text in axes.texts]
    assert texts == ["falls: 1 of 3 models,\nto −0.9 nats"]
    assert "LLMRanker[loss=SDPO,rejected_num=15] -0.9" in plot.caption and LONG not in plot.caption
    rising = plots_of(made(tmp_path / "rising", ["Pop", "BPR", "SASRec", "LLMRanker"], users=30))["training-1"]
    assert not [text for axes in rising.figure.axes for text in axes.texts] and "displacement" not in rising.caption


def test_left_out_without_data(tmp_path: Path) -> None:
    """Runs of an older version, without LLM, in one setting: bars and costs are all there is."""
    results = one_setting(tmp_path, A=[of_users(ndcg_at_10=[0.0, 1.0])], B=[of_users(ndcg_at_10=[1.0, 1.0])])
    assert list(plots_of([results])) == ["metric", "cost"]
    assert list(plots_of([Results(NOT_GIVEN, [Line("A", [], ["failed"])])])) == []


def test_the_same_files_each_time(tmp_path: Path) -> None:
    """Whatever the user has set for his own plots, which stays as it is; no window and no global state."""
    every = made(tmp_path / "runs", ["SASRec", LONG], users=30)
    save_plots(every, QUICK, tmp_path / "one")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "text.usetex": True, "axes.prop_cycle": "cycler('color', ['r'])"}):
        changed = dict(matplotlib.rcParams)
        save_plots(every, QUICK, tmp_path / "two")
        assert dict(matplotlib.rcParams) == changed
    assert dict(matplotlib.rcParams) == before
    names = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert {Path(name).suffix for name in names} == {".png", ".pdf"} and "metric.pdf" in names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    with Image.open(tmp_path / "one" / "metric.png") as image:
        assert image.info["dpi"] == pytest.approx((200, 200), abs=0.1) and image.width == 680


def test_labels_are_text(tmp_path: Path) -> None:
    """Dollars, backslashes, braces and line breaks are no markup, and nothing fails by them."""
    labels = ["$x^{2$", r"a_\frac{$$}", "line\nbreak", "LLMRanker[item_text={title} ($)]"]
    plots = plots_of(made(tmp_path, labels, users=30))
    with paper_style():
        for plot in plots.values():
            plot.figure.draw_without_rendering()
    shown = [label.get_text() for label in plots["metric"].figure.axes[0].get_yticklabels()]
    assert shown[:3] == ["$x^{2$", r"a_\frac{$$}", "line break"]


def test_what_is_not_drawn_any_more_goes(tmp_path: Path) -> None:
    """Plots of a comparison that had more data; files of the user's stay."""
    for name in ("few_shot.png", "training-7.pdf", "mine.png", "few_shot.txt"):
        (tmp_path / "plots").mkdir(exist_ok=True)
        (tmp_path / "plots" / name).touch()
    save_plots([one_setting(tmp_path, A=[of_users(ndcg_at_10=[0.0, 1.0])])], QUICK, tmp_path / "plots")
    names = {file.name for file in (tmp_path / "plots").iterdir()}
    assert names == {"metric.png", "metric.pdf", "cost.png", "cost.pdf", "mine.png", "few_shot.txt"}


def test_runs_do_not_load_matplotlib() -> None:
    told = "import sys, recbole_llm.cli, recbole_llm.quick_start, recbole_llm.report.compare as c; "
    loaded = subprocess.run(
        [sys.executable, "-c", told + "print([m for m in sys.modules if m.startswith('matplotlib')])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert loaded.stdout.strip().splitlines()[-1] == "[]"
