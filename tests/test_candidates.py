"""Candidates: frozen, one set for every model, drawn without regard to the answer; and what a model sees."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from scipy.stats import chisquare

from recbole_llm.data.candidates import EvalRows
from recbole_llm.data.protocol import Protocol
from recbole_llm.errors import UserError
from recbole_llm.model import model_class
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import Event, prepared, random_events, started, write_dataset, write_events

SMALL_SASREC = {"hidden_size": 8, "inner_size": 8, "n_layers": 1, "n_heads": 1}
pytestmark = pytest.mark.usefixtures("one_thread")
ALIKE = 1e-4  # p-value under which an honest draw of fixed seed would be too unlikely


def candidates_of(rows: EvalRows) -> dict[str, list[str]]:
    """Candidates of each user in the order in which models get them, by token."""
    return {str(r["user"]): list(r["candidates"]) for r in rows.records()}


def histories(events: list[Event]) -> dict[str, list[str]]:
    """Items of each user by time."""
    found: dict[str, list[str]] = {}
    for user, item, _, _ in sorted(events, key=lambda e: e[3]):
        found.setdefault(user, []).append(item)
    return found


def with_mode(settings: dict[str, Any], mode: str, **split: Any) -> dict[str, Any]:
    return {**settings, "eval_args": {**split, "mode": mode}}


# The draw


@pytest.mark.parametrize("mode", ["uni1", "uni19", "pop9"])
@pytest.mark.parametrize("split", [{"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}], ids=["row", "rows"])
def test_candidates_are_distinct_and_unseen(
    toy: dict[str, Any], tmp_path: Path, mode: str, split: dict[str, Any]
) -> None:
    """N items never met by the user, before or after the row, and the target once."""
    events = random_events([4 + n % 12 for n in range(60)])
    write_events(tmp_path / "data", events)
    _, protocol = prepared(with_mode(toy, mode, split=split), "SASRec")
    met = {user: set(items) for user, items in histories(events).items()}
    for rows in (protocol.valid, protocol.test):
        assert len(rows) >= 60 and rows.candidates.shape == (len(rows), int(mode[3:]) + 1)
        for record in rows.records():
            candidates = record["candidates"]
            assert len(set(candidates)) == len(candidates)
            assert met[record["user"]] & set(candidates) == {record["target"]}
    # Rows of one user, and the two splits, draw anew.
    drawn = Counter(
        (record["user"], frozenset(record["candidates"]) - {record["target"]})
        for rows in (protocol.valid, protocol.test)
        for record in rows.records()
    )
    assert mode == "uni1" or max(drawn.values()) == 1


def test_same_for_every_model_and_run(toy: dict[str, Any]) -> None:
    """Models, their order and epochs, and moved global generators, change no candidate, nor its place."""
    runs = [("SASRec", 1), ("Pop", 1), ("BPR", 3), ("GRU4Rec", 1), ("BPR", 1), ("SASRec", 2)]
    files = set()
    for number, (model, epochs) in enumerate(runs):
        random.seed(number), np.random.seed(number), torch.manual_seed(number)
        small = SMALL_SASREC if model == "SASRec" else {}
        result = run_recbole_llm(model, config_dict={**toy, **small, "epochs": epochs, "seed": number})
        folder = Path(result["run_folder"])
        record = json.loads((folder / "result.json").read_text())
        saved = tuple((folder / f"candidates-{split}.jsonl.gz").read_bytes() for split in ("valid", "test"))
        files.add((result["candidate_hash"], record["valid_candidate_hash"], *saved))
    assert len(files) == 1
    _, other = prepared(toy, "Pop", candidate_seed=1)
    assert other.candidate_hash not in {f[0] for f in files}


def test_same_in_another_process(toy: dict[str, Any]) -> None:
    """Nothing hangs on Python's salted hashes."""
    program = (
        "import json, sys\n"
        "from recbole_llm.config import LLMConfig\n"
        "from recbole_llm.data.protocol import prepare_data\n"
        "p = prepare_data(LLMConfig('GRU4Rec', config_dict=json.loads(sys.argv[1])))\n"
        "print(p.valid.digest, p.test.digest, p.test.item_tokens[p.test.candidates].tolist())"
    )
    # From the temporary folder of the run, with our own tree importable there.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-c", program, json.dumps(toy)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    _, protocol = prepared(toy, "BPR")
    rows = protocol.test.item_tokens[protocol.test.candidates].tolist()
    assert done.stdout.splitlines()[-1] == f"{protocol.valid.digest} {protocol.test.digest} {rows}"


