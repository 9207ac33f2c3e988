"""Loading LLMs, and what is saved of their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    FalconConfig,
    GPT2Config,
    GPTBigCodeConfig,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    T5Config,
)

from recbole_llm import files
from recbole_llm.errors import UserError
from recbole_llm.llm import adapter, half_precision, logps
from recbole_llm.llm.adapter import adapter_state, load_adapter, save_adapter, set_adapter_state
from recbole_llm.llm.base import context_of
from recbole_llm.llm.logps import batch_logps
from recbole_llm.llm.pretrained import dtype_of, load_llm
from recbole_llm.llm.tiny import tiny_llm
from recbole_llm.llm.token_tree import TreeBuilder
from recbole_llm.llm.types import LLM

CPU = torch.device("cpu")


def load(llm: str | Path = "tiny", **options: object) -> LLM:
    return load_llm(**{"llm": str(llm), "device": CPU, "seed": 0, **options})


def refused(match: str) -> pytest.RaisesExc[UserError]:
    return pytest.raises(UserError, match=match)


def logits(llm: LLM) -> torch.Tensor:
    ids = llm.tokenizer("What is next?\n", return_tensors="pt").input_ids
    with torch.no_grad():
        return llm.model(input_ids=ids).logits


def trained(**options: object) -> LLM:
    """A tiny LLM whose trainable weights were moved."""
    llm = load(**options)
    generator = torch.Generator().manual_seed(1)
    state = adapter_state(llm)
    moved = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in state.items()}
    set_adapter_state(llm, moved)
    return llm


# ---- loading


def test_embedded_llm() -> None:
    llm = load("embedded")
    assert isinstance(llm.model, PeftModel) and not llm.model.training
    assert (llm.name, llm.context, llm.dtype, llm.device) == ("embedded", 8192, "float32", "cpu")
    base, lora = [], []
    for name, weight in llm.model.named_parameters():
        (lora if "lora_" in name else base).append(weight)
    assert not any(weight.requires_grad for weight in base)
    assert all(weight.requires_grad and weight.dtype == torch.float32 for weight in lora)
    assert len(lora) == 30 * 7 * 2
    assert llm.model.config.use_cache is False and llm.model.config._attn_implementation == "token_tree_blocks"


def test_new_adapter_changes_nothing_and_is_seeded() -> None:
    before = torch.get_rng_state()
    bare, one, same, other = load(finetune="none"), load(seed=1), load(seed=1), load(seed=2)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(logits(bare), logits(one))
    states = [adapter_state(llm) for llm in (one, same, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert one.revision == bare.revision


def test_what_is_trained() -> None:
    assert all(weight.requires_grad for weight in load(finetune="full").model.parameters())
    assert not any(weight.requires_grad for weight in load(finetune="none").model.parameters())
    names = adapter_state(load(lora_target_modules=["q_proj", "v_proj"], lora_r=4))
    assert len(names) == 2 * 2 * 2 and all(4 in tensor.shape for tensor in names.values())
    for named in ("v_proj", ["v_proj"], r".*\.v_proj"):  # a name, names, peft's pattern
        assert set(adapter_state(load(lora_target_modules=named, lora_r=4))) == {n for n in names if "v_proj" in n}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(dtype: str, folder: Path) -> None:
    for llm in (load(dtype=dtype), load(folder, dtype=dtype)):
        weight = llm.model.get_base_model().lm_head.weight
        assert llm.dtype == dtype and weight.dtype == getattr(torch, dtype)
    assert load(dtype=dtype).revision == load().revision


def test_weights_that_are_trained_are_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a GPU too; an update of 1e-5 is lost in bfloat16, and who wants that is told."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    found = {kind: dtype_of("auto", torch.device("cuda"), kind) for kind in ("lora", "none", "full")}
    assert found == {"lora": "bfloat16", "none": "bfloat16", "full": "float32"}
    load(finetune="full")
    assert "--finetune=full" not in caplog.text
    load(finetune="full", dtype="bfloat16")
    assert "--dtype=bfloat16 with --finetune=full" in caplog.text


def test_lora_on_the_output_layer_in_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the body runs under autocast, the output layer does not. Against the same adapters in float32."""
    tree = TreeBuilder()
    prompt = tree.chain(-1, range(20, 32))[-1]
    for first in (40, 50, 60):
        tree.completion(tree.chain(prompt, range(first, first + 5)))

    def computed(llm: LLM) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        values = batch_logps(llm.model.train(), [tree.build()])
        values.sum().backward()
        return values.detach(), {name: p.grad for name, p in llm.model.named_parameters() if p.requires_grad}

    names = {"lora_target_modules": ["q_proj", "lm_head"]}
    in_float32 = trained(**names)
    expected, expected_gradients = computed(in_float32)
    monkeypatch.setattr(half_precision, "_suits", lambda model: True)
    monkeypatch.setattr(logps, "autocast", lambda model: torch.autocast("cpu", torch.bfloat16))
    half = load(dtype="bfloat16", **names)
    set_adapter_state(half, adapter_state(in_float32))
    found, gradients = computed(half)
    torch.testing.assert_close(found, expected, atol=0.3, rtol=0)
    for name, gradient in expected_gradients.items():
        assert (gradients[name] - gradient).norm() <= 0.1 * gradient.norm() > 0, name


