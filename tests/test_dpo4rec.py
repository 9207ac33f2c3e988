"""DPO4Rec's recommender and its data: who reads what, nothing leaks, the text moves the ranking."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.utils import init_seed

from recbole_llm.data.dataset import POSITION
from recbole_llm.data.protocol import Protocol
from recbole_llm.dpo4rec.iterations import best_iteration, fell
from recbole_llm.dpo4rec.loop import DPO4RecTrainer
from recbole_llm.dpo4rec.places import Places, check_placebo, draw_places, train_rows_of, trained_rows, training_loader
from recbole_llm.dpo4rec.work import Work, others_in_place
from recbole_llm.errors import ConfigError, UserError
from recbole_llm.llm.sampling import Sampling, Written
from recbole_llm.quick_start import run_recbole_llm
from tests.conftest import ANIMALS, COLOURS, accuracy, prepared, toy_settings, write_dataset, write_events

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL: dict[str, Any] = {
    "llm": "tiny",
    "text_encoder": "llm",
    "pair_users": 10,
    "text_positions": 4,
    "reward_positions": 2,
    "samples": 3,
    "reasoning_tokens": 10,
    "reward_gap": 0.0,
    "adaptor_hidden": 8,
    "generation_batch": 12,
}


@pytest.fixture
def small(toy: dict[str, Any]) -> dict[str, Any]:
    """Settings of a run of DPO4Rec on the made-up data with the random LLM."""
    return {**toy, **SMALL}


def trainer_of(settings: dict[str, Any], **changes: Any) -> tuple[DPO4RecTrainer, Protocol]:
    """A trainer that is ready to run its stages."""
    config, protocol = prepared(settings, "DPO4Rec", **changes)
    init_seed(config["seed"], True)
    trainer = DPO4RecTrainer(config, config.model_class(config, protocol.train_data._dataset))
    folder = Path(config["checkpoint_dir"]) / "by-hand"
    folder.mkdir(parents=True, exist_ok=True)
    trainer.start(protocol, folder)
    return trainer, protocol


@pytest.mark.parametrize(
    ("scores", "bigger", "falls", "kept"),
    [
        ([0.3], True, False, 0),
        ([0.3, 0.4], True, False, 1),
        ([0.4, 0.3], True, True, 0),
        ([0.4, 0.3], False, False, 1),
        ([0.3, 0.4], False, True, 0),
        ([0.3, 0.3], True, False, 0),
        ([0.3, 0.5, 0.4], True, True, 1),
        ([None, None], True, False, 1),
        ([None], False, False, 0),
    ],
)
def test_iterations(scores: list[float | None], bigger: bool, falls: bool, kept: int) -> None:
    assert fell(scores, bigger) is falls and best_iteration(scores, bigger) == kept


# ---- places


def test_places(small: dict[str, Any]) -> None:
    """Readers and pair users are different training users; asked users are told of all training items."""
    config, protocol = prepared(small, "DPO4Rec", text_users=20)
    places = draw_places(config, protocol)
    assert (len(places.readers), len(places.pairs), len(places.asked)) == (20, 10, 40)
    assert not set(places.readers) & set(places.pairs)
    ends = protocol.train_ends
    assert all(known == ends[u] - 4 for u, known in places.readers.items())
    assert all(known == ends[u] - 2 for u, known in places.pairs.items())
    assert all(known == ends[u] for u, known in places.asked.items())
    assert places == draw_places(config, protocol)
    assert draw_places(*prepared(small, "DPO4Rec", few_shot_seed=3)).pairs != places.pairs


def test_few_users(small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--pair_users=50: only 40 training users"):
        draw_places(*prepared(small, "DPO4Rec", pair_users=50))
    with pytest.raises(UserError, match=r"--text_users=None, --pair_users=40: .* leave 0"):
        draw_places(*prepared(small, "DPO4Rec", pair_users=40))
    with pytest.raises(UserError, match=r"--text_users=35, --pair_users=10: .* leave 30"):
        draw_places(*prepared(small, "DPO4Rec", text_users=35))


def test_labels_that_judge_train_nothing() -> None:
    """Of user 2, whose texts know 3 items, positions 3 and on are labels."""
    places = Places({1: 2}, {2: 3}, {})
    users, positions = np.array([1, 1, 2, 2, 2, 3]), np.array([1, 5, 2, 3, 4, 9])
    assert trained_rows(places, users, positions).tolist() == [True, True, True, False, False, True]


def test_planted_labels_stay_out(small: dict[str, Any], tmp_path: Path) -> None:
    """Every user's last four events (labels that judge, validation, test) are of items that stand nowhere else: of a
    pair user's they are in no training row and no prompt; of others the two labels train, but are in no prompt read."""
    rng = np.random.default_rng(0)
    events = []
    for user in range(40):
        order = [*rng.choice(30, 8, replace=False), *rng.choice(np.arange(30, 60), 4, replace=False)]
        events += [(f"u{user}", f"i{item}", 5.0, float(100 * t + user)) for t, item in enumerate(order)]
    write_events(tmp_path / "data", events)
    trainer, protocol = trainer_of(small)
    rows = training_loader(trainer.config, trainer.protocol, trainer.places)._dataset.inter_feat
    pairs = trainer.places.pairs
    trained = set(zip(rows["user_id"].tolist(), rows[POSITION].tolist(), strict=True))
    lists = trainer.work.judge(trainer.model, pairs).lists
    for one in lists:
        known, end = pairs[one.user], protocol.train_ends[one.user]
        labels = set(protocol.events.items_of(one.user)[known:end])
        assert set(one.items[one.relevant]) == labels
        assert not {(one.user, p) for p in range(known, end)} & trained
        assert (one.user, known - 1) in trained  # earlier rows do train
        assert not labels & set(one.history)
    everyone = train_rows_of(protocol)
    assert len(rows) == len(everyone[0]) - 2 * len(pairs)
    tokens = protocol.dataset.field2id_token["item_id"]
    late = {i for i in range(1, len(tokens)) if int(tokens[i][1:]) >= 30}
    users, targets = rows["user_id"].numpy(), rows["item_id"].numpy()
    of_pairs = np.isin(users, list(pairs))
    assert not set(targets[of_pairs]) & late
    assert set(targets[~of_pairs]) & late
    titles, judged = trainer.work.question.lines, list(pairs.items())
    for asked, (user, known) in zip(trainer.work.asked(judged), judged, strict=True):
        told = trainer.work.reasoner.llm.tokenizer.decode(asked.prompt)
        assert all(titles[i] in told for i in protocol.events.items_of(user)[:known])
        assert not any(titles[i] in told for i in late)
    places = trainer.places.written()
    for asked, (user, known) in zip(trainer.work.asked(places), places, strict=True):
        told = trainer.work.reasoner.llm.tokenizer.decode(asked.prompt)
        mine = protocol.events.items_of(user)
        assert all(titles[i] in told for i in mine[:known])
        assert not any(titles[i] in told for i in mine[known:])