def test_file_order_moves_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    """RecBole numbers users and items as they appear in the file; candidates go by their names."""
    events = random_events([8] * 30)
    write_events(tmp_path / "data", events)
    _, forward = prepared(toy, "BPR")
    write_events(tmp_path / "data", events[::-1])
    _, backward = prepared(toy, "BPR")
    assert forward.test.item_tokens.tolist() != backward.test.item_tokens.tolist()
    assert candidates_of(forward.test) == candidates_of(backward.test)


def test_target_is_at_no_place_in_particular(toy: dict[str, Any], tmp_path: Path) -> None:
    """400 rows: each of the 10 places holds the target about as often, for popular and rare targets alike."""
    write_events(tmp_path / "data", random_events([6] * 400))
    _, protocol = prepared(toy, "Pop")
    rows = protocol.test
    place = (rows.candidates == rows.targets[:, None]).argmax(1)
    assert chisquare(np.bincount(place, minlength=10)).pvalue > ALIKE
    early = rows.targets <= np.median(rows.targets)  # RecBole's low ids
    spread = np.sqrt(99 / 12) * np.sqrt(1 / early.sum() + 1 / (~early).sum())
    assert abs(place[early].mean() - place[~early].mean()) < 4 * spread
    # The other candidates' order tells nothing either: their ids do not rise or fall along the row.
    along = np.corrcoef(np.tile(np.arange(10), 400), rows.candidates.reshape(-1))[0, 1]
    assert abs(along) < 4 / np.sqrt(4000)


@pytest.mark.parametrize("mode", ["uni9", "pop9"])
def test_draw_does_not_look_at_the_target(toy: dict[str, Any], tmp_path: Path, mode: str) -> None:
    """Another last item, and the user's candidates stay as they were, each in its place; so do other users'.

    Where the new target was a candidate or the old one becomes one, a single item makes room.
    """
    write_events(tmp_path / "data", events := random_events([6] * 40))
    _, before = prepared(with_mode(toy, mode), "Pop")
    old, met, untouched = candidates_of(before.test), histories(events), 0
    items = {e[1] for e in events}
    for number in range(12):
        user, target = f"u{number}", met[f"u{number}"][-1]
        drawn = set(old[user]) - {target}
        # A new target that was drawn for this user, and ones that were not.
        swapped = min(drawn) if number % 4 == 0 else sorted(items - drawn - set(met[user]))[number]
        changed = [(u, swapped if (u, i) == (user, target) else i, r, t) for u, i, r, t in events]
        assert {e[1] for e in changed} == items
        write_events(tmp_path / "data", changed)
        _, after = prepared(with_mode(toy, mode), "Pop")
        new = candidates_of(after.test)
        assert {u: c for u, c in new.items() if u != user} == {u: c for u, c in old.items() if u != user}
        assert new[user].index(swapped) == old[user].index(target)
        asked = set(new[user]) - {swapped}
        if swapped in drawn:
            assert drawn - asked == {swapped} and len(asked - drawn) == 1
        elif target in asked:
            assert asked - drawn == {target} and len(drawn - asked) == 1
        else:
            untouched += 1
            assert [c for c in new[user] if c != swapped] == [c for c in old[user] if c != target]
        assert after.candidate_hash != before.candidate_hash
    assert untouched >= 5


def popularity_events() -> list[Event]:
    """``warm`` validates and ``hot`` tests 60 users and neither trains; ``a``, ``b``, ``c`` train 90, 20, 10.

    600 probing users meet four items that only they meet.
    """
    events: list[Event] = []
    for user in range(60):
        items = ["a", "b" if user < 20 else "c" if user < 30 else "a", "warm", "hot"]
        events += [(f"f{user}", item, 3.0, float(time)) for time, item in enumerate(items)]
    return events + [(f"p{user}", f"own{n}", 3.0, float(n)) for user in range(600) for n in range(4)]


def test_pop_draws_by_training_popularity(toy: dict[str, Any], tmp_path: Path) -> None:
    """In proportion to training interactions; what is popular in held-out ones alone is never drawn."""
    write_events(tmp_path / "data", popularity_events())
    for few_shot in (None, 30):  # fewer training users must not move what is asked
        _, protocol = prepared(with_mode(toy, "pop1"), "Pop", few_shot=few_shot)
        for rows in (protocol.valid, protocol.test):
            drawn = Counter(
                c for r in rows.records() for c in r["candidates"] if r["user"].startswith("p") and c != r["target"]
            )
            assert drawn.total() == 600 and set(drawn) == {"a", "b", "c"}
            expected = 600 * np.array([90, 20, 10]) / 120
            assert chisquare([drawn["a"], drawn["b"], drawn["c"]], expected).pvalue > ALIKE


