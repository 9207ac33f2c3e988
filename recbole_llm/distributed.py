"""One run in several processes that torchrun started, each with a share of the work; in one process nothing changes.

Files are the first process's: it alone writes them, and what it reads of a run's state it tells the others. Whatever
decides what comes next (sums, scores, errors, a wish to stop) is gathered first, so all processes go the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from recbole_llm.errors import UserError
from recbole_llm.processes import rank, world_size

Result = TypeVar("Result")
Thing = TypeVar("Thing")

# For a process that waits: another may train a recommender, or wait for another run's stage. One that died is noticed
# at once, by its connection and by torchrun.
PATIENCE = timedelta(days=1)
TORCHRUN = "torchrun --nproc_per_node=<processes> -m recbole_llm run -m LLMRanker ..."


def is_first() -> bool:
    """Whether this process writes files, logs and shows progress."""
    return rank() == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Inside, the processes can talk to each other: by gloo, and about tensors on GPUs by NCCL."""
    if world_size() == 1 or dist.is_initialized():
        yield
        return
    with _told_when_lost():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    yield
    dist.destroy_process_group()  # not after an error: the others may be waiting for this one


# ---- GPUs


def visible_gpus() -> str:
    """``gpu_id`` of a machine's processes, where the user names none: those that are visible, or the first so many."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(_local("WORLD_SIZE"))))


def own_device(device: torch.device) -> torch.device:
    """The GPU of this process alone, or the CPU.

    Raises:
        UserError: the machine has more processes than GPUs.
    """
    if device.type != "cuda":
        return device
    if (found := torch.cuda.device_count()) < _local("WORLD_SIZE"):
        raise UserError(
            f"--nproc_per_node={_local('WORLD_SIZE')}: each process needs a GPU of its own, and {found} can be seen "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}). Start as many processes as GPUs, or set "
            "--gpu_id= to use the CPU."
        )
    own = torch.device("cuda", _local("RANK"))
    torch.cuda.set_device(own)
    return own


def _local(name: str) -> int:
    """torchrun's ``LOCAL_WORLD_SIZE`` and ``LOCAL_RANK``: of the processes on this machine."""
    return int(os.environ[f"LOCAL_{name}"])


# ---- agreement


def gathered(work: Callable[[], Result]) -> list[Result]:
    """What ``work`` gives in each process, by rank; called by all of them.

    Raises:
        UserError: in all processes, where it was raised in one.
    """
    if world_size() == 1:
        return [work()]
    mine, own_error = None, None
    try:
        mine = work()
    except UserError as error:
        own_error = error
    found: list[Any] = [None] * world_size()
    with _told_when_lost():
        dist.all_gather_object(found, (mine, own_error and str(own_error)))
    _raise_alike((told for _, told in found), own_error)
    return [value for value, _ in found]


def from_first(work: Callable[[], Result]) -> Result:
    """What ``work`` gives in the first process, where alone it is done; called by all of them, which wait for it.

    Raises:
        UserError: in all processes, where it was raised in the first.
    """
    if world_size() == 1:
        return work()
    told: list[Any] = [None, None]
    own_error = None
    if is_first():
        try:
            told[0] = work()
        except UserError as error:
            own_error, told[1] = error, str(error)
    with _told_when_lost():
        dist.broadcast_object_list(told, src=0)
    _raise_alike(told[1:], own_error)
    return told[0]


def _raise_alike(errors: Any, own: UserError | None) -> None:
    """The first of these texts as an error that every process raises."""
    for text in errors:
        if text is not None:
            error = UserError(text)
            error.known_to_all = True
            raise error from own


def anywhere(*flags: bool) -> list[bool]:
    """Which of these flags are set in some process; called by all of them."""
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    with _told_when_lost():
        dist.all_reduce(counts)
    return [count > 0 for count in counts.tolist()]


def same_everywhere(what: str, value: Callable[[], str]) -> None:
    """Make sure that the processes agree before they share work; in a single one nothing is computed.

    Raises:
        UserError: they do not.
    """
    found = gathered(value) if world_size() > 1 else []
    if len(set(found)) > 1:
        raise UserError(
            f"The processes of this run do not have the same {what} ({', '.join(v[:12] for v in found)}). Give all of "
            "them the same command, data, code and versions."
        )


@contextmanager
def _told_when_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's are of this kind
        raise UserError(
            f"Another process of this run has ended, or cannot be reached ({' '.join(str(error).split())[:200]}); why, "
            "it says itself, or torchrun does below. The same command goes on from the last save."
        ) from error


# ---- shares of work


def shares(sizes: Sequence[float], parts: int) -> list[list[int]]:
    """Numbers 0, 1, ... of things of these sizes in ``parts`` shares of about equal size, each share in order.

    The largest go first, each to the share that is smallest so far (Graham 1969: no share exceeds 4/3 of the best
    division's largest). A share may be empty.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    weights = [0.0] * parts
    for number in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        part = weights.index(min(weights))
        found[part].append(number)
        weights[part] += sizes[number]
    return [sorted(part) for part in found]


def own_share(things: Sequence[Thing], sizes: Sequence[float]) -> list[Thing]:
    """This process's share of what all of them have to do."""
    return [things[i] for i in shares(sizes, world_size())[rank()]]


def divided(
    things: Sequence[Thing], sizes: Sequence[float], work: Callable[[list[Thing]], list[Result]]
) -> list[Result]:
    """An answer for each thing, in their order, in every process; each does ``work`` on its share.

    Raises:
        UserError: in all processes, where it was raised in one.
    """
    parts = shares(sizes, world_size())
    found = gathered(lambda: work([things[i] for i in parts[rank()]]))
    answers = dict(zip(sum(parts, []), sum(found, []), strict=True))
    return [answers[i] for i in range(len(things))]


def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Add up the gradients of all processes, in place; a parameter that has none in any keeps none.

    One sum of one float32 vector, which has the same bits in every process. Nothing is done in a single one.
    """
    if world_size() == 1:
        return
    there = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([there, *(part.float().flatten() for part in parts)])
    with _told_when_lost():
        dist.all_reduce(flat)
    there, *sums = flat.split([len(parameters), *(p.numel() for p in parameters)])
    for parameter, processes, total in zip(parameters, there.tolist(), sums, strict=True):
        parameter.grad = total.view_as(parameter).to(parameter.dtype) if processes else None
