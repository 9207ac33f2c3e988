"""From frozen text vectors to what a recommender adds to users and items: KAR's hybrid experts, or one small network.

Source: Xi et al., Towards open-world recommendation with knowledge augmentation from LLMs (KAR), RecSys 2024.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


class HybridExperts(nn.Module):
    """Experts that users and items share, and experts of each side, mixed by a gate of each side.

    Args:
        width_in: of text vectors, d.
        hidden, width_out: of an expert's two layers.
        shared, own: numbers of experts.
        sides: names of the sides, such as ``user`` and ``item``.
        dropout: of an expert's hidden units.
    """

    def __init__(
        self,
        width_in: int,
        hidden: int,
        width_out: int,
        *,
        shared: int,
        own: int,
        sides: tuple[str, ...],
        dropout: float,
    ) -> None:
        super().__init__()

        def experts(number: int) -> nn.ModuleList:
            return nn.ModuleList(small_network(width_in, hidden, width_out, dropout) for _ in range(number))

        self.shared = experts(shared)
        self.own = nn.ModuleDict({side: experts(own) for side in sides})
        self.gate = nn.ModuleDict({side: nn.Linear(width_in, shared + own) for side in sides})

    def forward(self, texts: Tensor, side: str) -> Tensor:
        """Text vectors ``[B, d]`` -> ``[B, width_out]``."""
        found = torch.stack([expert(texts) for expert in (*self.shared, *cast(nn.ModuleList, self.own[side]))], dim=1)
        share = self.gate[side](texts).softmax(-1)
        return (share[..., None] * found).sum(1)


class PlainAdaptor(nn.Module):
    """One small network a side; takes what ``HybridExperts`` takes, without experts."""

    def __init__(self, width_in: int, hidden: int, width_out: int, *, sides: tuple[str, ...], dropout: float) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({side: small_network(width_in, hidden, width_out, dropout) for side in sides})

    def forward(self, texts: Tensor, side: str) -> Tensor:
        """Text vectors ``[B, d]`` -> ``[B, width_out]``."""
        return self.networks[side](texts)


def small_network(width_in: int, hidden: int, width_out: int, dropout: float) -> nn.Sequential:
    """Two layers with a ReLU after each but, other than KAR's, none at the end: an output may be negative."""
    return nn.Sequential(nn.Linear(width_in, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width_out))
