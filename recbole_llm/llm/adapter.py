"""What training changed in an LLM: its LoRA adapter, or all weights, in memory and on disk."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open

from recbole_llm.distributed import from_first
from recbole_llm.errors import MachineError, UserError
from recbole_llm.files import to_disk, write_tensors
from recbole_llm.llm.identity import check_identity, identity
from recbole_llm.llm.types import LLM


def adapter_state(llm: LLM) -> dict[str, torch.Tensor]:
    """Copies of the trainable tensors, by the names they have on disk, on the model's device."""
    return {name: tensor.detach().clone() for name, tensor in _trainable(llm).items()}


@torch.no_grad()
def set_adapter_state(llm: LLM, state: dict[str, torch.Tensor]) -> None:
    """Put back what ``adapter_state`` gave.

    Raises:
        UserError: other names or shapes than the model's; nothing is changed then.
    """
    live = _trainable(llm)
    shapes = {name: tensor.shape for name, tensor in live.items()}
    if shapes != {name: tensor.shape for name, tensor in state.items()}:
        raise UserError(
            f"the adapter ({len(state)} tensors) does not fit the model's ({len(shapes)}): names or shapes "
            "differ. Use the --lora_r and --lora_target_modules it was trained with."
        )
    for name, tensor in live.items():
        tensor.copy_(state[name])


def save_adapter(llm: LLM, folder: Path) -> None:
    """Write what was trained: peft's adapter files, or for ``finetune=full`` a transformers folder.

    The weights file appears whole or not at all, and carries a SHA-256 of its tensors.

    Raises:
        UserError: nothing is trained, the disk is full, or what was written cannot be read back.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _trainable(llm).items()}
    base = identity(llm)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".saving-*"):  # by a killed process
            shutil.rmtree(left, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as name:
            work = Path(name)
            (work / "adapter_base.json").write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
            _save_config(llm, work)
            # No second key: safetensors writes keys in any order, and equal weights shall give equal files.
            write_tensors(work / _file(llm), state, {"sha256": digest(state)})
            _read(work / _file(llm))
            # The weights last: the other files are the same each time, so a kill in between leaves a pair.
            for file in sorted(work.iterdir(), key=lambda file: file.suffix == ".safetensors"):
                to_disk(file)  # the stage's record, which says that it is whole, is on the disk after it
                os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise MachineError(
            f"--checkpoint_dir: the adapter could not be saved in {folder}: {error}. Free some space, or "
            "name another folder; the last good adapter is untouched."
        ) from error


def load_adapter(llm: LLM, folder: Path) -> None:
    """Put a saved adapter into a model that was loaded with the same settings; of several processes the first reads it.

    Raises:
        UserError: no adapter, a damaged one, one of another base model, tokenizer or chat template, or of other LoRA
            settings.
    """
    set_adapter_state(llm, from_first(lambda: _checked(llm, folder)))


def _checked(llm: LLM, folder: Path) -> dict[str, torch.Tensor]:
    """A saved adapter that fits the model, or ``UserError``."""
    try:
        base = json.loads((folder / "adapter_base.json").read_text(encoding="utf-8"))
        check_identity(base, llm, f"the adapter in {folder}", "Give the model it was trained over, unchanged.")
        if isinstance(llm.model, PeftModel):
            saved = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["lora_alpha"]
            wanted = llm.model.peft_config["default"].lora_alpha
            if saved != wanted:
                raise UserError(f"--lora_alpha={wanted}: the adapter in {folder} was trained with {saved}.")
        return _read(folder / _file(llm))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise MachineError(
            f"{folder} holds no adapter that can be read ({error!r}): adapter_base.json and {_file(llm)} are "
            "needed, as a training with the same --finetune writes them. Remove the folder and train again."
        ) from error


def digest(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, types, shapes and values, in hex."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha256.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        sha256.update(flat.view(torch.uint8).numpy().data)
    return sha256.hexdigest()


def _trainable(llm: LLM) -> dict[str, torch.Tensor]:
    """The tensors themselves; to write into one is to change the model."""
    if isinstance(llm.model, PeftModel):
        live = get_peft_model_state_dict(llm.model, adapter_name="default", save_embedding_layers=False)
    else:
        live = {name: weight for name, weight in llm.model.named_parameters() if weight.requires_grad}
    if not live:
        raise UserError(f"nothing of --llm={llm.name} is trained, so it has no adapter: set --finetune=lora.")
    return live


def _file(llm: LLM) -> str:
    return "adapter_model.safetensors" if isinstance(llm.model, PeftModel) else "model.safetensors"


def _save_config(llm: LLM, folder: Path) -> None:
    if isinstance(llm.model, PeftModel):
        lora = copy.copy(llm.model.peft_config["default"])
        # What the user typed, and no path of this machine; peft reads the files either way.
        lora.base_model_name_or_path, lora.inference_mode = llm.name, True
        if isinstance(lora.target_modules, set):
            lora.target_modules = sorted(lora.target_modules)  # a set's order changes from run to run
        lora.save_pretrained(folder)
    else:
        llm.model.config.save_pretrained(folder)
        llm.tokenizer.save_pretrained(folder)


def _read(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as stored:
        state = {name: stored.get_tensor(name) for name in stored.keys()}
        expected = (stored.metadata() or {}).get("sha256")
    if digest(state) != expected:
        raise MachineError(f"{file} is damaged: the SHA-256 of its tensors is not the {expected} it names.")
    return state