def test_folder_is_the_same_model(folder: Path) -> None:
    from_folder, tiny = load(folder), load()
    assert torch.equal(logits(from_folder), logits(tiny))
    assert from_folder.name == str(folder) and from_folder.context == 8192


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=1100),
        GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=2, vocab_size=1100),
        FalconConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=1100, hidden_dropout=0.2),
        OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=1100,
                               word_embed_proj_dim=32, dropout=0.3, attention_dropout=0.2, layerdrop=0.5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_base_drops_nothing(config: Any, attention: str, folder: Path) -> None:
    """In training mode log-probs are those of evaluation, so a policy begins as its reference."""
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(folder)
    model = load_llm(llm=str(folder), device=torch.device("cpu"), attention=attention, seed=0).model
    ids = torch.arange(12)[None]
    expected = model.eval()(input_ids=ids).logits
    torch.testing.assert_close(model.train()(input_ids=ids).logits, expected)
    assert not torch.allclose(base.train()(input_ids=ids).logits, base.eval()(input_ids=ids).logits)


def test_revision_sees_every_part_of_the_weights(folder: Path) -> None:
    before = load(folder).revision
    assert load(folder).revision == before
    state = load_file(folder / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        changed = {**state, name: state[name] + 1}
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        assert load(folder).revision != before


def test_missing_pad_token_is_the_end_of_text(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(folder).tokenizer.pad_token == "<|im_end|>"


def test_context_of_longrope_is_where_its_factors_change() -> None:
    """Beyond, the positions of every sequence in a pass hang on the longest one."""
    factors = {"long_factor": [4.0] * 4, "short_factor": [1.0] * 4, "original_max_position_embeddings": 32}
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=1100,
        max_position_embeddings=128,
        original_max_position_embeddings=32,
        pad_token_id=0,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **factors},
    )
    assert context_of(AutoModelForCausalLM.from_config(config), tiny_llm()[1]) == 32


def test_context_is_at_most_the_sliding_window() -> None:
    model, tokenizer = tiny_llm()
    model.config = MistralConfig(max_position_embeddings=1000, sliding_window=300)
    assert context_of(model, tokenizer) == 300
    model.config = MistralConfig(max_position_embeddings=1000, sliding_window=None)
    assert context_of(model, tokenizer) == 1000


# ---- what cannot be loaded


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dtype": "int8"}, "--dtype=int8: expected one of auto, float32"),
        ({"quantization": "3bit"}, "--quantization=3bit: expected one of None, 4bit"),
        ({"finetune": "all"}, "--finetune=all: expected one of lora, full, none"),
        ({"attention": "magic"}, "--attention=magic: expected one of auto, blocks"),
        ({"quantization": "4bit"}, "--llm=tiny cannot be quantised"),
        ({"quantization": "4bit", "finetune": "full"}, "--finetune=full cannot train --quantization=4bit"),
        ({"lora_target_modules": ["query"]}, "--lora_target_modules=.*query.*linear layers are .*q_proj"),
        (
            {"lora_target_modules": ["q_proj", "v_prj"]},
            "--lora_target_modules=.*no layer is called v_prj\\. .*linear layers are .*q_proj",
        ),
        ({"lora_r": 0}, "--lora_r=0"),
    ],
)
def test_options_that_do_not_work(options: dict[str, object], match: str) -> None:
    with refused(match):
        load(**options)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/nowhere", "nowhere.gguf", "a/b/c"])
def test_path_that_does_not_exist(name: str) -> None:
    with refused(f"--llm={name}: no such folder or .gguf file"):
        load(name)