# ---- the recommender


def batch_of(trainer: DPO4RecTrainer) -> Interaction:
    return next(iter(training_loader(trainer.config, trainer.protocol, trainer.places)))


def read_random_texts(trainer: DPO4RecTrainer) -> None:
    rng, width = np.random.default_rng(0), trainer.model.item_vectors.shape[1]
    draw = {u: rng.normal(size=width).astype(np.float32) for u in range(1, 41)}
    train = {u: (known, draw[u]) for u, known in trainer.places.readers.items()}
    trainer.model.read_texts(train, {u: -draw[u] for u in trainer.places.asked})


@pytest.mark.parametrize("recommender", ["SASRec", "GRU4Rec"])
@pytest.mark.parametrize("adaptor", ["experts", "mlp"])
def test_no_dead_branch(small: dict[str, Any], recommender: str, adaptor: str) -> None:
    """Gradient reaches every weight of the adaptor, and without the text the scores are others."""
    trainer, _ = trainer_of(small, recommender_model=recommender, adaptor=adaptor)
    read_random_texts(trainer)
    model, batch = trainer.model, batch_of(trainer)
    model.calculate_loss(batch).backward()
    for name, weight in model.named_parameters():
        if name.startswith(("adaptor", "fuse")):
            assert weight.grad is not None and weight.grad.abs().sum() > 0, name
    model.eval()
    with torch.no_grad():
        reads = (batch[POSITION] >= model.train_from[batch["user_id"]]).numpy()
        assert 0 < reads.sum() < len(reads)
        before = model.full_sort_predict(batch)
        model.read_texts({}, {})
        after = model.full_sort_predict(batch)
    changed = (before - after).abs().amax(1).numpy() > 1e-6
    assert np.array_equal(changed, reads)  # those rows, and no other


