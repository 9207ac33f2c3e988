"""Our ranker on ml-100k, its prompts and items as a run has them."""

from __future__ import annotations

from typing import Any

from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import Protocol, prepare_data
from recbole_llm.model.llmranker import LLMRanker

QUIET: dict[str, Any] = {"encoder": "none", "gpu_id": "", "show_progress": False, "state": "ERROR"}
SETTINGS: dict[str, Any] = {**QUIET, "dtype": "float32", "fast_linears": False, "prompt": "stream", "seed": 0}


def ml_100k_ranker(**settings: Any) -> tuple[LLMRanker, Protocol]:
    """LLMRanker in evaluation mode, and the data, with these keys changed."""
    config = LLMConfig("LLMRanker", "ml-100k", config_dict={**SETTINGS, **settings})
    protocol = prepare_data(config)
    return LLMRanker(config, protocol.train_data._dataset).eval(), protocol
