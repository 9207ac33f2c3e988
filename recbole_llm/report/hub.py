"""What a model hub reads of a run, and the code that loads its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from recbole_llm.harm import HARM
from recbole_llm.llm.embedded import PACKAGED
from recbole_llm.report.markdown import one_line


def hub_id(llm: str) -> str | None:
    """The base model's name on the hub; None for a random one, or one that lies in a folder or a file."""
    if llm in PACKAGED:
        return PACKAGED[llm].hub
    local = llm == "tiny" or llm.startswith((".", "/", "~")) or llm.endswith(".gguf") or Path(llm).exists()
    return None if local or llm.count("/") > 1 else llm


def front_matter(record: Mapping[str, Any], folder: Path) -> str:
    """The YAML at the head of an LLM's card.

    Args:
        record: what ``result.json`` will hold.
        folder: the run's own; says which weights there are.
    """
    library = "peft" if _has_adapter(folder) else "transformers" if (folder / "model.safetensors").is_file() else None
    metrics = _headline(record["metrics"])
    trained = [stage["loss"] for stage in record.get("stages", ())] or ["zero-shot"]
    tags = ["recommendation", "recbole", "recbole-llm", record["model"], record.get("alignment") or trained[-1]]
    dataset = one_line(record["dataset"])
    results = [
        EvalResult(
            task_type="recommendation",
            task_name="next-item ranking",
            dataset_type=dataset,
            dataset_name=f"{dataset}, {record['mode']}, candidates {record['candidate_hash'][:12]}",
            metric_type=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    data = ModelCardData(
        base_model=hub_id(record["llm"]),
        library_name=library,
        tags=tags,
        metrics=list(metrics),
        model_name=one_line(folder.name),
        eval_results=results,
    )
    return f"---\n{data.to_yaml()}\n---"


def _headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy at the largest K: a card is for people, and its front matter is what they see first."""
    last = max((int(name.partition("@")[2]) for name in metrics if "@" in name), default=0)
    named = {name: value for name, value in metrics.items() if name.endswith(f"@{last}")}
    return {name: value for name, value in named.items() if name.partition("@")[0] not in HARM}


def _has_adapter(folder: Path) -> bool:
    return (folder / "adapter_model.safetensors").is_file()


def loading_code(llm: str, dtype: str, folder: Path) -> str | None:
    """Python that makes ``model`` of the folder's weights, to be run in the folder; None where nothing was trained."""
    if not _has_adapter(folder):
        if not (folder / "model.safetensors").is_file():
            return None
        load = f'model = AutoModelForCausalLM.from_pretrained(".", dtype="{dtype}").eval()  # "." is this folder'
        return f"from transformers import AutoModelForCausalLM\n\n{load}"
    lines = ["from peft import PeftModel"]
    if llm == "tiny":
        lines += ["from recbole_llm.llm.tiny import tiny_llm", "", "base, tokenizer = tiny_llm()"]
    else:
        where, imported = repr(llm), []
        if llm in PACKAGED:
            name = "" if llm == "embedded" else repr(llm)
            where, imported = f"embedded_folder({name})", ["from recbole_llm.llm.embedded import embedded_folder"]
        elif llm.endswith(".gguf") or Path(llm).expanduser().is_dir():
            where, imported = _path_from(folder, llm), ["from pathlib import Path"]
            if llm.endswith(".gguf"):
                where = f"gguf_folder({where})"
                imported += ["from recbole_llm.llm.embedded import gguf_folder"]
        lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", *imported, "", f"where = {where}"]
        lines += [f'base = AutoModelForCausalLM.from_pretrained(where, dtype="{dtype}")']
        lines += ["tokenizer = AutoTokenizer.from_pretrained(where)"]
    return "\n".join([*lines, 'model = PeftModel.from_pretrained(base, ".").eval()  # "." is this folder'])


def _path_from(folder: Path, llm: str) -> str:
    """Python of the path to a model of this machine as it is named in a folder; it was typed in another."""
    if llm.startswith("~") or Path(llm).is_absolute():
        return f"Path({llm!r})" + (".expanduser()" if llm.startswith("~") else "")
    return f"Path({os.path.relpath(Path(llm).resolve(), folder.resolve())!r})"