def test_rows_before_a_text_do_not_read_it(small: dict[str, Any]) -> None:
    """A text written from k items is read from target position k on; rows without a position read the asked text."""
    trainer, protocol = trainer_of(small)
    read_random_texts(trainer)
    model = trainer.model
    user, known = next(iter(trainer.places.readers.items()))
    row = Interaction({"user_id": torch.tensor([user, user]), POSITION: torch.tensor([known - 1, known])})
    texts = model._texts(row)
    assert not texts[0].any()
    assert torch.equal(texts[1], model.train_text[user])
    asked = model._texts(Interaction({"user_id": torch.tensor([user])}))
    assert torch.equal(asked[0], model.asked_text[user])
    assert not torch.equal(asked[0], texts[1])


def test_predict_equals_full_sort(small: dict[str, Any]) -> None:
    trainer, protocol = trainer_of(small)
    read_random_texts(trainer)
    model = trainer.model.eval()
    rows = protocol.test.visible[torch.arange(8)]
    items = torch.arange(5, 13)
    with torch.no_grad():
        full = model.full_sort_predict(rows)
        rows.update(Interaction({"item_id": items}))
        alone = model.predict(rows)
    assert torch.allclose(alone, full[torch.arange(8), items], atol=1e-5)


def test_scores_of_texts_are_those_of_rows(small: dict[str, Any]) -> None:
    """The reward judges by the very scores that ranking uses."""
    trainer, protocol = trainer_of(small)
    read_random_texts(trainer)
    model, rows = trainer.model.eval(), protocol.valid
    scale = model.scale_of(model.item_vectors)
    users = rows.users[:6]
    with torch.no_grad():
        expected = model.full_sort_predict(rows.visible[torch.arange(6)]).numpy()
    texts = model.asked_text[torch.as_tensor(users)].numpy() / scale
    found = model.scores_of_texts([rows.history[i] for i in range(6)], texts)
    assert np.allclose(found, expected, atol=1e-4)


def test_without_texts_it_is_sasrec(small: dict[str, Any]) -> None:
    """knowledge none, no label set aside: the very numbers of RecBole's SASRec."""
    own = {"epochs": 3, "train_batch_size": 256, "stopping_step": 5, "learning_rate": 0.001}
    alone = run_recbole_llm("SASRec", None, None, {**{k: small[k] for k in small if k not in SMALL}, **own})
    none = {"knowledge": "none", "iterations": 0, "pair_users": 0}
    ours = run_recbole_llm("DPO4Rec", None, None, {**small, **own, **none})
    assert accuracy(ours["test_result"]) == accuracy(alone["test_result"])
    assert ours["best_valid_result"] == alone["best_valid_result"]


def test_a_placebo_needs_others() -> None:
    """Half of the texts may be one user's, not more."""
    check_placebo(Places({1: 2, 2: 3}, {}, {1: 6, 2: 7}))
    with pytest.raises(UserError, match="--knowledge=placebo: one user has 2 of 3 texts"):
        check_placebo(Places({1: 2, 2: 3}, {}, {1: 6}))


def test_labels_that_leave_no_row_are_told(small: dict[str, Any]) -> None:
    trainer, protocol = trainer_of(small)
    all_judge = replace(trainer.places, pairs=dict.fromkeys(protocol.training_sequences(), 0))
    with pytest.raises(UserError, match="--pair_users=.* no training row is left"):
        training_loader(trainer.config, protocol, all_judge)


def test_others_in_place() -> None:
    """Every place gets a text of another user, and every text is used once."""
    users = [1, 1, 2, 3, 3, 4, 5]
    found = others_in_place(users, 0)
    assert sorted(found) == list(range(7))
    assert all(users[mine] != users[other] for mine, other in enumerate(found))
    assert found == others_in_place(users, 0) != others_in_place(users, 1)


