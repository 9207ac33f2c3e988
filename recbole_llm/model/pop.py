"""Pop: recommends what most training interactions are with; RecBole's, with a count that is one."""

from __future__ import annotations

import torch
from recbole.data.interaction import Interaction
from recbole.model.general_recommender.pop import Pop as RecBolePop


class Pop(RecBolePop):
    """RecBole's Pop adds one for all rows of a batch that hold the same item, so its ranking hangs on the batch size
    and the shuffle; here every training interaction counts."""

    def calculate_loss(self, interaction: Interaction) -> torch.Tensor:
        """Count a batch; the loss is none ``[1]``."""
        items = interaction[self.ITEM_ID]
        self.item_cnt += torch.bincount(items, minlength=self.n_items)[:, None]
        self.max_cnt = self.item_cnt.amax(0)
        return torch.zeros(1, device=self.device, requires_grad=True)
