"""Frozen linear layers on a CPU through oneDNN, where it is measured to be faster than torch's default (MKL).

In float32 torch sends ``nn.Linear`` to MKL, which on AMD's processors can be half as fast as oneDNN, and on others is
as fast. So the two are timed once, on the model's own shapes, and what was chosen is kept in the package's cache
folder: the last bits of a result depend on it, and two runs on one machine must agree in them.

oneDNN rounds a little more: in the embedded model a product's error is 4e-7 of it, MKL's 2.4e-7, both against float64.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import nn
from torch.nn import functional

from recbole_llm.files import content_hash, write_json
from recbole_llm.llm.model_cache import cache_root
from recbole_llm.llm.types import CausalLM
from recbole_llm.machine import processor

DEFAULT, ONEDNN = "default", "onednn"
LEAST_GAIN = 1.1  # less is what another load of the machine makes of nothing
ROWS = (32, 400)  # a few titles, and a prompt
SECONDS, LEAST_ROUNDS = 0.5, 6  # of timing, for the layers and for the head; on a busy machine few rounds mislead
MOST_INPUTS, MOST_OUTPUTS, MOST_WORDS = 1536, 1536, 8192  # of a weight that is timed: larger ones are cut
LEAST_WEIGHTS = 2**16  # smaller ones gain nothing that could be measured


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``torch.nn.functional.linear`` by oneDNN: CPU and float32, without a gradient.

    A transposed view as ``weight`` needs no copy and is as fast.
    """
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _FrozenProduct(torch.autograd.Function):
    """``onednn_linear`` with the gradient of its input; weight and bias are frozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return onednn_linear(grad, weight.t()), None, None


class OneDNNLinear(nn.Linear):
    """A linear layer that goes through oneDNN while it is frozen, on a CPU and in float32, and else as ever."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ weight.T + bias``, ``[..., in] -> [..., out]``."""
        if not self.suits(x):
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenProduct.apply(x, self.weight, self.bias)
        return onednn_linear(x, self.weight, self.bias)

    def suits(self, x: torch.Tensor) -> bool:
        """Whether an input's product goes through oneDNN."""
        frozen = not any(p.requires_grad for p in self.parameters())
        return frozen and x.dtype == self.weight.dtype == torch.float32 and x.device.type == "cpu"


def speed_up_linears(model: CausalLM, cache_folder: Path | None = None) -> dict[str, str]:
    """Put the faster kernel under a model's frozen linear layers, its LM head included, before LoRA wraps them.

    Nothing is done, and nothing measured, where no weight is a frozen float32 one on a CPU.

    Args:
        model: a transformers causal LM; its layers are replaced by others with the same parameters.
        cache_folder: where the decision is kept; None takes ``RECBOLE_LLM_CACHE``, else the user's cache folder.

    Returns:
        ``{"layers": ..., "head": ...}``, each ``default`` or ``onednn``.
    """
    layers, head = _frozen_linears(model)
    if not (layers or head) or not _has_onednn():
        return {"layers": DEFAULT, "head": DEFAULT}
    kernels = _decision(layers, head, cache_folder)
    use_kernels(model, kernels)
    return kernels


def use_kernels(model: CausalLM, kernels: dict[str, str]) -> None:
    """Put these kernels under a model's frozen linear layers, as ``speed_up_linears`` returns them."""
    layers, head = _frozen_linears(model)
    chosen = (layers if kernels["layers"] == ONEDNN else []) + (head if kernels["head"] == ONEDNN else [])
    for name, module in list(model.named_modules()):
        if any(module is linear for linear in chosen):
            model.set_submodule(name, _onednn(module))


def _onednn(linear: nn.Linear) -> OneDNNLinear:
    """The same parameters in another layer."""
    fast = OneDNNLinear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    fast.weight, fast.bias = linear.weight, linear.bias
    return fast.train(linear.training)