# ---- a planted preference


def colour_data(folder: Path) -> dict[str, str]:
    """Users choose eight items of any colour, then six of one colour of theirs; returns user -> colour."""
    rng, events, colour_of = np.random.default_rng(3), [], {}
    colours = {c: [i for i in range(60) if COLOURS[i % 4] == c] for c in COLOURS}
    for user in range(160):
        colour = COLOURS[user % 4]
        late = rng.choice(colours[colour], 6, replace=False)
        early = rng.choice([i for i in range(60) if i not in late], 8, replace=False)
        events += [(f"u{user}", f"i{item}", 5.0, float(100 * t + user % 7)) for t, item in enumerate([*early, *late])]
        colour_of[f"u{user}"] = colour
    write_dataset(folder)
    write_events(folder, events)
    assert len(ANIMALS) * len(COLOURS) == 60
    return colour_of


def test_planted_good_reasoning_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text alone tells what follows a random history; the trained recommender rewards the true text above a
    false one, for nearly every user, although it never saw these users' labels."""
    monkeypatch.chdir(tmp_path)
    colour_of = colour_data(tmp_path / "data")
    told = {c: f"This person likes {c} things, {c} above all: {c}, {c}." for c in COLOURS}

    def planted(work: Work, places: list[tuple[int, int]], sampling: Sampling, what: str) -> list[list[Written]]:
        found = []
        for user, _ in places:
            true = colour_of[str(work.user_tokens[user])]
            false = COLOURS[(COLOURS.index(true) + 1) % 4]
            found.append([Written(told[c], 1, True) for c in (true, false)][: sampling.number])
        return found

    monkeypatch.setattr(Work, "write", planted)
    settings = {**toy_settings(tmp_path / "data", tmp_path / "saved"), **SMALL, "samples": 2, "pair_users": 60}
    changes = {"text_positions": 4, "reward_positions": 4, "epochs": 20, "learning_rate": 0.005, "eval_step": 0}
    trainer, protocol = trainer_of({**settings, **changes})
    trainer.teach_recommender(0, None)
    judged = trainer.work.judge(trainer.model, trainer.places.pairs)
    better = [true.ndcg - false.ndcg for true, false in judged.rewards]
    assert np.mean(better) > 0.3
    assert np.mean(np.array(better) > 0) > 0.8
    assert np.mean([pair.best == 0 for pair in judged.pairs]) > 0.9