def test_pop_draws_without_replacement(toy: dict[str, Any], tmp_path: Path) -> None:
    """Two of three, one after the other: the chance of {b, c} is 2/12 * 1/10 + 1/12 * 2/11."""
    write_events(tmp_path / "data", popularity_events())
    _, protocol = prepared(with_mode(toy, "pop2"), "Pop")
    drawn = Counter(
        frozenset(c for c in r["candidates"] if c != r["target"])
        for r in protocol.test.records()
        if r["user"].startswith("p")
    )
    weight = {"a": 9 / 12, "b": 2 / 12, "c": 1 / 12}
    chance = {
        pair: sum(weight[x] * weight[y] / (1 - weight[x]) for x, y in (pair, pair[::-1]))
        for pair in (("a", "b"), ("a", "c"), ("b", "c"))
    }
    assert sum(chance.values()) == pytest.approx(1)
    assert chisquare([drawn[frozenset(p)] for p in chance], [600 * c for c in chance.values()]).pvalue > ALIKE


def test_uniform_draws_uniformly(toy: dict[str, Any], tmp_path: Path) -> None:
    write_events(tmp_path / "data", random_events([4] * 500, items=20))
    _, protocol = prepared(with_mode(toy, "uni4"), "Pop")
    rows = protocol.test
    negatives = rows.candidates[rows.candidates != rows.targets[:, None]]
    unseen = np.ones((len(rows), 21))
    unseen[:, 0] = 0
    for row, user in enumerate(rows.users):
        unseen[row, protocol.events.items_of(user)] = 0
    expected = (unseen / unseen.sum(1, keepdims=True)).sum(0)[1:] * 4
    assert chisquare(np.bincount(negatives, minlength=21)[1:], expected).pvalue > ALIKE


@pytest.mark.parametrize("mode", ["uni55", "pop55"])
def test_more_than_there_are_is_told(toy: dict[str, Any], tmp_path: Path, mode: str) -> None:
    """60 items less the user's 6 leave 54."""
    write_events(tmp_path / "data", random_events([6] * 100))
    prepared(with_mode(toy, f"{mode[:3]}54"), "Pop")
    with pytest.raises(UserError, match=f"mode {mode} needs 55 items .* there are 54"):
        prepared(with_mode(toy, mode), "Pop")


def test_the_number_that_is_advised_does_for_all(toy: dict[str, Any], tmp_path: Path) -> None:
    """The first user may have more items left than a later one."""
    write_events(tmp_path / "data", random_events([6] * 99 + [9]))
    with pytest.raises(UserError, match="Use mode uni51 or less"):
        prepared(with_mode(toy, "uni55"), "Pop")
    prepared(with_mode(toy, "uni51"), "Pop")


def test_saved_candidates_read_back(toy: dict[str, Any], tmp_path: Path) -> None:
    config, protocol = prepared(toy, "Pop")
    for number in (1, 2):
        protocol.test.save(tmp_path / f"{number}.jsonl.gz")
    with gzip.open(tmp_path / "1.jsonl.gz", "rt", encoding="utf-8") as lines:
        assert [json.loads(line) for line in lines] == list(protocol.test.records())
    assert (tmp_path / "1.jsonl.gz").read_bytes() == (tmp_path / "2.jsonl.gz").read_bytes()


def test_hash_tells_what_is_asked(toy: dict[str, Any], tmp_path: Path) -> None:
    """Targets, candidates and the masking rule move it; ratings, which no row holds, do not."""
    events = random_events([6] * 40)

    def digest(rows: list[Event], **changes: Any) -> str:
        write_events(tmp_path / "data", rows)
        return prepared({**toy, **changes}, "Pop")[1].candidate_hash

    first = digest(events)
    assert digest([(u, i, 1.0, t) for u, i, _, t in events]) == first
    swapped = [(u, i, r, -t) for u, i, r, t in events]  # other targets of the same items
    full = {"eval_args": {"mode": "full"}}
    changes = [
        {"candidate_seed": 9},
        {"eval_users": 20},
        {"eval_args": {"mode": "uni8"}},
        full,
        {**full, "mask_history": False},
    ]
    found = [first, digest(swapped), digest(events[:-6]), *(digest(events, **change) for change in changes)]
    assert len(set(found)) == len(found)


