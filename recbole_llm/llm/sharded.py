"""FSDP: a frozen LLM whose layers are spread over processes, so that one larger than a GPU can be used and tuned.

Each process keeps its part of every decoder layer; a layer is put together while it computes, forward and backward.
Embeddings, last norm, LM head and adapters are whole in each. A layer needs all processes at once, so all of them must
run the model equally often: those that have less to do run empty passes along (``even_passes``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from recbole_llm.distributed import anywhere
from recbole_llm.errors import UserError
from recbole_llm.llm.logps import batch_logps, decoder_and_head
from recbole_llm.llm.token_tree import TreeBuilder
from recbole_llm.processes import world_size


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """Spread a frozen model over the processes, layer by layer, and move what stays whole to the device.

    Args:
        model: on the CPU, so that no GPU ever holds more than its part and one layer.
        device: of this process.

    Raises:
        UserError: transformers does not say which modules are the model's layers.
    """
    decoder, _ = decoder_and_head(model)
    names = set(model._no_split_modules or ())
    layers = [module for module in decoder.modules() if type(module).__name__ in names]
    if not layers:
        raise UserError(f"--fsdp=True: transformers names no layers of a {type(model).__name__}; leave --fsdp out.")
    mesh = init_device_mesh(device.type, (world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    whole = {parameter for parameter in model.parameters() if not isinstance(parameter, DTensor)}
    fully_shard(decoder, mesh=mesh, ignored_params=whole)  # the root of all layers, which fetch ahead under it
    model.to(device)
    decoder.is_empty_pass = False
    # Before FSDP's own hook: all processes must talk in the same order.
    decoder.register_forward_pre_hook(_announce, prepend=True)


def _announce(decoder: torch.nn.Module, _: tuple[object, ...]) -> None:
    """Before each pass, tell those who are done that there is one more."""
    if not decoder.is_empty_pass:
        anywhere(True)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ``shard`` was applied."""
    return isinstance(decoder_and_head(model)[0], FSDPModule)


@contextmanager
def even_passes(model: torch.nn.Module) -> Iterator[None]:
    """Inside, processes may run a sharded model unequally often, each forward with its backward where gradients are on.

    Those that are done run a tree of two tokens along, whose loss is 0, until all are. Called by all of them.
    """
    try:
        yield
    except UserError:
        _finish(model)  # it will be told to the others, once they are done
        raise
    _finish(model)


def _finish(model: torch.nn.Module) -> None:
    if not is_sharded(model):
        return
    tree = TreeBuilder()
    tree.completion(tree.chain(tree.chain(-1, [0])[-1], [0]))
    built, (decoder, _) = tree.build(), decoder_and_head(model)
    while anywhere(False)[0]:
        decoder.is_empty_pass = True
        nothing = batch_logps(model, [built]).sum() * 0
        if nothing.requires_grad:
            nothing.backward()
        decoder.is_empty_pass = False
