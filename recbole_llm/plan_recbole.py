"""What training one of RecBole's own models will cost."""

from __future__ import annotations

import time
from collections.abc import Iterable
from itertools import islice
from statistics import median
from typing import Any

import torch
from recbole.data.interaction import Interaction
from recbole.trainer import Trainer
from recbole.utils import ModelType, get_trainer

from recbole_llm.allocator import freed_memory_kept
from recbole_llm.config import LLMConfig
from recbole_llm.data.protocol import prepare_data
from recbole_llm.memory import machine_name
from recbole_llm.run_log import explained


def plan_of_recbole(config: LLMConfig, probe: bool) -> dict[str, Any]:
    """Batches and parameters of a model of RecBole's; time of a few batches where its trainer does nothing else."""
    with explained(config, None, "reading the data"):
        protocol = prepare_data(config)
        model = config.model_class(config, protocol.train_data._dataset).to(config["device"])
    batches, seconds = len(protocol.train_data), None
    rounds = 1 if config["MODEL_TYPE"] == ModelType.TRADITIONAL else config["epochs"]  # those count, and are done
    if probe and get_trainer(config["MODEL_TYPE"], config["model"]) is Trainer:
        with explained(config, None, "training on a few batches"):
            seconds = rounds * batches * batch_seconds(model, protocol.train_data)
    notes = ["validation and test are not measured; early stopping can only shorten this."]
    notes += [] if seconds is not None else ["time: not measured."]
    training = {
        "name": "training",
        "rounds": rounds,
        "positions": len(protocol.train_data._dataset),
        "steps": rounds * batches,
        "seconds": seconds,
    }
    return {
        "model": config["model"],
        "dataset": config["dataset"],
        "work": [training],
        "memory": {"weights": weight_bytes(model)},
        "seconds": None if seconds is None else {"passes": seconds, "total": seconds},
        "machine": machine_name(config["device"]),
        "notes": notes,
    }


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def batch_seconds(model: Any, batches: Iterable[Interaction], count: int = 5) -> float:
    """Seconds of a training step of a RecBole model, the median of a few after one that warms up."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(weights, lr=0.0) if weights else None
    clocks = []
    with freed_memory_kept():  # as in training
        for batch in islice(batches, count + 1):
            clock = time.perf_counter()
            parts = model.calculate_loss(batch.to(model.device))
            loss: Any = sum(parts) if isinstance(parts, tuple) else parts
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            clocks.append(time.perf_counter() - clock)
    return median(clocks[1:] or clocks)