def test_eval_users_are_shared(toy: dict[str, Any], tmp_path: Path) -> None:
    """One sample for validation, test and every model; its candidates are those of a whole evaluation."""
    write_events(tmp_path / "data", random_events([3, 4, 5, 6] * 15))  # three events: no validation row
    _, whole = prepared(toy, "BPR")
    _, general = prepared(toy, "BPR", eval_users=15)
    _, sequential = prepared(toy, "SASRec", eval_users=15)
    drawn = candidates_of(general.test)
    valid = candidates_of(general.valid)
    assert len(drawn) == len(valid) == 15
    assert {user for user in drawn if user in candidates_of(whole.valid)} < valid.keys()
    assert general.candidate_hash == sequential.candidate_hash
    assert drawn == {user: c for user, c in candidates_of(whole.test).items() if user in drawn}
    _, other = prepared(toy, "BPR", eval_users=15, candidate_seed=5)
    assert candidates_of(other.test).keys() != drawn.keys()


# What a model sees


class Spy(SequentialRecommender):
    """Keeps what it is handed, and scores by a rule that each test sets."""

    pairwise = True
    rule: Any = staticmethod(lambda interaction: torch.zeros(len(interaction)))

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.handed: list[Interaction] = []

    def predict(self, interaction: Interaction) -> torch.Tensor:
        self.handed.append(interaction)
        return type(self).rule(interaction)

    def full_sort_predict(self, interaction: Interaction) -> torch.Tensor:
        if self.pairwise:
            raise NotImplementedError
        self.handed.append(interaction)
        return torch.zeros(len(interaction), self.n_items)


def spy(settings: dict[str, Any], **attributes: Any) -> tuple[Any, dict[str, float], Protocol]:
    """A spy evaluated on the test rows, and its result."""
    config, protocol = prepared(settings, "SASRec")
    trainer = started(config, protocol, type("Spy", (Spy,), attributes))
    return trainer, trainer.evaluate(protocol.test, load_best_model=False), protocol