# ---- wrong settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"endpoint": "http://x/v1"}, "--endpoint=http://x/v1: a server's LLM cannot be trained"),
        ({"endpoint": "localhost", "iterations": 0}, "--endpoint=localhost: must be an address"),
        ({"endpoint_model": "m"}, "--endpoint_model: it names a model at --endpoint; give both, or neither"),
        ({"endpoint": "http://x/v1", "iterations": 0}, "--endpoint_model: it names a model"),
        ({"pair_users": 0}, "--pair_users=0: the LLM is aligned on texts about pair users"),
        ({"text_encoder": "tfidf"}, "--text_encoder=tfidf: its vectors depend on all texts"),
        ({"loss_type": "BPR"}, "--loss_type=BPR: DPO4Rec trains by cross-entropy"),
        ({"recommender_config": {"epochs": 3}}, "--recommender_config: epochs: the recommender is trained by the run"),
        ({"recommender_config": {"n_layer": 3}}, "did you mean `n_layers`"),
        ({"recommender_model": "BPR"}, "--recommender_model='BPR': must be one of SASRec, GRU4Rec"),
        ({"samples": 1}, "--samples=1: must be a whole number >= 2"),
        ({"knowledge": "some"}, "--knowledge='some': must be one of reasoning, placebo, none"),
        ({"reasoning_prompt": "stream"}, "--reasoning_prompt=stream: "),
        ({"reasoning_prompt": "nothing"}, "--reasoning_prompt=nothing: no such template; use reasoning"),
        ({"reasoning_item": "{plot}"}, "--reasoning_item='{plot}': no column {plot}"),
        ({"quantization": "4bit"}, "--llm=tiny cannot be quantised"),
        ({"rejected": "uniform"}, "--rejected: DPO4Rec does not read it; it is a key of LLMRanker"),
    ],
)
def test_wrong_settings(small: dict[str, Any], changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        run_recbole_llm("DPO4Rec", None, None, {**small, **changes})
    assert told in str(raised.value)


def test_no_room_for_a_text(small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--reasoning_tokens=8190: the LLM's context of 8192 tokens leaves"):
        run_recbole_llm("DPO4Rec", None, None, {**small, "reasoning_tokens": 8190})


def test_lists_that_cannot_be_drawn_are_told_before_any_text(small: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--reward_others=80: there are only 5. items"):
        run_recbole_llm("DPO4Rec", None, None, {**small, "reward_others": 80})
    assert not list(Path(small["checkpoint_dir"]).glob("stages/DPO4Rec-*"))
    run_recbole_llm("DPO4Rec", None, None, {**small, "reward_others": 80, "iterations": 0})  # where nothing judges


def test_no_title_column(small: dict[str, Any], tmp_path: Path) -> None:
    """``reasoning_item`` names the column, and nothing asks for another key."""
    file = tmp_path / "data" / "toy" / "toy.item"
    file.write_text(file.read_text(encoding="utf-8").replace("title:token_seq", "headline:token_seq"), encoding="utf-8")
    changes = {"encoder": "none", "iterations": 0}
    with pytest.raises(ConfigError, match="--reasoning_item=auto: no title column"):
        run_recbole_llm("DPO4Rec", None, None, {**small, **changes})
    assert run_recbole_llm("DPO4Rec", None, None, {**small, **changes, "reasoning_item": "{headline}"})["test_result"]


def test_an_item_without_title_is_untitled(small: dict[str, Any], tmp_path: Path) -> None:
    """Genres alone are no item."""
    file = tmp_path / "data" / "toy" / "toy.item"
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()]
    rows[1][1] = ""
    lines = ["item_id:token\ttitle:token_seq\tgenres:token_seq", *(f"{r[0]}\t{r[1]}\tfur" for r in rows[1:])]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    trainer, protocol = trainer_of(small)
    texts = trainer.work.question.texts
    first = list(protocol.dataset.field2id_token["item_id"]).index("i0")
    assert texts[first] == "untitled i0"
    assert all(text.endswith(" (fur)") for i, text in enumerate(texts) if i not in (0, first))


# ---- what names a stage


def folders(settings: dict[str, Any], tmp_path: Path, **changes: Any) -> tuple[str, str]:
    """Names of the text file and the recommender's folder of a run without alignment."""
    saved = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    settings = {**settings, "iterations": 0, "checkpoint_dir": str(saved), **changes}
    trainer, protocol = trainer_of(settings)
    folder, _ = trainer.teach_recommender(0, protocol.valid)
    (texts,) = (saved / "stages").glob("DPO4Rec-texts-*/texts.jsonl")
    return texts.parent.name, folder.name


@pytest.mark.parametrize(
    ("changes", "texts", "recommender"),
    [
        ({}, True, True),
        ({"seed": 7}, True, False),  # greedy texts of the untuned LLM are the same for every seed
        ({"lora_r": 4}, True, True),
        ({"shuffle": False}, True, False),
        ({"transform": "inverse_itemseq"}, True, False),
        ({"eval_args": {"mode": {"valid": "uni9", "test": "full"}}}, True, True),  # how the test asks teaches nothing
        ({"adaptor": "mlp"}, True, False),
        ({"text_users": 20}, False, False),
        ({"reasoning_tokens": 9}, False, False),
        ({"reasoning_history": 3}, False, False),
        ({"llm": "tiny", "dtype": "bfloat16"}, False, False),
        ({"knowledge": "placebo"}, True, False),
        ({"beta": 0.3, "samples": 4, "align_epochs": 1}, True, True),
    ],
    ids=str,
)
def test_what_names_a_stage(
    small: dict[str, Any], tmp_path: Path, changes: dict[str, Any], texts: bool, recommender: bool
) -> None:
    """A stage is found again where nothing that moves it changed, and only there."""
    before, after = folders(small, tmp_path), folders(small, tmp_path, **changes)
    assert (before[0] == after[0], before[1] == after[1]) == (texts, recommender)