def test_hub_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused("--llm=nobody/nothing could not be loaded: HF_HUB_OFFLINE is set.*--llm=embedded"):
        load("nobody/nothing")


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*args: object, **options: object) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co' to load the files")

    monkeypatch.setattr("recbole_llm.llm.base.AutoConfig.from_pretrained", no_network)
    with refused("--llm=nobody/nothing could not be loaded: .* cannot be reached.*hf download.*=embedded"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    "config",
    [
        BertConfig(architectures=["BertForMaskedLM"]),
        T5Config(architectures=["T5ForConditionalGeneration"]),
        LlamaConfig(architectures=["LlamaForSequenceClassification"]),
    ],
)
def test_not_a_causal_lm(tmp_path: Path, config: object) -> None:
    config.save_pretrained(tmp_path)
    with refused(f"--llm={tmp_path} is a {config.architectures[0]}, not a causal language model"):
        load(tmp_path)


def test_no_config(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with refused(f"--llm={tmp_path} is a folder without config.json.*readme.txt"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with refused("it holds an adapter: give its base model"):
        load(tmp_path)


@pytest.mark.parametrize("content", ["not json", '{"model_type": "unheard-of"}', "{}"])
def test_damaged_config(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with refused(f"--llm={folder} "):
        load(folder)


def test_custom_code_is_never_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.Odd", "AutoModelForCausalLM": "odd.LM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "odd.py").write_text("raise SystemExit('it ran')")
    with refused("Python code of its own, which is never run here"):
        load(folder)


def test_weights_that_are_damaged_or_incomplete(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole, state = weights.read_bytes(), load_file(weights)
    weights.write_bytes(whole[:-100])
    with refused(f"--llm={folder} could not be loaded"):
        load(folder)
    del state["lm_head.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with refused("not a complete causal LM .*lm_head.weight"):
        load(folder)
    weights.unlink()
    with refused(f"--llm={folder} could not be loaded"):
        load(folder)


def test_adapter_in_the_folder_of_its_base(folder: Path) -> None:
    load(folder).model.save_pretrained(folder)
    with refused("an adapter lies over its base model"):
        load(folder)


def test_tokenizers_that_do_not_do(folder: Path) -> None:
    tokens, config = folder / "tokenizer.json", folder / "tokenizer_config.json"
    whole, settings = json.loads(tokens.read_text()), json.loads(config.read_text())
    more = {**whole["added_tokens"][0], "id": 1027, "content": "<|more|>"}
    tokens.write_text(json.dumps({**whole, "added_tokens": [*whole["added_tokens"], more]}))
    with refused("1028 tokens in its tokenizer, 1027 in the model"):
        load(folder)
    del settings["eos_token"]
    tokens.write_text(json.dumps(whole))
    config.write_text(json.dumps(settings))
    with refused("no end-of-text token"):
        load(folder)


def test_slow_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with refused("no fast version"):
        load(folder)


def test_no_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.LlamaForCausalLM.to", full)
    with refused("does not fit into the GPU's memory.*--quantization=4bit"):
        load(folder)


# ---- 4 bits


def test_4bit_without_bitsandbytes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused(r"--quantization=4bit needs bitsandbytes: pip install 'recbole-llm\[qlora\]'"):
        load(folder, quantization="4bit")


def test_4bit_on_the_cpu_is_exact(folder: Path) -> None:
    """Logits and the adapters' gradients are those over the weights that the 4 bits stand for."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    quantised, plain = load(folder, quantization="4bit"), load(folder, fast_linears=False)
    layers = dict(quantised.model.named_modules())
    with torch.no_grad():
        for name, layer in plain.model.named_modules():
            if isinstance(layers[name], bitsandbytes.nn.Linear4bit):
                weight = layers[name].weight
                layer.weight.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
    gradients = []
    for llm in (quantised, plain):
        for name, weight in llm.model.named_parameters():
            if "lora_B" in name:
                weight.data.fill_(0.01)
        llm.model(input_ids=torch.arange(20)[None]).logits.logsumexp(-1).sum().backward()
        gradients.append({n: p.grad for n, p in llm.model.named_parameters() if p.grad is not None})
    assert torch.equal(logits(quantised), logits(plain))
    assert gradients[0].keys() == gradients[1].keys() and all("lora_" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])
    assert quantised.revision == plain.revision


# ---- adapters


@pytest.mark.parametrize("how", ["lora", "full"])
def test_round_trip(tmp_path: Path, how: str) -> None:
    llm, fresh = trained(finetune=how), load(finetune=how, seed=5)
    assert not torch.equal(logits(llm), logits(fresh))
    save_adapter(llm, tmp_path / "new" / "run")
    load_adapter(fresh, tmp_path / "new" / "run")
    assert torch.equal(logits(llm), logits(fresh))
    first = {file.name: file.read_bytes() for file in (tmp_path / "new" / "run").iterdir()}
    save_adapter(fresh, tmp_path / "new" / "run")
    assert first == {file.name: file.read_bytes() for file in (tmp_path / "new" / "run").iterdir()}


def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    llm = trained()
    save_adapter(llm, tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "adapter_base.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    peft = PeftModel.from_pretrained(tiny_llm()[0], str(tmp_path)).eval()
    ids = llm.tokenizer("What is next?\n", return_tensors="pt").input_ids
    assert torch.equal(peft(input_ids=ids).logits, logits(llm))


def test_full_model_is_a_folder_to_load(tmp_path: Path) -> None:
    llm = trained(finetune="full")
    save_adapter(llm, tmp_path)
    assert torch.equal(logits(load(tmp_path, finetune="none")), logits(llm))


def test_a_second_frozen_adapter_is_not_saved(tmp_path: Path) -> None:
    llm = trained()
    names = adapter_state(llm).keys()
    llm.model.add_adapter("reference", llm.model.peft_config["default"])
    save_adapter(llm, tmp_path)
    assert adapter_state(llm).keys() == names == load_file(tmp_path / "adapter_model.safetensors").keys()


def test_state_in_memory_is_a_copy() -> None:
    llm = load()
    start, before = adapter_state(llm), logits(llm)
    set_adapter_state(llm, adapter_state(trained()))
    assert not torch.equal(logits(llm), before)
    set_adapter_state(llm, start)
    assert torch.equal(logits(llm), before)


def test_other_base_is_refused(tmp_path: Path, folder: Path) -> None:
    save_adapter(trained(), tmp_path / "run")
    other = load(folder)
    with refused(f"over tiny .weights {load().revision}.*--llm={folder} has other weights .{other.revision}"):
        load_adapter(other, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lora_r": 8}, "--lora_r"),
        ({"lora_target_modules": ["q_proj"]}, "--lora_target_modules"),
        ({"lora_alpha": 8}, "--lora_alpha=8: the adapter in .* was trained with 32"),
        ({"finetune": "full"}, "holds no adapter that can be read.*same --finetune"),
        ({"finetune": "none"}, "holds no adapter that can be read"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, options: dict[str, object], match: str) -> None:
    save_adapter(trained(), tmp_path)
    llm = load(**options)
    before = logits(llm)
    with refused(match):
        load_adapter(llm, tmp_path)
    assert torch.equal(logits(llm), before)


@pytest.mark.parametrize("damage", ["truncated", "one byte", "empty", "missing", "no base", "base not json"])
def test_damaged_adapter_is_refused(tmp_path: Path, damage: str) -> None:
    save_adapter(trained(), tmp_path)
    weights, base = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_base.json"
    data = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(data[: len(data) // 2])
    elif damage == "one byte":
        weights.write_bytes(data[:-10] + bytes([data[-10] ^ 1]) + data[-9:])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "missing":
        weights.unlink()
    elif damage == "no base":
        base.unlink()
    else:
        base.write_text("[1, 2")
    llm = load()
    before = logits(llm)
    with refused(str(tmp_path)):
        load_adapter(llm, tmp_path)
    assert torch.equal(logits(llm), before)


def test_no_folder(tmp_path: Path) -> None:
    with refused("nowhere holds no adapter"):
        load_adapter(load(), tmp_path / "nowhere")


def test_nothing_trained_is_not_saved(tmp_path: Path) -> None:
    with refused("nothing of --llm=tiny is trained.*--finetune=lora"):
        save_adapter(load(finetune="none"), tmp_path)


def test_adapter_that_comes_out_empty_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = trained()
    monkeypatch.setattr(files, "save_file", lambda state, file, metadata: save_file({}, file, metadata))
    with refused("is damaged"):
        save_adapter(llm, tmp_path)
    monkeypatch.setattr(adapter, "get_peft_model_state_dict", lambda *args, **options: {})
    with refused("nothing of --llm=tiny is trained"):
        save_adapter(llm, tmp_path)
    assert not list(tmp_path.iterdir())


def test_failed_save_keeps_the_last_good_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = trained()
    save_adapter(good, tmp_path)

    def full(state: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with refused(f"could not be saved in {tmp_path}.*No space left"):
        save_adapter(load(), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    fresh = load()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(good))


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused("could not be saved"):
        save_adapter(trained(), tmp_path / "file" / "run")


def test_model_without_head_is_not_a_causal_lm(folder: Path) -> None:
    LlamaModel(tiny_llm()[0].config).save_pretrained(folder)
    with refused("is a LlamaModel, not a causal language model"):
        load(folder)