def write_telling_data(folder: Path) -> dict[str, Any]:
    """Every interaction has values of its own, so that a leak shows by its value.

    ``note`` and ``wish_list`` are columns of an interaction; the latter only has a history's name.
    """
    events = random_events([8] * 40)
    columns = (
        "user_id:token",
        "item_id:token",
        "rating:float",
        "timestamp:float",
        "note:token_seq",
        "wish_list:token",
        "label:float",
    )
    lines = [
        f"{u}\t{i}\t{10_000 + n}\t{20_000 + t}\tword{n} {i}\twish{n}\t{30_000 + n}"
        for n, (u, i, _, t) in enumerate(events)
    ]
    (folder / "toy").mkdir(parents=True, exist_ok=True)
    (folder / "toy" / "toy.inter").write_text("\n".join(["\t".join(columns), *lines]) + "\n")
    items = [f"i{n}\ttitle{n} of item" for n in range(60)]
    (folder / "toy" / "toy.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *items]) + "\n")
    users = [f"u{n}\tjob{n}" for n in range(40)]
    (folder / "toy" / "toy.user").write_text("\n".join(["user_id:token\tjob:token", *users]) + "\n")
    return {
        "load_col": {
            "inter": ["user_id", "item_id", "rating", "timestamp", "note", "wish_list", "label"],
            "item": ["item_id", "title"],
            "user": ["user_id", "job"],
        }
    }


@pytest.mark.parametrize("mode", ["uni9", "full"])
@pytest.mark.parametrize("pairwise", [True, False])
def test_models_see_nothing_of_the_target(toy: dict[str, Any], tmp_path: Path, mode: str, pairwise: bool) -> None:
    """No label, rating, time, text or id of the target, in no field that a model is handed."""
    settings = {**with_mode(toy, mode), **write_telling_data(tmp_path / "data")}
    trainer, _, protocol = spy(settings, pairwise=pairwise)
    whole, rows = protocol.dataset, protocol.test
    seen = {
        "user_id",
        "job",
        "item_length",
        "item_id_list",
        "rating_list",
        "timestamp_list",
        "note_list",
        "wish_list_list",
        "label_list",
    }
    assert set(rows.visible.columns) == seen
    handed = trainer.model.handed
    assert sum(map(len, handed)) == len(rows) * (1 if not pairwise else 10 if mode == "uni9" else 61)
    # The target's own values, from the plain table of interactions.
    parts = whole.build()
    test = parts[2].inter_feat
    order = {int(u): n for n, u in enumerate(test["user_id"])}
    for interaction in handed:
        assert set(interaction.columns) == seen | ({"item_id", "title"} if pairwise else set())
        for field in ("rating", "timestamp", "label", "note", "wish_list", "item_id"):
            history = interaction[f"{field}_list"].reshape(len(interaction), -1)
            own = [order[int(user)] for user in interaction["user_id"]]
            target = test[field][own].reshape(len(interaction), -1)
            # `note` shares a word with the item's other notes, never the first, its own.
            assert not (history == target[:, :1]).any(), field
        if pairwise:  # an item's title comes with each candidate alike
            titles = whole.item_feat["title"][interaction["item_id"]]
            assert torch.equal(interaction["title"], titles)


def test_cheating_by_value_gains_nothing(toy: dict[str, Any], tmp_path: Path) -> None:
    """A model that looks for the candidate anywhere else in its row finds no target: all tie, at chance."""

    def rule(interaction: Interaction) -> torch.Tensor:
        hits = torch.zeros(len(interaction))
        for field in interaction.columns:
            if field not in other_vocabularies:
                hits += (interaction[field] == interaction["item_id"][:, None]).any(1)
        return hits

    other_vocabularies = ("item_id", "user_id", "item_length", "job", "title", "note_list", "wish_list_list")

    settings = {**toy, **write_telling_data(tmp_path / "data"), "metric_decimal_place": 9}
    _, result, _ = spy(settings, rule=staticmethod(rule))
    assert result["hit@1"] == pytest.approx(0.1)


@pytest.mark.parametrize("descending", [True, False])
def test_cheating_by_place_gains_nothing(toy: dict[str, Any], tmp_path: Path, descending: bool) -> None:
    """RecBole puts the target first of a user's rows; here the first, or the last, is right one in ten."""
    write_events(tmp_path / "data", random_events([6] * 400))

    def rule(interaction: Interaction) -> torch.Tensor:
        place = torch.arange(len(interaction)).float()
        return -place if descending else place

    _, result, protocol = spy({**toy, "metrics": ["Hit", "NDCG", "GAUC"]}, rule=staticmethod(rule))
    assert len(protocol.test) == 400
    assert abs(result["hit@1"] - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 400)
    assert abs(result["gauc"] - 0.5) < 4 * np.sqrt(99 / 12) / 9 / np.sqrt(400)


def test_a_real_model_is_handed_no_target(toy: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """SASRec ranks by one pass over all items, no target in sight; the scores are those of ``predict``."""
    handed: list[Interaction] = []
    sasrec = model_class("SASRec")  # an import would leave torch's anomaly detection on for all tests
    honest = sasrec.full_sort_predict
    monkeypatch.setattr(sasrec, "full_sort_predict", lambda self, x: handed.append(x) or honest(self, x))
    config, protocol = prepared({**toy, **SMALL_SASREC}, "SASRec")
    trainer = started(config, protocol)
    trainer.model.eval()
    rows = protocol.test
    with torch.no_grad():
        fast, items = trainer.score_rows(rows, np.arange(len(rows)))
        slow = trainer._predict(rows.visible, items)
    torch.testing.assert_close(fast, slow)
    (interaction,) = handed
    histories_alone = {"user_id", "item_length", "item_id_list", "rating_list", "timestamp_list"}
    assert set(interaction.columns) == histories_alone
    assert not (interaction["item_id_list"] == torch.as_tensor(rows.targets)[:, None]).any()


def test_toy_users_meet_no_item_twice(tmp_path: Path) -> None:
    """What the tests above rest on."""
    write_dataset(tmp_path)
    lines = (tmp_path / "toy" / "toy.inter").read_text().splitlines()[1:]
    pairs = [tuple(line.split("\t")[:2]) for line in lines]
    assert len(set(pairs)) == len(pairs) == 40 * 12


def test_repeated_targets_are_counted(toy: dict[str, Any], tmp_path: Path) -> None:
    """One that the user met before is the only answer of the history; who reads a result has to know."""
    assert prepared(toy, "Pop")[1].test.repeated() == 0
    file = tmp_path / "data" / "toy" / "toy.inter"
    header, *lines = file.read_text().splitlines()
    user, first, *_ = lines[0].split("\t")
    last = max((line.split("\t") for line in lines if line.split("\t")[0] == user), key=lambda event: float(event[3]))
    again = "\t".join([user, first, last[2], str(float(last[3]) + 1)])
    file.write_text("\n".join([header, *lines, again]) + "\n")
    assert prepared(toy, "Pop")[1].test.repeated() == 1