def _frozen_linears(model: CausalLM) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Layers, and the LM head, that a kernel can be chosen for; quantised layers are of other classes."""
    head = model.get_output_embeddings()
    linears = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and not any(p.requires_grad for p in module.parameters())
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= LEAST_WEIGHTS
    ]
    return [m for m in linears if m is not head], [m for m in linears if m is head]


def _has_onednn() -> bool:
    """Whether the operator, which is no public part of torch, is there and does what we take it for."""
    x, weight = torch.eye(2, 3), torch.arange(12.0).view(4, 3)
    try:
        return torch.equal(onednn_linear(x, weight), functional.linear(x, weight))
    except (AttributeError, RuntimeError, TypeError):
        return False


# ---- the choice


def _decision(layers: list[nn.Linear], head: list[nn.Linear], cache_folder: Path | None) -> dict[str, str]:
    """What was chosen before for this machine and these shapes, or is chosen now."""
    about = {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "layers": sorted({tuple(m.weight.shape) for m in layers}),
        "head": sorted({tuple(m.weight.shape) for m in head}),
    }
    folder = cache_root(cache_folder) / "kernels"
    file = folder / f"{content_hash(about)[:16]}.json"
    log = logging.getLogger()
    try:
        kernels = _read(file)
        if kernels is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{file}.lock"):  # a run beside this one must decide alike
                kernels = _read(file) or _measured(file, layers, head, about)
    except OSError as error:
        log.warning(
            f"--fast_linears: nothing can be kept in {folder} ({error}), so torch's default products are used. "
            "Set RECBOLE_LLM_CACHE to a folder that can be written."
        )
        return {"layers": DEFAULT, "head": DEFAULT}
    log.info(f"Products with frozen weights: {kernels['layers']} in layers, {kernels['head']} in the LM head ({file}).")
    return kernels


def _measured(file: Path, layers: list[nn.Linear], head: list[nn.Linear], about: dict[str, Any]) -> dict[str, str]:
    """The faster kernels, kept in a file."""
    gains = {"layers": _gain(layers, MOST_OUTPUTS), "head": _gain(head, MOST_WORDS)}
    kernels = {kind: ONEDNN if gain >= LEAST_GAIN else DEFAULT for kind, gain in gains.items()}
    write_json(file, {"kernels": kernels, "gain": gains, **about})
    logging.getLogger().info(
        f"oneDNN against torch's default: {gains['layers']:.2f}x layers, {gains['head']:.2f}x head."
    )
    return kernels


def _read(file: Path) -> dict[str, str] | None:
    """A decision that was kept; None if there is none that can be read."""
    try:
        kernels = json.loads(file.read_text(encoding="utf-8"))["kernels"]
        known = {kind: kernels[kind] for kind in ("layers", "head")}
        return known if set(known.values()) <= {DEFAULT, ONEDNN} else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _gain(linears: Sequence[nn.Linear], most_outputs: int) -> float:
    """How many times faster oneDNN is, forward and backward, over one layer of each shape; 1 without a layer."""
    cut = [m.weight[:most_outputs, :MOST_INPUTS] for m in linears]
    by_shape = {tuple(weight.shape): weight for weight in cut}
    cases = [(_layers(weight.contiguous()), rows) for weight in by_shape.values() for rows in ROWS]
    fastest = torch.full((len(cases), 2), torch.inf)
    end = time.perf_counter() + SECONDS
    for round_ in count():
        if not cases or (round_ > LEAST_ROUNDS and time.perf_counter() > end):  # the first round warms up
            break
        for case, (pair, rows) in enumerate(cases):
            for kernel, layer in enumerate(pair):
                fastest[case, kernel] = min(fastest[case, kernel].item(), _seconds(layer, rows))
    default, onednn = fastest.sum(0).tolist()
    return default / onednn if cases else 1.0


def _layers(weight: torch.Tensor) -> tuple[nn.Linear, OneDNNLinear]:
    default = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    default.weight = nn.Parameter(weight, requires_grad=False)
    return default, _onednn(default)


@torch.enable_grad()
def _seconds(layer: nn.Linear, rows: int) -> float:
    x = torch.full((rows, layer.in_features), 0.01, requires_grad=True)
    start = time.perf_counter()
    y = layer(x)
    y.backward(y.detach())
    return time.perf_counter() - start
