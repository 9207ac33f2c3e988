"""What is wrong with DPO4Rec's settings; told with everything else before any work."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm import keys
from recbole_llm.data.atomic import check_items
from recbole_llm.data.template import load_template
from recbole_llm.dpo4rec.question import item_template


def alignment_rounds(settings: Any) -> int:
    """How often the LLM is aligned: never where the users' own texts are not read."""
    return settings["iterations"] if settings["knowledge"] == "reasoning" else 0


def wrong_dpo4rec(settings: Mapping[str, Any]) -> list[str]:
    """Settings that are fine alone and wrong together, one sentence each."""
    if any(key in settings and check(settings[key]) for key, check in (keys.DPO4REC_KEYS | keys.LLM_KEYS).items()):
        return []  # told by key
    endpoint, rounds = settings["endpoint"], alignment_rounds(settings)
    own = [k for k in settings["recommender_config"] or {} if k in keys.TRAINING_KEYS]
    found = {
        f"--endpoint={endpoint}: must be an address such as http://localhost:8000/v1.": endpoint is not None
        and not endpoint.startswith(("http://", "https://")),
        f"--endpoint={endpoint}: a server's LLM cannot be trained here; set --iterations=0, or leave it out to align "
        "--llm.": endpoint is not None and rounds > 0,
        "--endpoint_model: it names a model at --endpoint; give both, or neither.": (endpoint is None)
        != (settings["endpoint_model"] is None),
        "--pair_users=0: the LLM is aligned on texts about pair users; set --pair_users=100, or --iterations=0.": rounds
        > 0
        and settings["pair_users"] == 0,
        f"--text_encoder={settings['text_encoder']}: its vectors depend on all texts at once, which differ between "
        "iterations; use minilm, llm, or the hub id or folder of an encoder.": settings["text_encoder"]
        in ("tfidf", "none"),
        "--recommender_config: loss_type: DPO4Rec trains by cross-entropy over all items; leave it out.": (
            settings["recommender_config"] or {}
        ).get("loss_type", "CE")
        != "CE",
        f"--loss_type={settings['loss_type']}: DPO4Rec trains by cross-entropy over all items; leave it out.": settings[
            "loss_type"
        ]
        != "CE",
        f"--recommender_config: {', '.join(own)}: the recommender is trained by the run's own settings; give "
        f"{', '.join(f'--{k}' for k in own)} to the run.": bool(own),
        "--quantization: --llm=tiny cannot be quantised; leave it out.": settings["quantization"] == "4bit"
        and settings["llm"] == "tiny",
    }
    return [told for told, wrong in found.items() if wrong]


def check_texts(settings: Mapping[str, Any], dataset: str, properties: Path) -> None:
    """Raises ``UserError`` where the template of the question, or of an item's line, or the titles cannot be used."""
    load_template(settings["reasoning_prompt"], properties, "reasoning_prompt")
    item_template(settings, dataset)
    check_items(settings, dataset)
